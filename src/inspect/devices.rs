//! The devices' state in an image, field by field, and the processors' registers in it.

use serde::Serialize;

use crate::error::{Blame, ErrorKind, Result};
use crate::image::OpenedImage;
use crate::pipeline;
use crate::stream::{DeviceFields, Value, device_fields, device_fields_by};
use crate::units::StreamOffset;

/// Which device was meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is none of that name.
    #[error("no device is named {name:?}")]
    None {
        /// The name.
        name: String,
        /// All that there are.
        known: Vec<String>,
    },
    /// There are several of that name.
    #[error("{count} devices are named {name:?}")]
    Several {
        /// The name.
        name: String,
        /// How many.
        count: usize,
    },
    /// Nothing tells how long the device's state is.
    #[error("nothing in the stream tells where the state of {name:?} ends")]
    Undescribed {
        /// The name.
        name: String,
    },
}

impl Blame for DeviceError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Usage
    }

    fn facts(&self) -> Vec<String> {
        match self {
            DeviceError::None { known, .. } => vec![format!("there are {}", known.join(", "))],
            _ => Vec::new(),
        }
    }
}

/// All devices of a guest.
#[derive(Debug)]
pub struct Devices {
    /// In the order of the stream.
    pub devices: Vec<DeviceFields>,
    /// The bytes that they were read from.
    region: Vec<u8>,
    start: StreamOffset,
}

impl Devices {
    /// Those of an image.
    ///
    /// # Errors
    /// A damaged chunk; a device state that is not what its description says.
    pub fn of_image(opened: &OpenedImage) -> Result<Self> {
        let image = opened.image();
        let manifest = image.manifest()?;
        let begins_at = manifest.stream.as_ref().and_then(|it| it.device_state_at);
        let (start, region) = pipeline::device_region(image, begins_at)?;
        Devices::of(region, start)
    }

    fn of(region: Vec<u8>, start: StreamOffset) -> Result<Self> {
        let devices = device_fields(&region, start)?;
        Ok(Devices {
            devices,
            region,
            start,
        })
    }

    /// The one that is named `IDSTR`, or `IDSTR#INSTANCE` where there are several.
    ///
    /// # Errors
    /// [`DeviceError::None`], [`DeviceError::Several`].
    pub fn find(&self, name: &str) -> Result<&DeviceFields, DeviceError> {
        let exact = |device: &&DeviceFields| device.idstr == name || shown(device) == name;
        let found: Vec<&DeviceFields> = self.devices.iter().filter(exact).collect();
        match found.as_slice() {
            [] => Err(DeviceError::None {
                name: name.to_owned(),
                known: self.devices.iter().map(shown).collect(),
            }),
            [only] => Ok(only),
            several => Err(DeviceError::Several {
                name: name.to_owned(),
                count: several.len(),
            }),
        }
    }

    /// The bytes of a device's payload.
    ///
    /// # Errors
    /// [`DeviceError::Undescribed`].
    pub fn payload(&self, device: &DeviceFields) -> Result<&[u8], DeviceError> {
        let place = || {
            let first = usize::try_from(device.offset.checked_sub(self.start.0)?).ok()?;
            let end = first.checked_add(usize::try_from(device.len?).ok()?)?;
            self.region.get(first..end)
        };
        place().ok_or_else(|| DeviceError::Undescribed {
            name: shown(device),
        })
    }

    /// Whether it is known what the bytes of any device mean.
    pub fn is_described(&self) -> bool {
        self.devices.iter().any(|device| device.is_described)
    }

    /// The same devices, their bytes taken apart as the description of another stream says. Those that it does not fit
    /// stay without fields.
    ///
    /// # Errors
    /// A description that is none.
    pub fn described_by(self, description: &str) -> Result<Self> {
        let devices = device_fields_by(&self.region, self.start, description)?;
        Ok(Devices { devices, ..self })
    }
}

/// `cpu#1`.
pub(super) fn shown(device: &DeviceFields) -> String {
    format!("{}#{}", device.idstr, device.instance_id)
}

/// The registers of a virtual processor, as its state has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Registers {
    /// Its number.
    pub cpu: u32,
    /// Name and value: `rip`, `rsp`, `cr3`, ….
    pub registers: Vec<(&'static str, u64)>,
    /// Name, selector, base and limit: `cs`, `gdt`, ….
    pub segments: Vec<(&'static str, u64, u64, u64)>,
}

/// QEMU keeps the general registers in the order of their numbers in an instruction.
const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

const SINGLE: [(&str, &str); 12] = [
    ("rip", "env.eip"),
    ("rflags", "env.eflags"),
    ("cr0", "env.cr[0]"),
    ("cr2", "env.cr[2]"),
    ("cr3", "env.cr[3]"),
    ("cr4", "env.cr[4]"),
    ("efer", "env.efer"),
    ("star", "env.star"),
    ("lstar", "env.lstar"),
    ("cstar", "env.cstar"),
    ("fmask", "env.fmask"),
    ("kernelgsbase", "env.kernelgsbase"),
];

const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
const TABLES: [(&str, &str); 4] = [
    ("ldt", "env.ldt"),
    ("tr", "env.tr"),
    ("gdt", "env.gdt"),
    ("idt", "env.idt"),
];

/// The registers of every x86 processor among the devices.
pub fn registers(devices: &[DeviceFields]) -> Vec<Registers> {
    let cpus = devices.iter().filter(|device| device.idstr == "cpu");
    cpus.map(|cpu| Registers {
        cpu: cpu.instance_id,
        registers: general(cpu).into_iter().chain(single(cpu)).collect(),
        segments: segments(cpu),
    })
    .collect()
}

fn general(cpu: &DeviceFields) -> Vec<(&'static str, u64)> {
    let Some(Value::Elements(values)) = cpu.field("env.regs").map(|field| &field.value) else {
        return Vec::new();
    };
    let values = values.iter().filter_map(unsigned);
    GENERAL.into_iter().zip(values).collect()
}

fn single(cpu: &DeviceFields) -> Vec<(&'static str, u64)> {
    let value = |name: &str| unsigned(&cpu.field(name)?.value);
    SINGLE
        .into_iter()
        .filter_map(|(register, name)| Some((register, value(name)?)))
        .collect()
}

fn segments(cpu: &DeviceFields) -> Vec<(&'static str, u64, u64, u64)> {
    let mut found = Vec::new();
    if let Some(Value::Elements(values)) = cpu.field("env.segs").map(|field| &field.value) {
        let named = SEGMENTS.into_iter().zip(values);
        found.extend(named.filter_map(|(name, value)| segment(name, value)));
    }
    let tables = TABLES.into_iter();
    found.extend(tables.filter_map(|(name, field)| segment(name, &cpu.field(field)?.value)));
    found
}

fn segment(name: &'static str, value: &Value) -> Option<(&'static str, u64, u64, u64)> {
    let Value::Struct { fields, .. } = value else {
        return None;
    };
    let of = |name: &str| {
        let field = fields.iter().find(|field| field.name == name)?;
        unsigned(&field.value)
    };
    Some((name, of("selector")?, of("base")?, of("limit")?))
}

fn unsigned(value: &Value) -> Option<u64> {
    match value {
        Value::Unsigned(value) => Some(*value),
        _ => None,
    }
}
