//! `vmstow diff`

use std::fmt::Write;
use std::ops::Range;
use std::process::ExitCode;

use clap::Args;

use super::ask_qemu::AskQemuArgs;
use super::config::{change_line, line};
use super::devices::{more, plain};
use super::ui::{Ui, printable, threads};
use super::{Failure, Outcome};
use crate::image;
use crate::inspect::{
    self, BlockDiff, ChangedDevice, ConfigurationDiff, DeviceDiff, DiffFailure, DiffRequest,
    FieldChange, ImageDiff, MemoryDiff,
};
use crate::pipeline::{self, Which};
use crate::store::Location;
use crate::stream::Value;
use crate::units::human_bytes;

/// Show in what two images differ: guest memory, the state of devices, the configuration
///
/// Pages are found by the page maps; chunks of the same digest are not read, so two saves of one guest are compared
/// quickly. The layouts may differ, as may the guests.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DiffArgs {
    /// The first image
    old: Location,

    /// The second image
    new: Location,

    /// Compare guest memory; with --devices and --config only what is named
    #[arg(long)]
    memory: bool,

    /// Compare the state of devices, field by field where the images describe it
    #[arg(long)]
    devices: bool,

    /// Compare the domain XML and the manifests
    #[arg(long)]
    config: bool,

    #[command(flatten)]
    ask_qemu: AskQemuArgs,

    /// Print every range of pages and every field
    #[arg(long)]
    all: bool,

    /// Exit with 1 if they differ, with 0 if not
    #[arg(long)]
    exit_code: bool,

    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
}

const EXAMPLES: &str = "\
Examples:
  vmstow diff before.stow after.stow
  vmstow diff before.stow after.stow --memory --all
  vmstow diff before.stow after.stow --exit-code --quiet >/dev/null && echo same";

