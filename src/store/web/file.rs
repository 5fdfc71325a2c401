//! One file of a web server.

use ureq::http::Method;

use super::client::{Client, server_of};
use super::error::{WebError, Words};
use super::ranged::{Origin, RangedFile, Version};

/// Opens `http://…` or `https://…`.
///
/// # Errors
/// [`WebError`].
pub fn open_web(url: &str) -> Result<RangedFile, WebError> {
    let parsed = url::Url::parse(url).map_err(|error| WebError::Setting {
        what: url.to_owned(),
        why: error.to_string(),
    })?;
    RangedFile::open(Box::new(WebOrigin {
        there: without_password(parsed.clone()),
        url: parsed.into(),
        client: Client::new(true),
    }))
}

/// The address as it may be shown.
fn without_password(mut url: url::Url) -> String {
    if url.password().is_some() {
        let _ = url.set_password(None);
    }
    url.into()
}

#[derive(Debug)]
struct WebOrigin {
    there: String,
    url: String,
    client: Client,
}

impl Origin for WebOrigin {
    fn there(&self) -> &str {
        &self.there
    }

    fn url(&self, _method: &Method) -> String {
        self.url.clone()
    }

    /// Of another version the server sends all, with that one's ETag.
    fn condition(&self, version: &Version) -> Option<(&'static str, String)> {
        let validator = version.strong_etag().or(version.modified.as_deref())?;
        Some(("if-range", validator.to_owned()))
    }

    fn refusal(&self, status: u16, _text: &str) -> WebError {
        let server = server_of(&self.url);
        let there = self.there.clone();
        let words = Words::default();
        match status {
            404 | 410 => WebError::Missing { there, words },
            401 | 403 | 407 => WebError::Denied {
                server,
                there,
                words: Words {
                    message: Some(format!("its status is {status}")),
                    ..words
                },
            },
            _ => WebError::Status {
                server,
                status,
                words,
            },
        }
    }

    fn client(&self) -> &Client {
        &self.client
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_not_shown() {
        let url = url::Url::parse("https://me:secret@host/x.stow?a=b").unwrap();
        assert_eq!(without_password(url), "https://me@host/x.stow?a=b");
    }
}
