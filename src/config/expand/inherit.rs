//! What a domain leaves open, taken over from the one that it was before.
//!
//! Somebody who changes a guest's XML goes on from what they wrote, which has neither addresses nor aliases, while what is
//! kept has both. So an element of the new domain that is one of the old gets the old one's where it has none, and what was
//! chosen by the host at the time (machine type, CPU, firmware, emulator, UUID) stays chosen. What the new domain says
//! counts, and what it leaves out altogether is not brought back: that is the comparison's business.

use std::borrow::Cow;

use super::edit::device;
use super::{Expanded, HostKnowledge, expand};
use crate::config::ConfigError;
use crate::config::xml::{Document, Element};

/// Modes of CPUs that stand for whatever a host has.
const OPEN_MODES: [&str; 3] = ["host-model", "host-passthrough", "maximum"];

/// Ways to tell which old device a new one is, the surest first.
const WAYS: [fn(&Element) -> Option<String>; 4] = [by_alias, by_address, by_name, by_form];

/// Fills in everything that a domain leaves open: as it was `before` what that tells, the rest as [`expand`] does.
///
/// # Errors
/// As [`expand`].
pub fn expand_again(
    document: &Document,
    before: &Document,
    knowledge: &HostKnowledge,
) -> Result<Expanded, ConfigError> {
    let mut once = expand(&inherit(document, before), knowledge)?.document;
    // What nobody wrote, such as a controller, has the place that it had too.
    if let Some(devices) = once.root.find_mut("devices") {
        for added in devices.elements_mut().filter(|it| it.line == 0) {
            added.remove(|child| matches!(&*child.name, "address" | "alias"));
        }
    }
    expand(&inherit(&once, before), knowledge)
}

/// The domain with what it leaves open as it was `before`.
fn inherit(document: &Document, before: &Document) -> Document {
    let mut document = document.clone();
    let (new, old) = (&mut document.root, &before.root);
    if new.find("uuid").is_none()
        && let Some(uuid) = old.find("uuid")
    {
        let place = new.elements().position(|child| child.name == "name");
        new.insert(place.map_or(0, |place| place + 1), fresh(uuid));
    }
    machine(new, old);
    firmware(new, old);
    cpu(new, old);
    devices(&mut document, old);
    document
}

/// An element as if nobody had written it, so that no line is told of it.
fn fresh(element: &Element) -> Element {
    let mut element = element.clone();
    element.line = 0;
    element
}

/// `q35` stays the machine type that it was; so does one that is left out.
fn machine(new: &mut Element, old: &Element) {
    let Some(was) = old.at(&["os", "type"]).and_then(|kind| kind.get("machine")) else {
        return;
    };
    let Some(kind) = new.find_mut("os").and_then(|os| os.find_mut("type")) else {
        return;
    };
    let is_open = match kind.get("machine") {
        Some("q35") => was.starts_with("pc-q35-"),
        Some("pc") | None => was.starts_with("pc-i440fx-"),
        Some(_) => false,
    };
    if is_open {
        kind.set("machine", was);
    }
}

/// The files that `firmware='efi'` meant, and the one that variables without a file got.
fn firmware(new: &mut Element, old: &Element) {
    let Some(was) = old.find("os") else { return };
    let Some(os) = new.find_mut("os") else { return };
    if os.get("firmware").is_some()
        && os.find("loader").is_none_or(|it| it.text().is_empty())
        && let Some(loader) = was.find("loader")
    {
        os.remove(|child| child.name == "loader");
        let place = os.elements().position(|child| child.name == "type");
        os.insert(place.map_or(0, |place| place + 1), fresh(loader));
    }
    let has_file = |it: &Element| it.find("source").is_some() || !it.text().is_empty();
    let is_open = os.find("loader").is_some() && !os.find("nvram").is_some_and(has_file);
    if let Some(nvram) = was.find("nvram").filter(|_| is_open) {
        os.remove(|child| child.name == "nvram");
        let place = os.elements().position(|child| child.name == "loader");
        os.insert(place.map_or(0, |place| place + 1), fresh(nvram));
    }
    let smm = old.at(&["features", "smm"]);
    if os.get("firmware").is_some()
        && let Some(features) = new.find_mut("features")
        && features.find("smm").is_none()
    {
        smm.into_iter().for_each(|smm| features.push(fresh(smm)));
    }
}

/// A mode that stood for what the host had stays what that was. What is asked for beside it counts.
fn cpu(new: &mut Element, old: &Element) {
    let Some(was) = old.find("cpu") else { return };
    let Some(cpu) = new.find_mut("cpu") else {
        return;
    };
    let is_open = |cpu: &Element| cpu.get("mode").is_some_and(|it| OPEN_MODES.contains(&it));
    if !is_open(cpu) || is_open(was) {
        return;
    }
    let mut kept = was.clone();
    kept.line = cpu.line;
    for child in cpu.elements() {
        match &*child.name {
            "model" | "vendor" => {}
            "feature" => {
                let name = child.get("name").unwrap_or_default();
                let is_it = |it: &Element| it.name == "feature" && it.get("name") == Some(name);
                let says = child.get("policy").unwrap_or("require");
                let is_same =
                    |it: &Element| is_it(it) && it.get("policy").unwrap_or("require") == says;
                let is_said = kept.elements().any(is_same);
                if !is_said {
                    kept.remove(is_it);
                    kept.push(child.clone());
                }
            }
            name => {
                kept.remove(|it| it.name == name);
                kept.push(child.clone());
            }
        }
    }
    *cpu = kept;
}

