//! What `run` and `restore` have in common: where and as what a guest is started.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::settings::{self, RemapArgs};
use crate::error::Result;
use crate::pipeline;
use crate::restore::{LazyOptions, RestoreRequest, RomSize};
use crate::store::Location;

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

/// How a guest is restored, here or on another host.
#[derive(Debug, Clone, Args)]
pub struct GuestArgs {
    /// Where and as what.
    #[command(flatten)]
    pub start: StartArgs,

    /// Restore although a disk changed since the save; the guest's file systems may break
    #[arg(long)]
    pub accept_changed_disks: bool,

    /// Override a reason by its code, which `vmstow check` tells; the guest's log keeps it. May be given several times
    ///
    /// QEMU may still refuse; where it does not, the guest may break.
    #[arg(long, value_name = "CODE")]
    pub force: Vec<String>,

    /// Make room for the ROM of all devices of a driver, as the guest had it. May be given several times
    #[arg(long = "romsize", value_name = "DRIVER=BYTES")]
    pub rom_sizes: Vec<RomSize>,

    /// Let the guest write to overlays that end with it, never to its disks
    #[arg(long)]
    pub throwaway: bool,

    /// Where the overlays go [default: $VMSTOW_OVERLAY_DIR, else /var/tmp/vmstow-UID]
    #[arg(long, value_name = "DIR", requires = "throwaway")]
    pub overlay_dir: Option<PathBuf>,

    /// How long QEMU may take to start, and to load what it was given
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub timeout: u64,
}

impl GuestArgs {
    /// What is to be restored from `image`: eagerly, by as many workers as there are cores.
    ///
    /// # Errors
    /// Files of remaps and settings that cannot be read.
    pub fn request(&self, image: Location, trust: bool) -> Result<RestoreRequest> {
        Ok(RestoreRequest {
            image,
            qemu: self.start.qemu.clone(),
            name: self.start.name.clone(),
            paused: self.start.paused,
            remaps: self.start.remaps.clone().all()?,
            settings: settings::read()?,
            trust,
            accept_changed_disks: self.accept_changed_disks,
            force: self.force.clone(),
            rom_sizes: self.rom_sizes.clone(),
            arguments: None,
            map: None,
            throwaway: self.throwaway,
            overlay_dir: self.overlay_dir.clone(),
            clones: None,
            threads: pipeline::default_threads(),
            timeout: Duration::from_secs(self.timeout),
            lazy: None,
            held_as: None,
        })
    }

    /// The words that say the same to the program on another host.
    ///
    /// # Errors
    /// Files of remaps that cannot be read.
    pub fn words(&self) -> Result<Vec<String>> {
        let mut words = Vec::new();
        let mut option = |name: &str, value: String| words.push(format!("--{name}={value}"));
        if let Some(qemu) = &self.start.qemu {
            option("qemu", qemu.display().to_string());
        }
        if let Some(name) = &self.start.name {
            option("name", name.clone());
        }
        for remap in self.start.remaps.clone().all()? {
            option("remap", remap.to_string());
        }
        for code in &self.force {
            option("force", code.clone());
        }
        for rom_size in &self.rom_sizes {
            option("romsize", rom_size.to_string());
        }
        if let Some(dir) = &self.overlay_dir {
            option("overlay-dir", dir.display().to_string());
        }
        option("timeout", self.timeout.to_string());
        let switches = [
            ("--paused", self.start.paused),
            ("--accept-changed-disks", self.accept_changed_disks),
            ("--throwaway", self.throwaway),
        ];
        let switches = switches.into_iter().filter(|(_, is_given)| *is_given);
        words.extend(switches.map(|(word, _)| word.to_owned()));
        Ok(words)
    }
}

/// How a guest gets its memory while it runs.
#[derive(Debug, Clone, Args)]
pub struct LazyArgs {
    /// Let the guest run before its memory is there; it gets what it asks for first, and all the rest behind
    #[arg(long, group = "late")]
    pub lazy: bool,

    /// With --lazy: give at most so many MiB a second of what the guest does not ask for
    #[arg(long, value_name = "MIB", requires = "lazy", value_parser = clap::value_parser!(u64).range(1..))]
    pub fill_rate: Option<u64>,

    /// With --lazy: keep in the image what the guest asks for first, so that later restores have it ready
    #[arg(long, requires = "lazy")]
    pub record: bool,

    /// With --lazy: let QEMU put every page in its place, even where vmstow could; slower
    #[arg(long, requires = "lazy", hide_short_help = true)]
    pub through_qemu: bool,
}

impl LazyArgs {
    /// The same for the process that gives it its memory.
    pub fn options(&self) -> LazyOptions {
        LazyOptions {
            fill_rate: self.fill_rate.map(|mib| mib << 20),
            through_qemu: self.through_qemu,
            records: self.record,
        }
    }

    /// The words that say the same to the program on another host.
    pub fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        words.extend(self.lazy.then(|| "--lazy".to_owned()));
        words.extend(self.through_qemu.then(|| "--through-qemu".to_owned()));
        words.extend(self.fill_rate.map(|mib| format!("--fill-rate={mib}")));
        words
    }
}
