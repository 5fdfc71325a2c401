//! What a person writes where an image is asked for.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::StoreError;

/// A path, `-` for standard input or output, or a place elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A file of this host.
    Path(PathBuf),
    /// `-`
    Pipe,
    /// `ssh://[USER@]HOST[:PORT]/PATH`
    Ssh(SshLocation),
    /// `s3://BUCKET/KEY`
    Object(ObjectLocation),
    /// `http://…` or `https://…`, as it was written; to be read only.
    Web(String),
    /// `oci://REGISTRY/NAME:TAG`
    Registry(RegistryLocation),
    /// `peer://SOCKET`: what another host offers to a process of ours on this one.
    Peer(PathBuf),
}

/// A file of another host, which is reached by `ssh`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshLocation {
    /// The user there; `None` leaves it to ssh's configuration.
    pub user: Option<String>,
    /// A name that ssh knows, or an address.
    pub host: String,
    /// `None` leaves it to ssh's configuration.
    pub port: Option<u16>,
    /// The path there; a relative one starts in the home directory.
    pub path: PathBuf,
}

/// An object of an object store. Where that is, the environment and its configuration files say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectLocation {
    /// The bucket.
    pub bucket: String,
    /// The object's key in it.
    pub key: String,
}

/// An artifact of a registry of container images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryLocation {
    /// `HOST[:PORT]`
    pub registry: String,
    /// The repository's name there; it may hold slashes.
    pub repository: String,
    /// The artifact's tag in it.
    pub tag: String,
}

impl Location {
    /// The path, if it is a file of this host.
    pub fn path(&self) -> Option<&std::path::Path> {
        match self {
            Location::Path(path) => Some(path),
            _ => None,
        }
    }

    /// What the file there is called, without where it is.
    pub fn file_name(&self) -> Option<OsString> {
        let last = |path: &str| path.rsplit('/').next().map(OsString::from);
        match self {
            Location::Path(path) => path.file_name().map(OsStr::to_owned),
            Location::Ssh(there) => there.path.file_name().map(OsStr::to_owned),
            Location::Object(there) => last(&there.key).filter(|name| !name.is_empty()),
            Location::Web(url) => {
                let end = url.find(['?', '#']).unwrap_or(url.len());
                last(&url[..end]).filter(|name| !name.is_empty())
            }
            Location::Registry(there) => {
                let name = there.repository.rsplit('/').next();
                name.map(|name| format!("{name}-{}.stow", there.tag).into())
            }
            Location::Pipe | Location::Peer(_) => None,
        }
    }

    /// Whether it is a place elsewhere.
    pub fn is_far(&self) -> bool {
        !matches!(self, Location::Path(_) | Location::Pipe)
    }

    /// For whom only takes files of this host.
    pub fn refused(&self) -> StoreError {
        StoreError::FarAway {
            there: self.to_string(),
        }
    }
}

impl FromStr for Location {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let wrong = || StoreError::NotALocation {
            text: text.to_owned(),
        };
        let is_scheme = |scheme: &str| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let scheme = text.split_once("://").filter(|(it, _)| is_scheme(it));
        match (text, scheme) {
            ("-", _) => Ok(Location::Pipe),
            ("", _) => Err(wrong()),
            (_, Some(("ssh", rest))) => parse_ssh(rest).map(Location::Ssh).ok_or_else(wrong),
            (_, Some(("s3", rest))) => parse_object(rest).map(Location::Object).ok_or_else(wrong),
            (_, Some(("oci", rest))) => parse_registry(rest)
                .map(Location::Registry)
                .ok_or_else(wrong),
            (_, Some(("peer", path))) => Ok(Location::Peer(PathBuf::from(path))),
            (_, Some(("http" | "https", rest))) => match is_web(rest) {
                true => Ok(Location::Web(text.to_owned())),
                false => Err(wrong()),
            },
            (_, Some(_)) => Err(wrong()),
            (path, None) => Ok(Location::Path(PathBuf::from(path))),
        }
    }
}

