//! What is done with a registry: manifests and blobs are looked for, fetched and sent.
//!
//! Source: the OCI distribution specification 1.1, *Pull* and *Push*.

use std::io::{self, Read};

use ureq::http::Response;
use ureq::http::header::{
    ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE,
};
use ureq::{Body, RequestBuilder, SendBody};

use super::RegistryError;
use super::manifest::{MANIFEST_TYPE, blob_name};
use super::request::{BodyError, Requests, TRIES, wait, words};
use crate::digest::Digest;
use crate::store::{Location, RegistryLocation};

/// What a tag may lead to; only the first is ours, the others are to be named.
const ACCEPTED: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// A registry takes no larger manifests; the usual limit is 4 MiB.
const MAX_MANIFEST_LEN: u64 = 8 << 20;

/// An artifact's place in a registry. Any thread may ask.
#[derive(Debug)]
pub struct Registry {
    requests: Requests,
    tag: String,
    there: String,
}

impl Registry {
    /// To read from there.
    ///
    /// # Errors
    /// [`RegistryError::Unreachable`]; [`RegistryError::NoRegistry`].
    pub fn to_read(there: &RegistryLocation) -> Result<Self, RegistryError> {
        Self::to(there, "pull")
    }

    /// To write there.
    ///
    /// # Errors
    /// As [`Registry::to_read`].
    pub fn to_write(there: &RegistryLocation) -> Result<Self, RegistryError> {
        Self::to(there, "pull,push")
    }

    fn to(there: &RegistryLocation, actions: &'static str) -> Result<Self, RegistryError> {
        Ok(Registry {
            requests: Requests::to(there, actions)?,
            tag: there.tag.clone(),
            there: Location::Registry(there.clone()).to_string(),
        })
    }

    /// The location.
    pub fn there(&self) -> &str {
        &self.there
    }

    /// Whether something has the tag.
    ///
    /// # Errors
    /// What the registry says; [`RegistryError::Unreachable`].
    pub fn has_tag(&self) -> Result<bool, RegistryError> {
        let address = self.requests.address(&format!("manifests/{}", self.tag));
        let response = self.requests.call(TRIES, &mut |agent, header| {
            as_us(agent.head(&address), header)
                .header(ACCEPT, ACCEPTED)
                .call()
        })?;
        self.is_there("look for a tag", response)
    }

    /// Whether the repository has the blob.
    ///
    /// # Errors
    /// As [`Registry::has_tag`].
    pub fn has_blob(&self, digest: &Digest) -> Result<bool, RegistryError> {
        let address = self.blob(digest);
        let response = self.requests.call(TRIES, &mut |agent, header| {
            as_us(agent.head(&address), header).call()
        })?;
        self.is_there("look for a blob", response)
    }

    fn is_there(&self, act: &'static str, response: Response<Body>) -> Result<bool, RegistryError> {
        match response.status().as_u16() {
            200 => Ok(true),
            404 => Ok(false),
            _ => Err(self.requests.refused(act, response)),
        }
    }

