//! The words around an error: what failed, where, why, and what to try next.

use std::io;

use crate::config::compat::Finding;
use crate::config::{ConfigError, Explanation, Unmodelled, explain};
use crate::configure::ConfigureError;
use crate::container::ContainerError;
use crate::convert::ConvertError;
use crate::error::{Error, ErrorKind};
use crate::host::HostError;
use crate::image::{ForeignError, ImageError, ParentError};
use crate::memory::MemoryError;
use crate::pipeline::PipelineError;
use crate::qmp::QmpError;
use crate::relocate::MoveError;
use crate::restore::{RestoreError, ServeError};
use crate::run::RunError;
use crate::save::SaveError;
use crate::store::StoreError;
#[cfg(feature = "oci")]
use crate::store::registry::RegistryError;
use crate::store::remote::RemoteError;
use crate::store::web::WebError;
use crate::stream::StreamError;
use crate::supervise::SuperviseError;
use crate::transfer::TransferError;

/// The sentence behind `error:`.
pub fn headline(error: &Error, image: Option<&str>) -> String {
    let image = match image {
        Some("-") | None => "the image",
        Some(image) => image,
    };
    if let Some(ConfigError::Unsupported { .. }) = error.downcast_ref() {
        return format!("no guest can be made of the domain XML in {image}");
    }
    match container_error(error) {
        Some(ContainerError::NoFooter { .. } | ContainerError::TooShort { .. }) => {
            format!("{image} is not complete: {error}")
        }
        Some(
            ContainerError::UnsupportedVersion { .. }
            | ContainerError::UnknownIncompatible { .. }
            | ContainerError::UnknownCritical { .. },
        ) => {
            format!("{image} cannot be read by this program: {error}")
        }
        Some(ContainerError::Write { .. }) => format!("{image} could not be written"),
        Some(ContainerError::Twin { .. }) => {
            format!("a parent of {image} is damaged: {error}")
        }
        Some(_) if error.downcast_ref::<SaveError>().is_none() => {
            format!("{image} is damaged: {error}")
        }
        _ if is_damage_seen_by_server(error) => format!("{image} is damaged: {error}"),
        _ => other_headline(error, image),
    }
}

/// Whether the process that gives a guest its memory found the image damaged.
fn is_damage_seen_by_server(error: &Error) -> bool {
    matches!(error.downcast_ref(), Some(SuperviseError::Side(failed)) if failed.kind() == ErrorKind::Image)
}

fn other_headline(error: &Error, image: &str) -> String {
    match (error.downcast_ref(), error.downcast_ref()) {
        (Some(ImageError::BareStream), _) => {
            format!("{image} is not complete, or no image: {error}")
        }
        (Some(ImageError::NotAnImage | ImageError::LibvirtSave), _) => {
            format!("{image} cannot be used: {error}")
        }
        _ if error.downcast_ref::<ForeignError>().is_some() => {
            format!("{image} cannot be used: {error}")
        }
        (Some(ImageError::Read(_)), _) => format!("{image} cannot be used: {error}"),
        (_, Some(StreamError::Truncated { .. })) => {
            format!("{image} cannot be read to its end: {error}")
        }
        (_, Some(_)) => format!("{image} is not a migration stream we can read: {error}"),
        _ => error.to_string(),
    }
}

/// The place behind `at:`.
pub fn place(error: &Error) -> Option<String> {
    error.at()
}

/// The lines behind `why:`.
pub fn facts(error: &Error) -> Vec<String> {
    if let Some(ConfigError::Unsupported { elements }) = error.downcast_ref() {
        return elements.iter().map(unsupported).collect();
    }
    let mut facts = error.facts();
    for cause in error.causes().map(ToString::to_string) {
        if !facts.contains(&cause) {
            facts.push(cause);
        }
    }
    let explanations = explanations(error).into_iter();
    facts.extend(explanations.map(|one| format!("that is, {}", one.cause)));
    facts
}

