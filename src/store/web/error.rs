//! What can go wrong with a server that is spoken to by HTTP: one of the web, or an object store.

use crate::error::{Blame, ErrorKind};

/// What can go wrong with files of the web and objects of an object store. Whoever reads one may need it several times, so it is
/// cheap to clone.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WebError {
    /// No server answers.
    #[error("cannot reach {server}")]
    Unreachable {
        /// Its address.
        server: String,
        /// What the system or TLS said.
        why: String,
    },
    /// The connection broke, and again when it was made anew.
    #[error("the connection to {server} broke")]
    Broken {
        /// Its address.
        server: String,
        /// What the system said.
        why: String,
    },
    /// There is nothing of that name.
    #[error("there is no {there}")]
    Missing {
        /// The location.
        there: String,
        /// The server's words.
        words: Words,
    },
    /// There is no such bucket.
    #[error("there is no bucket {bucket} at {server}")]
    NoBucket {
        /// Its name.
        bucket: String,
        /// Who was asked.
        server: String,
    },
    /// The bucket lies elsewhere.
    #[error("the bucket {bucket} is not in the region {asked}")]
    OtherRegion {
        /// Its name.
        bucket: String,
        /// Where it was looked for.
        asked: String,
        /// Where it is, if the server says so.
        region: Option<String>,
    },
    /// The server does not let us.
    #[error("{server} does not give access to {there}")]
    Denied {
        /// Who was asked.
        server: String,
        /// The location.
        there: String,
        /// The server's words.
        words: Words,
    },
    /// Nothing tells with which keys to sign.
    #[error("there are no credentials for {there}")]
    NoCredentials {
        /// The location.
        there: String,
        /// The profile of the AWS configuration files that was looked at.
        profile: String,
    },
    /// The environment or one of the AWS configuration files says something that cannot be.
    #[error("{what} cannot be used")]
    Setting {
        /// The variable, or the file and what of it.
        what: String,
        /// The reason.
        why: String,
    },
    /// It is gone since it was opened.
    #[error("{there} vanished while it was being read")]
    Vanished {
        /// The location.
        there: String,
    },
    /// Something else took its place since it was opened.
    #[error("{there} changed while it was being read")]
    Changed {
        /// The location.
        there: String,
        /// What differs, with both values.
        how: String,
    },
    /// The server gives whole files only.
    #[error("the server of {there} gives whole files only")]
    NoRanges {
        /// The location.
        there: String,
    },
    /// Something of that name is there already.
    #[error("{there} exists")]
    Exists {
        /// The location.
        there: String,
    },
    /// It does not fit into an upload that takes bounded memory.
    #[error("an object of {len} bytes is too large to be uploaded")]
    TooLarge {
        /// Its length.
        len: u64,
        /// The most that can be.
        limit: u64,
    },
    /// An upload was ended or completed by somebody else.
    #[error("the upload to {there} was ended by somebody else")]
    UploadEnded {
        /// The location.
        there: String,
    },
    /// The server refused, or failed.
    #[error("{server} answered with the status {status}")]
    Status {
        /// Who.
        server: String,
        /// Its answer.
        status: u16,
        /// Its words.
        words: Words,
    },
    /// The server's answer makes no sense.
    #[error("{server} gave an answer that cannot be: {what}")]
    Nonsense {
        /// Who.
        server: String,
        /// What of it.
        what: String,
    },
}

/// What a server says of an error: an object store gives a code and a message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Words {
    /// `AccessDenied`, …
    pub code: Option<String>,
    /// For people.
    pub message: Option<String>,
}

impl Words {
    /// Whether the code is one of these.
    pub fn say(&self, codes: &[&str]) -> bool {
        self.code
            .as_deref()
            .is_some_and(|code| codes.contains(&code))
    }

    /// Both in one line.
    fn line(&self) -> Option<String> {
        match (&self.code, &self.message) {
            (Some(code), Some(message)) => Some(format!("{code}: {message}")),
            (one, other) => one.as_ref().or(other.as_ref()).cloned(),
        }
    }
}

impl Blame for WebError {
    fn kind(&self) -> ErrorKind {
        match self {
            WebError::Exists { .. } | WebError::TooLarge { .. } => ErrorKind::Usage,
            WebError::NoCredentials { .. } | WebError::Setting { .. } => ErrorKind::Usage,
            _ => ErrorKind::Remote,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            WebError::Unreachable { why, .. } | WebError::Broken { why, .. } => vec![why.clone()],
            WebError::Setting { why, .. } => vec![why.clone()],
            WebError::Changed { how, .. } => vec![how.clone()],
            WebError::Missing { words, .. }
            | WebError::Denied { words, .. }
            | WebError::Status { words, .. } => words.line().into_iter().collect(),
            WebError::OtherRegion {
                region: Some(region),
                ..
            } => vec![format!("it is in {region}")],
            WebError::NoCredentials { profile, .. } => vec![format!(
                "AWS_ACCESS_KEY_ID is not set, and the AWS configuration files give no keys for the profile {profile:?}"
            )],
            WebError::TooLarge { limit, .. } => vec![format!("the most is {limit} bytes")],
            _ => Vec::new(),
        }
    }
}
