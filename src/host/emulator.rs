//! What a QEMU binary tells by QMP when it runs no guest: how it expands a CPU model, with the accelerator that the guest
//! will have.
//!
//! The binary is started for the questions alone, with a machine that has nothing, and answers on its standard output.
//! Answers are kept as what the binary says of itself is, with an accelerator that looks at this host's CPU until the next
//! boot.
//!
//! Source: QEMU `qapi/machine-target.json`, `query-cpu-model-expansion`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::HostError;
use super::facts_cache;
use super::process::boot_id;

/// What is asked.
const ARGUMENTS: [&str; 9] = [
    "-machine",
    "none",
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-S",
    "-qmp",
    "stdio",
];

/// A CPU model in QEMU's words: all of its properties, with their values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CpuExpansion {
    /// The model that it was expanded to: `base`, or the same.
    pub model: String,
    /// `avx2` → true, `vendor` → "GenuineIntel", …
    pub props: BTreeMap<String, Value>,
}

/// A CPU model as QEMU expands it with this accelerator: with `full` every property it has, with `static` those that make
/// it from a model that never changes.
///
/// # Errors
/// [`HostError::NotAnswered`] with QEMU's words: it lacks the model, or the accelerator cannot be used here.
pub fn expand_cpu(
    binary: &Path,
    accelerator: &str,
    kind: &str,
    model: &str,
) -> Result<CpuExpansion, HostError> {
    let question = json!({
        "execute": "query-cpu-model-expansion",
        "arguments": { "type": kind, "model": { "name": model } },
    });
    let boot = match accelerator {
        "tcg" => String::new(),
        _ => boot_id(),
    };
    let key = format!("cpu {accelerator} {kind} {model} {boot}");
    if let Some(kept) = facts_cache::kept_answer(binary, &key) {
        return Ok(kept);
    }
    let answer = ask(binary, accelerator, &question)?;
    let expansion: Expansion = serde_json::from_value(answer).map_err(|error| {
        let words = error.to_string();
        not_answered(binary, &question, words)
    })?;
    let expansion = CpuExpansion {
        model: expansion.model.name,
        props: expansion.model.props,
    };
    facts_cache::keep_answer(binary, &key, &expansion);
    Ok(expansion)
}

/// `{"model": {"name": "base", "props": {…}}}`
#[derive(Deserialize)]
struct Expansion {
    model: ExpandedModel,
}

#[derive(Deserialize)]
struct ExpandedModel {
    name: String,
    #[serde(default)]
    props: BTreeMap<String, Value>,
}

/// Starts the binary, asks it one thing and lets it end.
fn ask(binary: &Path, accelerator: &str, question: &Value) -> Result<Value, HostError> {
    let not_run = |source| HostError::File {
        act: "run",
        path: binary.to_owned(),
        source,
    };
    let mut command = Command::new(binary);
    command.args(["-accel", accelerator]).args(ARGUMENTS);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command.stderr(Stdio::piped());
    let mut child = command.spawn().map_err(not_run)?;
    let mut said = json!({ "execute": "qmp_capabilities" }).to_string();
    for line in [question.clone(), json!({ "execute": "quit" })] {
        said.push_str(&format!("\n{line}"));
    }
    said.push('\n');
    if let Some(mut input) = child.stdin.take() {
        // A binary that ended has its reasons, which it tells.
        let _ = input.write_all(said.as_bytes());
    }
    let output = child.wait_with_output().map_err(not_run)?;
    let text = String::from_utf8_lossy(&output.stdout);
    // The second reply is the one to the question; the greeting and events are none.
    let replies = text.lines().filter_map(|line| {
        let reply: Value = serde_json::from_str(line).ok()?;
        (reply.get("return").is_some() || reply.get("error").is_some()).then_some(reply)
    });
    let mut reply = replies.skip(1).take(1);
    match reply.next() {
        Some(mut reply) if reply.get("return").is_some() => Ok(reply["return"].take()),
        Some(reply) => {
            let words = reply["error"]["desc"].as_str().unwrap_or_default();
            Err(not_answered(binary, question, words.to_owned()))
        }
        None => {
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(not_answered(binary, question, words))
        }
    }
}

fn not_answered(binary: &Path, question: &Value, words: String) -> HostError {
    let command = question["execute"].as_str().unwrap_or_default().to_owned();
    HostError::NotAnswered {
        path: binary.to_owned(),
        command,
        words,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::find_qemu;

    #[test]
    fn a_cpu_model_is_expanded_with_the_accelerator_asked_for() {
        let qemu = find_qemu().expect("QEMU (Debian package qemu-system-x86)");
        let model = expand_cpu(&qemu, "tcg", "full", "Nehalem").unwrap();
        assert_eq!(model.props["sse4.2"], Value::Bool(true), "{model:?}");
        assert_eq!(model.props["avx2"], Value::Bool(false), "{model:?}");
        let again = expand_cpu(&qemu, "tcg", "full", "Nehalem").unwrap();
        assert_eq!(again, model);
    }

    #[test]
    fn a_model_that_qemu_lacks_gives_its_words() {
        let qemu = find_qemu().expect("QEMU (Debian package qemu-system-x86)");
        let error = expand_cpu(&qemu, "tcg", "full", "Babbage").unwrap_err();
        assert!(
            matches!(&error, HostError::NotAnswered { words, .. } if words.contains("Babbage")),
            "{error:?}"
        );
    }

    #[test]
    fn a_program_that_is_no_qemu_does_not_answer() {
        let error = expand_cpu(Path::new("/bin/true"), "tcg", "full", "max").unwrap_err();
        assert!(matches!(error, HostError::NotAnswered { .. }), "{error:?}");
    }
}
