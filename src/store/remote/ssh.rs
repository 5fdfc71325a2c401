//! Starts this program on another host, by way of the system's own `ssh`.
//!
//! Keys, known hosts, agents, jump hosts: all that is ssh's and its configuration's.

use std::io;
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::peer::widen;
use super::{Peer, RemoteError};
use crate::store::SshLocation;

/// The environment variable that names another command than `ssh`, split at blanks.
const SSH: &str = "VMSTOW_SSH";

/// The environment variable that names this program on the other host.
const REMOTE_PROGRAM: &str = "VMSTOW_REMOTE_PROGRAM";

/// A connection that is cut must not be waited for till the end of days: 3 × 10 s.
const KEEP_ALIVE: [&str; 6] = [
    "-o",
    "ServerAliveInterval=10",
    "-o",
    "ServerAliveCountMax=3",
    "-o",
    "ConnectTimeout=15",
];

impl Peer {
    /// Starts `vmstow serve --stdio` on the host of `there`.
    ///
    /// # Errors
    /// [`RemoteError::Start`] if there is no ssh; [`RemoteError::NoGreeting`] if it does not get that far.
    pub fn connect(there: &SshLocation) -> Result<Self, RemoteError> {
        let setting = |name: &str, default: &str| {
            let set = std::env::var(name).ok().filter(|text| !text.is_empty());
            set.unwrap_or_else(|| default.to_owned())
        };
        let ssh = setting(SSH, "ssh");
        let mut words = ssh.split_whitespace();
        let program = words.next().unwrap_or("ssh").to_owned();
        let mut command = Command::new(&program);
        command.args(words).args(KEEP_ALIVE).arg("-T");
        if let Some(port) = there.port {
            command.args(["-p", &port.to_string()]);
        }
        if let Some(user) = &there.user {
            command.args(["-l", user]);
        }
        let remote = format!("{} serve --stdio", setting(REMOTE_PROGRAM, "vmstow"));
        command.args(["--", &there.host, &remote]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let failed = |source: io::Error| RemoteError::Start {
            program,
            source: Arc::new(source),
        };
        let mut child = command.spawn().map_err(failed)?;
        let (Some(input), Some(output)) = (child.stdout.take(), child.stdin.take()) else {
            unreachable!("both are piped");
        };
        widen(&input);
        widen(&output);
        let peer = Peer::greet(there.host.clone(), input, output, Some(child))?;
        peer.show_life()?;
        Ok(peer)
    }
}