/// What stands behind `ssh://`; `None` if it is not clear.
fn parse_ssh(text: &str) -> Option<SshLocation> {
    let (authority, path) = text.split_once('/')?;
    let (user, address) = match authority.rsplit_once('@') {
        Some((user, address)) => (Some(user.to_owned()), address),
        None => (None, authority),
    };
    let (host, port) = host_and_port(address)?;
    // ssh would take such words for options.
    let may_stand = |word: &str| is_word(word) && !word.starts_with('-');
    let path = match path.strip_prefix("~/") {
        Some("") => ".".to_owned(),
        Some(in_home) => in_home.to_owned(),
        None => format!("/{path}"),
    };
    let is_clear = may_stand(host) && user.as_deref().is_none_or(may_stand) && !path.contains('\0');
    is_clear.then(|| SshLocation {
        user,
        host: host.to_owned(),
        port,
        path: PathBuf::from(path),
    })
}

/// What stands behind `s3://`.
fn parse_object(text: &str) -> Option<ObjectLocation> {
    let (bucket, key) = text.split_once('/')?;
    let is_clear = is_word(bucket) && !key.is_empty() && !key.contains(char::is_control);
    is_clear.then(|| ObjectLocation {
        bucket: bucket.to_owned(),
        key: key.to_owned(),
    })
}

/// What stands behind `oci://`.
fn parse_registry(text: &str) -> Option<RegistryLocation> {
    let (registry, name) = text.split_once('/')?;
    let (repository, tag) = name.rsplit_once(':')?;
    let is_clear = is_host(registry) && repository.split('/').all(is_name_part) && is_tag(tag);
    is_clear.then(|| RegistryLocation {
        registry: registry.to_owned(),
        repository: repository.to_owned(),
        tag: tag.to_owned(),
    })
}

/// Whether it is a host with or without a port: a host's name, an address, or one in brackets.
fn is_host(text: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    !text.starts_with('-')
        && text.chars().all(is_part)
        && host_and_port(text).is_some_and(|(host, _)| !host.is_empty())
}

/// A part of a repository's name, as the OCI distribution specification has it.
fn is_name_part(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.starts_with(is_plain)
        && text.ends_with(is_plain)
        && text.chars().all(|c| is_plain(c) || "._-".contains(c))
        && !text.contains("..")
}

/// A tag, as the OCI distribution specification has it.
fn is_tag(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.starts_with(is_plain)
        && text.len() <= 128
        && text.chars().all(|c| is_plain(c) || ".-".contains(c))
}

/// Whether a host and a file stand behind `http://`.
fn is_web(text: &str) -> bool {
    let parts = text.split_once('/');
    is_word(text) && parts.is_some_and(|(host, path)| !host.is_empty() && !path.is_empty())
}

/// Something without blanks in it.
fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.contains(|c: char| c.is_control() || c.is_whitespace())
}

/// `HOST`, `HOST:PORT`, `[ADDRESS]` or `[ADDRESS]:PORT`.
fn host_and_port(address: &str) -> Option<(&str, Option<u16>)> {
    let (host, rest) = match address.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']')?,
        None => address.split_at(address.find(':').unwrap_or(address.len())),
    };
    let port = match rest {
        "" => None,
        rest => Some(
            rest.strip_prefix(':')?
                .parse()
                .ok()
                .filter(|port| *port != 0)?,
        ),
    };
    Some((host, port))
}

impl fmt::Display for SshLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ssh://")?;
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        match self.host.contains(':') {
            true => write!(f, "[{}]", self.host)?,
            false => f.write_str(&self.host)?,
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        match self.path.is_absolute() {
            true => self.path.display().fmt(f),
            false => write!(f, "/~/{}", self.path.display()),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Path(path) => path.display().fmt(f),
            Location::Pipe => f.write_str("-"),
            Location::Ssh(there) => there.fmt(f),
            Location::Object(there) => write!(f, "s3://{}/{}", there.bucket, there.key),
            Location::Web(url) => f.write_str(&without_password(url)),
            Location::Peer(path) => write!(f, "peer://{}", path.display()),
            Location::Registry(there) => write!(
                f,
                "oci://{}/{}:{}",
                there.registry, there.repository, there.tag
            ),
        }
    }
}

