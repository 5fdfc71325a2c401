//! The configuration compared: domain XML, and what the manifests say of the guest, its QEMU and its resources.
//!
//! What tells of the save and not of the guest is left out (when, by which program and how it was made), and what memory
//! and devices show themselves.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Map, Value};

use super::{DiffFailure, In};
use crate::config::abi::{self, Change};
use crate::config::xml::Document;
use crate::container::{ContainerError, Manifest};
use crate::error::Error;
use crate::image::OpenedImage;
use crate::pipeline::Which;

/// In what the configuration of two guests differs.
#[derive(Debug, Serialize)]
pub struct ConfigurationDiff {
    /// Differences of the domain XML.
    pub xml: Vec<Change>,
    /// Differences of the manifests.
    pub facts: Vec<FactChange>,
}

/// A fact of the manifest that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FactChange {
    /// Which: `machine.vcpus`, `resources.disk:vda.backend.path`, `labels.owner`.
    pub name: String,
    /// What it was; `None` if it was not there.
    pub old: Option<String>,
    /// What it is; `None` if it is gone.
    pub new: Option<String>,
}

impl ConfigurationDiff {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.xml.is_empty() && self.facts.is_empty()
    }
}

/// Members of the manifest that are compared, but for the resources.
const MEMBERS: [&str; 5] = ["guest", "qemu", "machine", "remaps", "labels"];

/// What of a file's fingerprint tells of what is in it, not of where it lies.
const OF_CONTENT: [&str; 3] = ["size", "mtime_ns", "sha256"];

/// Values by name; what stands in a list has no name of its own, and is told apart by what it is.
type Facts = BTreeMap<(String, String), String>;

/// Compares the configuration of two images.
pub(super) fn compare(
    old: &OpenedImage,
    new: &OpenedImage,
) -> Result<ConfigurationDiff, DiffFailure> {
    let parse = |opened: &OpenedImage| -> Result<Document, Error> {
        Ok(Document::parse(opened.image().xml()?.as_bytes())?)
    };
    let xml = abi::compare(
        &parse(old).in_image(Which::Old)?,
        &parse(new).in_image(Which::New)?,
    );
    let manifest =
        |opened: &OpenedImage| -> Result<Manifest, ContainerError> { opened.image().manifest() };
    let old = manifest(old).in_image(Which::Old)?;
    let new = manifest(new).in_image(Which::New)?;
    Ok(ConfigurationDiff {
        xml: xml.changes,
        facts: changes(&facts(&old), &facts(&new)),
    })
}

/// All that is compared, by name.
fn facts(manifest: &Manifest) -> Facts {
    let mut facts = Facts::new();
    // A manifest that was read can be written again.
    let Ok(Value::Object(mut all)) = serde_json::to_value(manifest) else {
        return facts;
    };
    if let Some(Value::Object(guest)) = all.get_mut("guest") {
        // What was done with it after the save.
        guest.remove("ran_on");
    }
    for member in MEMBERS {
        if let Some(value) = all.remove(member) {
            flatten(member, value, &mut facts);
        }
    }
    if let Some(Value::Array(resources)) = all.remove("resources") {
        let resources = resources.into_iter().filter_map(|resource| match resource {
            Value::Object(resource) => Some(resource),
            _ => None,
        });
        resources.for_each(|resource| of_resource(resource, &mut facts));
    }
    facts
}

fn of_resource(mut resource: Map<String, Value>, facts: &mut Facts) {
    let mut word = |member: &str| match resource.remove(member) {
        Some(Value::String(word)) => word,
        _ => String::new(),
    };
    let (kind, id) = (word("kind"), word("id"));
    if let Some(Value::Object(fingerprint)) = resource.get_mut("fingerprint") {
        // What the guest prints is no part of how it is configured.
        let is_told = |member: &str| kind != "chardev" && OF_CONTENT.contains(&member);
        fingerprint.retain(|member, _| is_told(member));
    }
    let name = format!("resources.{kind}:{id}");
    flatten(&name, Value::Object(resource), facts);
}

