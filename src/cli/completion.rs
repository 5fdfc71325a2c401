//! `vmstow completion` and `vmstow man`: what shells and `man` want to know, from the same source as `--help`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Command};

use super::Outcome;
use crate::store::StoreError;

/// Print a completion script for a shell
///
/// For bash: vmstow completion bash > /etc/bash_completion.d/vmstow
#[derive(Debug, Args)]
pub struct CompletionArgs {
    /// The shell
    shell: clap_complete::Shell,
}

/// Write the man pages into a directory
///
/// One page a subcommand: vmstow.1, vmstow-save.1, …
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Where to write them
    directory: PathBuf,
}

/// Prints the script.
pub fn run(args: &CompletionArgs, mut command: Command) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "vmstow", &mut script);
    let written = std::io::stdout().lock().write_all(&script);
    written.map_err(|source| StoreError::Pipe {
        act: "write",
        source,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the pages.
pub fn run_man(args: &ManArgs, command: Command) -> Outcome {
    let error = |source| StoreError::File {
        act: "write",
        path: args.directory.clone(),
        source,
    };
    std::fs::create_dir_all(&args.directory).map_err(error)?;
    clap_mangen::generate_to(command.disable_help_subcommand(true), &args.directory)
        .map_err(error)?;
    Ok(ExitCode::SUCCESS)
}
