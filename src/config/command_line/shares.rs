//! Directories of the host's that the guest mounts.

use super::controllers::virtio_device;
use super::json::Pairs;
use super::line::{Line, id};
use super::{SideCommand, SideKind, memory};
use crate::config::domain::Domain;
use crate::config::domain::shares::{AccessMode, Share, ShareDriver};

/// Adds the shares.
pub(super) fn shares(line: &mut Line<'_>, domain: &Domain) {
    for share in &domain.devices.shares {
        match share.driver {
            ShareDriver::Path => nine_p(line, share),
            ShareDriver::VirtioFs => virtiofs(line, domain, share),
            ShareDriver::Handle => line.error(
                &share.info,
                "QEMU shares by handle no more",
                Some("use <driver type='path'/>"),
            ),
        }
    }
}

fn nine_p(line: &mut Line<'_>, share: &Share) {
    let alias = id(&share.info);
    let Some(directory) = &share.directory else {
        return line.error(&share.info, "9p shares a directory", None);
    };
    let model = match share.access {
        Some(AccessMode::Passthrough) | None => "passthrough",
        Some(AccessMode::Mapped) => "mapped",
        Some(AccessMode::Squash) => "none",
    };
    let name = format!("fsdev-{alias}");
    let backend = Pairs::new("local")
        .with("security_model", model)
        .with_some(
            "multidevs",
            share
                .multi_devices
                .as_deref()
                .filter(|word| *word != "default"),
        )
        .with_some("fmode", share.file_mode.as_deref())
        .with_some("dmode", share.directory_mode.as_deref())
        .with_some("writeout", share.write_policy.as_deref())
        .with("id", &name)
        .with("path", directory)
        .with_switch("readonly", share.read_only.then_some(true));
    line.pairs("fsdev", backend);
    let device = virtio_device("virtio-9p", share.model, share.virtio)
        .with("fsdev", name)
        .with("mount_tag", share.tag.as_str());
    line.device(device, &share.info);
}

fn virtiofs(line: &mut Line<'_>, domain: &Domain, share: &Share) {
    memory::needs_sharing(line, domain, &share.info);
    let alias = id(&share.info);
    let socket = match (&share.socket, &share.directory) {
        (Some(socket), _) => socket.clone(),
        (None, Some(directory)) => virtiofsd(line, share, directory),
        (None, None) => return,
    };
    let chardev = format!("chr-vu-{alias}");
    line.pairs(
        "chardev",
        Pairs::new("socket")
            .with("id", &chardev)
            .with("path", socket),
    );
    let device = virtio_device("vhost-user-fs", None, share.virtio)
        .with("chardev", chardev)
        .with("tag", share.tag.as_str())
        .with_some("queue-size", share.queue_size);
    line.device(device, &share.info);
}

/// Has virtiofsd run; its socket.
fn virtiofsd(line: &mut Line<'_>, share: &Share, directory: &str) -> String {
    let alias = id(&share.info);
    let socket = format!("{}/{alias}.virtiofs", line.context.directory);
    let program = virtiofsd_of(share, &line.context.virtiofsd).to_owned();
    let mut argv = vec![program.clone(), format!("--socket-path={socket}")];
    match line.context.virtiofsds_in_c.contains(&program) {
        true => argv.extend(options_in_c(line, share, directory)),
        false => argv.extend(options(line, share, directory)),
    }
    line.side_commands.push(SideCommand {
        kind: SideKind::Virtiofsd,
        alias: alias.to_owned(),
        argv,
        socket: socket.clone(),
        directories: Vec::new(),
    });
    socket
}

/// The virtiofsd that a share asks for; `usual` is the one that this host has.
pub fn virtiofsd_of<'a>(share: &'a Share, usual: &'a str) -> &'a str {
    share.binary.path.as_deref().unwrap_or(usual)
}

/// What the virtiofsd in Rust is told.
fn options(line: &mut Line<'_>, share: &Share, directory: &str) -> Vec<String> {
    let binary = &share.binary;
    let mut options = vec![format!("--shared-dir={directory}")];
    let values = [
        ("cache", binary.cache.clone()),
        ("sandbox", binary.sandbox.clone()),
        (
            "thread-pool-size",
            binary.thread_pool_size.map(|it| it.to_string()),
        ),
        ("rlimit-nofile", binary.open_files.map(|it| it.to_string())),
    ];
    for (name, value) in values {
        options.extend(value.map(|value| format!("--{name}={value}")));
    }
    for (is_group, guest, host, count) in &share.id_map {
        let name = if *is_group { "gid" } else { "uid" };
        options.push(format!("--{name}-map=:{guest}:{host}:{count}:"));
    }
    if binary.xattr == Some(true) {
        options.push("--xattr".to_owned());
    }
    if share.read_only {
        options.push("--readonly".to_owned());
    }
    if binary.posix_lock == Some(true) || binary.flock == Some(true) {
        line.warning(
            &share.info,
            "locks on the host are not virtiofsd's any more",
        );
    }
    options
}

/// What the virtiofsd in C is told, as far as it has words for it.
fn options_in_c(line: &mut Line<'_>, share: &Share, directory: &str) -> Vec<String> {
    let binary = &share.binary;
    if directory.contains(',') {
        let why = "the virtiofsd that came with QEMU cannot be told a path with a comma in it";
        line.error(&share.info, why, None);
    }
    if share.read_only || !share.id_map.is_empty() {
        let what = if share.read_only {
            "<readonly/>"
        } else {
            "<idmap>"
        };
        let why = format!("the virtiofsd that came with QEMU has no {what}");
        let try_ = "name the one that took its place: <binary path='/usr/libexec/virtiofsd'/>";
        line.error(&share.info, why, Some(try_));
    }
    let mut words = vec![format!("source={directory}")];
    words.extend(binary.cache.as_ref().map(|mode| format!("cache={mode}")));
    words.extend(
        binary
            .sandbox
            .as_ref()
            .map(|mode| format!("sandbox={mode}")),
    );
    for (name, is_on) in [
        ("xattr", binary.xattr),
        ("posix_lock", binary.posix_lock),
        ("flock", binary.flock),
    ] {
        words.extend(is_on.map(|is_on| match is_on {
            true => name.to_owned(),
            false => format!("no_{name}"),
        }));
    }
    let mut options = vec!["-f".to_owned(), "-o".to_owned(), words.join(",")];
    for (name, value) in [
        ("thread-pool-size", binary.thread_pool_size.map(u64::from)),
        ("rlimit-nofile", binary.open_files),
    ] {
        options.extend(value.map(|value| format!("--{name}={value}")));
    }
    options
}
