//! `-rtc`, timers, sleep states, and what becomes of the guest when it ends.

use super::line::Line;
use crate::config::domain::Domain;
use crate::config::domain::features::{
    Clock, ClockOffset, LifecycleAction, TickPolicy, Timer, TimerName, TimerTrack,
};

/// Adds the clock and its timers; `-machine` and `-cpu` have the rest of them.
pub(super) fn clock(line: &mut Line<'_>, clock: &Clock) {
    let mut value = format!("base={}", base(line, clock));
    for timer in &clock.timers {
        match timer.name {
            TimerName::Rtc => value.push_str(&rtc(line, timer)),
            TimerName::Pit => pit(line, timer),
            _ => {}
        }
    }
    line.option("rtc", value);
}

fn base(line: &mut Line<'_>, clock: &Clock) -> String {
    let context = line.context;
    match clock.offset {
        None | Some(ClockOffset::Utc) => "utc".to_owned(),
        Some(ClockOffset::LocalTime) => "localtime".to_owned(),
        Some(ClockOffset::Timezone) => {
            let zone = clock.timezone.clone().unwrap_or_default();
            line.environment.push(("TZ".to_owned(), zone));
            "localtime".to_owned()
        }
        Some(ClockOffset::Variable) => {
            let zone = if clock.is_local_basis {
                context.utc_offset
            } else {
                0
            };
            let start = context
                .now
                .saturating_add(clock.adjustment.unwrap_or(0))
                .saturating_add(zone);
            date(start)
        }
        Some(ClockOffset::Absolute) => date(clock.start.unwrap_or(0)),
    }
}

fn rtc(line: &mut Line<'_>, timer: &Timer) -> String {
    let mut value = String::new();
    match timer.track {
        Some(TimerTrack::Guest) => value.push_str(",clock=vm"),
        Some(TimerTrack::Wall) => value.push_str(",clock=host"),
        Some(TimerTrack::Realtime) => value.push_str(",clock=rt"),
        Some(TimerTrack::Boot) => {
            line.error_at(
                "domain/clock/timer/@track",
                timer.line,
                "QEMU's clock does not follow the boot time",
                None,
            );
        }
        None => {}
    }
    match timer.tick_policy {
        Some(TickPolicy::Catchup) => value.push_str(",driftfix=slew"),
        Some(TickPolicy::Delay) | None => {}
        Some(TickPolicy::Merge | TickPolicy::Discard) => {
            let why = "QEMU's real time clock either delays missed ticks or makes up for them";
            line.error_at("domain/clock/timer/@tickpolicy", timer.line, why, None);
        }
    }
    value
}

fn pit(line: &mut Line<'_>, timer: &Timer) {
    let policy = match timer.tick_policy {
        Some(TickPolicy::Delay) => "delay",
        Some(TickPolicy::Discard) => "discard",
        Some(TickPolicy::Catchup | TickPolicy::Merge) => {
            let why = "QEMU's interval timer either delays missed ticks or discards them";
            return line.error_at("domain/clock/timer/@tickpolicy", timer.line, why, None);
        }
        None => return,
    };
    if line.is_kvm {
        line.global("kvm-pit", "lost_tick_policy", policy);
    } else if policy == "discard" {
        line.warning_at(
            "domain/clock/timer/@tickpolicy",
            timer.line,
            "without KVM missed ticks of the interval timer are delayed",
        );
    }
}

/// Seconds since 1970 as `2023-11-14T22:13:20`.
fn date(seconds: i64) -> String {
    let second = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    second.strftime("%Y-%m-%dT%H:%M:%S").to_string()
}

/// Adds sleep states.
pub(super) fn power_management(line: &mut Line<'_>, domain: &Domain) {
    let driver = if line.is_q35 { "ICH9-LPC" } else { "PIIX4_PM" };
    if let Some(is_on) = domain.power.suspend_to_mem {
        line.global(driver, "disable_s3", u8::from(!is_on));
    }
    if let Some(is_on) = domain.power.suspend_to_disk {
        line.global(driver, "disable_s4", u8::from(!is_on));
    }
}

/// Adds what becomes of the guest. QEMU ends when the guest powers itself off or panics, unless it is told otherwise.
pub(super) fn lifecycle(line: &mut Line<'_>, domain: &Domain) {
    use LifecycleAction::{
        CoredumpDestroy, CoredumpRestart, Destroy, Preserve, RenameRestart, Restart,
    };
    let lifecycle = &domain.lifecycle;
    let mut actions = Vec::new();
    match lifecycle.on_poweroff {
        None | Some(Destroy) => {}
        Some(Preserve) => actions.push("shutdown=pause"),
        Some(_) => {
            line.warning_at(
                "domain/on_poweroff",
                0,
                "the guest is not started again when it has powered itself off",
            );
        }
    }
    match lifecycle.on_reboot {
        None | Some(Restart | RenameRestart) => {}
        Some(Destroy) => actions.push("reboot=shutdown"),
        Some(Preserve) => {
            // A shutdown in place of a reboot, and a pause in place of a shutdown.
            actions.push("reboot=shutdown");
            if !actions.contains(&"shutdown=pause") {
                line.warning_at("domain/on_reboot", 0, "the guest ends when it reboots");
            }
        }
        Some(CoredumpDestroy | CoredumpRestart) => {
            line.error_at("domain/on_reboot", 0, "a reboot leaves no core", None);
        }
    }
    match lifecycle.on_crash {
        None | Some(Destroy) => {}
        Some(Preserve) => actions.push("panic=pause"),
        Some(CoredumpDestroy) => {
            line.warning_at(
                "domain/on_crash",
                0,
                "no core is written when the guest panics",
            );
        }
        Some(Restart | RenameRestart | CoredumpRestart) => {
            // QEMU cannot reset a guest that panicked, but a guest that goes on can reset itself.
            actions.push("panic=none");
            line.warning_at(
                "domain/on_crash",
                0,
                "the guest goes on when it panics, and has to restart itself",
            );
        }
    }
    if !actions.is_empty() {
        line.option("action", actions.join(","));
    }
}
