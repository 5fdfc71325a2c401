//! What a work costs: seconds, and the machine's CPU seconds.

use std::time::{Duration, Instant};

/// Ticks a second of the times in `/proc/stat`, on x86-64.
const TICKS_PER_SECOND: f64 = 100.0;

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    pub seconds: f64,
    /// Of all CPUs and all processes, without idle time, waiting for disks and time stolen by other machines.
    pub cpu_seconds: f64,
}

/// A running measurement.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
    cpu: f64,
}

impl Clock {
    pub fn start() -> Self {
        let cpu = machine_cpu_seconds();
        let start = Instant::now();
        Clock { start, cpu }
    }

    /// What it cost until now.
    pub fn stop(&self) -> Cost {
        self.stop_at(Instant::now())
    }

    /// As [`Clock::stop`]; the time ended at `end`, the CPU's work now.
    pub fn stop_at(&self, end: Instant) -> Cost {
        Cost {
            seconds: (end - self.start).as_secs_f64(),
            cpu_seconds: machine_cpu_seconds() - self.cpu,
        }
    }
}

/// How many CPUs other work keeps busy just now, as seen in two seconds.
pub fn busy_cpus() -> f64 {
    let clock = Clock::start();
    std::thread::sleep(Duration::from_secs(2));
    let cost = clock.stop();
    cost.cpu_seconds / cost.seconds
}

/// user + nice + system + irq + softirq of `/proc/stat`.
fn machine_cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap();
    let fields: Vec<f64> = text
        .lines()
        .next()
        .unwrap()
        .split_whitespace()
        .skip(1)
        .map(|field| field.parse().unwrap())
        .collect();
    [0, 1, 2, 5, 6]
        .map(|field: usize| fields[field])
        .iter()
        .sum::<f64>()
        / TICKS_PER_SECOND
}
