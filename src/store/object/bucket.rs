//! A bucket, what is asked of it, and what its answers mean.

use std::io::Read;
use std::time::Duration;

use rusty_s3::{Credentials, UrlStyle};
use ureq::http::Method;

use super::answer::error_words;
use super::settings::Settings;
use crate::store::ObjectLocation;
use crate::store::web::{
    Answer, Ask, Client, Fault, Origin, RangedFile, Version, WebError, Words, may_pass, server_of,
};

/// How long a signature holds; a request is made at once, and a server's clock may be some minutes off.
const EXPIRES: Duration = Duration::from_secs(3600);

/// Opens an object to be read.
///
/// # Errors
/// [`WebError`].
pub fn open_object(there: &ObjectLocation) -> Result<RangedFile, WebError> {
    RangedFile::open(Box::new(Bucket::of(there)?))
}

/// Whether a store that answers so may do better later.
pub fn may_pass_later(status: u16, words: &Words) -> bool {
    let codes = [
        "SlowDown",
        "RequestTimeout",
        "InternalError",
        "ServiceUnavailable",
        "OperationAborted",
        "ConditionalRequestConflict",
    ];
    may_pass(status) || words.say(&codes)
}

/// A bucket of a store, and one key in it.
pub struct Bucket {
    bucket: rusty_s3::Bucket,
    credentials: Credentials,
    client: Client,
    key: String,
    there: String,
}

/// What is asked of an object, besides its key.
#[derive(Default)]
pub(super) struct Request<'a, 'b> {
    /// Sorted by name.
    pub query: &'a [(&'a str, &'a str)],
    /// Whether the bucket itself is meant.
    pub is_about_bucket: bool,
    /// Headers that need no signature.
    pub headers: &'a [(&'static str, String)],
    /// What goes along.
    pub body: Option<(&'b mut dyn Read, u64)>,
    /// How long the store may think.
    pub patience: Option<Duration>,
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bucket({})", self.there)
    }
}

impl Bucket {
    /// The store that the environment names. Nothing is asked yet.
    ///
    /// # Errors
    /// [`WebError::Setting`]; [`WebError::NoCredentials`].
    pub fn of(there: &ObjectLocation) -> Result<Self, WebError> {
        let settings = Settings::find()?;
        let location = format!("s3://{}/{}", there.bucket, there.key);
        let credentials = settings.credentials.ok_or(WebError::NoCredentials {
            there: location.clone(),
            profile: settings.profile,
        })?;
        let (name, style) = (there.bucket.clone(), UrlStyle::Path);
        let endpoint = settings.endpoint.to_string();
        let bucket = rusty_s3::Bucket::new(settings.endpoint, style, name, settings.region);
        let bucket = bucket.map_err(|error| WebError::Setting {
            what: format!("the address {endpoint:?} of the object store"),
            why: error.to_string(),
        })?;
        Ok(Bucket {
            bucket,
            credentials,
            client: Client::new(false),
            key: there.key.clone(),
            there: location,
        })
    }

    /// The location, as a person writes it.
    pub fn there(&self) -> &str {
        &self.there
    }

    /// The key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The address of the server.
    pub fn server(&self) -> String {
        server_of(self.bucket.base_url().as_str())
    }

    fn sign(&self, method: &Method, is_about_bucket: bool, query: &[(&str, &str)]) -> String {
        let method = match *method {
            Method::HEAD => rusty_s3::Method::Head,
            Method::PUT => rusty_s3::Method::Put,
            Method::POST => rusty_s3::Method::Post,
            Method::DELETE => rusty_s3::Method::Delete,
            _ => rusty_s3::Method::Get,
        };
        let url = match is_about_bucket {
            true => self.bucket.base_url().clone(),
            false => self.bucket.object_url(&self.key),
        };
        let signed = rusty_s3::signing::sign(
            &jiff::Timestamp::now(),
            method,
            url,
            self.credentials.key(),
            self.credentials.secret(),
            self.credentials.token(),
            self.bucket.region(),
            EXPIRES.as_secs(),
            query.iter().copied(),
            std::iter::empty(),
        );
        signed.into()
    }

    /// Asks once; what is no success is a fault.
    pub(super) fn ask(&self, method: Method, request: Request<'_, '_>) -> Result<Answer, Fault> {
        let url = self.sign(&method, request.is_about_bucket, request.query);
        let answer = self.client.ask(Ask {
            method,
            url: &url,
            headers: request.headers,
            body: request.body,
            patience: request.patience,
        })?;
        let status = answer.status;
        if matches!(status, 200 | 204 | 206) {
            return Ok(answer);
        }
        let region = answer.header("x-amz-bucket-region").map(str::to_owned);
        let text = answer.text().unwrap_or_default();
        let error = match (status, region) {
            (301 | 307 | 400, Some(region)) if region != self.bucket.region() => {
                self.other_region(Some(region))
            }
            _ => self.refusal(status, &text),
        };
        Err(self.fault(status, error))
    }

    /// Whether an error may pass.
    pub(super) fn fault(&self, status: u16, error: WebError) -> Fault {
        let may_pass = match &error {
            WebError::Status { words, .. } | WebError::Denied { words, .. } => {
                may_pass_later(status, words)
            }
            _ => may_pass(status),
        };
        match may_pass {
            true => Fault::Passing(error),
            false => Fault::Final(error),
        }
    }

    pub(super) fn nonsense(&self, what: &str) -> WebError {
        WebError::Nonsense {
            server: self.server(),
            what: what.to_owned(),
        }
    }

    fn other_region(&self, region: Option<String>) -> WebError {
        WebError::OtherRegion {
            bucket: self.bucket.name().to_owned(),
            asked: self.bucket.region().to_owned(),
            region,
        }
    }

    /// What a status and the words with it mean.
    pub(super) fn meaning(&self, status: u16, words: Words) -> WebError {
        let there = self.there.clone();
        let server = self.server();
        if words.say(&["NoSuchBucket"]) {
            let bucket = self.bucket.name().to_owned();
            return WebError::NoBucket { bucket, server };
        }
        if words.say(&["NoSuchUpload"]) {
            return WebError::UploadEnded { there };
        }
        if words.say(&["PermanentRedirect", "AuthorizationHeaderMalformed"]) {
            return self.other_region(None);
        }
        match status {
            404 | 410 => WebError::Missing { there, words },
            401 | 403 => WebError::Denied {
                server,
                there,
                words,
            },
            301 | 307 => self.other_region(None),
            _ => WebError::Status {
                server,
                status,
                words,
            },
        }
    }
}

impl Origin for Bucket {
    fn there(&self) -> &str {
        &self.there
    }

    fn url(&self, method: &Method) -> String {
        self.sign(method, false, &[])
    }

    fn condition(&self, version: &Version) -> Option<(&'static str, String)> {
        Some(("if-match", version.strong_etag()?.to_owned()))
    }

    fn refusal(&self, status: u16, text: &str) -> WebError {
        self.meaning(status, error_words(text).unwrap_or_default())
    }

    fn client(&self) -> &Client {
        &self.client
    }
}
