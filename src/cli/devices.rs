//! What `vmstow inspect --devices`, `--device` and `--registers` print.

use std::fmt::Write;
use std::process::ExitCode;

use serde_json::json;

use super::inspect::InspectArgs;
use super::ui::{Ui, printable};
use super::{About, Outcome};
use crate::inspect::{Devices, Registers, registers};
use crate::progress::Progress;
use crate::stream::{DeviceFields, Field, Subsection, Value};

/// Bytes of a buffer, and elements of an array, that are shown to people.
const SHOWN_BYTES: usize = 32;
const SHOWN_ELEMENTS: usize = 64;

/// Prints what was asked for.
pub fn show(args: &InspectArgs, devices: &Devices, ui: &Ui) -> Outcome {
    if !devices.is_described() {
        ui.warn(
            "the stream does not describe its devices: what their bytes mean is not known; of an image --ask-qemu tells it",
        );
    }
    if args.registers {
        let all = registers(&devices.devices);
        ui.answer(&json!({ "cpus": all }), |_| {
            all.iter().map(of_cpu).collect()
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(name) = &args.device else {
        let all = &devices.devices;
        ui.answer(&json!({ "devices": all }), |_| {
            all.iter().map(of_device).collect()
        })?;
        return Ok(ExitCode::SUCCESS);
    };
    let device = devices.find(name).about(&args.image)?;
    match args.raw {
        true => ui.write(devices.payload(device).about(&args.image)?)?,
        false => ui.answer(&json!({ "device": device }), |_| of_device(device))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A tree, two spaces a level.
struct Tree(String);

impl Tree {
    fn line(&mut self, depth: usize, text: &str) {
        let _ = writeln!(
            self.0,
            "{:indent$}{}",
            "",
            printable(text),
            indent = 2 * depth
        );
    }

    fn members(&mut self, depth: usize, fields: &[Field], subsections: &[Subsection]) {
        for field in fields {
            self.value(depth, &field.name, &field.kind, &field.value);
        }
        for subsection in subsections {
            let text = format!("{} version {}", subsection.name, subsection.version_id);
            self.line(depth, &text);
            self.members(depth + 1, &subsection.fields, &subsection.subsections);
        }
    }

    fn value(&mut self, depth: usize, name: &str, kind: &str, value: &Value) {
        match value {
            Value::Struct {
                fields,
                subsections,
            } => {
                self.line(depth, name);
                self.members(depth + 1, fields, subsections);
            }
            Value::Elements(values) if values.iter().all(is_plain) => {
                let shown = values.iter().take(SHOWN_ELEMENTS).map(plain);
                let shown: Vec<String> = shown.collect();
                let more = more(values.len(), SHOWN_ELEMENTS);
                self.line(
                    depth,
                    &format!("{name}: [{}{more}] {kind}", shown.join(", ")),
                );
            }
            Value::Elements(values) => {
                for (index, value) in values.iter().enumerate() {
                    self.value(depth, &format!("{name}[{index}]"), kind, value);
                }
            }
            plain_value => self.line(depth, &format!("{name}: {} {kind}", plain(plain_value))),
        }
    }
}

fn is_plain(value: &Value) -> bool {
    !matches!(value, Value::Struct { .. } | Value::Elements(_))
}

/// A value that is neither struct nor array.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::Unsigned(value) => format!("{value:#x}"),
        Value::Signed(value) => value.to_string(),
        Value::Bytes(bytes) => {
            let shown = bytes.iter().take(SHOWN_BYTES);
            let shown: String = shown.map(|byte| format!("{byte:02x}")).collect();
            shown + &more(bytes.len(), SHOWN_BYTES)
        }
        Value::Struct { .. } | Value::Elements(_) => String::new(),
    }
}

/// Says how many of `len` are not among the first `shown`.
pub(super) fn more(len: usize, shown: usize) -> String {
    match len.checked_sub(shown) {
        None | Some(0) => String::new(),
        Some(more) => format!(" … {more} more"),
    }
}

fn of_device(device: &DeviceFields) -> String {
    let mut tree = Tree(String::new());
    let len = match device.len {
        Some(len) => format!("{len} bytes"),
        None => "length not known".to_owned(),
    };
    let (name, instance) = (&device.idstr, device.instance_id);
    let text = format!(
        "{name}#{instance} version {}, {len} at stream offset {:#x}",
        device.version_id, device.offset
    );
    tree.line(0, &text);
    tree.members(1, &device.fields, &device.subsections);
    tree.0
}

fn of_cpu(cpu: &Registers) -> String {
    let mut text = format!("cpu {}\n", cpu.cpu);
    for row in cpu.registers.chunks(4) {
        let cells = row
            .iter()
            .map(|(name, value)| format!("{name:>12} {value:016x}"));
        let _ = writeln!(text, "{}", cells.collect::<String>());
    }
    for (name, selector, base, limit) in &cpu.segments {
        let _ = writeln!(
            text,
            "{name:>12} {selector:04x} base {base:016x} limit {limit:08x}"
        );
    }
    text
}
