//! Would this guest run here: everything that speaks against it, told and not refused.

use serde::Serialize;

use super::plan::Plan;
use super::target::Target;
use super::{RestoreError, RestoreRequest, dry_load};
use crate::config::compat::{Finding, Level, state};
use crate::container::Manifest;
use crate::error::{Blame, Result};
use crate::image::{OpenedImage, Trust};
use crate::progress::Progress;

pub use super::dry_load::Boot;

/// Findings after which QEMU is not asked.
const NOT_ASKED: [&str; 4] = [
    "qemu.missing",
    "machine.unknown",
    "accel.missing",
    "image.untrusted",
];

/// What a check gave.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// The guest's name here.
    pub guest: String,
    /// Whether nothing speaks against a restore but doubts.
    pub can_run: bool,
    /// The QEMU that would be started.
    pub qemu: String,
    /// Its version; `None` if it is none.
    pub qemu_version: Option<String>,
    /// Whether that QEMU was asked what it would have.
    pub is_compared: bool,
    /// Everything that was found, the worst first.
    pub findings: Vec<Finding>,
    /// How the trial went, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot: Option<Boot>,
}

/// Holds an image against this host, and with `boot` loads its guest on trial.
///
/// # Errors
/// A damaged image; what is wrong with the request itself.
pub fn check(
    opened: OpenedImage,
    manifest: Manifest,
    request: &RestoreRequest,
    boot: bool,
    progress: &dyn Progress,
) -> Result<Verdict> {
    let image = opened.image();
    image.verify_head()?;
    image.xml()?;
    image.page_map()?;
    let trust = Trust::of(image)?;
    let assessed = Plan::assess(manifest.clone(), &trust, request)?;
    let plan = assessed.plan;
    let mut findings = assessed.findings;
    findings.extend(assessed.stranger.iter().map(untrusted));
    // What a stranger's arguments would make QEMU read is not tried out.
    let can_be_asked = findings
        .iter()
        .all(|finding| !NOT_ASKED.contains(&finding.code));
    let target = match can_be_asked {
        true => Some(plan.compare_target(&opened)?),
        false => None,
    };
    let mut is_compared = false;
    let mut changes = assessed.changes;
    match target {
        Some(Target::Compared(more)) => {
            // What QEMU itself told counts more than what its arguments seem to say.
            is_compared = more.iter().all(|finding| finding.code != "qemu.refuses");
            changes.retain(|change| !is_compared || !state::is_of_state(change.code));
            findings.extend(more);
        }
        Some(Target::Unknown(doubt)) => findings.push(doubt),
        None => {}
    }
    findings.extend(changes);
    let mut boot_report = None;
    if boot && can_be_asked {
        match dry_load::dry_load(opened, manifest, request, progress)? {
            Ok(report) => boot_report = Some(report),
            Err(finding) => findings.push(finding),
        }
    }
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    let accepted = |finding: &Finding| finding.level == Level::Warning;
    Ok(Verdict {
        guest: plan.name().to_owned(),
        can_run: findings.iter().all(accepted),
        qemu: plan.qemu.path.display().to_string(),
        qemu_version: assessed
            .no_qemu
            .is_none()
            .then(|| plan.qemu.version.to_string()),
        is_compared,
        findings,
        boot: boot_report,
    })
}

fn untrusted(stranger: &RestoreError) -> Finding {
    let fact = format!("{stranger}: {}", stranger.facts().join(", "));
    let fix = "--trust, if you trust whoever made it; else --remap for each".to_owned();
    Finding::refusal("image.untrusted", fact, fix)
}
