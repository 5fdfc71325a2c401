//! One request after the other to a registry: who we are, and what is worth another try.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use docker_credential::DockerCredential;
use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::http::header::WWW_AUTHENTICATE;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body, ResponseExt};

use super::challenge::{self, Challenge};
use super::{RegistryError, credentials};
use crate::store::RegistryLocation;

/// How often something that may pass is tried again: eight seconds in all.
pub const TRIES: u32 = 5;

/// The longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// The longest silence of the other side.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(120);
/// The longest wait for a registry to say by which protocol it speaks.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that are kept.
const IDLE_CONNECTIONS: usize = 16;
/// Bytes of an answer that are read for its words.
const MAX_WORDS_LEN: u64 = 64 << 10;
/// Bytes of a token.
const MAX_TOKEN_LEN: u64 = 1 << 20;

/// Registries, `HOST[:PORT]` with commas between, that may be spoken to without TLS.
const INSECURE: &str = "VMSTOW_INSECURE_REGISTRIES";

/// What a body that cannot be read gives as its error, so that nobody takes it for the network's.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct BodyError(pub String);

impl BodyError {
    /// The one in an error, if it is one.
    pub fn of(error: &ureq::Error) -> Option<&Self> {
        match error {
            ureq::Error::Io(error) => error.get_ref()?.downcast_ref(),
            _ => None,
        }
    }
}

/// A repository of a registry, and how to speak to it. Any thread may.
#[derive(Debug)]
pub struct Requests {
    agent: Agent,
    /// `HOST[:PORT]`, as it was named.
    registry: String,
    repository: String,
    /// `https://HOST[:PORT]`
    base: String,
    /// What we want to do: `pull` or `pull,push`.
    actions: &'static str,
    credential: OnceLock<Option<DockerCredential>>,
    /// The header that worked last.
    authorization: Mutex<Option<String>>,
    was_reached: AtomicBool,
}

/// What an `Agent` is asked, with the header that says who we are.
pub type Send<'a> = dyn FnMut(&Agent, Option<&str>) -> Result<Response<Body>, ureq::Error> + 'a;

impl Requests {
    /// Finds out how to speak to the registry. One that may be spoken to without TLS is if it has none.
    ///
    /// # Errors
    /// [`RegistryError::Unreachable`]; [`RegistryError::NoRegistry`].
    pub fn to(there: &RegistryLocation, actions: &'static str) -> Result<Self, RegistryError> {
        let host = match there.registry.as_str() {
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            other => other,
        };
        let is_near = is_loopback(host);
        let mut requests = Requests {
            agent: agent(is_near),
            registry: there.registry.clone(),
            repository: there.repository.clone(),
            base: format!("https://{host}"),
            actions,
            credential: OnceLock::new(),
            authorization: Mutex::default(),
            was_reached: AtomicBool::new(false),
        };
        if is_near || is_named_insecure(host) {
            requests.choose_protocol(host)?;
        }
        Ok(requests)
    }

