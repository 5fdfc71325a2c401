//! What `run` and `restore` have in common: where and as what a guest is started.

use std::path::PathBuf;

use clap::Args;

use super::settings::RemapArgs;

/// Where and as what a guest is started.
#[derive(Debug, Clone, Default, Args)]
pub struct StartArgs {
    /// Leave the guest paused
    #[arg(long)]
    pub paused: bool,

    /// Use this QEMU instead of the guest's own
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,

    /// Give the guest another name here
    #[arg(long)]
    pub name: Option<String>,

    /// Its resources.
    #[command(flatten)]
    pub remaps: RemapArgs,
}
