//! A registry of container images: Debian's docker-registry on a free port of this host, ended with the test.

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::assets::docker_registry;
use super::wait::{PATIENCE, wait_until};

/// The one who may: `tester`, `secret`.
const USERS: &str = "tester:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n";

/// How a registry is to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct RegistrySpec<'a> {
    /// Whether it wants credentials: those of `tester`, whose password is `secret`.
    pub wants_password: bool,
    /// Its certificate and key, if it speaks TLS.
    pub tls: Option<(&'a Path, &'a Path)>,
    /// Who gives the tokens that it wants, and the certificate by which they are known.
    pub tokens: Option<(&'a str, &'a Path)>,
}

/// A registry that runs until it is dropped.
#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    child: Child,
    port: u16,
}

impl Registry {
    /// Starts one with its files below `dir`.
    #[track_caller]
    pub fn start(dir: PathBuf, spec: RegistrySpec<'_>) -> Self {
        std::fs::create_dir(&dir).unwrap();
        let at = |name: &str| dir.join(name).display().to_string();
        let mut config = format!(
            "version: 0.1\nlog:\n  level: info\n  formatter: json\n  accesslog:\n    disabled: true\n\
             storage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n",
            at("storage")
        );
        if let Some((certificate, key)) = spec.tls {
            let (certificate, key) = (certificate.display(), key.display());
            write!(
                config,
                "  tls:\n    certificate: {certificate}\n    key: {key}\n"
            )
            .unwrap();
        }
        if spec.wants_password {
            std::fs::write(at("users"), USERS).unwrap();
            let users = at("users");
            write!(
                config,
                "auth:\n  htpasswd:\n    realm: test\n    path: {users}\n"
            )
            .unwrap();
        }
        if let Some((realm, certificate)) = spec.tokens {
            let certificate = certificate.display();
            write!(
                config,
                "auth:\n  token:\n    realm: {realm}\n    service: tested\n    issuer: the test\n    rootcertbundle: {certificate}\n"
            )
            .unwrap();
        }
        std::fs::write(at("config.yml"), config).unwrap();
        let child = Command::new(docker_registry())
            .args(["serve", &at("config.yml")])
            .process_group(0)
            .current_dir(&dir)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(at("log")).unwrap())
            .spawn()
            .expect("docker-registry can be started");
        let mut registry = Registry {
            dir,
            child,
            port: 0,
        };
        registry.port = wait_until("the registry to listen", PATIENCE, || {
            let log = registry.log();
            if let Some(status) = registry.child.try_wait().unwrap() {
                panic!("docker-registry ended ({status}): {log}");
            }
            let port = log.split("listening on 127.0.0.1:").nth(1);
            let digits = port.map(|it| {
                it.chars()
                    .take_while(char::is_ascii_digit)
                    .collect::<String>()
            });
            digits.and_then(|digits| digits.parse().ok()).ok_or(log)
        });
        registry
    }

    /// `HOST:PORT`
    pub fn name(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The location of a tag of the repository `lab/guest`.
    pub fn location(&self, tag: &str) -> String {
        format!("oci://{}/lab/guest:{tag}", self.name())
    }

    /// What it keeps of a blob, whose digest is `sha256:` and so on.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        let blobs = self.dir.join("storage/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }

    /// Bytes of all blobs that it keeps.
    pub fn kept_bytes(&self) -> u64 {
        let blobs = self.dir.join("storage/docker/registry/v2/blobs/sha256");
        let list = |dir: &Path| {
            std::fs::read_dir(dir)
                .map_or(Vec::new(), |it| it.map(|it| it.unwrap().path()).collect())
        };
        let data = list(&blobs)
            .into_iter()
            .flat_map(|dir| list(&dir))
            .map(|dir| dir.join("data"));
        data.map(|file| file.metadata().map_or(0, |it| it.len()))
            .sum()
    }

    /// The requests that it answered, a line of JSON each.
    pub fn answered(&self) -> Vec<serde_json::Value> {
        let log = self.log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        lines
            .filter(|line: &serde_json::Value| line["msg"] == "response completed")
            .collect()
    }

    /// What it wrote about itself.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