    fn choose_protocol(&mut self, host: &str) -> Result<(), RegistryError> {
        let secure = match self.ping() {
            Ok(_) => return Ok(()),
            Err(ureq::Error::Io(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                return Err(self.unreachable(&ureq::Error::Io(error)));
            }
            Err(error) => error,
        };
        self.base = format!("http://{host}");
        match self.ping() {
            Ok(200 | 401 | 403) => Ok(()),
            // Such is the answer of a server that wants TLS, but not ours.
            Ok(_) => Err(RegistryError::NoRegistry {
                registry: self.registry.clone(),
                why: in_words(&secure),
            }),
            Err(error) => Err(self.unreachable(&error)),
        }
    }

    fn ping(&self) -> Result<u16, ureq::Error> {
        let request = self.agent.get(format!("{}/v2/", self.base));
        let request = request.config().timeout_global(Some(PING_TIMEOUT)).build();
        Ok(request.call()?.status().as_u16())
    }

    /// `HOST[:PORT]`, as it was named.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The address of something in the repository.
    pub fn address(&self, rest: &str) -> String {
        format!("{}/v2/{}/{rest}", self.base, self.repository)
    }

    /// The address that a `Location` header names.
    pub fn address_of(&self, location: &str) -> String {
        let host = self.base.strip_prefix("https://");
        let bare = location.strip_prefix("http://");
        // A registry behind a proxy may not know that it speaks TLS.
        let rest = host
            .zip(bare)
            .and_then(|(host, bare)| bare.strip_prefix(host));
        match rest.unwrap_or(location) {
            path if path.starts_with('/') => format!("{}{path}", self.base),
            _ => location.to_owned(),
        }
    }

    /// Whether it is the registry's: others do not learn who we are.
    pub fn is_ours(&self, address: &str) -> bool {
        let rest = address.strip_prefix(&self.base);
        rest.is_some_and(|rest| rest.starts_with('/'))
    }

    /// Has `send` ask, with credentials if the registry wants some, and again while what fails may pass.
    ///
    /// # Errors
    /// [`RegistryError::Denied`]; [`RegistryError::Credentials`]; [`RegistryError::Unreachable`]; [`RegistryError::Source`].
    /// Any other answer is one.
    pub fn call(&self, tries: u32, send: &mut Send<'_>) -> Result<Response<Body>, RegistryError> {
        let mut failures = 0;
        let mut was_asked = false;
        loop {
            let header = self.authorization();
            match send(&self.agent, header.as_deref()) {
                Ok(response) => {
                    self.was_reached.store(true, Ordering::Relaxed);
                    match response.status().as_u16() {
                        // Whoever else it was sent on to does not learn who we are.
                        401 if !was_asked && self.is_ours(&response.get_uri().to_string()) => {
                            was_asked = true;
                            self.authenticate(response, header)?;
                            continue;
                        }
                        401 | 403 => return Err(self.denied(words(response))),
                        429 | 500 | 502..=504 if failures < tries => {}
                        _ => return Ok(response),
                    }
                }
                Err(error) if failures < tries && self.may_pass(&error) => {}
                Err(error) => return Err(self.failed(&error)),
            }
            wait(failures);
            failures += 1;
        }
    }

    /// Whether another try may do better.
    pub fn may_pass(&self, error: &ureq::Error) -> bool {
        let is_passing = match error {
            ureq::Error::Io(_) => BodyError::of(error).is_none(),
            ureq::Error::Timeout(_)
            | ureq::Error::ConnectionFailed
            | ureq::Error::HostNotFound
            | ureq::Error::Protocol(_) => true,
            _ => false,
        };
        is_passing && self.was_reached.load(Ordering::Relaxed)
    }

    /// What a request that got no answer failed by.
    pub fn failed(&self, error: &ureq::Error) -> RegistryError {
        match BodyError::of(error) {
            Some(BodyError(why)) => RegistryError::Source { why: why.clone() },
            None => self.unreachable(error),
        }
    }

    fn unreachable(&self, error: &ureq::Error) -> RegistryError {
        RegistryError::Unreachable {
            registry: self.registry.clone(),
            why: in_words(error),
        }
    }

    /// An answer that says that it could not be done.
    pub fn refused(&self, act: &'static str, response: Response<Body>) -> RegistryError {
        RegistryError::Refused {
            registry: self.registry.clone(),
            act,
            status: response.status().as_u16(),
            words: words(response),
        }
    }

    fn denied(&self, words: Vec<String>) -> RegistryError {
        let user = self.credential.get().and_then(Option::as_ref);
        let user = user.map(|credential| match credential {
            DockerCredential::UsernamePassword(user, _) => user.escape_debug().to_string(),
            DockerCredential::IdentityToken(_) => "the owner of our token".to_owned(),
        });
        RegistryError::Denied {
            registry: self.registry.clone(),
            repository: self.repository.clone(),
            user,
            words,
        }
    }

    fn authorization(&self) -> Option<String> {
        let kept = self.authorization.lock();
        kept.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn credential(&self) -> Result<Option<&DockerCredential>, RegistryError> {
        if self.credential.get().is_none() {
            let found = credentials::find(&self.registry, &self.repository)?;
            let _ = self.credential.set(found);
        }
        Ok(self.credential.get().and_then(Option::as_ref))
    }

    /// Makes the header that `response` asks for; `sent` is the one that was not enough.
    fn authenticate(
        &self,
        response: Response<Body>,
        sent: Option<String>,
    ) -> Result<(), RegistryError> {
        let headers = response.headers().get_all(WWW_AUTHENTICATE).iter();
        let challenge = challenge::parse(headers.filter_map(|it| it.to_str().ok()));
        let mut kept = self
            .authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *kept != sent {
            return Ok(()); // another thread was quicker
        }
        let credential = self.credential()?;
        let header = match (challenge, credential) {
            (Some(Challenge::Bearer { realm, service }), _) => {
                self.token(&realm, service.as_deref(), credential)?
            }
            (Some(Challenge::Basic), Some(DockerCredential::UsernamePassword(user, password))) => {
                basic(user, password)
            }
            _ => return Err(self.denied(words(response))),
        };
        *kept = Some(header);
        Ok(())
    }

    /// Gets a token from whom the registry names.
    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        credential: Option<&DockerCredential>,
    ) -> Result<String, RegistryError> {
        let is_safe = realm.starts_with("https://")
            || (realm.starts_with("http://") && self.base.starts_with("http://"));
        if !is_safe {
            let realm = realm.escape_debug();
            return Err(self.denied(vec![format!(
                "it has credentials sent to {realm}, without TLS"
            )]));
        }
        let scope = format!("repository:{}:{}", self.repository, self.actions);
        let mut fields = vec![("scope", scope.as_str())];
        fields.extend(service.map(|service| ("service", service)));
        let asked = match credential {
            Some(DockerCredential::IdentityToken(token)) => {
                fields.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "vmstow"),
                    ("refresh_token", token.as_str()),
                ]);
                self.agent.post(realm).send_form(fields)
            }
            Some(DockerCredential::UsernamePassword(user, password)) => {
                let request = self.agent.get(realm).query_pairs(fields);
                request
                    .header("Authorization", basic(user, password))
                    .call()
            }
            None => self.agent.get(realm).query_pairs(fields).call(),
        };
        let mut response = asked.map_err(|error| self.unreachable(&error))?;
        match response.status().as_u16() {
            200 => {}
            400..=499 => return Err(self.denied(words(response))),
            _ => return Err(self.refused("give a token", response)),
        }
        #[derive(Deserialize)]
        struct Answer {
            #[serde(alias = "access_token")]
            token: Option<String>,
        }
        let limited = response.body_mut().with_config().limit(MAX_TOKEN_LEN);
        let answer = limited.read_to_vec().ok();
        let answer = answer.and_then(|bytes| serde_json::from_slice::<Answer>(&bytes).ok());
        let token = answer.and_then(|answer| answer.token);
        token.map(|token| format!("Bearer {token}")).ok_or_else(|| {
            let words = vec!["who gives the tokens gave none".to_owned()];
            self.denied(words)
        })
    }
}