/// An address as people may see it.
fn without_password(url: &str) -> String {
    let parts = url.split_once("://").and_then(|(scheme, rest)| {
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (user, host) = rest[..end].rsplit_once('@')?;
        let (name, _) = user.split_once(':')?;
        Some(format!("{scheme}://{name}@{host}{}", &rest[end..]))
    });
    parts.unwrap_or_else(|| url.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_hold_anything_but_a_scheme() {
        assert_eq!("-".parse::<Location>().unwrap(), Location::Pipe);
        for path in ["a.stow", "/x/y", "./-", "a b://c"] {
            assert_eq!(
                path.parse::<Location>().unwrap(),
                Location::Path(path.into())
            );
        }
        for text in [
            "",
            "s3://bucket",
            "s3:///x",
            "oci://host/name",
            "http://host",
            "ftp://host/x",
        ] {
            assert!(matches!(
                text.parse::<Location>(),
                Err(StoreError::NotALocation { .. })
            ));
        }
    }

    #[test]
    fn a_file_of_another_host_is_said_in_one_way() {
        for (text, user, host, port, path) in [
            ("ssh://a/x.stow", None, "a", None, "/x.stow"),
            ("ssh://me@a:22/v/x y", Some("me"), "a", Some(22), "/v/x y"),
            ("ssh://[fe80::1]:2222/~/x", None, "fe80::1", Some(2222), "x"),
            ("ssh://a/dir/", None, "a", None, "/dir/"),
            ("ssh://a/", None, "a", None, "/"),
        ] {
            let location: Location = text.parse().unwrap();
            let expected = SshLocation {
                user: user.map(str::to_owned),
                host: host.to_owned(),
                port,
                path: path.into(),
            };
            assert_eq!(location, Location::Ssh(expected));
            assert_eq!(location.to_string(), text);
        }
    }

    #[test]
    fn objects_artifacts_and_files_of_the_web_are_said_as_they_are_read() {
        for text in [
            "s3://bucket/some/key",
            "oci://localhost:5000/lab/web01:monday",
            "https://host/images/web01.stow?version=3",
            "peer:///run/vmstow/x.sock",
        ] {
            let location: Location = text.parse().unwrap();
            assert!(location.is_far());
            assert_eq!(location.to_string(), text);
        }
    }

    #[test]
    fn names_that_no_registry_takes_are_no_locations() {
        for text in [
            "oci://host/Upper:x",
            "oci://host/name:a/b",
            "oci://host/name:a?b",
            "oci://host/../x:y",
            "oci://host//x:y",
            "oci://host/x-:y",
            "oci://host/x:.y",
            "oci://host/name@sha256:00",
            "oci://host:port/x:y",
            "oci://-host/x:y",
            "oci://a@host/x:y",
            "oci:///x:y",
        ] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
        let there: Location = "oci://[::1]:5000/a/b__c/d-e.f:v1.0_x".parse().unwrap();
        assert_eq!(there.to_string(), "oci://[::1]:5000/a/b__c/d-e.f:v1.0_x");
    }

    #[test]
    fn what_ssh_would_take_for_an_option_is_no_host() {
        for text in [
            "ssh://-oProxyCommand=x/y",
            "ssh://-l@host/y",
            "ssh://host",
            "ssh:///x",
            "ssh://host:0/x",
            "ssh://host:ssh/x",
            "ssh://a b/x",
            "ssh://[::1/x",
        ] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_password_is_not_shown() {
        for (text, shown) in [
            (
                "https://me:se@cret@host:8/x?a=b@c:d",
                "https://me@host:8/x?a=b@c:d",
            ),
            ("http://me@host/x", "http://me@host/x"),
            ("http://host/a:b@c", "http://host/a:b@c"),
        ] {
            let location: Location = text.parse().unwrap();
            assert_eq!(location.to_string(), shown);
        }
    }
}
