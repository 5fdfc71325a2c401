//! This host's signing key, and the keys of others that its user trusts.
//!
//! The key is ed25519 in OpenSSH format, made at first use as `signing_key` in `$XDG_STATE_HOME/vmstow` (or
//! `~/.local/state/vmstow`), mode 0600, with `signing_key.pub` beside it. Trusted keys stand in
//! `$XDG_CONFIG_HOME/vmstow/allowed_signers` (or `~/.config/vmstow/allowed_signers`), one a line, as
//! `ssh-keygen -Y verify` takes them. Source of the format: OpenSSH `ssh-keygen(1)`, ALLOWED SIGNERS.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ssh_key::rand_core::OsRng;
use ssh_key::{Algorithm, HashAlg, LineEnding, PrivateKey, PublicKey, SshSig};

use crate::error::{Blame, ErrorKind};

/// The namespace of every signature this program makes.
pub const NAMESPACE: &str = "vmstow";

/// What can be wrong with a key or a signature.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Neither `$XDG_STATE_HOME` nor `$HOME` tells where the key shall be.
    #[error("there is no place for the signing key: neither XDG_STATE_HOME nor HOME is set")]
    NoHome,
    /// A key file could not be read or made.
    #[error("cannot {act} {}", path.display())]
    File {
        /// What was tried.
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A private key that others can read.
    #[error("{} can be read by others (mode {mode:o})", path.display())]
    Exposed {
        /// The key's file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file does not hold a key, or a key could not be used.
    #[error("{} holds no usable key", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The library's reason.
        source: ssh_key::Error,
    },
    /// A line of the allowed signers holds no key.
    #[error("{} line {line} holds no public key", path.display())]
    AllowedSigner {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
}

impl Blame for KeyError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Host
    }
}

/// This host's key, ready to sign.
pub struct SigningKey(PrivateKey);

impl SigningKey {
    /// Reads the key of this user, or makes it.
    ///
    /// # Errors
    /// Any [`KeyError`] but [`KeyError::AllowedSigner`].
    pub fn load_or_create() -> Result<Self, KeyError> {
        Self::load_or_create_in(&state_directory().ok_or(KeyError::NoHome)?)
    }

    fn load_or_create_in(directory: &Path) -> Result<Self, KeyError> {
        let path = directory.join("signing_key");
        match load(&path)? {
            Some(key) => Ok(key),
            None => {
                create(directory, &path)?;
                load(&path)?.ok_or(KeyError::NoHome)
            }
        }
    }

    /// The armored signature over `statement`.
    ///
    /// # Errors
    /// [`KeyError::Unusable`] if the key cannot sign, which an encrypted one cannot.
    pub fn sign(&self, statement: &str) -> Result<String, KeyError> {
        let error = |source| KeyError::Unusable {
            path: "signing_key".into(),
            source,
        };
        let signature = self
            .0
            .sign(NAMESPACE, HashAlg::Sha512, statement.as_bytes())
            .map_err(error)?;
        signature.to_pem(LineEnding::LF).map_err(error)
    }

    /// Its public half.
    pub fn signer(&self) -> Signer {
        Signer(self.0.public_key().clone())
    }
}

/// The key a signature was made with.
#[derive(Debug, Clone)]
pub struct Signer(PublicKey);

impl Signer {
    /// Its fingerprint, `SHA256:…`, as OpenSSH shows it.
    pub fn fingerprint(&self) -> String {
        self.0.fingerprint(HashAlg::Sha256).to_string()
    }

    /// The comment in the key, where there is one.
    pub fn comment(&self) -> &str {
        self.0.comment()
    }
}

impl PartialEq for Signer {
    fn eq(&self, other: &Self) -> bool {
        self.0.key_data() == other.0.key_data()
    }
}

/// Who made `armored` over `statement`; `None` if it is no valid signature of ours.
pub fn signer_of(statement: &str, armored: &str) -> Option<Signer> {
    let signature = SshSig::from_pem(armored).ok()?;
    let key = PublicKey::from(signature.public_key().clone());
    key.verify(NAMESPACE, statement.as_bytes(), &signature)
        .ok()?;
    Some(Signer(key))
}

/// Whose images may name resources of this host: this host's own key, if it exists, and the allowed signers.
///
/// # Errors
/// A key file that exists and cannot be used.
pub fn trusted_signers() -> Result<Vec<Signer>, KeyError> {
    let mut trusted = Vec::new();
    if let Some(directory) = state_directory() {
        trusted.extend(load(&directory.join("signing_key"))?.map(|key| key.signer()));
    }
    if let Some(directory) = directory_of("XDG_CONFIG_HOME", ".config") {
        trusted.extend(allowed_signers(&directory.join("allowed_signers"))?);
    }
    Ok(trusted)
}

/// The file in which the public half of this host's key stands.
pub fn public_key_path() -> Option<PathBuf> {
    state_directory().map(|directory| directory.join("signing_key.pub"))
}

/// Where this program keeps what has to last.
pub(super) fn state_directory() -> Option<PathBuf> {
    directory_of("XDG_STATE_HOME", ".local/state")
}

/// Where this program keeps something: below what `variable` says, else below the home directory.
pub(super) fn directory_of(variable: &str, below_home: &str) -> Option<PathBuf> {
    Some(below(variable, below_home)?.join("vmstow"))
}

/// The directory that `variable` names, else the one of that name below the home directory.
pub(super) fn below(variable: &str, below_home: &str) -> Option<PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute(variable).or_else(|| absolute("HOME").map(|home| home.join(below_home)))
}

