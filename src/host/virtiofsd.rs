//! Which words a virtiofsd takes: there are two programs of that name.
//!
//! The one in C came with QEMU up to 7.2 (Debian 12: `/usr/lib/qemu/virtiofsd`) and takes `-o source=DIR`; the one in Rust,
//! which took its place, takes `--shared-dir=DIR`. What their help says tells them apart.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionbio;

/// How long a program may take to say how it is used.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest help that is read.
const MOST_BYTES: u64 = 1 << 16;

/// Whether the program takes its options as the one in C did. `false` if it does not say.
pub fn is_virtiofsd_in_c(program: &Path) -> bool {
    let mut command = Command::new(program);
    command.arg("--help").stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else {
        return false;
    };
    let since = Instant::now();
    while matches!(child.try_wait(), Ok(None)) && since.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = child.kill();
    let _ = child.wait();
    let mut help = Vec::new();
    if let Some(said) = child.stdout.take() {
        // What it said is in the pipe, which a child of its own may hold open.
        let _ = ioctl_fionbio(&said, true);
        let _ = said.take(MOST_BYTES).read_to_end(&mut help);
    }
    String::from_utf8_lossy(&help).contains("-o source=")
}
