//! What went wrong and who is to blame.
//!
//! Every module has its own error enum whose variants carry facts. [`Error`] carries any of them up to the caller;
//! [`ErrorKind`] decides the program's exit code. The words a person reads are made in `cli`.

use std::fmt;

/// Who is to blame; the program's exit code follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// It failed, and none of the more precise kinds fits.
    Failed,
    /// The request itself makes no sense.
    Usage,
    /// The image is damaged, incomplete or not an image.
    Image,
    /// This host, its QEMU or a resource that changed.
    Host,
    /// The other end of a connection.
    Remote,
    /// The image is not trusted to name resources of this host.
    Trust,
    /// The user interrupted; everything was put back.
    Interrupted,
}

impl ErrorKind {
    /// The exit code of the program: 1 to 6, or 130.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorKind::Failed => 1,
            ErrorKind::Usage => 2,
            ErrorKind::Image => 3,
            ErrorKind::Host => 4,
            ErrorKind::Remote => 5,
            ErrorKind::Trust => 6,
            ErrorKind::Interrupted => 130,
        }
    }
}

/// An error that knows who is to blame and, where there is such a thing, at which place it happened.
///
/// `Display` is one sentence without an end stop; the cause is [`std::error::Error::source`], never repeated in it.
pub trait Blame: std::error::Error + Send + Sync + 'static {
    /// Who is to blame.
    fn kind(&self) -> ErrorKind;

    /// The place: a file offset, a stream offset, a path. `None` where the sentence says it all.
    fn at(&self) -> Option<String> {
        None
    }

    /// What else there is to know, a line each: QEMU's own words, every reason of a refusal.
    fn facts(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Any error of this library.
pub struct Error(Box<dyn Blame>);

/// The result of everything that can fail at the level of a story.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Who is to blame.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind()
    }

    /// The place, if there is one.
    pub fn at(&self) -> Option<String> {
        self.0.at()
    }

    /// What else there is to know, a line each.
    pub fn facts(&self) -> Vec<String> {
        self.0.facts()
    }

    /// The causes, nearest first.
    pub fn causes(&self) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
        std::iter::successors(self.0.source(), |cause| cause.source())
    }

    /// The module's own error, if it is a `T`.
    pub fn downcast_ref<T: Blame>(&self) -> Option<&T> {
        let inner: &(dyn std::error::Error + 'static) = &*self.0;
        inner.downcast_ref()
    }
}

impl<E: Blame> From<E> for Error {
    fn from(error: E) -> Self {
        Error(Box::new(error))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error, PartialEq)]
    #[error("it broke")]
    struct Broke;

    impl Blame for Broke {
        fn kind(&self) -> ErrorKind {
            ErrorKind::Image
        }
    }

    #[test]
    fn an_error_keeps_its_kind_and_its_own_type() {
        let error = Error::from(Broke);
        assert_eq!(error.kind().exit_code(), 3);
        assert_eq!(error.to_string(), "it broke");
        assert_eq!(error.downcast_ref::<Broke>(), Some(&Broke));
    }
}
