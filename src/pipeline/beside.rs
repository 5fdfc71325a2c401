//! Work of the stories that goes on at the same time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Does `aside` on a thread of its own while `work` goes on here, and waits for both; `None` if that thread died.
pub fn beside<A, B: Send>(
    work: impl FnOnce() -> A,
    aside: impl FnOnce() -> B + Send,
) -> (A, Option<B>) {
    thread::scope(|scope| {
        let aside = scope.spawn(aside);
        let done = work();
        (done, aside.join().ok())
    })
}

/// Does `work` for each number below `count`, up to `at_once` of them at a time. What one gave is in its place; `None`
/// if its thread died.
pub fn side_by_side<T: Send>(
    count: usize,
    at_once: usize,
    work: &(dyn Fn(usize) -> T + Sync),
) -> Vec<Option<T>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(count));
    let take = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return;
            }
            let result = work(number);
            if let Ok(mut done) = done.lock() {
                done.push((number, result));
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once.clamp(1, count.max(1)))
            .map(|_| scope.spawn(take))
            .collect();
        for worker in workers {
            let _ = worker.join();
        }
    });
    let mut results: Vec<Option<T>> = (0..count).map(|_| None).collect();
    for (number, result) in done.into_inner().unwrap_or_default() {
        if let Some(place) = results.get_mut(number) {
            *place = Some(result);
        }
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_stand_in_order_however_many_work_at_once() {
        for at_once in [0, 1, 3, 99] {
            let squares = side_by_side(10, at_once, &|number| number * number);
            let expected: Vec<_> = (0..10).map(|number| Some(number * number)).collect();
            assert_eq!(squares, expected);
        }
        assert!(side_by_side(0, 2, &|number| number).is_empty());
    }
}