/// Each value below `name` under a name of its own, but for those in a list.
fn flatten(name: &str, value: Value, facts: &mut Facts) {
    let mut tell = |item: &str, text: String| {
        facts.insert((name.to_owned(), item.to_owned()), text);
    };
    match value {
        Value::Object(members) => {
            for (member, value) in members {
                flatten(&format!("{name}.{member}"), value, facts);
            }
        }
        Value::Array(values) => {
            let mut times: BTreeMap<String, u32> = BTreeMap::new();
            for value in in_groups(values) {
                let time = times.entry(value.clone()).or_insert(0);
                *time += 1;
                tell(&format!("{value} {time}"), value);
            }
        }
        Value::String(text) => tell("", text),
        Value::Null => {}
        other => tell("", other.to_string()),
    }
}

/// The values of a list as text; what follows an option of a command line stays with it.
fn in_groups(values: Vec<Value>) -> Vec<String> {
    let mut groups: Vec<String> = Vec::new();
    for value in values {
        let word = match value {
            Value::String(word) => word,
            other => other.to_string(),
        };
        match groups.last_mut() {
            Some(group) if is_lone_option(group) && !word.starts_with('-') => {
                group.push(' ');
                group.push_str(&word);
            }
            _ => groups.push(word),
        }
    }
    groups
}

fn is_lone_option(group: &str) -> bool {
    group.starts_with('-') && !group.contains(' ')
}

fn changes(old: &Facts, new: &Facts) -> Vec<FactChange> {
    let keys: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let changes = keys.into_iter().map(|key| FactChange {
        name: key.0.clone(),
        old: old.get(key).cloned(),
        new: new.get(key).cloned(),
    });
    changes.filter(|change| change.old != change.new).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn changed(name: &str, old: Value, new: Value) -> Vec<FactChange> {
        let facts = |value| {
            let mut facts = Facts::new();
            flatten(name, value, &mut facts);
            facts
        };
        changes(&facts(old), &facts(new))
    }

    fn change(name: &str, old: Option<&str>, new: Option<&str>) -> FactChange {
        FactChange {
            name: name.to_owned(),
            old: old.map(str::to_owned),
            new: new.map(str::to_owned),
        }
    }

    #[test]
    fn facts_have_the_names_they_have_in_the_manifest() {
        let found = changed(
            "machine",
            json!({ "type": "pc", "vcpus": 1, "cpu_model": "max" }),
            json!({ "type": "pc", "vcpus": 2 }),
        );
        let expected = [
            change("machine.cpu_model", Some("max"), None),
            change("machine.vcpus", Some("1"), Some("2")),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn an_argument_more_is_one_difference_and_moves_no_other() {
        let found = changed(
            "argv",
            json!(["qemu", "-m", "64", "-nodefaults", "-device", "x"]),
            json!([
                "qemu",
                "-smp",
                "2",
                "-m",
                "64",
                "-nodefaults",
                "-device",
                "x",
                "-device",
                "x"
            ]),
        );
        let expected = [
            change("argv", None, Some("-device x")),
            change("argv", None, Some("-smp 2")),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_resource_is_known_by_its_name_and_a_file_by_its_content() {
        let resource = |number: u32, size: u32| {
            let resource = json!({ "kind": "disk", "id": "vda", "backend": { "path": "/a" },
                "fingerprint": { "inode": number, "size": size } });
            let mut facts = Facts::new();
            of_resource(resource.as_object().unwrap().clone(), &mut facts);
            facts
        };
        assert_eq!(changes(&resource(1, 2), &resource(3, 2)), []);
        let name = "resources.disk:vda.fingerprint.size";
        let expected = [change(name, Some("2"), Some("4"))];
        assert_eq!(changes(&resource(1, 2), &resource(1, 4)), expected);
        let gone = changes(&resource(1, 2), &Facts::new());
        assert_eq!(gone.len(), 2);
        assert_eq!(
            gone[0],
            change("resources.disk:vda.backend.path", Some("/a"), None)
        );
    }
}
