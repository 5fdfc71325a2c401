//! Who we are to a registry: what `docker login`, `podman login` and their helpers keep.
//!
//! Source: containers-auth.json(5).

use std::env;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};

use super::RegistryError;

/// The credentials for a repository; `None` if there are none. The first file that has some decides.
///
/// # Errors
/// [`RegistryError::Credentials`] for a file that cannot be read, or a helper that fails.
pub fn find(registry: &str, repository: &str) -> Result<Option<DockerCredential>, RegistryError> {
    for path in files() {
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                continue;
            }
            Err(error) => {
                let why = error.to_string();
                return Err(RegistryError::Credentials { path, why });
            }
        };
        match in_file(&bytes, registry, repository) {
            Ok(None) => {}
            Ok(found) => return Ok(found),
            Err(error) => {
                let why = error.to_string().replace('\n', " ");
                return Err(RegistryError::Credentials { path, why });
            }
        }
    }
    Ok(None)
}

/// Where they may stand, the first first.
fn files() -> Vec<PathBuf> {
    let variable = |name: &str| {
        env::var_os(name)
            .filter(|it| !it.is_empty())
            .map(PathBuf::from)
    };
    if let Some(named) = variable("REGISTRY_AUTH_FILE") {
        return vec![named];
    }
    let home = variable("HOME");
    let in_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let runtime = variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json"));
    let config = variable("XDG_CONFIG_HOME").map(|dir| dir.join("containers/auth.json"));
    let docker = variable("DOCKER_CONFIG").map(|dir| dir.join("config.json"));
    let files = [
        runtime,
        config.or_else(|| in_home(".config/containers/auth.json")),
        docker.or_else(|| in_home(".docker/config.json")),
    ];
    files.into_iter().flatten().collect()
}

/// Those of the repository, of what it lies in, or of the registry.
fn in_file(
    file: &[u8],
    registry: &str,
    repository: &str,
) -> Result<Option<DockerCredential>, CredentialRetrievalError> {
    let mut name = format!("{registry}/{repository}");
    loop {
        match get_credential_from_reader(file, &name) {
            Ok(found) => return Ok(Some(found)),
            Err(error) if is_none(&error) => {}
            Err(error) => return Err(error),
        }
        match name.rfind('/') {
            Some(end) => name.truncate(end),
            None => return Ok(None),
        }
    }
}

/// Whether this only says that there are none.
fn is_none(error: &CredentialRetrievalError) -> bool {
    match error {
        CredentialRetrievalError::NoCredentialConfigured => true,
        CredentialRetrievalError::HelperFailure { stdout, stderr, .. } => [stdout, stderr]
            .iter()
            .any(|words| words.contains("credentials not found")),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(credential: Option<DockerCredential>) -> Option<String> {
        credential.map(|it| match it {
            DockerCredential::UsernamePassword(user, password) => format!("{user}:{password}"),
            DockerCredential::IdentityToken(token) => token,
        })
    }

    #[test]
    fn the_closest_entry_counts() {
        // "me:a", "you:b", "hub:c"
        let file = br#"{"auths": {
            "host:5000": {"auth": "bWU6YQ=="},
            "host:5000/lab": {"auth": "eW91OmI="},
            "https://index.docker.io/v1/": {"auth": "aHViOmM="}}}"#;
        let of = |registry, name| user(in_file(file, registry, name).unwrap());
        assert_eq!(of("host:5000", "lab/web01"), Some("you:b".to_owned()));
        assert_eq!(of("host:5000", "other/web01"), Some("me:a".to_owned()));
        assert_eq!(of("docker.io", "me/web01"), Some("hub:c".to_owned()));
        assert_eq!(of("host", "lab/web01"), None);
    }

    #[test]
    fn a_file_that_is_none_is_said_to_be() {
        assert!(in_file(b"{\"auths\": 3}", "host", "name").is_err());
        assert!(
            in_file(
                b"{\"auths\": {\"host\": {\"auth\": \"!\"}}}",
                "host",
                "name"
            )
            .is_err()
        );
        assert_eq!(in_file(b"{}", "host", "name"), Ok(None));
    }
}