/// What QEMU said that did not load a guest, in other words.
fn explanations(error: &Error) -> Vec<Explanation> {
    match (error.downcast_ref(), error.downcast_ref()) {
        (Some(RestoreError::QemuGaveUp { words, .. }), _) => explain(words),
        (_, Some(SuperviseError::EarlyExit { log, .. })) => explain(log),
        _ => Vec::new(),
    }
}

/// What stands in domain XML and cannot be honoured, with what to do about it.
fn unsupported(element: &Unmodelled) -> String {
    match &element.try_ {
        Some(advice) => format!("{element}: {advice}"),
        None => element.to_string(),
    }
}

/// What to do now, behind `try:`.
pub fn advice(error: &Error, image: Option<&str>) -> Option<String> {
    let image = image.filter(|image| *image != "-").unwrap_or("IMAGE");
    if let Some(advice) = error.downcast_ref().and_then(move_advice) {
        return Some(advice);
    }
    if let Some(advice) = error.downcast_ref().and_then(save_advice) {
        return Some(advice);
    }
    if is_damage_seen_by_server(error) {
        return Some(format!(
            "copy the image again; `vmstow verify {image}` lists all that is damaged"
        ));
    }
    if let Some(first) = explanations(error).into_iter().next() {
        return Some(first.remedy);
    }
    if let Some(advice) = error.downcast_ref().and_then(parent_advice) {
        return Some(advice.to_owned());
    }
    let configure = error.downcast_ref();
    if let Some(advice) = configure.and_then(|error| configure_advice(error, image)) {
        return Some(advice);
    }
    match (error.downcast_ref(), error.downcast_ref()) {
        (Some(MemoryError::NoRegisters), _) => {
            return Some("give the root of the page tables with --cr3".to_owned());
        }
        (_, Some(PipelineError::PipedDelta)) => {
            return Some("write it to a file beside its parent first".to_owned());
        }
        (_, Some(PipelineError::Parent(_))) => {
            return Some(
                "save without --parent, or name another one; `vmstow verify` tells which is whole"
                    .to_owned(),
            );
        }
        (_, Some(PipelineError::NoMemory { .. })) => {
            return Some(format!(
                "`vmstow mem {image} map` lists where there is memory"
            ));
        }
        _ => {}
    }
    if let Some(advice) = error.downcast_ref().and_then(serve_advice) {
        return Some(advice.to_owned());
    }
    if let Some(advice) = error.downcast_ref().and_then(restore_advice) {
        return Some(advice);
    }
    if let Some(advice) = error.downcast_ref().and_then(run_advice) {
        return Some(advice.to_owned());
    }
    if let Some(advice) = error.downcast_ref().and_then(supervise_advice) {
        return Some(advice.to_owned());
    }
    if let Some(advice) = container_error(error).and_then(|error| container_advice(error, image)) {
        return Some(advice);
    }
    if let Some(TransferError::DeltaThere { .. }) = error.downcast_ref() {
        return Some("make a full image of it with `vmstow convert`, and copy that".to_owned());
    }
    if let Some(advice) = error.downcast_ref().and_then(remote_advice) {
        return Some(advice.to_owned());
    }
    if let Some(advice) = error.downcast_ref().and_then(web_advice) {
        return Some(advice);
    }
    #[cfg(feature = "oci")]
    if let Some(advice) = error.downcast_ref().and_then(registry_advice) {
        return Some(advice.to_owned());
    }
    if let Some(advice) = error.downcast_ref().and_then(foreign_advice) {
        return Some(advice);
    }
    if let Some(advice) = error.downcast_ref().and_then(convert_advice) {
        return Some(advice.to_owned());
    }
    let text = match (
        error.downcast_ref::<HostError>(),
        error.downcast_ref::<StoreError>(),
        error.downcast_ref::<ConfigError>(),
    ) {
        (Some(HostError::NoMonitor { .. }), ..) => {
            "start QEMU with -qmp unix:/path/to/monitor.sock,server=on,wait=off, then use qmp:/path/to/monitor.sock"
        }
        (Some(HostError::NoListener { .. }), ..) => {
            "vmstow has to run on the guest's host, as the guest's user or as root"
        }
        (Some(HostError::NoQemu { .. }), ..) => {
            "install QEMU (Debian: qemu-system-x86), or name one with --qemu"
        }
        (Some(HostError::NoProgram { program, .. }), ..) => return Some(install(program)),
        (Some(HostError::NoQemuImg), ..) => "install it (Debian: qemu-utils)",
        (Some(HostError::NoOverlay { words, .. }), ..) if words.contains("lock") => {
            "end that guest, or give this one a copy of the disk with --remap disk:ID=PATH"
        }
        (Some(HostError::NoSuchGuest { .. }), ..) => {
            "`vmstow list` shows the guests that vmstow runs"
        }
        (_, Some(StoreError::Exists { .. }), _) => "choose another name, or give --replace",
        (_, Some(StoreError::InUse { .. }), _) => {
            "`vmstow list` shows the guests: end those that run on it, or change a copy of it"
        }
        (_, Some(StoreError::BeingChanged { .. } | StoreError::BeingMade { .. }), _) => {
            "wait until that has ended"
        }
        (_, Some(StoreError::FarAway { .. }), _) => {
            "use a file of this host; `vmstow copy` brings images here and there"
        }
        (_, Some(StoreError::Terminal), _) => "name a file, or pipe the output somewhere",
        (.., Some(ConfigError::Refused { .. })) => "`vmstow inspect` lists what the guest has",
        _ => return image_advice(error, image).or_else(|| busy(error)),
    };
    Some(text.to_owned())
}

