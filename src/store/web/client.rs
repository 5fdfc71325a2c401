//! One HTTP request, and when it is worth another try.

use std::io::{self, Read};
use std::time::Duration;

use ureq::http::{HeaderMap, Method, Request, Response, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, AsSendBody, Body, SendBody};

use super::error::WebError;

/// How often something is tried before it counts as failed, where the server was never heard of.
const FIRST_TRIES: u32 = 3;

/// How often, where the server has answered before.
const TRIES: u32 = 7;

/// The wait before the second try; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(200);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long nothing may move.
const SILENCE: Duration = Duration::from_secs(30);

/// The most that is read of an answer that tells of an error, or that is XML.
const MAX_TEXT_LEN: u64 = 8 << 20;

/// Makes requests; any thread may, and connections are used again.
#[derive(Debug, Clone)]
pub struct Client {
    agent: Agent,
}

/// What is asked.
pub struct Ask<'a, 'b> {
    /// How.
    pub method: Method,
    /// Where.
    pub url: &'a str,
    /// Besides the usual ones.
    pub headers: &'a [(&'static str, String)],
    /// What goes along, with its length.
    pub body: Option<(&'b mut dyn Read, u64)>,
    /// How long the server may think; `None` for as long as usual.
    pub patience: Option<Duration>,
}

/// What comes back.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    headers: HeaderMap,
    body: Body,
}

/// Why there is no result: whether it may help to try again.
#[derive(Debug)]
pub enum Fault {
    /// It may pass.
    Passing(WebError),
    /// It will not.
    Final(WebError),
}

impl From<WebError> for Fault {
    fn from(error: WebError) -> Self {
        Fault::Final(error)
    }
}

impl Client {
    /// One that goes where the server sends it, or one that is told so.
    pub fn new(follows_redirects: bool) -> Self {
        // The system's certificates, so that those of a company's own authority count.
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(if follows_redirects { 10 } else { 0 })
            .max_redirects_will_error(follows_redirects)
            .user_agent(concat!("vmstow/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .max_idle_connections_per_host(16)
            .build();
        Client {
            agent: config.new_agent(),
        }
    }

    /// Asks once.
    ///
    /// # Errors
    /// A fault that may pass if no answer came at all.
    pub fn ask(&self, ask: Ask<'_, '_>) -> Result<Answer, Fault> {
        let server = server_of(ask.url);
        let mut request = Request::builder().method(ask.method).uri(ask.url);
        for (name, value) in ask.headers {
            request = request.header(*name, value);
        }
        let patience = ask.patience.unwrap_or(ANSWER_TIMEOUT);
        let response = match ask.body {
            Some((body, len)) => {
                request = request.header(header::CONTENT_LENGTH, len);
                self.run(request.body(SendBody::from_reader(body)), patience)
            }
            None => self.run(request.body(()), patience),
        };
        let (parts, body) = response.map_err(|error| fault(error, server))?.into_parts();
        Ok(Answer {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body,
        })
    }

    fn run(
        &self,
        request: Result<Request<impl AsSendBody>, ureq::http::Error>,
        patience: Duration,
    ) -> Result<Response<Body>, ureq::Error> {
        let request = self.agent.configure_request(request?);
        let request = request
            .timeout_recv_response(Some(patience))
            .timeout_per_read(Some(patience.max(SILENCE)))
            .build();
        self.agent.run(request)
    }
}

/// Tries until it is done, will never be done, or was tried often enough.
///
/// # Errors
/// The last fault.
pub fn persist<T>(
    was_heard: bool,
    is_cancelled: &dyn Fn() -> bool,
    mut attempt: impl FnMut() -> Result<T, Fault>,
) -> Result<T, WebError> {
    let mut left = if was_heard { TRIES } else { FIRST_TRIES };
    let mut wait = FIRST_WAIT;
    loop {
        left -= 1;
        match attempt() {
            Ok(done) => return Ok(done),
            Err(Fault::Final(error)) => return Err(error),
            Err(Fault::Passing(error)) if left == 0 || is_cancelled() => return Err(error),
            Err(Fault::Passing(_)) => {}
        }
        std::thread::sleep(wait);
        wait *= 2;
    }
}

/// What a request that got no answer says of server and connection.
fn fault(error: ureq::Error, server: String) -> Fault {
    let why = match &error {
        ureq::Error::HostNotFound => "no host of that name is known".to_owned(),
        ureq::Error::Io(error) => error.to_string(),
        other => other.to_string(),
    };
    match error {
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => {
            Fault::Passing(WebError::Unreachable { server, why })
        }
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
            Fault::Passing(WebError::Unreachable { server, why })
        }
        // The system's resolver has no kind of its own.
        ureq::Error::Io(error) if is_about_connecting(&error) || why.contains("lookup address") => {
            Fault::Passing(WebError::Unreachable { server, why })
        }
        ureq::Error::Io(error)
            if matches!(
                error.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::Other
            ) =>
        {
            // A certificate that does not hold today will not hold in a second; or the body ended by itself.
            Fault::Final(WebError::Unreachable { server, why })
        }
        ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::Protocol(_) => {
            Fault::Passing(WebError::Broken { server, why })
        }
        _ => Fault::Final(WebError::Unreachable { server, why }),
    }
}

fn is_about_connecting(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
            | io::ErrorKind::AddrNotAvailable
    )
}

/// `SCHEME://HOST[:PORT]` of an address; never what else stands in it, for that may be secret.
pub fn server_of(url: &str) -> String {
    match url::Url::parse(url) {
        Ok(url) => {
            let host = url.host_str().unwrap_or_default();
            let port = url.port().map_or(String::new(), |port| format!(":{port}"));
            format!("{}://{host}{port}", url.scheme())
        }
        Err(_) => "the server".to_owned(),
    }
}

/// Whether a status says that the same request may succeed later.
pub fn may_pass(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502..=504)
}

impl Answer {
    /// A header, if it is there and is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// A header that is a number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.header(name)?.trim().parse().ok()
    }

    /// Fills `buf` with the whole body, which has to be as long.
    ///
    /// # Errors
    /// What the connection says; `UnexpectedEof` if the body is shorter.
    pub fn read_into(mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut reader = self.body.as_reader();
        reader.read_exact(buf)?;
        // Only behind the end of the body the connection can be used again.
        match reader.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(io::Error::other("more bytes came than were asked for")),
        }
    }

    /// The body as text, as far as it is any.
    ///
    /// # Errors
    /// What the connection says.
    pub fn text(mut self) -> io::Result<String> {
        let mut bytes = Vec::new();
        let mut reader = self.body.as_reader().take(MAX_TEXT_LEN);
        reader.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_secret_in_an_address_is_not_named() {
        let url = "https://me:secret@host:8443/x?X-Amz-Signature=1";
        assert_eq!(server_of(url), "https://host:8443");
    }

    #[test]
    fn what_will_not_pass_is_tried_once_and_the_rest_again() {
        let missing = || WebError::Vanished {
            there: "x".to_owned(),
        };
        let mut count = 0;
        let outcome: Result<(), _> = persist(true, &|| false, || {
            count += 1;
            Err(Fault::Final(missing()))
        });
        assert!(outcome.is_err() && count == 1);
        let mut count = 0;
        let outcome = persist(true, &|| false, || {
            count += 1;
            match count {
                3 => Ok(count),
                _ => Err(Fault::Passing(missing())),
            }
        });
        assert_eq!(outcome.ok(), Some(3));
    }
}
