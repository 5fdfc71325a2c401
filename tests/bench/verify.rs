//! `vmstow verify` beside a plain digest of the same bytes.

use std::path::PathBuf;

use crate::clock::{Clock, Cost};
use crate::contender::{Contender, Place, run as run_command};
use crate::end;
use crate::guests::Recipe;
use crate::ours::Vmstow;
use crate::rounds::{OURS_RAW, OURS_ZSTD, warm};
use crate::table::{Results, Sample};
use crate::work_dir::WorkDir;

pub const OPENSSL: &str = "openssl dgst -sha256";
pub const ZSTD_OPENSSL: &str = "zstd -dc \\| openssl dgst -sha256";

/// One guest in both layouts.
#[derive(Debug)]
pub struct Images {
    pub guest: String,
    pub zstd: PathBuf,
    pub raw: PathBuf,
}

impl Images {
    pub fn make(recipe: &Recipe, work: &WorkDir) -> Self {
        let make = |layout: &'static str| {
            end::doing(&format!("{}, making a {layout} image", recipe.name));
            let place = Place::make(work, recipe, &format!("{} verify {layout}", recipe.name));
            let mut vmstow = Vmstow::new(work, place.clone(), layout);
            let qemu = vmstow.boot();
            let serial = place.serial();
            serial.wait_for_line("the first checksum", |line| line.starts_with("sum "));
            vmstow.save();
            qemu.wait_for_exit();
            place.image()
        };
        Images {
            guest: recipe.name.clone(),
            zstd: make("zstd"),
            raw: make("raw"),
        }
    }

    pub fn remove(&self, work: &WorkDir) {
        for image in [&self.zstd, &self.raw] {
            work.done_with(image.parent().unwrap());
        }
    }
}

pub fn run(images: &Images, work: &WorkDir, pairs: u32, results: &mut Results) {
    for pair in 0..pairs {
        for (ours, theirs, image) in [
            (OURS_RAW, OPENSSL, &images.raw),
            (OURS_ZSTD, ZSTD_OPENSSL, &images.zstd),
        ] {
            end::doing(&format!(
                "{}, verify, {ours}, pair {}",
                images.guest,
                pair + 1
            ));
            let mut sides = [ours, theirs];
            sides.rotate_left(usize::from(pair % 2 == 1));
            for side in sides {
                warm(image);
                let cost = if side == ours {
                    timed(work.vmstow().arg("verify").arg(image))
                } else if side == OPENSSL {
                    timed(work.command("openssl").args(["dgst", "-sha256"]).arg(image))
                } else {
                    let script = "set -o pipefail; zstd -dcq \"$0\" | openssl dgst -sha256";
                    timed(work.command("bash").args(["-c", script]).arg(image))
                };
                results.add(Sample {
                    guest: images.guest.clone(),
                    work: "verify",
                    contender: side,
                    round: pair,
                    cost,
                    bytes: std::fs::metadata(image).unwrap().len(),
                });
            }
        }
    }
}

fn timed(command: &mut std::process::Command) -> Cost {
    let clock = Clock::start();
    run_command(command);
    clock.stop()
}
