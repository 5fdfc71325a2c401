//! An element without all that does not matter: comments, white space, how numbers are written, and what holds anyway.

use crate::config::domain::quantity::unit_len;
use std::collections::BTreeMap;

use crate::config::xml::Element;

/// An element of domain XML as it is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plain {
    pub(super) name: String,
    /// The line its tag starts in.
    pub(super) line: u32,
    pub(super) attributes: BTreeMap<String, String>,
    /// Without the blanks around it.
    pub(super) text: String,
    pub(super) children: Vec<Plain>,
}

/// Attributes that say what holds without them: element, attribute, value.
const DEFAULTS: [(&str, &str, &str); 16] = [
    ("disk", "device", "disk"),
    ("driver", "name", "qemu"),
    ("address", "domain", "0"),
    ("address", "bus", "0"),
    ("address", "function", "0"),
    ("address", "controller", "0"),
    ("address", "target", "0"),
    ("address", "multifunction", "off"),
    ("vcpu", "placement", "static"),
    ("model", "fallback", "allow"),
    ("cpu", "match", "exact"),
    ("cpu", "check", "none"),
    ("feature", "policy", "require"),
    ("loader", "format", "raw"),
    ("nvram", "format", "raw"),
    ("graphics", "autoport", "no"),
];

/// Elements that hold an amount of memory, in KiB where they say no unit.
const AMOUNTS: [&str; 6] = [
    "memory",
    "currentMemory",
    "maxMemory",
    "size",
    "requested",
    "block",
];

/// Elements whose attributes are numbers.
const NUMBERED: [&str; 4] = ["address", "target", "master", "cell"];

impl Plain {
    /// Deep recursion is the reader's business, which bounds the depth of every document.
    pub(super) fn of(element: &Element) -> Self {
        let mut attributes: BTreeMap<String, String> = element
            .attributes
            .iter()
            .filter(|attribute| !attribute.name.starts_with("xmlns"))
            .map(|attribute| {
                (
                    attribute.name.to_string(),
                    attribute.value().trim().to_owned(),
                )
            })
            .collect();
        let name = element.name.to_string();
        let mut text = element.text();
        if AMOUNTS.contains(&name.as_str())
            && let Some(bytes) = bytes(&text, attributes.get("unit").map(String::as_str))
        {
            attributes.remove("unit");
            text = bytes.to_string();
        }
        match name.as_str() {
            "domain" => drop(attributes.remove("id")),
            "uuid" => text = text.to_lowercase(),
            "mac" => attributes
                .values_mut()
                .for_each(|value| *value = value.to_lowercase()),
            _ if NUMBERED.contains(&name.as_str()) => {
                attributes
                    .values_mut()
                    .for_each(|value| *value = number(value));
            }
            _ => {}
        }
        attributes.retain(|key, value| {
            !DEFAULTS.contains(&(name.as_str(), key.as_str(), value.as_str()))
        });
        let children = element.elements().map(Plain::of).collect();
        let mut plain = Plain {
            name,
            line: element.line,
            attributes,
            text,
            children,
        };
        plain.drop_copies();
        plain
    }

    /// A console for a serial port is that port once more.
    fn drop_copies(&mut self) {
        if self.name != "devices" || !self.children.iter().any(|child| child.name == "serial") {
            return;
        }
        self.children.retain(|child| {
            let kind = child.child("target").and_then(|target| target.get("type"));
            child.name != "console" || !matches!(kind, None | Some("serial"))
        });
    }

    /// Whether both say the same; where they stand is not compared.
    pub(super) fn is_same(&self, other: &Plain) -> bool {
        self.name == other.name
            && self.attributes == other.attributes
            && self.text == other.text
            && self.children.len() == other.children.len()
            && self
                .children
                .iter()
                .zip(&other.children)
                .all(|(one, other)| one.is_same(other))
    }

    /// By what it is told from others of its name; `None` if only its place tells.
    pub(super) fn key(&self) -> Option<String> {
        let of_child = |child: &str, attribute: &str| {
            let value = self.child(child)?.get(attribute)?;
            Some(value.to_owned())
        };
        match self.name.as_str() {
            "disk" => of_child("target", "dev"),
            "interface" => of_child("mac", "address"),
            "controller" => Some(format!("{:?} {:?}", self.get("type"), self.get("index"))),
            "feature" | "timer" => self.get("name").map(str::to_owned),
            _ => {
                let address = self.child("address")?;
                Some(format!("{:?}", address.attributes))
            }
        }
    }

    pub(super) fn get(&self, attribute: &str) -> Option<&str> {
        self.attributes.get(attribute).map(String::as_str)
    }

    pub(super) fn child(&self, name: &str) -> Option<&Plain> {
        self.children.iter().find(|child| child.name == name)
    }

    /// The children of this name.
    pub(super) fn all(&self, name: &str) -> Vec<&Plain> {
        let children = self.children.iter();
        children.filter(|child| child.name == name).collect()
    }

    /// The children of its child of this name.
    pub(super) fn below(&self, name: &str) -> Vec<Plain> {
        let child = self.child(name);
        child
            .map(|child| child.children.clone())
            .unwrap_or_default()
    }

    /// In one line: `<disk type="file"> <source file="/a"/> </disk>`.
    pub(super) fn shown(&self) -> String {
        let mut text = format!("<{}", self.name);
        for (name, value) in &self.attributes {
            text.push_str(&format!(" {name}={value:?}"));
        }
        if self.text.is_empty() && self.children.is_empty() {
            return text + "/>";
        }
        text.push('>');
        text.push_str(&self.text);
        for child in &self.children {
            text.push_str(&child.shown());
        }
        text + &format!("</{}>", self.name)
    }
}

/// `0x1f` and `031` as `31`; anything else as it is.
fn number(text: &str) -> String {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    parsed.map_or(text.to_owned(), |number| number.to_string())
}

/// An amount with libvirt's unit; KiB if there is none.
fn bytes(text: &str, unit: Option<&str>) -> Option<u128> {
    let amount: u128 = text.trim().parse().ok()?;
    let unit_len = unit_len(unit.unwrap_or("KiB"))?;
    amount.checked_mul(unit_len.into())
}
