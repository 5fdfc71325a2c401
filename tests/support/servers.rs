//! Object stores and web servers, real ones, each with a directory and a port of its own. They end when dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::assets::{rclone, s3s_fs};
use super::dir::TestDir;
use super::wait::{PATIENCE, wait_until};

/// The key that the object stores know.
pub const ACCESS_KEY: &str = "AKIAVMSTOWTESTS";
/// What belongs to it.
pub const SECRET_KEY: &str = "a/secret+of=the;tests#only";

/// A server, and the directory that it serves.
#[derive(Debug)]
pub struct Server {
    child: Child,
    address: String,
    root: PathBuf,
}

impl Server {
    /// The object store of rclone. With `has_etags` it reads every object whole for each request.
    pub fn rclone_s3(dir: &TestDir, has_etags: bool) -> Self {
        let hash = if has_etags { "MD5" } else { "" };
        let keys = format!("\"{ACCESS_KEY},{SECRET_KEY}\"");
        let mut command = Command::new(rclone());
        command.env("RCLONE_AUTH_KEY", keys);
        command.args(["serve", "s3", "--dir-cache-time", "0s", "--etag-hash", hash]);
        Self::start(dir, "rclone-s3", command, &["--addr", "127.0.0.1:0"])
    }

    /// The web server of rclone.
    pub fn rclone_http(dir: &TestDir) -> Self {
        let mut command = Command::new(rclone());
        command.args(["serve", "http", "--dir-cache-time", "0s"]);
        Self::start(dir, "rclone-http", command, &["--addr", "127.0.0.1:0"])
    }

    /// The object store `s3s-fs`.
    pub fn s3s_fs(dir: &TestDir) -> Self {
        let mut command = Command::new(s3s_fs());
        command.env("RUST_LOG", "s3s_fs=info").env("NO_COLOR", "1");
        command.args(["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY]);
        Self::start(
            dir,
            "s3s-fs",
            command,
            &["--host", "127.0.0.1", "--port", "0"],
        )
    }

    /// The web server of Python, which gives whole files only.
    pub fn python_http(dir: &TestDir) -> Self {
        let mut command = Command::new("python3");
        command.args(["-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]);
        Self::start(dir, "python-http", command, &["--directory"])
    }

    fn start(dir: &TestDir, name: &str, mut command: Command, arguments: &[&str]) -> Self {
        let root = dir.join(name);
        std::fs::create_dir_all(root.join("bucket")).unwrap();
        let log = dir.join(&format!("{name}.log"));
        let written = std::fs::File::create(&log).unwrap();
        let child = command
            .args(arguments)
            .arg(&root)
            .env("RCLONE_CONFIG", dir.join("no-rclone.conf"))
            .env("XDG_CACHE_HOME", dir.join("cache"))
            .stdin(Stdio::null())
            .stdout(written.try_clone().unwrap())
            .stderr(written)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let mut server = Server {
            child,
            address: String::new(),
            root,
        };
        server.address = wait_until(name, PATIENCE, || {
            let said = std::fs::read(&log).unwrap();
            let said = String::from_utf8_lossy(&said).into_owned();
            address_in(&said).ok_or(said)
        });
        server
    }

    /// `HOST:PORT`
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where a file of its bucket lies.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join("bucket").join(name)
    }

    /// The directory that it serves.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

/// What a server says that it listens at.
fn address_in(said: &str) -> Option<String> {
    let (_, behind) = said.rsplit_once("http://127.0.0.1:")?;
    let digits = behind.bytes().take_while(u8::is_ascii_digit).count();
    // All digits are there only if something follows.
    let port = behind.get(..digits).filter(|_| behind.len() > digits)?;
    (port != "0").then(|| format!("127.0.0.1:{port}"))
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
