//! Device sections taken apart into named, typed fields, as the stream's own vmdescription tells.
//!
//! In: the device state region of a stream. Out: a [`DeviceFields`] for each section, with a value for each field and
//! every byte accounted for. A section without a description, and a stream without one, keep their bytes as one field.
//!
//! Source: QEMU `migration/vmstate.c`, `vmstate_save_state_v`, and `vmstate-types.c`; spec/qemu-stream.md §8.

use serde::{Deserialize, Serialize};

use super::device_state::{self, DeviceSection};
use super::error::{Place, StreamError};
use crate::units::StreamOffset;

/// A device section.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeviceFields {
    /// Its name: `0000:00:02.0/virtio-net`.
    pub idstr: String,
    /// Tells sections of the same name apart.
    pub instance_id: u32,
    /// The version of its layout.
    pub version_id: u32,
    /// Where its payload begins in the stream.
    pub offset: u64,
    /// The bytes of its payload; `None` if nothing tells where it ends.
    pub len: Option<u64>,
    /// Whether it is known what its bytes mean: all of them lie in its fields and subsections then.
    pub is_described: bool,
    /// Its fields.
    pub fields: Vec<Field>,
    /// The parts that only some guests have.
    pub subsections: Vec<Subsection>,
}

/// A field of a device, or of a struct in one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Field {
    /// QEMU's name for it.
    pub name: String,
    /// QEMU's type: `uint32`, `buffer`, `struct`, ….
    #[serde(rename = "type")]
    pub kind: String,
    /// Where it begins in the section's payload.
    pub offset: u64,
    /// Its bytes, those of all elements together.
    pub len: u64,
    /// What it holds.
    pub value: Value,
}

/// A subsection.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Subsection {
    /// Its name: `cpu/tsc_khz`.
    pub name: String,
    /// The version of its layout.
    pub version_id: u32,
    /// Its fields.
    pub fields: Vec<Field>,
    /// Subsections of its own.
    pub subsections: Vec<Subsection>,
}

/// What a field holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// `bool`.
    Bool(bool),
    /// `uint8` to `uint64`, and timers: nanoseconds, all bits set for one that is not armed.
    Unsigned(u64),
    /// `int8` to `int64`.
    Signed(i64),
    /// Any other type: its bytes in hexadecimal.
    Bytes(#[serde(serialize_with = "hexadecimal")] Vec<u8>),
    /// A struct.
    Struct {
        /// Its fields.
        fields: Vec<Field>,
        /// Its subsections.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        subsections: Vec<Subsection>,
    },
    /// An array.
    Elements(Vec<Value>),
}

/// The region's sections, field by field. `start` is where it begins in the stream.
///
/// # Errors
/// As the stream's parser: whatever is wrong with the region; [`StreamError::BadVmDescription`] if the description of a
/// section does not fit its own sizes.
pub fn device_fields(region: &[u8], start: StreamOffset) -> Result<Vec<DeviceFields>, StreamError> {
    let state = device_state::read(region, start, None)?;
    let devices = state.sections.into_iter().map(DeviceFields::undescribed);
    let Some(json) = &state.vmdescription else {
        return Ok(devices.collect());
    };
    let description = Description::parse(&json.json, json.offset)?;
    let described = devices.zip(&description.devices);
    let decoded = described.map(|(device, described)| {
        let offset = StreamOffset(device.offset);
        let misfit = || bad(offset, "the sizes of its fields do not add up");
        device
            .decoded(region, start, described)
            .map_err(|_| misfit())
    });
    decoded.collect()
}