fn remote_advice(error: &RemoteError) -> Option<&'static str> {
    match error {
        RemoteError::Start { .. } => {
            Some("install it (Debian: openssh-client), or name another with VMSTOW_SSH")
        }
        RemoteError::Ended { .. } => Some("run the command again: it goes on where it stopped"),
        RemoteError::NoGreeting { .. } => Some(
            "see that `ssh HOST vmstow --version` works and prints nothing else; VMSTOW_REMOTE_PROGRAM names vmstow's path there",
        ),
        RemoteError::NoCommonVersion { .. } => Some("install the same version on both hosts"),
        RemoteError::BrokenRule { .. } => None,
        RemoteError::Refused { words, .. } => {
            let exists = words
                .first()
                .is_some_and(|first| first.ends_with(" exists"));
            exists.then_some("choose another name, or give --replace")
        }
    }
}

fn web_advice(error: &WebError) -> Option<String> {
    let s3 = |there: &str| there.starts_with("s3://");
    let keys = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile of ~/.aws/credentials that has keys";
    Some(match error {
        WebError::Unreachable { .. } => {
            "is the address right, and the server up? That of an object store stands in AWS_ENDPOINT_URL".to_owned()
        }
        WebError::Broken { .. } => "run the command again: a copy goes on where it stopped".to_owned(),
        WebError::Vanished { there } => format!("see what became of {there}"),
        WebError::Changed { .. } => "run the command again".to_owned(),
        WebError::NoCredentials { .. } => keys.to_owned(),
        WebError::Denied { words, .. } if words.say(&["InvalidAccessKeyId", "NotSignedUp"]) => {
            "AWS_ACCESS_KEY_ID, or the profile's, is not known there: is AWS_ENDPOINT_URL that of the right store?".to_owned()
        }
        WebError::Denied { words, .. } if words.say(&["SignatureDoesNotMatch"]) => {
            "AWS_SECRET_ACCESS_KEY, or the profile's, does not belong to the access key".to_owned()
        }
        WebError::Denied { words, .. } if words.say(&["RequestTimeTooSkewed"]) => {
            "set this host's clock".to_owned()
        }
        WebError::Denied { there, .. } if s3(there) => {
            "whose keys these are has to be allowed to read (s3:GetObject), and to copy there (s3:PutObject)".to_owned()
        }
        WebError::Denied { .. } => {
            "name and password may stand in the address: https://NAME:PASSWORD@HOST/PATH".to_owned()
        }
        WebError::OtherRegion { region, .. } => {
            format!("set AWS_REGION={}", region.as_deref().unwrap_or("REGION"))
        }
        WebError::NoBucket { .. } => "make the bucket first, or see that its name and AWS_ENDPOINT_URL are right".to_owned(),
        WebError::NoRanges { there } => {
            format!("bring it here as a whole first: curl -o FILE '{there}'")
        }
        WebError::Exists { .. } => "choose another name, or give --replace".to_owned(),
        WebError::UploadEnded { .. } => "run the command again, unless somebody else copies to the same place".to_owned(),
        WebError::Setting { .. }
        | WebError::Missing { .. }
        | WebError::TooLarge { .. }
        | WebError::Status { .. }
        | WebError::Nonsense { .. } => return None,
    })
}