fn devices(document: &mut Document, old: &Element) {
    let Some(was) = old.find("devices") else {
        return;
    };
    if let Some(devices) = document.root.find_mut("devices") {
        if devices.find("emulator").is_none()
            && let Some(emulator) = was.find("emulator")
        {
            devices.insert(0, fresh(emulator));
        }
        bridges(devices, was);
    }
    let names: Vec<Cow<'static, str>> = was.elements().map(|it| it.name.clone()).collect();
    for (at, name) in names.iter().enumerate() {
        if names.get(..at).is_some_and(|seen| !seen.contains(name)) {
            devices_of(document, name, was);
        }
    }
}

/// Whoever gives no bridge or port a place leaves open which others there are.
fn bridges(devices: &mut Element, was: &Element) {
    let is_bridge = |it: &Element| {
        let is_root = matches!(it.get("model"), Some("pci-root" | "pcie-root"));
        it.name == "controller" && it.get("type") == Some("pci") && !is_root
    };
    let written: Vec<&Element> = devices.elements().filter(|it| is_bridge(it)).collect();
    if written.iter().any(|it| it.find("address").is_some()) {
        return;
    }
    let indexes: Vec<&str> = written.iter().filter_map(|it| it.get("index")).collect();
    let is_missing = |it: &&Element| {
        is_bridge(it)
            && it
                .get("index")
                .is_some_and(|index| !indexes.contains(&index))
    };
    let missing: Vec<Element> = was.elements().filter(is_missing).map(fresh).collect();
    missing.into_iter().for_each(|it| devices.push(it));
}

/// Gives the devices of one name what they leave open.
fn devices_of(document: &mut Document, name: &str, was: &Element) {
    let olds: Vec<&Element> = was.all(name).collect();
    let count = document
        .root
        .find("devices")
        .map_or(0, |devices| devices.all(name).count());
    let mut found: Vec<Option<&Element>> = vec![None; count];
    let mut free = olds;
    for way in WAYS {
        for (number, found) in found.iter_mut().enumerate() {
            let Some(new) = device(document, name, number).filter(|_| found.is_none()) else {
                continue;
            };
            let Some(key) = way(new) else { continue };
            let place = free
                .iter()
                .position(|old| way(old).as_ref() == Some(&key) && fits(new, old));
            *found = place.map(|place| free.remove(place));
        }
    }
    for (number, old) in found.iter().enumerate() {
        if let (Some(new), Some(old)) = (device(document, name, number), old) {
            complete(new, old);
        }
    }
}

/// Whether two devices can be one: neither says of its kind what the other denies.
fn fits(new: &Element, old: &Element) -> bool {
    let model = |it: &Element| {
        let own = it.get("model").map(str::to_owned);
        own.or_else(|| Some(it.find("model")?.get("type")?.to_owned()))
    };
    let is_other = |one: Option<String>, other: Option<String>| match (one, other) {
        (Some(one), Some(other)) => one != other,
        _ => false,
    };
    let bus = |it: &Element| {
        let own = it.get("bus").map(str::to_owned);
        own.or_else(|| Some(it.find("target")?.get("bus")?.to_owned()))
    };
    let kind = |it: &Element| Some(it.get("type")?.to_owned());
    let has_kind = matches!(&*new.name, "controller" | "input" | "hub" | "sound");
    let is_another = is_other(model(new), model(old))
        || is_other(bus(new), bus(old))
        || has_kind && is_other(kind(new), kind(old));
    !is_another
}

fn by_alias(element: &Element) -> Option<String> {
    Some(element.find("alias")?.get("name")?.to_owned())
}

fn by_address(element: &Element) -> Option<String> {
    let address = element.find("address")?;
    let places = address.attributes.iter().filter(|it| it.name != "type");
    let mut places: Vec<String> = places
        .map(|it| format!("{}={}", it.name, it.value()))
        .collect();
    places.sort();
    // One of which only the kind is said says nothing.
    (!places.is_empty()).then(|| format!("{:?} {places:?}", address.get("type")))
}

fn by_name(element: &Element) -> Option<String> {
    let of = |child: &str, attribute: &str| {
        let value = element.find(child)?.get(attribute)?;
        Some(value.to_lowercase())
    };
    match &*element.name {
        "disk" => of("target", "dev"),
        "interface" => of("mac", "address"),
        "channel" => of("target", "name"),
        "filesystem" => of("target", "dir"),
        "controller" => {
            let index = element.get("index").unwrap_or("0");
            Some(format!("{:?} {index}", element.get("type")))
        }
        "serial" | "parallel" | "console" => of("target", "port"),
        _ => None,
    }
}

/// A device that is told by nothing else is the next one of its kind.
fn by_form(element: &Element) -> Option<String> {
    let has_name = matches!(&*element.name, "disk" | "controller");
    (!has_name).then(|| element.name.to_string())
}

/// Adds what the new device leaves open.
fn complete(new: &mut Element, old: &Element) {
    if new.name == "interface"
        && let Some(mac) = old.find("mac")
        && new.find("mac").and_then(|it| it.get("address")).is_none()
    {
        new.remove(|child| child.name == "mac");
        new.insert(0, fresh(mac));
    }
    for name in ["alias", "address"] {
        let Some(was) = old.find(name) else { continue };
        match new.find_mut(name) {
            None => new.push(fresh(was)),
            Some(child) => {
                // `<address type='pci'/>` says the kind and leaves the place open.
                let is_open = child.attributes.iter().all(|it| it.name == "type");
                if is_open
                    && child
                        .get("type")
                        .is_none_or(|it| was.get("type") == Some(it))
                {
                    child.attributes.clone_from(&was.attributes);
                }
            }
        }
    }
}