/// The region's sections, field by field, as another stream describes them: one whose guest has the same devices in the
/// same state. A section that this does not fit to its last byte, name, instance, version and subsections included,
/// stays without fields.
///
/// # Errors
/// Whatever is wrong with the region; [`StreamError::BadVmDescription`] if that is no description at all.
pub fn device_fields_by(
    region: &[u8],
    start: StreamOffset,
    description: &str,
) -> Result<Vec<DeviceFields>, StreamError> {
    let state = device_state::read(region, start, None)?;
    let description = Description::parse(description, start)?;
    let devices = state.sections.into_iter().map(DeviceFields::undescribed);
    let decoded = devices.map(|device| {
        let mut all = description.devices.iter();
        match all.find(|described| described.is_of(&device)) {
            Some(described) => {
                let decoded = device.decoded(region, start, described);
                decoded.unwrap_or_else(|device| *device)
            }
            None => device,
        }
    });
    Ok(decoded.collect())
}

fn bad(offset: StreamOffset, fact: &str) -> StreamError {
    StreamError::BadVmDescription {
        at: Place::after(offset, None),
        source: serde::de::Error::custom(fact),
    }
}

impl DeviceFields {
    fn undescribed(section: DeviceSection) -> Self {
        DeviceFields {
            idstr: section.idstr,
            instance_id: section.instance_id,
            version_id: section.version_id,
            offset: section.offset.0,
            len: section.len,
            is_described: false,
            fields: Vec::new(),
            subsections: Vec::new(),
        }
    }

    /// With its fields; as it was if its payload is not what the description says.
    fn decoded(
        self,
        region: &[u8],
        start: StreamOffset,
        described: &Described,
    ) -> Result<Self, Box<Self>> {
        let payload = || {
            let first = usize::try_from(self.offset.checked_sub(start.0)?).ok()?;
            let end = first.checked_add(usize::try_from(self.len?).ok()?)?;
            region.get(first..end)
        };
        let members = payload().and_then(|bytes| {
            let mut reader = Reader { bytes, at: 0 };
            let members = reader.members(&described.members)?;
            (reader.at == bytes.len()).then_some(members)
        });
        match members {
            Some((fields, subsections)) => Ok(DeviceFields {
                is_described: true,
                fields,
                subsections,
                ..self
            }),
            None => Err(Box::new(self)),
        }
    }

    /// The first field with that name, not looking into structs.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.iter().find(|field| field.name == name)
    }
}

fn hexadecimal<S: serde::Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    use std::fmt::Write;
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    serializer.serialize_str(&text)
}

#[derive(Debug, Deserialize)]
struct Description {
    devices: Vec<Described>,
}

#[derive(Debug, Deserialize)]
struct Described {
    #[serde(default)]
    name: String,
    #[serde(default)]
    instance_id: i64,
    /// Absent for sections of the old style.
    version: Option<u32>,
    #[serde(flatten)]
    members: Members,
}

impl Description {
    fn parse(json: &str, at: StreamOffset) -> Result<Self, StreamError> {
        serde_json::from_str(json).map_err(|source| StreamError::BadVmDescription {
            at: Place::after(at, None),
            source,
        })
    }
}

impl Described {
    /// Whether it is the device's.
    fn is_of(&self, device: &DeviceFields) -> bool {
        let instance = device.instance_id;
        let is_instance = self.instance_id == i64::from(instance)
            || self.instance_id == i64::from(instance.cast_signed());
        let is_version = self
            .version
            .is_none_or(|version| version == device.version_id);
        self.name == device.idstr && is_instance && is_version
    }
}

/// What devices, structs and subsections have in common.
#[derive(Debug, Default, Deserialize)]
struct Members {
    #[serde(default)]
    fields: Vec<DescribedField>,
    #[serde(default)]
    subsections: Vec<DescribedSubsection>,
}

#[derive(Debug, Deserialize)]
struct DescribedField {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    size: u64,
    array_len: Option<u64>,
    index: Option<u64>,
    #[serde(rename = "struct")]
    of_struct: Option<Members>,
    /// Those of a `tmp`, which stand in the field itself.
    #[serde(default)]
    fields: Vec<DescribedField>,
}

