//! The state of devices compared: field by field, or byte by byte where nothing tells what the bytes mean.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::inspect::devices::{Devices, shown};
use crate::stream::{DeviceFields, Field, Subsection, Value};

/// In what the state of devices differs. Devices are named `IDSTR#INSTANCE`.
#[derive(Debug, Serialize)]
pub struct DeviceDiff {
    /// Devices that both have.
    pub compared: usize,
    /// Those that only the first image has.
    pub only_in_old: Vec<String>,
    /// Those that only the second one has.
    pub only_in_new: Vec<String>,
    /// Those whose state differs, in the order of the second image.
    pub changed: Vec<ChangedDevice>,
}

/// In what the state of a device differs.
#[derive(Debug, Serialize)]
pub struct ChangedDevice {
    /// Its name.
    pub device: String,
    /// The version of its layout; it differs if its program does.
    pub versions: [u32; 2],
    /// Bytes of its state; `None` where nothing tells.
    pub lens: [Option<u64>; 2],
    /// Whether its fields were compared; else its bytes were.
    pub is_described: bool,
    /// Bytes that differ, up to the end of the shorter one; only where its bytes were compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub differing_bytes: Option<u64>,
    /// The fields that differ.
    pub fields: Vec<FieldChange>,
}

/// A field that differs.
#[derive(Debug, PartialEq, Serialize)]
pub struct FieldChange {
    /// Where it is: `env.regs[3]`, `cpu/msr_mcg_ctl.env.mcg_ctl`.
    pub path: String,
    /// What it was; `None` if it was not there.
    pub old: Option<Value>,
    /// What it is; `None` if it is gone.
    pub new: Option<Value>,
}

impl DeviceDiff {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.only_in_old.is_empty() && self.only_in_new.is_empty() && self.changed.is_empty()
    }
}

/// Compares devices of the same name and instance.
pub(super) fn compare(old: &Devices, new: &Devices) -> DeviceDiff {
    let only_in = |these: &Devices, those: &Devices| {
        let these = these.devices.iter();
        let lonely = these.filter(|device| twin(device, those).is_none());
        lonely.map(shown).collect()
    };
    let news = new.devices.iter();
    let pairs: Vec<(&DeviceFields, &DeviceFields)> = news
        .filter_map(|device| Some((twin(device, old)?, device)))
        .collect();
    let changed = pairs.iter().filter_map(|(before, after)| {
        let fields = before.is_described && after.is_described;
        match fields {
            true => by_fields(before, after),
            false => by_bytes(before, after, old, new),
        }
    });
    DeviceDiff {
        compared: pairs.len(),
        only_in_old: only_in(old, new),
        only_in_new: only_in(new, old),
        changed: changed.collect(),
    }
}

fn twin<'d>(device: &DeviceFields, others: &'d Devices) -> Option<&'d DeviceFields> {
    let mut others = others.devices.iter();
    others.find(|other| other.idstr == device.idstr && other.instance_id == device.instance_id)
}

impl ChangedDevice {
    fn of(old: &DeviceFields, new: &DeviceFields) -> Self {
        ChangedDevice {
            device: shown(new),
            versions: [old.version_id, new.version_id],
            lens: [old.len, new.len],
            is_described: false,
            differing_bytes: None,
            fields: Vec::new(),
        }
    }
}

fn by_fields(old: &DeviceFields, new: &DeviceFields) -> Option<ChangedDevice> {
    let fields = changes(&Leaves::of(old), &Leaves::of(new));
    let differs = !fields.is_empty() || old.version_id != new.version_id;
    differs.then(|| ChangedDevice {
        is_described: true,
        fields,
        ..ChangedDevice::of(old, new)
    })
}

fn by_bytes(
    old: &DeviceFields,
    new: &DeviceFields,
    olds: &Devices,
    news: &Devices,
) -> Option<ChangedDevice> {
    let payloads = (olds.payload(old).ok(), news.payload(new).ok());
    let differing_bytes = match payloads {
        (Some(old), Some(new)) => {
            let pairs = old.iter().zip(new);
            Some(pairs.filter(|(old, new)| old != new).count() as u64)
        }
        _ => None,
    };
    let differs =
        differing_bytes != Some(0) || old.len != new.len || old.version_id != new.version_id;
    differs.then(|| ChangedDevice {
        differing_bytes,
        ..ChangedDevice::of(old, new)
    })
}