#[cfg(feature = "oci")]
fn registry_advice(error: &RegistryError) -> Option<&'static str> {
    match error {
        RegistryError::Unreachable { .. } => {
            Some("run the command again once it can be reached: a copy goes on where it stopped")
        }
        RegistryError::NoRegistry { .. } => Some(
            "SSL_CERT_FILE names certificates to be trusted, VMSTOW_INSECURE_REGISTRIES registries that have no TLS",
        ),
        RegistryError::Denied { user: None, .. } => Some(
            "log in there with `podman login`, `skopeo login` or `docker login`; REGISTRY_AUTH_FILE names another file of credentials",
        ),
        RegistryError::Denied { .. } => {
            Some("log in there as somebody who may, and with the right password")
        }
        RegistryError::NotFound { .. } => {
            Some("`skopeo list-tags docker://REGISTRY/NAME` lists what is there")
        }
        RegistryError::Exists { .. } => Some("choose another tag, or give --replace"),
        RegistryError::Gone { .. } => {
            Some("copy the image there again: it was deleted, or thrown away by the registry")
        }
        RegistryError::OtherBytes { .. } => Some(
            "copy the image to another registry from where it came: the storage of this one is damaged",
        ),
        _ => None,
    }
}

fn parent_advice(error: &ParentError) -> Option<&'static str> {
    Some(match error {
        ParentError::Missing { .. } => {
            "put that image beside it, under any name that ends in .stow, or name its directory with VMSTOW_PARENTS"
        }
        ParentError::TooLong { .. } => {
            "make a full image of one of them with `vmstow convert`, and go on from that"
        }
        ParentError::Layout { .. } => "leave out --layout, or --parent",
        ParentError::TargetThere { .. } => "leave --parent away, or save into a file",
        ParentError::Replaced { .. } => "give the new image another name",
        ParentError::SameSave => "name an earlier image as the parent",
        ParentError::Pipe => "name a file as the parent",
    })
}

fn configure_advice(error: &ConfigureError, image: &str) -> Option<String> {
    Some(match error {
        ConfigureError::SeenByGuest { .. } => {
            "leave these as they are; to change what the guest sees, change it while it runs and save it again".to_owned()
        }
        ConfigureError::NotCarried { .. } => {
            "leave these as they are, and give the backend at the restore with --remap".to_owned()
        }
        ConfigureError::Torn { .. } => format!("vmstow repair {image}"),
        ConfigureError::Pipe => "write it to a file first".to_owned(),
        ConfigureError::Unknown { .. } => {
            format!("`vmstow config {image} get` prints the XML, with --labels the labels")
        }
        _ => return None,
    })
}

fn foreign_advice(error: &ForeignError) -> Option<String> {
    Some(match error {
        ForeignError::Incomplete => {
            "wait for `virsh save` to end; if that was killed, nothing tells how much of the guest is in it".to_owned()
        }
        ForeignError::NoProgram { program, .. } => install(program),
        ForeignError::Decompress(_) | ForeignError::OtherFormat { .. } => {
            "copy the file again: it is damaged or cut off".to_owned()
        }
        ForeignError::Temporary(_) => {
            "make room there, or name another directory with TMPDIR".to_owned()
        }
        ForeignError::UnknownFormat { .. } | ForeignError::UnknownVersion { .. } => {
            "let libvirt restore it and save it in another format: `virsh save --image-format raw`".to_owned()
        }
        _ => return None,
    })
}