fn agent(is_near: bool) -> Agent {
    let roots = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier);
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .tls_config(roots.build())
        .user_agent(concat!("vmstow/", env!("CARGO_PKG_VERSION")))
        .redirect_auth_headers(RedirectAuthHeaders::Never)
        .max_idle_connections(IDLE_CONNECTIONS)
        .max_idle_connections_per_host(IDLE_CONNECTIONS)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_per_read(Some(SILENCE_TIMEOUT))
        .timeout_per_write(Some(SILENCE_TIMEOUT))
        .timeout_recv_response(Some(SILENCE_TIMEOUT));
    if is_near {
        config = config.proxy(None);
    }
    config.build().into()
}

/// Whether the host, with or without a port, is this one.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(address) => address.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let address = name.parse::<std::net::IpAddr>();
    name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn is_named_insecure(host: &str) -> bool {
    let named = std::env::var(INSECURE).unwrap_or_default();
    named.split(',').any(|name| name.trim() == host)
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// Sleeps a while after so many failures: a quarter of a second, then twice as long each time.
pub fn wait(failures: u32) {
    thread::sleep(Duration::from_millis(250) * (1 << failures.min(8)));
}

/// Why there was no answer.
fn in_words(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// What a registry says behind its status, a line each.
pub fn words(response: Response<Body>) -> Vec<String> {
    #[derive(Deserialize)]
    struct Answer {
        errors: Vec<Told>,
    }
    #[derive(Deserialize)]
    struct Told {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let mut body = response.into_body();
    let limited = body.with_config().limit(MAX_WORDS_LEN);
    let Ok(bytes) = limited.read_to_vec() else {
        return Vec::new();
    };
    let told: Vec<String> = match serde_json::from_slice::<Answer>(&bytes) {
        Ok(answer) => answer
            .errors
            .iter()
            .map(|told| format!("{}: {}", told.code, told.message))
            .collect(),
        Err(_) => String::from_utf8_lossy(&bytes)
            .lines()
            .map(str::to_owned)
            .collect(),
    };
    let clean = told
        .iter()
        .map(|line| line.trim().chars().take(300).collect::<String>());
    let clean = clean.filter(|line| !line.is_empty()).take(3);
    clean
        .map(|line| {
            line.escape_debug()
                .to_string()
                .replace("\\\"", "\"")
                .replace("\\'", "'")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_but_the_registry_learns_who_we_are() {
        let requests = Requests {
            agent: agent(false),
            registry: "host:1".to_owned(),
            repository: "a".to_owned(),
            base: "https://host:1".to_owned(),
            actions: "pull",
            credential: OnceLock::new(),
            authorization: Mutex::default(),
            was_reached: AtomicBool::new(false),
        };
        for (location, address, is_ours) in [
            ("/v2/x?y=z", "https://host:1/v2/x?y=z", true),
            ("https://host:1/x", "https://host:1/x", true),
            ("http://host:1/x", "https://host:1/x", true),
            ("http://host:10/x", "http://host:10/x", false),
            (
                "https://host:1.example/x",
                "https://host:1.example/x",
                false,
            ),
            ("https://elsewhere/x", "https://elsewhere/x", false),
        ] {
            assert_eq!(requests.address_of(location), address);
            assert_eq!(requests.is_ours(address), is_ours, "{address}");
        }
    }

    #[test]
    fn only_this_host_is_spoken_to_without_tls_by_itself() {
        for near in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "127.1.2.3",
            "[::1]:5000",
        ] {
            assert!(is_loopback(near), "{near}");
        }
        for far in [
            "localhost.example",
            "10.0.0.1:5000",
            "[2001:db8::1]",
            "127.0.0.1.example",
            "",
        ] {
            assert!(!is_loopback(far), "{far}");
        }
    }
}
