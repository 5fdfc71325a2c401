//! What of a guest's state a QEMU binary can read, as far as it tells: its `-dump-vmstate`.
//!
//! The binary writes a description of every device's state that it has, whether a guest uses it or not, and ends. What is
//! not a device (processors, timers, RAM) is not among them. The answer is kept as others are.
//!
//! Source: QEMU `migration/savevm.c`, `dump_vmstate_json_to_file`; seen with 7.2 and 10.0.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::HostError;
use super::facts_cache;

/// Names of descriptions of state, and of their subsections.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmstateNames {
    /// `i8259`, …
    pub descriptions: BTreeSet<String>,
    /// `i8259/ltim`, …
    pub subsections: BTreeSet<String>,
}

/// What this binary tells of the devices of a machine type, which takes it some 60 ms unless it was asked before.
///
/// # Errors
/// [`HostError::NotAnswered`] if it does not tell.
pub fn vmstate_names(binary: &Path, machine_type: &str) -> Result<VmstateNames, HostError> {
    let question = format!("vmstate {machine_type}");
    if let Some(kept) = facts_cache::kept_answer(binary, &question) {
        return Ok(kept);
    }
    let names = ask(binary, machine_type)?;
    facts_cache::keep_answer(binary, &question, &names);
    Ok(names)
}

fn ask(binary: &Path, machine_type: &str) -> Result<VmstateNames, HostError> {
    let mut command = Command::new(binary);
    command.args(["-accel", "tcg", "-machine", machine_type, "-nodefaults"]);
    command.args(["-dump-vmstate", "/dev/stdout"]);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    let output = command.output().map_err(|source| HostError::File {
        act: "run",
        path: binary.to_owned(),
        source,
    })?;
    let dump: Value = serde_json::from_slice(&output.stdout).map_err(|_| {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        HostError::NotAnswered {
            path: binary.to_owned(),
            command: "-dump-vmstate".to_owned(),
            words,
        }
    })?;
    let mut names = VmstateNames::default();
    names.gather(&dump);
    Ok(names)
}

impl VmstateNames {
    /// Descriptions stand as values of `Description`, subsections in arrays of that name; both nest.
    fn gather(&mut self, value: &Value) {
        match value {
            Value::Array(elements) => elements.iter().for_each(|element| self.gather(element)),
            Value::Object(members) => {
                for (key, member) in members {
                    let named = |value: &Value| value["name"].as_str().map(str::to_owned);
                    if key == "Description" {
                        self.descriptions.extend(named(member));
                    }
                    if let ("Subsections", Value::Array(subsections)) = (key.as_str(), member) {
                        self.subsections
                            .extend(subsections.iter().filter_map(named));
                    }
                    self.gather(member);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::find_qemu;

    #[test]
    fn qemu_tells_the_parts_of_its_devices_state() {
        let qemu = find_qemu().expect("QEMU (Debian package qemu-system-x86)");
        let names = vmstate_names(&qemu, "q35").unwrap();
        assert!(names.descriptions.contains("i8259"), "{names:?}");
        assert!(names.subsections.contains("i8259/ltim"), "{names:?}");
        assert!(
            names
                .subsections
                .contains("mc146818rtc/irq_reinject_on_ack_count"),
            "{names:?}"
        );
    }

    #[test]
    fn a_program_that_is_no_qemu_tells_nothing() {
        let error = vmstate_names(Path::new("/bin/true"), "q35").unwrap_err();
        assert!(matches!(error, HostError::NotAnswered { .. }), "{error:?}");
    }
}
