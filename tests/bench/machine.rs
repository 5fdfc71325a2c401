//! What the numbers were measured on.

use std::process::Command;

use crate::support::Qemu;

/// The lines above the table.
pub fn describe() -> Vec<String> {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown CPU", |(_, model)| model);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    vec![
        format!(
            "{}, {model}, {cores} cores, Linux {}",
            jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC"),
            kernel.trim()
        ),
        format!(
            "{}; libvirt {}; {}; {}",
            first_line(Command::new(Qemu::V10.program()).arg("--version")),
            first_line(Command::new("virsh").arg("--version")),
            first_line(Command::new("zstd").arg("--version")),
            first_line(Command::new("openssl").arg("version")),
        ),
        format!("`cargo bench --bench compare -- {}`", arguments.join(" ")),
    ]
}

fn first_line(command: &mut Command) -> String {
    let output = command
        .output()
        .map(|output| output.stdout)
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&output);
    text.lines()
        .next()
        .unwrap_or("unknown")
        .trim_matches(['*', ' '])
        .to_owned()
}
