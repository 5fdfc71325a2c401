//! `vmstow doctor`

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::Outcome;
use super::ui::Ui;
use crate::host::{self, QemuFacts, RuntimeDir, Userfaultfd, keys};
use crate::units::human_bytes;

/// Say what this host has and lacks for saving and restoring guests
#[derive(Debug, Args)]
pub struct DoctorArgs {}

#[derive(Serialize)]
struct Finding {
    name: &'static str,
    is_good: bool,
    fact: String,
    advice: Option<&'static str>,
}

/// Looks at everything; exit code 4 if no guest could be restored here.
pub fn run(_: &DoctorArgs, ui: &Ui) -> Outcome {
    let findings = [
        qemu(),
        kvm(),
        userfaultfd(),
        runtime(),
        signing_key(),
        memory(),
        space(),
    ];
    ui.answer(&json!({ "findings": findings }), |_| human(&findings))?;
    let is_good = findings
        .iter()
        .filter(|finding| finding.name == "qemu" || finding.name == "runtime");
    Ok(if is_good.into_iter().all(|finding| finding.is_good) {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(4)
    })
}

fn human(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = if finding.is_good { "ok" } else { "--" };
        let _ = writeln!(text, "{mark} {:>11}: {}", finding.name, finding.fact);
        if let (false, Some(advice)) = (finding.is_good, finding.advice) {
            let _ = writeln!(text, "   {:>11}  {advice}", "");
        }
    }
    text
}

fn qemu() -> Finding {
    let found = host::find_qemu().and_then(|path| QemuFacts::probe(&path));
    let advice = Some("install QEMU (Debian: qemu-system-x86), or name one with --qemu");
    match found {
        Ok(qemu) => Finding {
            name: "qemu",
            is_good: true,
            fact: format!(
                "{} {}, {} machine types, accelerators {}",
                qemu.path.display(),
                qemu.version,
                qemu.machines.len(),
                qemu.accelerators.join(", ")
            ),
            advice,
        },
        Err(error) => Finding {
            name: "qemu",
            is_good: false,
            fact: error.to_string(),
            advice,
        },
    }
}

fn kvm() -> Finding {
    let is_good = host::is_kvm_accessible();
    let fact = if is_good {
        "/dev/kvm can be opened"
    } else {
        "/dev/kvm cannot be opened: guests that ran with KVM cannot be restored here"
    };
    Finding {
        name: "kvm",
        is_good,
        fact: fact.to_owned(),
        advice: Some("load the kvm module; join the group that owns /dev/kvm"),
    }
}

fn userfaultfd() -> Finding {
    let (is_good, fact) = match host::userfaultfd() {
        Userfaultfd::Available => (true, "available".to_owned()),
        other => (false, format!("{other:?}").to_lowercase()),
    };
    Finding {
        name: "userfaultfd",
        is_good,
        fact,
        advice: Some(
            "`restore --lazy` and `save --live` need it: sysctl vm.unprivileged_userfaultfd=1",
        ),
    }
}

fn runtime() -> Finding {
    let advice = Some("set VMSTOW_RUNTIME_DIR to a directory of your own with a short path");
    match RuntimeDir::open() {
        Ok(directory) => Finding {
            name: "runtime",
            is_good: true,
            fact: directory.path().display().to_string(),
            advice,
        },
        Err(error) => Finding {
            name: "runtime",
            is_good: false,
            fact: error.to_string(),
            advice,
        },
    }
}

fn signing_key() -> Finding {
    let trusted = keys::trusted_signers();
    let advice =
        Some("give the key file mode 0600, and mend the line of allowed_signers that is named");
    match (trusted, keys::public_key_path()) {
        (Ok(trusted), Some(path)) => Finding {
            name: "keys",
            is_good: true,
            fact: format!(
                "{} keys are trusted; this host's own: {}",
                trusted.len(),
                path.display()
            ),
            advice,
        },
        (Ok(_), None) => Finding {
            name: "keys",
            is_good: false,
            fact: "neither XDG_STATE_HOME nor HOME is set".to_owned(),
            advice,
        },
        (Err(error), _) => Finding {
            name: "keys",
            is_good: false,
            fact: error.to_string(),
            advice,
        },
    }
}

fn memory() -> Finding {
    let available = host::available_memory().unwrap_or(0);
    let fact = format!("{} available", human_bytes(available));
    Finding {
        name: "memory",
        is_good: available > 128 << 20,
        fact,
        advice: None,
    }
}

fn space() -> Finding {
    let free = host::free_space(Path::new(".")).unwrap_or(0);
    Finding {
        name: "space",
        is_good: free > 128 << 20,
        fact: format!("{} free in this directory", human_bytes(free)),
        advice: Some(
            "an image needs as much room as its guest has memory that is not zero, at the most",
        ),
    }
}
