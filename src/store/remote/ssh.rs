//! Starts this program on another host, by way of the system's own `ssh`.
//!
//! Keys, known hosts, agents, jump hosts: all that is ssh's and its configuration's.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::peer::{FromServer, widen};
use super::{Peer, RemoteError};
use crate::store::SshLocation;

/// The environment variable that names another command than `ssh`, split at blanks.
const SSH: &str = "VMSTOW_SSH";

/// The environment variable that names this program on the other host.
const REMOTE_PROGRAM: &str = "VMSTOW_REMOTE_PROGRAM";

/// The cipher that OpenSSH below 10 prefers however slow it is, and the one that processors with AES instructions do in about
/// half the time.
const SLOW: &str = "chacha20-poly1305@openssh.com";
const QUICK: &str = "aes128-gcm@openssh.com";

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
        let words: Vec<&str> = ssh.split_whitespace().collect();
        let (program, words) = words.split_first().unwrap_or((&"ssh", &[]));
        let mut arguments: Vec<String> = words.iter().map(ToString::to_string).collect();
        if let Some(port) = there.port {
            arguments.extend(["-p".to_owned(), port.to_string()]);
        }
        if let Some(user) = &there.user {
            arguments.extend(["-l".to_owned(), user.clone()]);
        }
        let mut command = Command::new(program);
        command.args(&arguments).args(KEEP_ALIVE).arg("-T");
        let is_openssh = |word: &&str| Path::new(word).file_name() == Some("ssh".as_ref());
        if has_aes() && words.iter().chain([program]).any(is_openssh) {
            let mut asking = Command::new(program);
            asking.args(&arguments).args(["-G", "--", &there.host]);
            command.args(quick_cipher_first(&mut asking));
        }
        let remote = format!("{} serve --stdio", setting(REMOTE_PROGRAM, "vmstow"));
        command.args(["--", &there.host, &remote]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let failed = |source: io::Error| RemoteError::Start {
            program: (*program).to_owned(),
            source: Arc::new(source),
        };
        let mut child = command.spawn().map_err(failed)?;
        let (Some(input), Some(output)) = (child.stdout.take(), child.stdin.take()) else {
            unreachable!("both are piped");
        };
        widen(&input);
        widen(&output);
        let peer = Peer::greet(
            there.host.clone(),
            FromServer::new(input),
            output,
            Some(child),
        )?;
        peer.show_life()?;
        Ok(peer)
    }
}

/// Whether this processor has instructions for AES; the other host's most likely has them too, for it is to run the same guests.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has = std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    let has = std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let has = false;
    has
}

/// The option that puts the quick cipher before the slow one, if both are allowed by ssh's configuration and the slow one is first:
/// nothing is used that would not have been, and no other order is touched. `asking` prints the configuration.
fn quick_cipher_first(asking: &mut Command) -> Option<String> {
    let asked = asking.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let printed = String::from_utf8(asked.ok()?.stdout).ok()?;
    reordered(&printed).map(|ciphers| format!("-oCiphers={ciphers}"))
}

fn reordered(configuration: &str) -> Option<String> {
    let mut lines = configuration.lines();
    let ciphers = lines.find_map(|line| line.strip_prefix("ciphers "))?;
    let (first, others) = ciphers.split_once(',')?;
    let mut others: Vec<&str> = others.split(',').collect();
    let quick = others.iter().position(|cipher| *cipher == QUICK)?;
    others.remove(quick);
    let all = [&[QUICK, first], &others[..]].concat();
    (first == SLOW).then(|| all.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_order_in_which_ssh_prefers_what_is_slow_is_changed() {
        let of = |ciphers: &str| reordered(&format!("user x\nciphers {ciphers}\nport 22\n"));
        assert_eq!(
            of("chacha20-poly1305@openssh.com,aes128-ctr,aes128-gcm@openssh.com,aes256-ctr"),
            Some(format!("{QUICK},{SLOW},aes128-ctr,aes256-ctr"))
        );
        for ciphers in [
            "aes256-gcm@openssh.com,chacha20-poly1305@openssh.com,aes128-gcm@openssh.com",
            "chacha20-poly1305@openssh.com",
            "chacha20-poly1305@openssh.com,aes256-gcm@openssh.com",
            "aes128-gcm@openssh.com",
            "",
        ] {
            assert_eq!(of(ciphers), None, "{ciphers}");
        }
        assert_eq!(reordered("bad option: -G\n"), None);
    }
}