fn convert_advice(error: &ConvertError) -> Option<&'static str> {
    Some(match error {
        ConvertError::HasXml => {
            "convert it without --xml; `vmstow config NEW replace FILE` changes the XML of an image"
        }
        ConvertError::NoXml => "give the domain XML with --xml FILE",
        ConvertError::NoPlaces => "name a file",
        ConvertError::Misplaced { .. } => "`vmstow convert --help` tells what each option is for",
        _ => return None,
    })
}

fn image_advice(error: &Error, image: &str) -> Option<String> {
    match error.downcast_ref()? {
        ImageError::BareStream => Some(format!(
            "`vmstow inspect {image}` reads a bare stream, `vmstow convert {image} NEW.stow --xml FILE` makes an image of it; if this was an image with --layout raw, it was cut off: copy it again"
        )),
        ImageError::LibvirtSave => Some(format!(
            "`vmstow convert {image} NEW.stow` makes an image of it"
        )),
        ImageError::NotAnImage | ImageError::Read(_) => None,
    }
}

fn busy(error: &Error) -> Option<String> {
    match error.downcast_ref()? {
        QmpError::MonitorBusy { .. } => Some("end the other client, or give QEMU one more monitor: -qmp unix:/path/to/other.sock,server=on,wait=off".to_owned()),
        QmpError::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            Some("run vmstow as the guest's user or as root".to_owned())
        }
        QmpError::Connect { .. } => Some("is the guest running, and is that the socket of its -qmp option?".to_owned()),
        _ => None,
    }
}

fn container_error(error: &Error) -> Option<&ContainerError> {
    if let Some(RestoreError::Damaged { why, .. }) = error.downcast_ref() {
        return container_error(why);
    }
    match error.downcast_ref() {
        Some(PipelineError::Container(error)) => Some(error),
        _ => error.downcast_ref(),
    }
}

fn container_advice(error: &ContainerError, image: &str) -> Option<String> {
    Some(match error {
        ContainerError::NoFooter { .. } | ContainerError::TooShort { .. } => {
            "the save is still running or was cut off; wait for it or save again".to_owned()
        }
        ContainerError::HashMismatch { .. }
        | ContainerError::ChunkCrc { .. }
        | ContainerError::NotAFrame { .. }
        | ContainerError::DataSection { .. }
        | ContainerError::RawLength { .. } => {
            format!("copy the image again; `vmstow verify {image}` lists every damaged chunk")
        }
        ContainerError::Twin { .. } => format!(
            "copy that parent again; `vmstow verify {image}` lists every chunk that lacks something"
        ),
        ContainerError::NoParent { .. } => {
            "put the parent beside it, or name its directory with VMSTOW_PARENTS".to_owned()
        }
        ContainerError::UnsupportedVersion { .. }
        | ContainerError::UnknownIncompatible { .. }
        | ContainerError::UnknownCritical { .. } => "use a newer vmstow".to_owned(),
        ContainerError::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            "make room, or save to another place".to_owned()
        }
        ContainerError::Read { .. } | ContainerError::Write { .. } => return None,
        _ => "copy the image again from where it came".to_owned(),
    })
}

fn move_advice(error: &MoveError) -> Option<String> {
    Some(match error {
        MoveError::NotMoved { why, .. } => return advice(why, None),
        MoveError::Unknown { .. } => {
            "run the same command again: it asks the other host, and settles it; if that is gone for good, and the guest \
             with it, `vmstow move GUEST --settle --stays-here`"
                .to_owned()
        }
        MoveError::Lost { .. } => {
            "look there what became of it; then let it run on here (QMP cont), or end it (`vmstow stop`)".to_owned()
        }
        MoveError::Unserved { .. } => "run the same command again, soon: the guest stands still when it needs what it lacks".to_owned(),
        MoveError::Unsettled { .. } => "`vmstow move GUEST --settle` settles that one".to_owned(),
        MoveError::NotEnded { .. } => "run the same command again, or end that QEMU by its monitor".to_owned(),
        MoveError::RunsTwice { .. } => "end one of them, at once: they write to the same disks".to_owned(),
        MoveError::NotPutBack { .. } => "`vmstow move GUEST --settle` tries it again".to_owned(),
        _ => return None,
    })
}