#[derive(Debug, Deserialize)]
struct DescribedSubsection {
    vmsd_name: String,
    version: u32,
    #[serde(flatten)]
    members: Members,
}

/// A section's payload, read from its beginning. `None` from a method: the description does not fit.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// A subsection begins with this byte.
const SUBSECTION: u8 = super::wire::QEMU_VM_SUBSECTION;

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(len)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn members(&mut self, members: &Members) -> Option<(Vec<Field>, Vec<Subsection>)> {
        let fields = self.fields(&members.fields)?;
        let subsections = members.subsections.iter();
        let subsections: Option<Vec<Subsection>> =
            subsections.map(|one| self.subsection(one)).collect();
        Some((fields, subsections?))
    }

    fn fields(&mut self, described: &[DescribedField]) -> Option<Vec<Field>> {
        described.iter().map(|field| self.field(field)).collect()
    }

    /// 0x05 · str8 name · be32 version · fields · subsections.
    fn subsection(&mut self, described: &DescribedSubsection) -> Option<Subsection> {
        let name = described.vmsd_name.as_bytes();
        let mut header = vec![SUBSECTION, u8::try_from(name.len()).ok()?];
        header.extend_from_slice(name);
        header.extend_from_slice(&described.version.to_be_bytes());
        if self.take(header.len())? != header {
            return None;
        }
        let (fields, subsections) = self.members(&described.members)?;
        Some(Subsection {
            name: described.vmsd_name.clone(),
            version_id: described.version,
            fields,
            subsections,
        })
    }

    fn field(&mut self, described: &DescribedField) -> Option<Field> {
        let offset = self.at as u64;
        let value = match described.array_len {
            None => self.element(described)?,
            // Elements without bytes would cost memory for nothing.
            Some(_) if described.size == 0 => Value::Elements(Vec::new()),
            Some(count) => {
                let elements = (0..count).map(|_| self.element(described));
                Value::Elements(elements.collect::<Option<_>>()?)
            }
        };
        let name = match described.index {
            Some(index) => format!("{}[{index}]", described.name),
            None => described.name.clone(),
        };
        Some(Field {
            name,
            kind: described.kind.clone(),
            offset,
            len: self.at as u64 - offset,
            value,
        })
    }

    fn element(&mut self, described: &DescribedField) -> Option<Value> {
        let begin = self.at;
        let size = usize::try_from(described.size).ok()?;
        let members = match (&described.of_struct, described.fields.as_slice()) {
            (Some(members), _) => Some(self.members(members)?),
            (None, []) => None,
            (None, fields) => Some((self.fields(fields)?, Vec::new())),
        };
        if let Some((fields, subsections)) = members {
            let is_whole = self.at - begin == size;
            return is_whole.then_some(Value::Struct {
                fields,
                subsections,
            });
        }
        let bytes = self.take(size)?;
        Some(Value::of(&described.kind, bytes))
    }
}

