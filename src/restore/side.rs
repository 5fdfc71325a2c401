//! The programs that worked for the saved guest beside QEMU, for the restored one.
//!
//! They are started anew, in the guest's new directory. What the emulator of a TPM keeps is in the stream: QEMU hands it over
//! while it loads, before the guest runs, so its directory may be empty or hold something later, and a clone gets one of its
//! own.
//!
//! Source: QEMU `backends/tpm/tpm_emulator.c`, `tpm_emulator_post_load`; seen with swtpm 0.7 and QEMU 10.0.

use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use crate::config::{Arguments, Remap, ResourceKind, ResourceTable, passt};
use crate::container::manifest::SideProgram as Saved;
use crate::host;
use crate::supervise::SideProgram;

/// What stands for the guest's directory as long as it has none.
pub const PLACE: &str = "/nonexistent";

/// The programs for a guest that has this directory and is started by this command: those that worked for it and that the
/// command still connects to, and those that a remap asks for. With `is_passing` what they keep lies there too, and ends
/// with it.
pub fn programs_for(
    command: &[String],
    saved: &[Saved],
    directory: &Path,
    is_passing: bool,
) -> Vec<SideProgram> {
    let mut programs = programs_at(saved, directory, is_passing);
    let is_named = |socket: &str| command.iter().any(|word| word.contains(socket));
    programs.retain(|program| is_named(&program.socket.display().to_string()));
    let Ok(arguments) = Arguments::parse(command) else {
        return programs;
    };
    for own in passt::own(&arguments, &directory.display().to_string()) {
        let socket = PathBuf::from(&own.socket);
        if programs.iter().any(|program| program.socket == socket) {
            continue;
        }
        let mut argv = passt::command("passt", &own.socket, geteuid().is_root());
        argv.extend(own.addresses);
        programs.push(SideProgram {
            name: own.id,
            argv,
            socket,
            state: None,
        });
    }
    programs
}

/// Moves what emulators of TPMs keep to where remaps say, and gives the other remaps.
pub fn move_states(saved: &mut [Saved], remaps: Vec<Remap>, table: &ResourceTable) -> Vec<Remap> {
    let mut is_other = |remap: &Remap| {
        let mut is_moved = false;
        for program in saved.iter_mut() {
            let mut tpms = table.of(ResourceKind::Tpm);
            let tpm = tpms.find(|tpm| tpm.backend.path.as_ref() == Some(&program.socket));
            let (Some(tpm), Some(state)) = (tpm, program.state.clone()) else {
                continue;
            };
            let Some(moved) = remap.moved_state(tpm, &state, &host::is_socket) else {
                continue;
            };
            for word in program.argv.iter_mut().skip(1) {
                *word = word.replace(&state, &moved);
            }
            program.state = Some(moved);
            is_moved = true;
        }
        !is_moved
    };
    remaps.into_iter().filter(|it| is_other(it)).collect()
}

/// The saved programs for a guest that has this directory. With `is_passing` what they keep lies there too, and ends with it.
fn programs_at(saved: &[Saved], directory: &Path, is_passing: bool) -> Vec<SideProgram> {
    let programs = saved
        .iter()
        .map(|one| program_at(one, directory, is_passing));
    programs.collect()
}

fn program_at(saved: &Saved, directory: &Path, is_passing: bool) -> SideProgram {
    let file_name = Path::new(&saved.socket).file_name().unwrap_or_default();
    let socket = directory.join(file_name);
    let state = saved.state.as_ref().map(|state| match is_passing {
        true => directory.join(format!("{}.state", saved.name)),
        false => PathBuf::from(state),
    });
    let mut argv = saved.argv.clone();
    for word in argv.iter_mut().skip(1) {
        *word = word.replace(&saved.socket, &socket.display().to_string());
        if let (Some(old), Some(new)) = (&saved.state, &state) {
            *word = word.replace(old, &new.display().to_string());
        }
    }
    SideProgram {
        name: saved.name.clone(),
        argv,
        socket,
        state,
    }
}

/// Whether a path is that of a socket in the guest's new directory on which one of these programs will listen.
pub fn is_own_socket(saved: &[Saved], path: &str) -> bool {
    let in_place = Path::new(path).strip_prefix(PLACE).ok();
    in_place.is_some_and(|name| {
        if name.extension().is_some_and(|it| it == "passt") {
            return true;
        }
        let mut sockets = saved.iter().map(|one| Path::new(&one.socket).file_name());
        sockets.any(|socket| socket == Some(name.as_os_str()))
    })
}

/// What an image of a stranger would start, a line each.
pub fn shown(saved: &[Saved]) -> impl Iterator<Item = String> {
    saved
        .iter()
        .map(|one| format!("program {}", one.argv.join(" ")))
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::*;

    #[test]
    fn a_program_moves_with_its_guest_and_a_clone_gets_its_own() {
        let saved = Saved {
            name: "tpm0".to_owned(),
            argv: [
                "swtpm",
                "dir=/state/web",
                "path=/run/vmstow/web/tpm0.sock,mode=0600",
            ]
            .map(str::to_owned)
            .to_vec(),
            socket: "/run/vmstow/web/tpm0.sock".to_owned(),
            state: Some("/state/web".to_owned()),
            other: Default::default(),
        };
        let moved = programs_at(slice::from_ref(&saved), Path::new("/r/web-2"), false);
        let words = [
            "swtpm",
            "dir=/state/web",
            "path=/r/web-2/tpm0.sock,mode=0600",
        ];
        assert_eq!(moved[0].argv, words);
        assert_eq!(moved[0].socket, Path::new("/r/web-2/tpm0.sock"));
        assert!(is_own_socket(
            slice::from_ref(&saved),
            "/nonexistent/tpm0.sock"
        ));
        assert!(!is_own_socket(
            slice::from_ref(&saved),
            "/run/vmstow/web/tpm0.sock"
        ));
        let cloned = programs_at(&[saved], Path::new("/r/c"), true);
        assert_eq!(cloned[0].argv[1], "dir=/r/c/tpm0.state");
        assert_eq!(
            cloned[0].state.as_deref(),
            Some(Path::new("/r/c/tpm0.state"))
        );
    }
}
