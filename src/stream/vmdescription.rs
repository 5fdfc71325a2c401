//! The vmdescription: JSON behind the device state that tells how long each device section is.
//!
//! QEMU writes it for people and scripts and never reads it. Only lengths and names are taken from it here; the
//! text itself is kept for those who want to show fields. 7.2 and 10.0 differ in members that are skipped.
//!
//! Source: QEMU `migration/vmstate.c`, `vmsd_desc_field_start`; spec/qemu-stream.md §8.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};

/// What the JSON says about all device sections, in the order of the stream.
#[derive(Debug, Deserialize)]
pub(super) struct Description {
    pub(super) devices: Vec<Device>,
}

/// What it says about one device section.
#[derive(Debug, Deserialize)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) instance_id: i64,
    #[serde(default)]
    fields: Len<Field>,
    #[serde(default)]
    subsections: Len<Subsection>,
}

impl Device {
    /// The bytes of the section's payload; `None` if they would not fit in a u64.
    pub(super) fn payload_len(&self) -> Option<u64> {
        self.fields.0.checked_add(self.subsections.0)
    }
}

/// `array_len` elements of `size` bytes each, nested structs and their subsections included.
#[derive(Deserialize)]
struct Field {
    size: u64,
    array_len: Option<u64>,
}

/// A subsection of a section: 0x05 · str8 name · be32 version · fields · subsections.
#[derive(Deserialize)]
struct Subsection {
    vmsd_name: String,
    #[serde(default)]
    fields: Len<Field>,
    #[serde(default)]
    subsections: Len<Subsection>,
}

/// Something that stands for a number of bytes in the stream; `None` if they would not fit in a u64.
trait Extent {
    fn extent(&self) -> Option<u64>;
}

impl Extent for Field {
    fn extent(&self) -> Option<u64> {
        self.size.checked_mul(self.array_len.unwrap_or(1))
    }
}

impl Extent for Subsection {
    fn extent(&self) -> Option<u64> {
        let header = 1 + 1 + self.vmsd_name.len() as u64 + 4;
        header
            .checked_add(self.fields.0)?
            .checked_add(self.subsections.0)
    }
}

/// A JSON array of which only the sum of its elements' extents is kept.
struct Len<T>(u64, std::marker::PhantomData<T>);

impl<T> Default for Len<T> {
    fn default() -> Self {
        Len(0, std::marker::PhantomData)
    }
}

impl<T> fmt::Debug for Len<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
}

impl<'de, T: Deserialize<'de> + Extent> Deserialize<'de> for Len<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Len::default())
    }
}

impl<'de, T: Deserialize<'de> + Extent> Visitor<'de> for Len<T> {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut elements: A) -> Result<Self, A::Error> {
        while let Some(element) = elements.next_element::<T>()? {
            let sum = element.extent().and_then(|len| self.0.checked_add(len));
            self.0 = sum.ok_or_else(|| A::Error::custom("sizes beyond 64 bits"))?;
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload_len(device: &str) -> Option<u64> {
        let text = format!(r#"{{"page_size":4096,"devices":[{device}]}}"#);
        let description: Description = serde_json::from_str(&text).unwrap();
        description.devices[0].payload_len()
    }

    #[test]
    fn arrays_and_subsections_count_with_their_headers() {
        let device = r#"{"name":"a","instance_id":0,"vmsd_name":"a","version":1,
            "fields":[{"name":"x","array_len":3,"type":"uint32","size":4},
                      {"name":"s","type":"struct","struct":{"vmsd_name":"s","version":1,
                       "fields":[{"name":"y","type":"uint8","size":1}]},"size":8}],
            "subsections":[{"vmsd_name":"a/b","version":1,"fields":[{"name":"z","type":"bool","size":1}],
                "subsections":[{"vmsd_name":"a/b/c","version":1,"fields":[]}]}]}"#;
        assert_eq!(payload_len(device), Some(12 + 8 + (6 + 3 + 1) + (6 + 5)));
    }

    #[test]
    fn an_old_style_section_is_one_buffer() {
        let device = r#"{"name":"slirp","instance_id":0,"size":24,
            "fields":[{"name":"data","size":24,"type":"buffer"}]}"#;
        assert_eq!(payload_len(device), Some(24));
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let half = format!(r#"{{"name":"x","size":{}}}"#, u64::MAX / 2 + 1);
        for fields in [
            format!(r#"{half},{half}"#),
            format!(r#"{{"size":{},"array_len":2}}"#, u64::MAX),
        ] {
            let text =
                format!(r#"{{"devices":[{{"name":"a","instance_id":0,"fields":[{fields}]}}]}}"#);
            assert!(serde_json::from_str::<Description>(&text).is_err());
        }
    }
}