impl Value {
    /// Of a type that has no members. `uint32 equal` is a `uint32` that must be the same on both sides.
    fn of(kind: &str, bytes: &[u8]) -> Self {
        let number = kind.split(' ').next().unwrap_or_default();
        let unsigned = || {
            let value = bytes
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte));
            Value::Unsigned(value)
        };
        match (number, bytes) {
            ("bool", [byte]) => Value::Bool(*byte != 0),
            ("uint8", [_]) | ("uint16", [_, _]) | ("uint32", [_, _, _, _]) => unsigned(),
            ("uint64" | "timer", [_, _, _, _, _, _, _, _]) => unsigned(),
            ("int8", &[a]) => Value::Signed(i8::from_be_bytes([a]).into()),
            ("int16", &[a, b]) => Value::Signed(i16::from_be_bytes([a, b]).into()),
            ("int32", &[a, b, c, d]) => Value::Signed(i32::from_be_bytes([a, b, c, d]).into()),
            ("int64", &[a, b, c, d, e, f, g, h]) => {
                Value::Signed(i64::from_be_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => Value::Bytes(bytes.to_vec()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Decodes a payload by the description of a device.
    fn decode(device: &str, payload: &[u8]) -> Option<(Vec<Field>, Vec<Subsection>)> {
        let described: Described = serde_json::from_str(device).unwrap();
        let mut reader = Reader {
            bytes: payload,
            at: 0,
        };
        let members = reader.members(&described.members)?;
        (reader.at == payload.len()).then_some(members)
    }

    const DEVICE: &str = r#"{"name":"a","instance_id":0,"vmsd_name":"a","version":1,"fields":[
        {"name":"flag","type":"bool","size":1},
        {"name":"level","type":"int16","size":2},
        {"name":"same","type":"uint32 equal","size":4},
        {"name":"x","array_len":2,"type":"uint8","size":1},
        {"name":"y","index":3,"type":"buffer","size":2},
        {"name":"s","type":"struct","struct":{"vmsd_name":"s","version":1,
            "fields":[{"name":"z","type":"uint16","size":2}]},"size":2}],
        "subsections":[{"vmsd_name":"a/b","version":2,"fields":[{"name":"t","type":"timer","size":8}]}]}"#;

    fn payload() -> Vec<u8> {
        let mut bytes = vec![1, 0xff, 0xfe, 0, 0, 1, 0, 7, 8, 0xab, 0xcd, 1, 2];
        bytes.extend(b"\x05\x03a/b\0\0\0\x02");
        bytes.extend([0xff; 8]);
        bytes
    }

    #[test]
    fn every_field_has_its_value_and_its_place() {
        let (fields, subsections) = decode(DEVICE, &payload()).unwrap();
        let found: Vec<(&str, u64, u64)> = fields
            .iter()
            .map(|field| (&*field.name, field.offset, field.len))
            .collect();
        let expected = [
            ("flag", 0, 1),
            ("level", 1, 2),
            ("same", 3, 4),
            ("x", 7, 2),
            ("y[3]", 9, 2),
            ("s", 11, 2),
        ];
        assert_eq!(found, expected);
        let values: Vec<&Value> = fields.iter().map(|field| &field.value).collect();
        assert_eq!(values[0], &Value::Bool(true));
        assert_eq!(values[1], &Value::Signed(-2));
        assert_eq!(values[2], &Value::Unsigned(256));
        let elements = [7, 8].map(Value::Unsigned).to_vec();
        assert_eq!(values[3], &Value::Elements(elements));
        assert_eq!(values[4], &Value::Bytes(vec![0xab, 0xcd]));
        assert!(
            matches!(values[5], Value::Struct { fields, .. } if fields[0].value == Value::Unsigned(258))
        );
        assert_eq!(subsections[0].fields[0].value, Value::Unsigned(u64::MAX));
        let json = serde_json::to_value(&fields[4]).unwrap();
        assert_eq!(json["value"], "abcd");
    }

    #[test]
    fn a_payload_that_is_cut_or_too_long_does_not_fit() {
        let whole = payload();
        for len in 0..whole.len() {
            assert!(decode(DEVICE, &whole[..len]).is_none(), "{len}");
        }
        assert!(decode(DEVICE, &[whole, vec![0]].concat()).is_none());
    }

    #[test]
    fn elements_without_bytes_cost_nothing() {
        let device =
            r#"{"fields":[{"name":"x","array_len":18446744073709551615,"type":"uint8","size":0}]}"#;
        let (fields, _) = decode(device, &[]).unwrap();
        assert_eq!(fields[0].value, Value::Elements(Vec::new()));
        let device =
            r#"{"fields":[{"name":"x","array_len":18446744073709551615,"type":"uint8","size":1}]}"#;
        assert!(decode(device, &[0; 64]).is_none());
    }

    proptest! {
        #[test]
        fn any_payload_is_a_value_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            decode(DEVICE, &bytes);
        }
    }
}
