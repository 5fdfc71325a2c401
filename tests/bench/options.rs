//! What the user may choose.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Compare vmstow with virsh, QEMU's own migration to files, openssl and zstd
///
/// Builds guests, lets every tool save and restore them in turn, and prints a Markdown table: the median, lowest and
/// highest of the ratios ours / theirs of the same round. Each guest counts a hundred times a second on its serial port
/// and keeps a checksum of its memory; if it does not go on exactly where it was, the comparison ends with an error.
///
/// SAVE is timed from the command until it returned, the image is synced (fsync of the file, for every tool) and the
/// guest's QEMU is gone. RESTORE is timed from the command, with the image in the page cache and nothing left to write
/// back, until the guest's next tick. QEMU's `max-bandwidth` is lifted. CPU seconds are the whole machine's, since
/// libvirt works in several processes: run nothing else meanwhile.
#[derive(Debug, Parser)]
#[command(name = "compare", bin_name = "cargo bench --bench compare --")]
pub struct Options {
    /// The guest; may be given several times [default: all, and the guests of `memory`]
    #[arg(long = "guest", value_name = "NAME")]
    guest: Vec<GuestName>,

    /// Only this work
    #[arg(long)]
    only: Option<Work>,

    /// How often each work is done by each tool
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pub pairs: u32,

    /// Write every single measurement to a file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Keep the images and logs in target/bench
    #[arg(long)]
    pub keep: bool,

    /// Given by cargo
    #[arg(long = "bench", hide = true)]
    pub is_bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GuestName {
    /// 4 GiB, booted and idle
    Idle,
    /// 2 GiB, 60 % of it the files below /usr
    Text,
    /// 1 GiB, 78 % of it does not compress
    Random,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// Save and restore, in rounds
    SaveRestore,
    /// Check an image
    Verify,
    /// How large an image is
    Size,
    /// Copy an image through ssh, also to where an earlier save of the guest is
    Copy,
    /// How much memory vmstow needs for guests of 1, 2 and 4 GiB
    Memory,
    /// How soon a guest of 512 MiB to 8 GiB goes on, restored lazily or mapped
    FirstTick,
}

impl Options {
    pub fn guests(&self) -> Vec<GuestName> {
        if matches!(self.only, Some(Work::Memory | Work::FirstTick)) {
            Vec::new()
        } else if self.guest.is_empty() {
            GuestName::value_variants().to_vec()
        } else {
            self.guest.clone()
        }
    }

    /// It has guests of its own, so not if some were named, unless it was named too.
    pub fn wants_memory(&self) -> bool {
        self.only
            .map_or(self.guest.is_empty(), |only| only == Work::Memory)
    }

    /// As [`Options::wants_memory`].
    pub fn wants_first_tick(&self) -> bool {
        self.only
            .map_or(self.guest.is_empty(), |only| only == Work::FirstTick)
    }

    pub fn wants(&self, work: Work) -> bool {
        self.only.is_none_or(|only| only == work)
    }
}