    /// The manifest that has the tag.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`]; else as [`Registry::has_tag`].
    pub fn manifest(&self) -> Result<Vec<u8>, RegistryError> {
        let address = self.requests.address(&format!("manifests/{}", self.tag));
        let mut response = self.requests.call(TRIES, &mut |agent, header| {
            as_us(agent.get(&address), header)
                .header(ACCEPT, ACCEPTED)
                .call()
        })?;
        match response.status().as_u16() {
            200 => {}
            404 => {
                return Err(RegistryError::NotFound {
                    there: self.there.clone(),
                    words: words(response),
                });
            }
            _ => return Err(self.requests.refused("give a manifest", response)),
        }
        let limited = response.body_mut().with_config().limit(MAX_MANIFEST_LEN);
        limited.read_to_vec().map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => RegistryError::BadManifest {
                there: self.there.clone(),
                what: format!("it is longer than {MAX_MANIFEST_LEN} bytes"),
            },
            error => self.requests.failed(&error),
        })
    }

    /// Fills `buf` with the bytes at `offset` of a blob.
    ///
    /// # Errors
    /// [`RegistryError::Gone`]; [`RegistryError::OtherBytes`]; else as [`Registry::has_tag`].
    pub fn read_blob(
        &self,
        digest: &Digest,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), RegistryError> {
        let Some(last) = (buf.len() as u64).checked_sub(1) else {
            return Ok(());
        };
        let range = format!("bytes={offset}-{}", offset.saturating_add(last));
        let address = self.blob(digest);
        let mut failures = 0;
        loop {
            let response = self.requests.call(TRIES, &mut |agent, header| {
                as_us(agent.get(&address), header)
                    .header(RANGE, &range)
                    .call()
            })?;
            let body = self.ranged(digest, offset, buf.len(), response)?;
            match fill(body, buf) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    let error = ureq::Error::Io(error);
                    if failures == TRIES || !self.requests.may_pass(&error) {
                        return Err(self.requests.failed(&error));
                    }
                }
            }
            wait(failures);
            failures += 1;
        }
    }

    /// What follows the headers of an answer to a request for a range, once these agree with the request: the bytes, and how many
    /// come before them.
    fn ranged(
        &self,
        digest: &Digest,
        offset: u64,
        len: usize,
        response: Response<Body>,
    ) -> Result<(u64, Body), RegistryError> {
        let header = |name| response.headers().get(name).and_then(|it| it.to_str().ok());
        let other = |what: String| RegistryError::OtherBytes {
            registry: self.requests.registry().to_owned(),
            what,
        };
        match response.status().as_u16() {
            206 => {
                let expected = format!("bytes {offset}-{}/", offset + len as u64 - 1);
                let found = header(CONTENT_RANGE).unwrap_or("no range");
                if !found.starts_with(&expected) {
                    let found = found.escape_debug();
                    return Err(other(format!("of blob {digest} {found}, for {expected}…")));
                }
                Ok((0, response.into_body()))
            }
            // One that knows no ranges sends all of it.
            200 => {
                let found = response.body().content_length().unwrap_or(u64::MAX);
                match found >= offset.saturating_add(len as u64) {
                    true => Ok((offset, response.into_body())),
                    false => Err(other(format!("of blob {digest} only {found} bytes"))),
                }
            }
            404 => Err(RegistryError::Gone {
                there: self.there.clone(),
                digest: blob_name(digest),
            }),
            416 => Err(other(format!("blob {digest} ends before offset {offset}"))),
            _ => Err(self.requests.refused("give a part of a blob", response)),
        }
    }

    /// Sends a blob of `len` bytes that `body` gives, each time anew if it has to be sent again.
    ///
    /// # Errors
    /// [`RegistryError::Source`] if the body fails; else as [`Registry::has_tag`].
    pub fn put_blob<'b>(
        &self,
        digest: &Digest,
        len: u64,
        body: &dyn Fn() -> Box<dyn Read + 'b>,
    ) -> Result<(), RegistryError> {
        let mut failures = 0;
        loop {
            match self.send_blob(digest, len, body) {
                Err(RegistryError::Unreachable { .. }) if failures < TRIES => {}
                Err(RegistryError::Refused { status, .. })
                    if failures < TRIES && is_passing(status) => {}
                other => return other,
            }
            wait(failures);
            failures += 1;
            // What failed may have been the answer alone.
            if self.has_blob(digest)? {
                return Ok(());
            }
        }
    }

    fn send_blob<'b>(
        &self,
        digest: &Digest,
        len: u64,
        body: &dyn Fn() -> Box<dyn Read + 'b>,
    ) -> Result<(), RegistryError> {
        const ACT: &str = "take a blob";
        let address = self.requests.address("blobs/uploads/");
        let begun = self.requests.call(TRIES, &mut |agent, header| {
            as_us(agent.post(&address), header).send_empty()
        })?;
        if begun.status().as_u16() != 202 {
            return Err(self.requests.refused(ACT, begun));
        }
        let location = begun
            .headers()
            .get(LOCATION)
            .and_then(|it| it.to_str().ok());
        let Some(location) = location.map(|location| self.requests.address_of(location)) else {
            return Err(self.requests.refused(ACT, begun));
        };
        let joint = if location.contains('?') { '&' } else { '?' };
        let address = format!("{location}{joint}digest={}", blob_name(digest));
        let sent = self.requests.call(0, &mut |agent, header| {
            let mut body = Marked(body());
            let header = header.filter(|_| self.requests.is_ours(&address));
            as_us(agent.put(&address), header)
                .header(CONTENT_TYPE, "application/octet-stream")
                .header(CONTENT_LENGTH, len)
                .send(SendBody::from_reader(&mut body))
        })?;
        match sent.status().as_u16() {
            201 => Ok(()),
            _ => Err(self.requests.refused(ACT, sent)),
        }
    }

    /// Gives the tag to a manifest.
    ///
    /// # Errors
    /// As [`Registry::has_tag`].
    pub fn put_manifest(&self, json: &[u8]) -> Result<(), RegistryError> {
        let address = self.requests.address(&format!("manifests/{}", self.tag));
        let sent = self.requests.call(TRIES, &mut |agent, header| {
            let request = as_us(agent.put(&address), header);
            request.header(CONTENT_TYPE, MANIFEST_TYPE).send(json)
        })?;
        match sent.status().as_u16() {
            200..=204 => Ok(()),
            _ => Err(self.requests.refused("take a manifest", sent)),
        }
    }

    /// `HOST[:PORT]`, as it was named.
    pub fn registry(&self) -> &str {
        self.requests.registry()
    }

    fn blob(&self, digest: &Digest) -> String {
        self.requests
            .address(&format!("blobs/{}", blob_name(digest)))
    }
}

/// A body whose errors are known to be its own.
struct Marked<'b>(Box<dyn Read + 'b>);

impl Read for Marked<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0
            .read(buf)
            .map_err(|error| io::Error::other(BodyError(error.to_string())))
    }
}

/// Says who we are.
fn as_us<B>(request: RequestBuilder<B>, header: Option<&str>) -> RequestBuilder<B> {
    match header {
        Some(header) => request.header(AUTHORIZATION, header),
        None => request,
    }
}

fn is_passing(status: u16) -> bool {
    matches!(status, 429 | 500 | 502..=504)
}

/// Reads past what comes before, then fills `buf`.
fn fill((before, body): (u64, Body), buf: &mut [u8]) -> io::Result<()> {
    let mut reader = body.into_reader();
    io::copy(&mut reader.by_ref().take(before), &mut io::sink())?;
    reader.read_exact(buf)
}