/// Compares and prints.
pub fn run(args: &DiffArgs, ui: &Ui) -> Outcome {
    let open = |location: &Location| {
        image::open_any(location, ui).map_err(|error| Failure {
            error,
            image: Some(location.to_string()),
        })
    };
    let (old, new) = (open(&args.old)?, open(&args.new)?);
    let is_all = !(args.memory || args.devices || args.config);
    let devices = match args.devices || is_all {
        true => Some((
            args.ask_qemu.devices(&old, &args.old, ui)?,
            args.ask_qemu.devices(&new, &args.new, ui)?,
        )),
        false => None,
    };
    let request = DiffRequest {
        memory: args.memory || is_all,
        devices,
        configuration: args.config || is_all,
        threads: args.threads.unwrap_or_else(pipeline::default_threads),
    };
    let diff = inspect::diff(&old, &new, &request, ui);
    let diff = diff.map_err(|failed| args.failure(failed))?;
    ui.answer(&diff, |diff| Human::of(args.all).tell(diff))?;
    Ok(match args.exit_code && !diff.is_same {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

impl DiffArgs {
    /// Says which image it is about.
    fn failure(&self, failed: DiffFailure) -> Failure {
        let image = failed.which.map(|which| match which {
            Which::Old => self.old.to_string(),
            Which::New => self.new.to_string(),
        });
        Failure {
            error: failed.error,
            image,
        }
    }
}

/// What people read, and how much of it.
struct Human {
    text: String,
    /// Ranges of a RAMBlock.
    most_ranges: usize,
    /// Fields of a device.
    most_fields: usize,
    /// Devices.
    most_devices: usize,
    is_cut: bool,
}

impl Human {
    fn of(all: bool) -> Self {
        let most = |few: usize| if all { usize::MAX } else { few };
        Human {
            text: String::new(),
            most_ranges: most(8),
            most_fields: most(4),
            most_devices: most(12),
            is_cut: false,
        }
    }

    fn tell(mut self, diff: &ImageDiff) -> String {
        if let Some(memory) = &diff.memory {
            self.memory(memory);
        }
        if let Some(devices) = &diff.devices {
            self.devices(devices);
        }
        if let Some(configuration) = &diff.configuration {
            self.configuration(configuration);
        }
        if self.is_cut {
            self.line(0, "(--all shows the rest)");
        }
        self.text
    }

    fn line(&mut self, depth: usize, text: &str) {
        let indent = 2 * depth;
        let _ = writeln!(self.text, "{:indent$}{}", "", printable(text));
    }

    /// How many of `count` are shown at most; what is left out is remembered.
    fn shown(&mut self, count: usize, most: usize) -> usize {
        self.is_cut |= count > most;
        count.min(most)
    }

    fn memory(&mut self, memory: &MemoryDiff) {
        if memory.is_empty() {
            let count = memory.blocks.len();
            return self.line(
                0,
                &format!("memory: the same, all pages of {count} RAMBlocks"),
            );
        }
        let pages: u64 = memory.blocks.iter().map(|block| block.changed_pages).sum();
        let text = format!(
            "memory: {} differ, {}",
            pages_of(pages),
            human_bytes(pages * 4096)
        );
        self.line(0, &text);
        for block in memory.blocks.iter().filter(|block| !block.is_empty()) {
            self.block(block);
        }
    }

    fn block(&mut self, block: &BlockDiff) {
        let name = &block.idstr;
        match (block.old_pages, block.new_pages) {
            (None, Some(pages)) => self.line(1, &format!("+ {name}: {}", pages_of(pages))),
            (Some(pages), None) => self.line(1, &format!("- {name}: {}", pages_of(pages))),
            _ => {}
        }
        let (Some(_), Some(total)) = (block.old_pages, block.new_pages) else {
            return;
        };
        match block.pages_of_one() {
            (0, 0) => {}
            (less, 0) => self.line(1, &format!("~ {name}: {} less", pages_of(less))),
            (_, more) => self.line(1, &format!("~ {name}: {} more", pages_of(more))),
        }
        if block.changed_pages == 0 {
            return;
        }
        let mut text = format!(
            "~ {name}: {} of {total}, {} of their bytes",
            pages_of(block.changed_pages),
            block.changed_bytes
        );
        if block.filled_pages > 0 {
            let _ = write!(text, "; {} were zero", block.filled_pages);
        }
        if block.emptied_pages > 0 {
            let _ = write!(text, "; {} are zero now", block.emptied_pages);
        }
        self.line(1, &text);
        let ranges: Vec<Range<u64>> = block.changed.ranges().collect();
        let shown = self.shown(ranges.len(), self.most_ranges);
        for row in ranges[..shown].chunks(4) {
            let row: Vec<String> = row.iter().map(range).collect();
            self.line(2, &row.join("  "));
        }
        if ranges.len() > shown {
            self.line(2, &format!("… {} more ranges", ranges.len() - shown));
        }
    }

    fn devices(&mut self, devices: &DeviceDiff) {
        let compared = devices.compared;
        if devices.is_empty() {
            return self.line(0, &format!("devices: the same, all {compared}"));
        }
        let changed = devices.changed.len();
        self.line(0, &format!("devices: {changed} of {compared} differ"));
        devices
            .only_in_old
            .iter()
            .for_each(|name| self.line(1, &format!("- {name}")));
        devices
            .only_in_new
            .iter()
            .for_each(|name| self.line(1, &format!("+ {name}")));
        let shown = self.shown(changed, self.most_devices);
        for device in &devices.changed[..shown] {
            self.device(device);
        }
        if changed > shown {
            self.line(1, &format!("… {} more devices", changed - shown));
        }
        if devices.changed.iter().any(|device| !device.is_described) {
            self.line(1, "(with --ask-qemu QEMU describes what is not described)");
        }
    }

    fn device(&mut self, device: &ChangedDevice) {
        let mut text = format!("~ {}", device.device);
        if device.versions[0] != device.versions[1] {
            let [old, new] = device.versions;
            let _ = write!(text, ", version {old} → {new}");
        }
        if !device.is_described {
            text.push_str(&match (device.differing_bytes, device.lens) {
                (Some(count), [Some(old), Some(new)]) if old == new => {
                    format!(": {count} of {new} bytes, not described")
                }
                (Some(count), [Some(old), Some(new)]) => {
                    format!(": {count} bytes, {old} → {new} bytes in all, not described")
                }
                _ => ": nothing tells how long its state is".to_owned(),
            });
        }
        self.line(1, &text);
        let shown = self.shown(device.fields.len(), self.most_fields);
        for change in &device.fields[..shown] {
            self.line(2, &field(change));
        }
        if device.fields.len() > shown {
            self.line(2, &format!("… {} more fields", device.fields.len() - shown));
        }
    }

    fn configuration(&mut self, configuration: &ConfigurationDiff) {
        if configuration.is_empty() {
            return self.line(0, "config: the same");
        }
        let count = configuration.xml.len() + configuration.facts.len();
        self.line(
            0,
            &format!(
                "config: {count} {}",
                if count == 1 {
                    "difference"
                } else {
                    "differences"
                }
            ),
        );
        for change in &configuration.xml {
            self.line(1, change_line(change).trim_end());
        }
        for fact in &configuration.facts {
            self.line(
                1,
                &line(&fact.name, fact.old.as_deref(), fact.new.as_deref()),
            );
        }
    }
}

fn pages_of(count: u64) -> String {
    match count {
        1 => "1 page".to_owned(),
        count => format!("{count} pages"),
    }
}

/// `0x140..0x150`, or a single page's number.
fn range(range: &Range<u64>) -> String {
    match range.end - range.start {
        1 => format!("{:#x}", range.start),
        _ => format!("{:#x}..{:#x}", range.start, range.end),
    }
}

fn field(change: &FieldChange) -> String {
    let path = &change.path;
    match (&change.old, &change.new) {
        (Some(Value::Bytes(old)), Some(Value::Bytes(new))) => {
            format!("{path}: {}", bytes(old, new))
        }
        (Some(old), Some(new)) => format!("{path}: {} → {}", plain(old), plain(new)),
        (None, Some(new)) => format!("+ {path}: {}", plain(new)),
        (Some(old), None) => format!("- {path}: {}", plain(old)),
        (None, None) => path.clone(),
    }
}

/// Bytes of a buffer that are shown, from the first that differs.
const SHOWN_BYTES: usize = 8;

/// Short buffers whole, of others where they begin to differ.
fn bytes(old: &[u8], new: &[u8]) -> String {
    let hex = |bytes: &[u8]| -> String {
        let shown = bytes.iter().take(SHOWN_BYTES);
        let shown: String = shown.map(|byte| format!("{byte:02x}")).collect();
        shown + &more(bytes.len(), SHOWN_BYTES)
    };
    let pairs = || old.iter().zip(new);
    let count = pairs().filter(|(old, new)| old != new).count();
    let shorter = old.len().min(new.len());
    let first = pairs().position(|(old, new)| old != new).unwrap_or(shorter);
    if old.len().max(new.len()) <= SHOWN_BYTES {
        return format!("{} → {}", hex(old), hex(new));
    }
    let lens = match old.len() == new.len() {
        true => format!("of {}", new.len()),
        false => format!("of {} → {}", old.len(), new.len()),
    };
    let (old, new) = (hex(&old[first..]), hex(&new[first..]));
    format!("{count} {lens} bytes, from {first:#x} on {old} → {new}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_shown_where_they_begin_to_differ() {
        assert_eq!(bytes(&[1, 2], &[1, 3]), "0102 → 0103");
        let (old, mut new) = (vec![0; 100], vec![0; 100]);
        new[90] = 7;
        new[99] = 7;
        let expected =
            "2 of 100 bytes, from 0x5a on 0000000000000000 … 2 more → 0700000000000000 … 2 more";
        assert_eq!(bytes(&old, &new), expected);
        assert_eq!(
            bytes(&old, &new[..90]),
            "0 of 100 → 90 bytes, from 0x5a on 0000000000000000 … 2 more → "
        );
    }

    #[test]
    fn single_pages_and_ranges_of_them() {
        assert_eq!(range(&(5..6)), "0x5");
        assert_eq!(range(&(5..32)), "0x5..0x20");
    }
}