fn save_advice(error: &SaveError) -> Option<String> {
    Some(match error {
        SaveError::NotSaved { why, .. } => return advice(why, None),
        SaveError::MigrationActive { .. } => "wait until that migration has ended, or cancel it (QMP migrate_cancel)".to_owned(),
        SaveError::LacksMemory { .. } => "wait until `vmstow list` shows 100 % of its memory".to_owned(),
        SaveError::BeingSaved { .. } => "wait until that save has ended".to_owned(),
        SaveError::Blocked { .. } => "detach the device, save, attach it again after the restore".to_owned(),
        SaveError::NotRestorable { .. } => "start the guest without these arguments, or save it with a tool that keeps what they refer to".to_owned(),
        SaveError::NotRunning { .. } => "let it run (QMP cont), or save it without --live".to_owned(),
        SaveError::LiveUnknown { .. } => "save it without --live; QEMU 6.0 and later can let a guest run on".to_owned(),
        SaveError::LiveDisks { .. } => "give --disk-snapshot: its disks stay as they are, and it goes on in overlays over them".to_owned(),
        SaveError::NoSnapshot { .. } => "save it without --live".to_owned(),
        SaveError::LiveRefused { .. } => "`vmstow doctor` tells of userfaultfd, which this needs; without --live the guest is stopped, which always works".to_owned(),
        SaveError::LivePublishUnknown { .. } => "look whether the image is there and verifies".to_owned(),
        SaveError::ThrowawayDisks { .. } => "restore the image without --throwaway; that guest can be saved".to_owned(),
        SaveError::RunState { state: crate::qmp::RunState::Postmigrate, .. } => {
            "it was migrated and its other copy may run; if not, give --from-postmigrate".to_owned()
        }
        SaveError::RunState { .. } => "wait until that is over (QMP query-status tells), then save".to_owned(),
        SaveError::NoSpace { .. } => "make room, or use --layout zstd".to_owned(),
        SaveError::MigrationFailed { words: Some(words), .. } if words.contains("vhost-user-fs") => {
            "the virtiofsd behind the share cannot hand over its state: one of version 1.11 or later can, with QEMU 8.2 or later".to_owned()
        }
        SaveError::MigrationFailed { .. } => "QEMU's own log may say more; then save again".to_owned(),
        SaveError::Resumed | SaveError::MigratedElsewhere => "make sure that nothing else steers this guest, then save again".to_owned(),
        SaveError::DeviceState | SaveError::Buffer { .. } => "save with --capture migration".to_owned(),
        SaveError::DiskInUse { .. } => "end block jobs and exports of its disks, then save again".to_owned(),
        SaveError::TimedOut { .. } => "give a longer --timeout".to_owned(),
        SaveError::PublishUnknown { .. } => "look whether the image is there and verifies: then end the guest's QEMU, else let it run on (QMP cont)".to_owned(),
        SaveError::Then { .. } => "tell QEMU yourself, by its monitor".to_owned(),
        SaveError::NotASource { .. } => "vmstow save qmp:/path/to/monitor.sock IMAGE".to_owned(),
        _ => return None,
    })
}

/// Where a program that works for guests comes from.
fn install(program: &str) -> String {
    let name = program.rsplit('/').next().unwrap_or(program);
    format!("install it (Debian: {name})")
}

fn run_advice(error: &RunError) -> Option<&'static str> {
    match error {
        RunError::NameTaken { .. } => Some("give this one another name with --name"),
        RunError::OwnArguments { .. } => {
            Some("give --trust if you trust whoever wrote them, or take them out")
        }
        RunError::Untrusted { .. } => Some(
            "if you trust whoever made the image, give --trust; else give each resource with --remap",
        ),
        RunError::NoTemplate { .. } => Some("name one with <nvram template='…'>"),
        _ => None,
    }
}

