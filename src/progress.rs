//! How a long act tells how far it is, and learns that it shall stop.
//!
//! The library never prints. A story calls a [`Progress`]; the program draws a bar from it, a test counts with it.

/// Told about phases and bytes; asked whether to go on. Called from any thread, often: it must be cheap.
pub trait Progress: Send + Sync {
    /// A phase begins. `total` is its size in bytes of guest data, where it is known beforehand.
    fn begin(&self, phase: &str, total: Option<u64>) {
        let _ = (phase, total);
    }

    /// `bytes` more of the running phase are done.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }

    /// The running phase is over.
    fn end(&self) {}

    /// Something the user should read although nothing failed.
    fn warn(&self, text: &str) {
        let _ = text;
    }

    /// Whether the user asked to stop. Long acts look at least ten times a second.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Says nothing and never cancels.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}
