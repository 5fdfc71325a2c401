//! An object in the making: parts that appear together when the upload is completed, and not before.
//!
//! An upload outlives who began it. Its parts can be listed, so another one can go on with it. To the store, a part has the
//! MD5 of its bytes for an ETag where objects are not encrypted with keys of the customer's.

use std::cell::Cell;
use std::io::Read;
use std::time::Duration;

use base64::Engine as _;
use md5::{Digest as _, Md5};
use ureq::http::Method;

use super::answer::{Element, completion, error_words};
use super::bucket::{Bucket, Request};
use crate::store::web::{Answer, Fault, WebError, persist};

/// The least that a part may hold, the last one excepted.
pub const MIN_PART_LEN: u64 = 5 << 20;

/// The most parts of an upload.
pub const MOST_PARTS: u64 = 10_000;

/// The most pages of a listing that are read.
const MOST_PAGES: usize = 100;

/// How long a store may take to make one object of all parts.
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(900);

/// An upload that has begun and has not ended.
#[derive(Debug, Clone, Copy)]
pub struct Upload<'a> {
    bucket: &'a Bucket,
    id: &'a str,
}

/// A part that the store has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// From 1.
    pub number: u32,
    /// Its length.
    pub len: u64,
    /// Its ETag, without quotes; not all stores list it.
    pub etag: Option<String>,
}

/// What a key names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its length.
    pub len: u64,
    /// Its ETag and when it was made, as the store has them: another object has others.
    version: [Option<String>; 2],
}

impl Object {
    fn of(answer: &Answer, len: Option<u64>) -> Self {
        let version = ["etag", "last-modified"];
        Object {
            len: len.unwrap_or(0),
            version: version.map(|name| answer.header(name).map(str::to_owned)),
        }
    }
}

impl Bucket {
    /// The object; `None` if there is none.
    ///
    /// # Errors
    /// [`WebError`].
    pub fn object(&self) -> Result<Option<Object>, WebError> {
        let head = || self.ask(Method::HEAD, Request::default());
        match persist(false, &|| false, head) {
            Ok(answer) => Ok(Some(Object::of(&answer, answer.number("content-length")))),
            // What is missing here may be the bucket; whoever writes next hears of it.
            Err(WebError::Missing { .. }) => Ok(None),
            // Without words, for HEAD has none. What may write need not read.
            Err(WebError::Denied { .. }) => self.object_by_get(),
            Err(error) => Err(error),
        }
    }