fn supervise_advice(error: &SuperviseError) -> Option<&'static str> {
    match error {
        SuperviseError::NotAConsole { .. } => Some(
            "give the port a backend that one can connect to: <serial type='pty'/>, or --remap chardev:ID=pty",
        ),
        SuperviseError::ConsoleInUse { .. } => Some("end the other connection"),
        SuperviseError::GuestEnded { .. } => {
            Some("`vmstow list` shows the guests that vmstow runs")
        }
        _ => None,
    }
}

fn serve_advice(error: &ServeError) -> Option<&'static str> {
    match error {
        ServeError::NoTask => {
            Some("only a guest that was restored with --lazy can be gone on with")
        }
        ServeError::NoPageMap => Some("restore without --lazy"),
        ServeError::OtherImage { .. } => Some("put the image back where it was"),
        _ => None,
    }
}

fn restore_advice(error: &RestoreError) -> Option<String> {
    Some(match error {
        RestoreError::Untrusted { .. } => {
            "if you trust whoever made the image, give --trust, or put their key into ~/.config/vmstow/allowed_signers; else give each resource with --remap".to_owned()
        }
        RestoreError::CannotRun { findings, .. } => {
            let advice: Vec<String> = findings.iter().filter_map(Finding::advice).collect();
            match advice.as_slice() {
                [] => return None,
                [only] if findings.len() == 1 => only.clone(),
                _ => "give the flag behind each reason that has one".to_owned(),
            }
        }
        RestoreError::NoConfiguration { .. } => "`vmstow convert IMAGE NEW --xml FILE` gives it one: the domain XML of the guest, as it was when it was saved".to_owned(),
        RestoreError::NoDirectory { .. } => "make the directory; the guest's relative paths start there".to_owned(),
        RestoreError::QemuGaveUp { .. } | RestoreError::NotLoaded => "use the QEMU that the guest was saved from, or a newer one, with --qemu".to_owned(),
        RestoreError::NotMapped { .. } => "vmstow convert IMAGE OUT --layout mapped, then restore OUT; or restore without --map".to_owned(),
        RestoreError::HeadDiffers { .. } => "its configuration was changed since the save: restore it without --trust, or from a file".to_owned(),
        RestoreError::NotForced { .. } => "`vmstow check IMAGE` tells what would help".to_owned(),
        RestoreError::UnknownCode { .. } => "`vmstow check IMAGE` tells each reason with its code".to_owned(),
        RestoreError::MappedPipe => "write it to a file first, or restore without --map".to_owned(),
        RestoreError::NotStarted { source, .. } if source.to_string().contains("lock") => {
            "another QEMU uses this disk: end it, or give this guest a disk of its own with --remap disk:ID=PATH".to_owned()
        }
        RestoreError::Clone { why, .. } => return advice(why, None),
        RestoreError::SharedDisks { .. } => "give --throwaway, which lays an overlay over each disk".to_owned(),
        RestoreError::UnknownFormat { disk, .. } => {
            format!("name its file with --remap disk:{disk}=PATH, without --throwaway")
        }
        RestoreError::ImageReplaced => "run the command again".to_owned(),
        RestoreError::Unserved { guest, .. } => format!("go on with `vmstow restore --resume {guest}`"),
        RestoreError::Frozen { guest, .. } => {
            format!("end it with `vmstow stop {guest}`, and restore it from another copy of the image")
        }
        RestoreError::Ended { .. } => "restore it from its image again; what it did since is lost".to_owned(),
        RestoreError::CutOffClone { guest } => {
            format!("forget it with `vmstow stop {guest}`, and make the clones once more")
        }
        RestoreError::NotLazy { .. } => "restore without --lazy".to_owned(),
        RestoreError::TimedOut { .. } => "give a longer --timeout".to_owned(),
        _ => return None,
    })
}
