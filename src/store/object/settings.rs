//! Where an object store is and who we are there: the environment and the configuration files that AWS's own tools read.
//!
//! Read are `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_DEFAULT_REGION`,
//! `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, `AWS_PROFILE`; of the profile in `~/.aws/credentials`
//! (`AWS_SHARED_CREDENTIALS_FILE`) and `~/.aws/config` (`AWS_CONFIG_FILE`): `aws_access_key_id`, `aws_secret_access_key`,
//! `aws_session_token`, `region`, `endpoint_url`, and `endpoint_url` of `s3` in the section that `services` names.
//! Keys that have to be fetched (SSO, roles, a machine's own) are not.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use configparser::ini::Ini;
use rusty_s3::Credentials;
use url::Url;

use crate::store::web::WebError;

/// What `AWS_REGION` is where nobody says it.
const USUAL_REGION: &str = "us-east-1";

/// Where the store is, and who we are.
pub struct Settings {
    /// The server.
    pub endpoint: Url,
    /// Its region, which is part of what is signed.
    pub region: String,
    /// The keys; `None` if nothing tells them.
    pub credentials: Option<Credentials>,
    /// The profile that was looked at.
    pub profile: String,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Settings({}, {})", self.endpoint, self.region)
    }
}

/// The value of a variable, if it is set.
type Variable<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Settings {
    /// What this process's environment says.
    ///
    /// # Errors
    /// [`WebError::Setting`].
    pub fn find() -> Result<Self, WebError> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self::of(&variable, std::env::home_dir().as_deref())
    }

    fn of(variable: Variable<'_>, home: Option<&Path>) -> Result<Self, WebError> {
        let profile = variable("AWS_PROFILE").or_else(|| variable("AWS_DEFAULT_PROFILE"));
        let profile = profile.unwrap_or_else(|| "default".to_owned());
        let file = |name, usual| {
            let named = variable(name).map(PathBuf::from);
            named.or_else(|| Some(home?.join(".aws").join(usual)))
        };
        let credentials_file = read(file("AWS_SHARED_CREDENTIALS_FILE", "credentials"))?;
        let config_file = read(file("AWS_CONFIG_FILE", "config"))?;
        let section = match profile.as_str() {
            "default" => "default".to_owned(),
            other => format!("profile {other}"),
        };
        let config = |key: &str| config_file.get(&section, key);
        let region = ["AWS_REGION", "AWS_DEFAULT_REGION"];
        let region = region.into_iter().find_map(variable);
        let region = region.or_else(|| config("region"));
        let region = region.unwrap_or_else(|| USUAL_REGION.to_owned());
        let endpoint = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"];
        let endpoint = endpoint.into_iter().find_map(variable);
        let endpoint = endpoint
            .or_else(|| service_endpoint(&config_file, &config("services")?))
            .or_else(|| config("endpoint_url"))
            .unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let credentials = keys(|key| variable(&key.to_ascii_uppercase()))
            .or_else(|| keys(|key| credentials_file.get(&profile, key)))
            .or_else(|| keys(config));
        Ok(Settings {
            endpoint: endpoint_url(&endpoint)?,
            region,
            credentials,
            profile,
        })
    }
}

fn keys(get: impl Fn(&str) -> Option<String>) -> Option<Credentials> {
    let (key, secret) = (get("aws_access_key_id")?, get("aws_secret_access_key")?);
    Some(match get("aws_session_token") {
        Some(token) => Credentials::new_with_token(key, secret, token),
        None => Credentials::new(key, secret),
    })
}

fn endpoint_url(text: &str) -> Result<Url, WebError> {
    let wrong = |why: &str| WebError::Setting {
        what: format!("the address {text:?} of the object store"),
        why: why.to_owned(),
    };
    let url = Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
    match url.scheme() {
        "http" | "https" if url.has_host() => Ok(url),
        _ => Err(wrong("it has to begin with http:// or https://")),
    }
}

/// `endpoint_url` below `s3` of a section `services NAME`.
fn service_endpoint(config: &File, services: &str) -> Option<String> {
    let s3 = config.get(&format!("services {services}"), "s3")?;
    let nested = parse(&s3).ok()?;
    nested.get("default", "endpoint_url")
}

