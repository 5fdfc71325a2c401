//! `--ask-qemu`: QEMU describes the devices of an image that does not.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::settings::{self, RemapArgs};
use super::ui::Ui;
use super::{About, Failure};
use crate::image::{self, OpenedImage, Trust};
use crate::inspect::Devices;
use crate::pipeline;
use crate::progress::Progress;
use crate::restore::{self, Plan, RestoreError, RestoreRequest};
use crate::store::Location;

/// Whether QEMU is asked, and which one.
#[derive(Debug, Clone, Args)]
pub struct AskQemuArgs {
    /// Where an image does not describe its devices, let QEMU do it: for this the image is loaded into a guest of its own
    ///
    /// It stays paused, cut off from networks and with throwaway overlays over its disks, and is ended at once. It takes as
    /// long as a restore, and as much memory.
    #[arg(long)]
    ask_qemu: bool,

    /// With --ask-qemu: use this QEMU instead of the one the guest was saved from
    #[arg(long, value_name = "PATH", requires = "ask_qemu")]
    qemu: Option<PathBuf>,

    /// With --ask-qemu: let the image use resources of this host although nobody you trust signed it
    #[arg(long, requires = "ask_qemu")]
    trust: bool,

    #[command(flatten)]
    remaps: RemapArgs,
}

impl AskQemuArgs {
    /// The devices of an image, described if they can be.
    pub fn devices(
        &self,
        opened: &OpenedImage,
        location: &Location,
        ui: &Ui,
    ) -> Result<Devices, Failure> {
        let devices = Devices::of_image(opened).about(location)?;
        if !self.ask_qemu || devices.is_described() {
            return Ok(devices);
        }
        let description = self.description(location, ui)?;
        let devices = devices.described_by(&description).about(location)?;
        let others = devices.devices.iter().filter(|device| !device.is_described);
        let others: Vec<&str> = others.map(|device| &*device.idstr).collect();
        if !others.is_empty() {
            let others = others.join(", ");
            ui.warn(&format!(
                "QEMU's description does not fit these devices: {others}"
            ));
        }
        Ok(devices)
    }

    /// What QEMU says of the devices of the image there, opened anew: it is read for the guest alone.
    fn description(&self, location: &Location, ui: &Ui) -> Result<String, Failure> {
        if *location == Location::Pipe {
            return Err(RestoreError::DescribedPipe.into());
        }
        let opened = image::open(location).about(location)?;
        let manifest = opened.image().manifest().about(location)?;
        let trust = Trust::of(opened.image()).about(location)?;
        let mut request = RestoreRequest {
            image: location.clone(),
            qemu: self.qemu.clone(),
            name: None,
            paused: true,
            remaps: self.remaps.clone().all()?,
            settings: settings::read()?,
            trust: self.trust,
            // It never runs.
            accept_changed_disks: true,
            force: Vec::new(),
            rom_sizes: Vec::new(),
            arguments: None,
            map: None,
            throwaway: true,
            overlay_dir: None,
            clones: Some(1),
            threads: pipeline::default_threads(),
            timeout: Duration::from_secs(120),
            lazy: None,
            held_as: None,
        };
        let xml = opened.image().xml().about(location)?;
        restore::call_disks_by_id(&mut request.remaps, &manifest, &xml).about(location)?;
        let plan = Plan::check(manifest, &trust, &request).about(location)?;
        restore::describe_devices(&plan, opened, ui).about(location)
    }
}
