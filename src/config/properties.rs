//! The value of one QEMU option as properties: `virtio-blk-pci,drive=vda,addr=0x4` or `{"driver":"virtio-blk-pci"}`.
//!
//! Both forms answer the same questions ([`Properties::get`], [`Properties::set`]); what is not touched is written back
//! byte for byte. In the key=value form a comma inside a value is doubled, a first element without `=` is the value of
//! the option's implied key, and a later one is a switch (`readonly`, or `nowait` for `wait=off`).
//!
//! Source: QEMU's documentation of `-device` and `-blockdev`; observed behaviour of QEMU 7.2 and 10.0.

use serde_json::{Map, Value};

/// The properties of one option's value.
#[derive(Debug, Clone, PartialEq)]
pub enum Properties {
    /// `first,key=value,switch`
    Pairs {
        /// The key that a bare first element is the value of.
        implied: Option<&'static str>,
        /// In the order written.
        items: Vec<Property>,
    },
    /// `{"key": value}`
    Json(Map<String, Value>),
}

/// One element of the key=value form, its commas no longer doubled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Property {
    /// An element without `=`.
    Bare(String),
    /// `key=value`.
    Pair(String, String),
}

impl Properties {
    /// Reads a value. Text that starts with `{` but is not a JSON object is read as key=value, as it stands.
    pub fn parse(text: &str, implied: Option<&'static str>) -> Self {
        if text.starts_with('{')
            && let Ok(Value::Object(map)) = serde_json::from_str(text)
        {
            return Properties::Json(map);
        }
        let items = split(text).into_iter().map(Property::parse).collect();
        Properties::Pairs { implied, items }
    }

    /// The value as QEMU reads it.
    pub fn write(&self) -> String {
        match self {
            Properties::Json(map) => Value::Object(map.clone()).to_string(),
            Properties::Pairs { items, .. } => {
                let items: Vec<String> = items.iter().map(Property::write).collect();
                items.join(",")
            }
        }
    }

    /// The value of `key`; of two the last, as in QEMU. A dotted key names a member of a nested object.
    pub fn get(&self, key: &str) -> Option<String> {
        match self {
            Properties::Json(map) => json_get(map, key),
            Properties::Pairs { implied, items } => items
                .iter()
                .enumerate()
                .rev()
                .find_map(|(index, item)| item.value_of(key, implied.filter(|_| index == 0))),
        }
    }

    /// The first of `keys` that has a value.
    pub fn get_any(&self, keys: &[&str]) -> Option<String> {
        keys.iter().find_map(|key| self.get(key))
    }

    /// Whether `key` is there and says yes.
    pub fn is_on(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| is_yes(&value))
    }

    /// Gives `key` a value, in its place if it is there, else at the end.
    pub fn set(&mut self, key: &str, value: &str) {
        match self {
            Properties::Json(map) => json_set(map, key, value),
            Properties::Pairs { implied, items } => pairs_set(*implied, items, key, value),
        }
    }

    /// As [`Properties::set`], where QEMU wants a number in the JSON form.
    pub fn set_number(&mut self, key: &str, value: u64) {
        match self {
            Properties::Json(map) => drop(map.insert(key.to_owned(), value.into())),
            Properties::Pairs { .. } => self.set(key, &value.to_string()),
        }
    }

    /// As [`Properties::set`], where QEMU wants a text in the JSON form, also for `on` and `off`.
    pub fn set_text(&mut self, key: &str, value: &str) {
        match self {
            Properties::Json(map) => drop(map.insert(key.to_owned(), value.into())),
            Properties::Pairs { .. } => self.set(key, value),
        }
    }

    /// Takes `key` away, wherever it stands.
    pub fn remove(&mut self, key: &str) {
        match self {
            Properties::Json(map) => json_remove(map, key),
            Properties::Pairs { implied, items } => {
                let mut index = 0;
                items.retain(|item| {
                    let implied = implied.filter(|_| index == 0);
                    index += 1;
                    item.value_of(key, implied).is_none()
                });
            }
        }
    }

    /// Every key with its value; keys of nested JSON objects are dotted, switches have the value `on` or `off`.
    pub fn leaves(&self) -> Vec<(String, String)> {
        match self {
            Properties::Json(map) => {
                let mut leaves = Vec::new();
                json_leaves(map, "", &mut leaves);
                leaves
            }
            Properties::Pairs { implied, items } => items
                .iter()
                .enumerate()
                .map(|(index, item)| item.leaf(implied.filter(|_| index == 0)))
                .collect(),
        }
    }
}

/// Whether a value of a switch says yes.
pub fn is_yes(value: &str) -> bool {
    matches!(value, "on" | "yes" | "true" | "y")
}

/// A value with its commas doubled, as it has to stand behind `key=`.
pub fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

impl Property {
    fn parse(text: String) -> Self {
        match text.split_once('=') {
            Some((key, value)) => Property::Pair(key.to_owned(), value.to_owned()),
            None => Property::Bare(text),
        }
    }

    fn write(&self) -> String {
        match self {
            Property::Bare(value) => escape(value),
            Property::Pair(key, value) => format!("{}={}", escape(key), escape(value)),
        }
    }

    fn value_of(&self, key: &str, implied: Option<&str>) -> Option<String> {
        let (found, value) = self.leaf(implied);
        (found == key).then_some(value)
    }

    fn leaf(&self, implied: Option<&str>) -> (String, String) {
        match (self, implied) {
            (Property::Pair(key, value), _) => (key.clone(), value.clone()),
            (Property::Bare(value), Some(key)) => (key.to_owned(), value.clone()),
            (Property::Bare(switch), None) => match switch.strip_prefix("no") {
                // The old spellings; no switch of today begins with "no" but these.
                Some(key @ ("wait" | "delay")) => (key.to_owned(), "off".to_owned()),
                _ => (switch.clone(), "on".to_owned()),
            },
        }
    }
}