/// A file that may not be there.
struct File(Ini);

impl File {
    fn get(&self, section: &str, key: &str) -> Option<String> {
        let value = self.0.get(section, key)?;
        Some(value.trim().to_owned()).filter(|value| !value.is_empty())
    }
}

fn read(path: Option<PathBuf>) -> Result<File, WebError> {
    let Some(path) = path else {
        return Ok(File(Ini::new_cs()));
    };
    let wrong = |why: String| WebError::Setting {
        what: path.display().to_string(),
        why,
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => parse(&text).map_err(wrong),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(File(Ini::new_cs())),
        Err(error) => Err(wrong(error.to_string())),
    }
}

/// Keys may hold `#`, `;` and `:`; what is further in belongs to the key above it.
fn parse(text: &str) -> Result<File, String> {
    let mut defaults = Ini::new_cs().defaults();
    defaults.delimiters = vec!['='];
    defaults.inline_comment_symbols = Some(Vec::new());
    defaults.multiline = true;
    let mut ini = Ini::new_from_defaults(defaults);
    ini.read(text.to_owned())?;
    Ok(File(ini))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)], files: &[(&str, &str)]) -> Settings {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        for (name, text) in files {
            std::fs::write(home.path().join(".aws").join(name), text).unwrap();
        }
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Settings::of(&variable, Some(home.path())).unwrap()
    }

    fn key(settings: &Settings) -> Option<(&str, &str, Option<&str>)> {
        let keys = settings.credentials.as_ref()?;
        Some((keys.key(), keys.secret(), keys.token()))
    }

    #[test]
    fn where_nothing_is_said_it_is_amazons_and_nobody_is_known() {
        let found = settings(&[], &[]);
        assert_eq!(
            found.endpoint.as_str(),
            "https://s3.us-east-1.amazonaws.com/"
        );
        assert_eq!(key(&found), None);
        let found = settings(&[("AWS_DEFAULT_REGION", "eu-west-1")], &[]);
        assert_eq!(
            found.endpoint.as_str(),
            "https://s3.eu-west-1.amazonaws.com/"
        );
    }

    #[test]
    fn the_environment_goes_before_files_and_the_service_before_all() {
        let files = [
            (
                "credentials",
                "[default]\naws_access_key_id = A\naws_secret_access_key=b+/#;:c\n\n[lab]\n# of the lab\naws_access_key_id = L\naws_secret_access_key = S\naws_session_token = T\n",
            ),
            (
                "config",
                "[default]\nregion = r1\n[profile lab]\nregion = r2\nservices = ours\ns3 =\n  endpoint_url = https://wrong\nendpoint_url = https://lab.example\n[services ours]\ns3 =\n  endpoint_url = http://localhost:9000\nec2 =\n  endpoint_url = https://ec2\n",
            ),
        ];
        let found = settings(&[], &files);
        assert_eq!(key(&found), Some(("A", "b+/#;:c", None)));
        assert_eq!(found.region, "r1");
        let found = settings(&[("AWS_PROFILE", "lab")], &files);
        assert_eq!(key(&found), Some(("L", "S", Some("T"))));
        assert_eq!(found.region, "r2");
        assert_eq!(found.endpoint.as_str(), "http://localhost:9000/");
        let variables = [
            ("AWS_ENDPOINT_URL", "https://all"),
            ("AWS_ENDPOINT_URL_S3", "https://s3:1"),
            ("AWS_ACCESS_KEY_ID", "E"),
            ("AWS_SECRET_ACCESS_KEY", "F"),
            ("AWS_REGION", "r3"),
        ];
        let found = settings(&variables, &files);
        assert_eq!(found.endpoint.as_str(), "https://s3:1/");
        assert_eq!(
            (key(&found), found.region.as_str()),
            (Some(("E", "F", None)), "r3")
        );
    }

    #[test]
    fn an_address_that_is_none_is_refused() {
        for text in ["localhost:9000", "ftp://x", "", "http://"] {
            assert!(endpoint_url(text).is_err(), "{text}");
        }
    }
}