/// All values of a device, without the structs and arrays they stand in.
struct Leaves<'d> {
    /// Path and value, in the order of the stream. No path comes twice.
    values: Vec<(String, &'d Value)>,
    /// How often a path was met.
    seen: BTreeMap<String, u32>,
}

impl<'d> Leaves<'d> {
    fn of(device: &'d DeviceFields) -> Self {
        let mut leaves = Leaves {
            values: Vec::new(),
            seen: BTreeMap::new(),
        };
        leaves.members("", &device.fields, &device.subsections);
        leaves
    }

    fn members(&mut self, path: &str, fields: &'d [Field], subsections: &'d [Subsection]) {
        let below = |name: &str| match path {
            "" => name.to_owned(),
            _ => format!("{path}.{name}"),
        };
        for field in fields {
            self.value(below(&field.name), &field.value);
        }
        for subsection in subsections {
            let path = below(&subsection.name);
            self.members(&path, &subsection.fields, &subsection.subsections);
        }
    }

    fn value(&mut self, path: String, value: &'d Value) {
        match value {
            Value::Struct {
                fields,
                subsections,
            } => self.members(&path, fields, subsections),
            Value::Elements(values) => {
                for (index, value) in values.iter().enumerate() {
                    self.value(format!("{path}[{index}]"), value);
                }
            }
            _ => {
                let times = self.seen.entry(path.clone()).or_insert(0);
                *times += 1;
                let path = match times {
                    1 => path,
                    times => format!("{path} ({times})"),
                };
                self.values.push((path, value));
            }
        }
    }
}

/// In the order of the second one; what is gone comes behind.
fn changes(old: &Leaves<'_>, new: &Leaves<'_>) -> Vec<FieldChange> {
    let mut olds: BTreeMap<&str, &Value> = BTreeMap::new();
    olds.extend(old.values.iter().map(|(path, value)| (&**path, *value)));
    let mut changes = Vec::new();
    for (path, value) in &new.values {
        let before = olds.remove(&**path);
        if before != Some(value) {
            changes.push(FieldChange {
                path: path.clone(),
                old: before.cloned(),
                new: Some((*value).clone()),
            });
        }
    }
    let gone = old
        .values
        .iter()
        .filter(|(path, _)| olds.contains_key(&**path));
    changes.extend(gone.map(|(path, value)| FieldChange {
        path: path.clone(),
        old: Some((*value).clone()),
        new: None,
    }));
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(name: &str, value: Value) -> Field {
        Field {
            name: name.to_owned(),
            kind: "uint8".to_owned(),
            offset: 0,
            len: 1,
            value,
        }
    }

    fn device(fields: Vec<Field>, subsections: Vec<Subsection>) -> DeviceFields {
        DeviceFields {
            idstr: "a".to_owned(),
            instance_id: 0,
            version_id: 1,
            offset: 0,
            len: Some(1),
            is_described: true,
            fields,
            subsections,
        }
    }

    fn subsection(value: u64) -> Subsection {
        Subsection {
            name: "a/b".to_owned(),
            version_id: 1,
            fields: vec![field("z", Value::Unsigned(value))],
            subsections: Vec::new(),
        }
    }

    #[test]
    fn changes_have_the_path_of_what_differs() {
        let inner = |value| Value::Struct {
            fields: vec![field("y", Value::Unsigned(value))],
            subsections: Vec::new(),
        };
        let of = |value: u64, subsections| {
            let fields = vec![
                field("same", Value::Unsigned(7)),
                field("x", Value::Elements(vec![inner(1), inner(value)])),
                field("twice", Value::Unsigned(1)),
                field("twice", Value::Unsigned(value)),
            ];
            device(fields, subsections)
        };
        let changed = by_fields(&of(2, vec![subsection(5)]), &of(3, Vec::new())).unwrap();
        let found: Vec<_> = changed.fields.iter().map(|change| &*change.path).collect();
        assert_eq!(found, ["x[1].y", "twice (2)", "a/b.z"]);
        assert_eq!(changed.fields[0].old, Some(Value::Unsigned(2)));
        assert_eq!(changed.fields[0].new, Some(Value::Unsigned(3)));
        assert_eq!(changed.fields[2].new, None);
        assert!(by_fields(&of(2, vec![subsection(5)]), &of(2, vec![subsection(5)])).is_none());
        let changed = by_fields(&of(2, vec![subsection(5)]), &of(2, vec![subsection(6)]));
        assert_eq!(changed.unwrap().fields.len(), 1);
    }
}
