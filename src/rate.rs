//! A rate of bytes that several threads keep to together.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The longest sleep of a thread that keeps to a rate: so soon it hears that it is over.
const NAP: Duration = Duration::from_millis(50);

/// How many bytes may go a second, from its making on.
#[derive(Debug)]
pub struct RateLimit {
    begin: Instant,
    gone: AtomicU64,
    bytes_per_second: Option<u64>,
}

impl RateLimit {
    /// From now on; `None` is no limit.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        RateLimit {
            begin: Instant::now(),
            gone: AtomicU64::new(0),
            bytes_per_second,
        }
    }

    /// The limit, if there is one.
    pub fn bytes_per_second(&self) -> Option<u64> {
        self.bytes_per_second
    }

    /// Waits until `len` bytes more may go, or it is over.
    pub fn wait_for(&self, len: usize, is_over: &dyn Fn() -> bool) {
        let before = self.gone.fetch_add(len as u64, Ordering::Relaxed);
        let Some(rate) = self.bytes_per_second else {
            return;
        };
        let due = u128::from(before) * 1_000_000 / u128::from(rate.max(1));
        while !is_over() {
            let left = due.saturating_sub(self.begin.elapsed().as_micros());
            if left == 0 {
                return;
            }
            let left = Duration::from_micros(u64::try_from(left).unwrap_or(u64::MAX));
            thread::sleep(left.min(NAP));
        }
    }

    /// Counts bytes that went already: nobody knew before how many they would be.
    pub fn count(&self, len: usize) {
        self.gone.fetch_add(len as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_already_is_waited_for_unless_it_is_over() {
        let limit = RateLimit::new(Some(1000));
        let begin = Instant::now();
        limit.wait_for(100, &|| false);
        limit.count(100);
        limit.wait_for(1 << 30, &|| false);
        assert!(begin.elapsed() >= Duration::from_millis(200));
        limit.wait_for(1, &|| true);
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
}