fn load(path: &Path) -> Result<Option<SigningKey>, KeyError> {
    let error = |source| KeyError::File {
        act: "read",
        path: path.to_owned(),
        source,
    };
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(error(source)),
    };
    let mode = fs::metadata(path).map_err(error)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    let key = PrivateKey::from_openssh(text);
    key.map(SigningKey)
        .map(Some)
        .map_err(|source| KeyError::Unusable {
            path: path.to_owned(),
            source,
        })
}

/// Makes a key under `path`, unless another process does so at the same moment: the first one wins.
fn create(directory: &Path, path: &Path) -> Result<(), KeyError> {
    let error = |source| KeyError::File {
        act: "create",
        path: path.to_owned(),
        source,
    };
    let unusable = |source| KeyError::Unusable {
        path: path.to_owned(),
        source,
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(error)?;
    let mut key = PrivateKey::random(&mut OsRng, Algorithm::Ed25519).map_err(unusable)?;
    key.set_comment(format!("vmstow@{}", host_name()));
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(error)?;
    file.write_all(key.to_openssh(LineEnding::LF).map_err(unusable)?.as_bytes())
        .map_err(error)?;
    file.as_file().sync_all().map_err(error)?;
    match file.persist_noclobber(path) {
        Ok(_) => {}
        Err(failed) if failed.error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(failed) => return Err(error(failed.error)),
    }
    let public = key.public_key().to_openssh().map_err(unusable)?;
    let mut options = fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(path.with_extension("pub"))
        .map_err(error)?;
    writeln!(file, "{public}").map_err(error)
}

fn host_name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

/// The keys of an allowed signers file that may sign images; none if the file does not exist.
fn allowed_signers(path: &Path) -> Result<Vec<Signer>, KeyError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(KeyError::File {
                act: "read",
                path: path.to_owned(),
                source,
            });
        }
    };
    let mut signers = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let (options, signer) = options_and_key(line).ok_or(KeyError::AllowedSigner {
            path: path.to_owned(),
            line: index + 1,
        })?;
        if options.iter().all(|option| permits_images(option)) {
            signers.push(signer);
        }
    }
    Ok(signers)
}

/// The options and the key of one line: `principals [options] keytype base64 [comment]`, or a bare public key.
fn options_and_key(line: &str) -> Option<(Vec<&str>, Signer)> {
    const KEY_TYPES: [&str; 4] = ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"];
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words
        .iter()
        .position(|word| KEY_TYPES.iter().any(|kind| word.starts_with(kind)))?;
    let key = PublicKey::from_openssh(&words[at..].join(" ")).ok()?;
    let options = words[..at].iter().skip(1);
    Some((
        options.flat_map(|word| split_options(word)).collect(),
        Signer(key),
    ))
}

/// `a,b="c,d"` → `a`, `b="c,d"`.
fn split_options(word: &str) -> Vec<&str> {
    let mut is_quoted = false;
    let is_separator = |c: char| {
        is_quoted ^= c == '"';
        c == ',' && !is_quoted
    };
    word.split(is_separator).collect()
}

/// Whether a key with this option may sign images. Only a list of namespaces with ours in it does not forbid it: an
/// option that is not understood, a validity for example, may.
fn permits_images(option: &str) -> bool {
    let namespaces = option.strip_prefix("namespaces=");
    namespaces.is_some_and(|list| {
        list.trim_matches('"')
            .split(',')
            .any(|name| name == NAMESPACE)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_names_its_signer_and_holds_for_its_statement_only() {
        let directory = tempfile::tempdir().unwrap();
        let key = SigningKey::load_or_create_in(directory.path()).unwrap();
        let armored = key.sign("vmstow statement 1\n").unwrap();
        assert_eq!(
            signer_of("vmstow statement 1\n", &armored),
            Some(key.signer())
        );
        assert_eq!(signer_of("vmstow statement 2\n", &armored), None);
        assert_eq!(signer_of("vmstow statement 1\n", "no signature"), None);
    }

    #[test]
    fn the_key_is_made_once_and_kept_from_others() {
        let directory = tempfile::tempdir().unwrap();
        let first = SigningKey::load_or_create_in(directory.path()).unwrap();
        let again = SigningKey::load_or_create_in(directory.path()).unwrap();
        assert!(first.signer() == again.signer());
        let path = directory.path().join("signing_key");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let exposed = SigningKey::load_or_create_in(directory.path());
        assert!(matches!(
            exposed,
            Err(KeyError::Exposed { mode: 0o644, .. })
        ));
    }

    #[test]
    fn allowed_signers_are_read_as_openssh_writes_them() {
        let directory = tempfile::tempdir().unwrap();
        let key = SigningKey::load_or_create_in(directory.path())
            .unwrap()
            .signer();
        let public = fs::read_to_string(directory.path().join("signing_key.pub")).unwrap();
        let path = directory.path().join("allowed_signers");
        assert!(allowed_signers(&path).unwrap().is_empty());
        fs::write(
            &path,
            format!("# ours\n\nann@example.org namespaces=\"git,vmstow\" {public}{public}"),
        )
        .unwrap();
        assert!(allowed_signers(&path).unwrap() == [key.clone(), key]);
        for option in [
            "namespaces=\"git\"",
            "valid-before=\"20200101\"",
            "cert-authority",
        ] {
            fs::write(&path, format!("ann@example.org {option} {public}")).unwrap();
            assert!(allowed_signers(&path).unwrap().is_empty(), "{option}");
        }
        fs::write(&path, "ann@example.org nothing\n").unwrap();
        assert!(matches!(
            allowed_signers(&path),
            Err(KeyError::AllowedSigner { line: 1, .. })
        ));
    }
}