/// The elements between single commas, double commas undone.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}

fn pairs_set(implied: Option<&'static str>, items: &mut Vec<Property>, key: &str, value: &str) {
    let mut written = false;
    for (index, item) in items.iter_mut().enumerate() {
        let implied = implied.filter(|_| index == 0);
        if item.value_of(key, implied).is_none() {
            continue;
        }
        *item = match (&*item, implied) {
            (Property::Bare(_), Some(_)) if !value.contains('=') => {
                Property::Bare(value.to_owned())
            }
            _ => Property::Pair(key.to_owned(), value.to_owned()),
        };
        written = true;
    }
    if !written {
        // An empty last element, left by a comma at the end, would make that comma a doubled one.
        items.pop_if(|last| *last == Property::Bare(String::new()));
        items.push(Property::Pair(key.to_owned(), value.to_owned()));
    }
}

fn json_get(map: &Map<String, Value>, key: &str) -> Option<String> {
    if let Some(value) = map.get(key) {
        return scalar(value);
    }
    let (head, tail) = key.split_once('.')?;
    match map.get(head)? {
        Value::Object(inner) => json_get(inner, tail),
        _ => None,
    }
}

fn json_set(map: &mut Map<String, Value>, key: &str, value: &str) {
    if let Some((head, tail)) = key.split_once('.')
        && let Some(Value::Object(inner)) = map.get_mut(head)
    {
        return json_set(inner, tail, value);
    }
    let is_switch = matches!(map.get(key), None | Some(Value::Bool(_)));
    let value = match value {
        "on" if is_switch => Value::Bool(true),
        "off" if is_switch => Value::Bool(false),
        _ => Value::String(value.to_owned()),
    };
    map.insert(key.to_owned(), value);
}

fn json_remove(map: &mut Map<String, Value>, key: &str) {
    if map.remove(key).is_none()
        && let Some((head, tail)) = key.split_once('.')
        && let Some(Value::Object(inner)) = map.get_mut(head)
    {
        json_remove(inner, tail);
    }
}

fn json_leaves(map: &Map<String, Value>, prefix: &str, leaves: &mut Vec<(String, String)>) {
    for (key, value) in map {
        json_leaf(value, format!("{prefix}{key}"), leaves);
    }
}

fn json_leaf(value: &Value, path: String, leaves: &mut Vec<(String, String)>) {
    match value {
        Value::Object(inner) => json_leaves(inner, &format!("{path}."), leaves),
        Value::Array(inner) => {
            for (index, value) in inner.iter().enumerate() {
                json_leaf(value, format!("{path}.{index}"), leaves);
            }
        }
        _ => leaves.extend(scalar(value).map(|value| (path, value))),
    }
}

/// A JSON scalar as the key=value form spells it; `None` for null, arrays and objects.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(true) => Some("on".to_owned()),
        Value::Bool(false) => Some("off".to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_doubled_comma_is_one_comma_of_the_value() {
        let drive = Properties::parse("file=/a,,b.img,if=virtio", None);
        assert_eq!(drive.get("file").as_deref(), Some("/a,b.img"));
        assert_eq!(drive.get("if").as_deref(), Some("virtio"));
        assert_eq!(drive.write(), "file=/a,,b.img,if=virtio");
    }

    #[test]
    fn a_first_element_without_a_key_is_the_implied_keys_value() {
        let mut device = Properties::parse("e1000,netdev=n0", Some("driver"));
        assert_eq!(device.get("driver").as_deref(), Some("e1000"));
        device.set("driver", "igb");
        device.set("netdev", "n,1");
        assert_eq!(device.write(), "igb,netdev=n,,1");
    }

    #[test]
    fn switches_are_on_and_off() {
        let socket = Properties::parse("socket,path=/s,server,nowait", Some("backend"));
        assert!(socket.is_on("server"));
        assert_eq!(socket.get("wait").as_deref(), Some("off"));
    }

    #[test]
    fn json_members_are_reached_with_dots() {
        let text =
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"/a"},"read-only":true}"#;
        let mut node = Properties::parse(text, Some("driver"));
        assert_eq!(node.get("file.filename").as_deref(), Some("/a"));
        assert!(node.is_on("read-only"));
        node.set("file.filename", "/b");
        node.set("read-only", "off");
        node.remove("file.driver");
        assert_eq!(
            node.write(),
            r#"{"driver":"qcow2","file":{"filename":"/b"},"read-only":false}"#
        );
        assert!(
            node.leaves()
                .contains(&("file.filename".into(), "/b".into()))
        );
    }

    #[test]
    fn the_last_of_two_values_counts_and_both_are_replaced() {
        let mut name = Properties::parse("a=1,b,a=2", None);
        assert_eq!(name.get("a").as_deref(), Some("2"));
        name.set("a", "3");
        assert_eq!(name.write(), "a=3,b,a=3");
        name.remove("a");
        assert_eq!(name.write(), "b");
    }

    proptest! {
        #[test]
        fn what_is_not_touched_is_written_back(text in "[a-c=,{}.:/]{0,24}") {
            prop_assert_eq!(Properties::parse(&text, Some("driver")).write(), text);
        }

        #[test]
        fn a_value_that_was_set_is_read_back(text in "[a-c=,]{0,16}", value in "\\PC{0,16}") {
            let mut properties = Properties::parse(&text, None);
            properties.set("key", &value);
            let again = Properties::parse(&properties.write(), None);
            prop_assert_eq!(again.get("key"), Some(value));
        }
    }
}
