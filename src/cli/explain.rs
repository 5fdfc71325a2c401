//! `vmstow explain`

use std::io::Read;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Outcome;
use super::ui::{Ui, printable};
use crate::config::{Explanation, explain};
use crate::store::StoreError;

/// The longest text that is read from standard input, in bytes.
const TEXT_LIMIT: u64 = 16 << 20;

/// Say in other words why QEMU or libvirt did not load a guest
///
/// Takes a message, or a whole log on standard input, and tells for each line that is known what it means and what to
/// do. Without a known line the exit code is 1.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The message; `-` reads standard input
    #[arg(required = true, allow_hyphen_values = true)]
    text: Vec<String>,
}

/// Prints the explanations.
pub fn run(args: &ExplainArgs, ui: &Ui) -> Outcome {
    let text = match args.text.as_slice() {
        [only] if only == "-" => read_stdin()?,
        words => words.join(" "),
    };
    let explanations = explain(&text);
    ui.answer(&json!({ "explanations": explanations }), |_| {
        human(&explanations)
    })?;
    Ok(match explanations.is_empty() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

fn read_stdin() -> Result<String, StoreError> {
    let mut bytes = Vec::new();
    let read = std::io::stdin().take(TEXT_LIMIT).read_to_end(&mut bytes);
    read.map_err(|source| StoreError::File {
        act: "read",
        path: "standard input".into(),
        source,
    })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn human(explanations: &[Explanation]) -> String {
    let paragraph = |one: &Explanation| {
        let line = printable(&one.line);
        let (cause, remedy) = (printable(&one.cause), printable(&one.remedy));
        format!("{line} [{}]\n  why: {cause}\n  try: {remedy}\n", one.code)
    };
    match explanations {
        [] => "nothing in this text is known\n".to_owned(),
        known => known.iter().map(paragraph).collect::<Vec<_>>().join("\n"),
    }
}