    fn object_by_get(&self) -> Result<Option<Object>, WebError> {
        let headers = [("range", "bytes=0-0".to_owned())];
        let get = || {
            self.ask(
                Method::GET,
                Request {
                    headers: &headers,
                    ..Request::default()
                },
            )
        };
        match persist(true, &|| false, get) {
            Ok(answer) => {
                let total = answer.header("content-range").and_then(|range| {
                    let (_, total) = range.rsplit_once('/')?;
                    total.parse().ok()
                });
                Ok(Some(Object::of(&answer, total)))
            }
            Err(WebError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Begins an upload; gives its id.
    ///
    /// # Errors
    /// [`WebError`].
    pub fn begin(&self) -> Result<String, WebError> {
        let root = self.xml(Method::POST, &[("uploads", "")], false, true)?;
        let id = root.text_of("UploadId").map(str::to_owned);
        id.ok_or_else(|| self.nonsense("an upload without an id"))
    }

    /// The ids of all uploads of this key that have not ended, the newest first; `None` if the store does not list them.
    ///
    /// # Errors
    /// [`WebError`].
    pub fn uploads(&self) -> Result<Option<Vec<String>>, WebError> {
        let (mut key_marker, mut id_marker) = (String::new(), String::new());
        let mut found: Vec<(String, String)> = Vec::new();
        for _ in 0..MOST_PAGES {
            let query = [
                ("key-marker", key_marker.as_str()),
                ("prefix", self.key()),
                ("upload-id-marker", id_marker.as_str()),
                ("uploads", ""),
            ];
            // Empty markers are none, and not all stores take them.
            let is_first = key_marker.is_empty();
            let query: Vec<_> = query
                .into_iter()
                .filter(|(name, _)| !(is_first && name.ends_with("marker")))
                .collect();
            let root = match self.xml(Method::GET, &query, true, false) {
                Ok(root) => root,
                Err(WebError::Status {
                    status: 400 | 405 | 501,
                    ..
                }) => return Ok(None),
                // Where there is none, some say so with an error.
                Err(WebError::UploadEnded { .. }) => break,
                // Writing may be allowed where listing is not.
                Err(WebError::Denied { words, .. }) if words.say(&["AccessDenied"]) => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            };
            for upload in root.all("Upload") {
                if upload.text_of("Key") == Some(self.key()) {
                    let own = |name| upload.text_of(name).unwrap_or_default().to_owned();
                    found.push((own("Initiated"), own("UploadId")));
                }
            }
            let next = root.text_of("NextKeyMarker").unwrap_or_default();
            if root.text_of("IsTruncated") != Some("true") || next.is_empty() {
                break;
            }
            key_marker = next.to_owned();
            id_marker = root
                .text_of("NextUploadIdMarker")
                .unwrap_or_default()
                .to_owned();
        }
        found.sort();
        let ids = found.into_iter().rev().map(|(_, id)| id);
        Ok(Some(ids.filter(|id| !id.is_empty()).collect()))
    }

    /// Asks for something whose answer is XML.
    fn xml(
        &self,
        method: Method,
        query: &[(&str, &str)],
        is_about_bucket: bool,
        is_first: bool,
    ) -> Result<Element, WebError> {
        persist(!is_first, &|| false, || {
            let mut nothing = std::io::empty();
            let has_body = method == Method::POST;
            let request = Request {
                query,
                is_about_bucket,
                body: has_body.then_some((&mut nothing, 0)),
                ..Request::default()
            };
            let answer = self.ask(method.clone(), request)?;
            self.document(answer)
        })
    }

    /// The XML in an answer. An error may come with a status that is none.
    fn document(&self, answer: Answer) -> Result<Element, Fault> {
        let text = answer.text().map_err(|error| {
            Fault::Passing(WebError::Broken {
                server: self.server(),
                why: error.to_string(),
            })
        })?;
        if let Some(words) = error_words(&text) {
            let error = self.meaning(500, words);
            return Err(self.fault(200, error));
        }
        Element::parse(&text).ok_or_else(|| self.nonsense("no XML").into())
    }
}

impl<'a> Upload<'a> {
    /// The upload of this id.
    pub fn new(bucket: &'a Bucket, id: &'a str) -> Self {
        Upload { bucket, id }
    }

    /// Its id.
    pub fn id(&self) -> &'a str {
        self.id
    }

    /// The parts that the store has, by number; `None` if it knows no such upload.
    ///
    /// # Errors
    /// [`WebError`].
    pub fn parts(&self) -> Result<Option<Vec<Part>>, WebError> {
        let mut marker = String::new();
        let mut parts = Vec::new();
        for _ in 0..MOST_PAGES {
            let query = [
                ("part-number-marker", marker.as_str()),
                ("uploadId", self.id),
            ];
            let query = match marker.is_empty() {
                true => &query[1..],
                false => &query[..],
            };
            let root = match self.bucket.xml(Method::GET, query, false, false) {
                Ok(root) => root,
                Err(WebError::UploadEnded { .. } | WebError::Missing { .. }) => return Ok(None),
                Err(error) => return Err(error),
            };
            parts.extend(root.all("Part").filter_map(part));
            let next = root.text_of("NextPartNumberMarker").unwrap_or_default();
            if root.text_of("IsTruncated") != Some("true") || next.is_empty() || next == marker {
                break;
            }
            marker = next.to_owned();
        }
        parts.sort_by_key(|part| part.number);
        Ok(Some(parts))
    }

    /// Sends a part; gives its ETag. `body` makes a reader of the same bytes for every try, whose MD5 this is.
    ///
    /// # Errors
    /// [`WebError`].
    pub fn put<'b>(
        &self,
        number: u32,
        len: u64,
        md5: &PartDigest,
        is_cancelled: &dyn Fn() -> bool,
        body: &dyn Fn() -> Box<dyn Read + 'b>,
    ) -> Result<String, WebError> {
        let number = number.to_string();
        let query = [("partNumber", number.as_str()), ("uploadId", self.id)];
        let headers = [("content-md5", md5.base64())];
        let answer = persist(true, is_cancelled, || {
            let mut body = body();
            let request = Request {
                query: &query,
                headers: &headers,
                body: Some((&mut *body, len)),
                ..Request::default()
            };
            self.bucket.ask(Method::PUT, request)
        })?;
        let etag = answer.header("etag").map(str::to_owned);
        etag.ok_or_else(|| self.bucket.nonsense("a part without an ETag"))
    }

    /// Makes the object of the parts, each with its ETag, all at once. Where something is there that may not be replaced, a store
    /// that knows conditions refuses; of others, whoever completes last wins.
    ///
    /// # Errors
    /// [`WebError::Exists`]; [`WebError`].
    pub fn complete(&self, parts: &[(u32, String)], may_replace: bool) -> Result<(), WebError> {
        let text = completion(parts.iter().map(|(number, etag)| (*number, etag.as_str())));
        let query = [("uploadId", self.id)];
        let condition = [("if-none-match", "*".to_owned())];
        let tries = Cell::new(0u32);
        let complete = |headers: &[(&'static str, String)]| {
            persist(true, &|| false, || {
                tries.set(tries.get() + 1);
                let mut body = text.as_bytes();
                let request = Request {
                    query: &query,
                    headers,
                    body: Some((&mut body, text.len() as u64)),
                    patience: Some(COMPLETION_TIMEOUT),
                    ..Request::default()
                };
                let answer = self.bucket.ask(Method::POST, request)?;
                self.bucket.document(answer).map(drop)
            })
        };
        let outcome = match may_replace {
            true => complete(&[]),
            false => match complete(&condition) {
                // A store that knows no conditions here; that nothing is there was seen a moment ago.
                Err(WebError::Status { status: 501, .. }) => complete(&[]),
                other => other,
            },
        };
        match outcome {
            Err(WebError::Status { status, words, .. })
                if status == 412 || words.say(&["PreconditionFailed"]) =>
            {
                match tries.get() {
                    1 => Err(self.exists()),
                    // What is there may be what an earlier try made, whose answer was lost.
                    _ => Err(WebError::UploadEnded {
                        there: self.bucket.there().to_owned(),
                    }),
                }
            }
            other => other,
        }
    }

    fn exists(&self) -> WebError {
        WebError::Exists {
            there: self.bucket.there().to_owned(),
        }
    }

    /// Ends it; the store forgets its parts.
    ///
    /// # Errors
    /// [`WebError`].
    pub fn abort(&self) -> Result<(), WebError> {
        let query = [("uploadId", self.id)];
        let delete = || {
            let request = Request {
                query: &query,
                ..Request::default()
            };
            self.bucket.ask(Method::DELETE, request).map(drop)
        };
        match persist(true, &|| false, delete) {
            Err(WebError::UploadEnded { .. } | WebError::Missing { .. }) => Ok(()),
            other => other,
        }
    }
}

fn part(element: &Element) -> Option<Part> {
    Some(Part {
        number: u32::try_from(element.number_of("PartNumber")?).ok()?,
        len: element.number_of("Size")?,
        etag: element
            .text_of("ETag")
            .map(|etag| etag.trim_matches('"').to_ascii_lowercase()),
    })
}

/// The MD5 of a part: what the store holds its bytes against, and calls them by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartDigest([u8; 16]);

impl PartDigest {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        PartDigest(Md5::digest(bytes).into())
    }

    /// As an ETag has it, without quotes.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// As `Content-MD5` has it.
    fn base64(self) -> String {
        base64::engine::general_purpose::STANDARD.encode(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_written_in_both_ways() {
        let digest = PartDigest::of(b"hello");
        assert_eq!(digest.hex(), "5d41402abc4b2a76b9719d911017c592");
        assert_eq!(digest.base64(), "XUFAKrxLKna5cZ2REBfFkg==");
    }
}
