//! How the comparison ends when it does not end well: it says during what, and leaves nothing running and no files.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::support::{Process, processes_that_know};

static DOING: Mutex<String> = Mutex::new(String::new());
static IS_INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What is done from now on; an error begins with it.
pub fn doing(what: &str) {
    what.clone_into(&mut DOING.lock().unwrap());
}

/// A panic is how a check fails here: makes it one line that says during what.
pub fn explain_panics() {
    std::panic::set_hook(Box::new(|info| {
        if IS_INTERRUPTED.load(Ordering::SeqCst) {
            return;
        }
        let doing = DOING.lock().map(|text| text.clone()).unwrap_or_default();
        let payload = info.payload();
        let what = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("panicked");
        let at = info.location().map(ToString::to_string).unwrap_or_default();
        eprintln!("error: {doing}: {what}\n   at: {at}");
    }));
}

/// From now on SIGINT, SIGTERM and SIGHUP end every process that knows `dir`, remove it and exit with 130.
pub fn clean_up_when_interrupted(dir: &Path) {
    let dir = dir.to_owned();
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).unwrap();
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            IS_INTERRUPTED.store(true, Ordering::SeqCst);
            end_processes(&dir);
            let _ = std::fs::remove_dir_all(&dir);
            eprintln!("interrupted");
            std::process::exit(130);
        }
    });
}

/// Never returns if a signal came: what follows is the signal's.
pub fn wait_if_interrupted() {
    while IS_INTERRUPTED.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// Ends every process that knows `dir`, and those that they start meanwhile.
pub fn end_processes(dir: &Path) {
    // While libvirtd lives what it notes of them is true.
    for process in libvirt_guests(dir).into_iter().filter_map(Process::open) {
        process.kill();
    }
    let end = Instant::now() + Duration::from_secs(10);
    let mut calm = 0;
    while calm < 3 && Instant::now() < end {
        let pids = processes_that_know(dir);
        calm = if pids.is_empty() { calm + 1 } else { 0 };
        for process in pids.into_iter().filter_map(Process::open) {
            process.kill();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The QEMUs of a libvirtd of ours: libvirt gives them nothing by which they know `dir`.
fn libvirt_guests(dir: &Path) -> Vec<u32> {
    let noted = std::fs::read_dir(dir.join("libvirt/run/libvirt/qemu"));
    let paths = noted.into_iter().flatten().flatten().map(|it| it.path());
    let notes = paths.filter(|path| path.extension().is_some_and(|it| it == "pid"));
    let pid = |path| std::fs::read_to_string(path).ok()?.trim().parse().ok();
    notes.filter_map(pid).collect()
}
