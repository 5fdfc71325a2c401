//! Waiting for something to become true, with an end.

use std::time::{Duration, Instant};

/// How long anything may take before a test gives up; a busy machine with software emulation is slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks `probe` every 10 ms until it answers, and fails the test with `what` if it never does.
#[track_caller]
pub fn wait_until<T>(
    what: &str,
    patience: Duration,
    mut probe: impl FnMut() -> Result<T, String>,
) -> T {
    let end = Instant::now() + patience;
    loop {
        match probe() {
            Ok(found) => return found,
            Err(seen) if Instant::now() >= end => panic!("waited {patience:?} for {what}; {seen}"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}
