//! Where QEMU put the devices whose arguments leave that to it.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::config::Arguments;
use crate::config::domain_xml::PciPlace;
use crate::error::Result;
use crate::qmp::{QmpClient, QomProperty};

/// The places on PCI buses of all such devices, by argument. What cannot be told is left out.
pub fn places(qmp: &mut QmpClient, arguments: &Arguments) -> Result<BTreeMap<usize, PciPlace>> {
    let unplaced: Vec<(usize, String, Option<String>)> = arguments
        .options("device")
        .filter_map(|(index, device)| {
            let device = device.properties();
            let is_placed = device.get("addr").is_some();
            let driver = device.get("driver").filter(|_| !is_placed)?;
            Some((index, driver, device.get("id")))
        })
        .collect();
    let mut found = BTreeMap::new();
    if unplaced.is_empty() {
        return Ok(found);
    }
    // Devices without an id are numbered as they were made: of each driver in the order of the arguments.
    let mut unnamed = qmp.qom_list("/machine/peripheral-anon")?;
    unnamed.sort_by_key(number);
    for (index, driver, id) in unplaced {
        let path = match id {
            Some(id) => format!("/machine/peripheral/{id}"),
            None => {
                let child = format!("child<{driver}>");
                let Some(place) = unnamed.iter().position(|one| one.type_name == child) else {
                    continue;
                };
                format!("/machine/peripheral-anon/{}", unnamed.remove(place).name)
            }
        };
        found.extend(place(qmp, &path).map(|place| (index, place)));
    }
    Ok(found)
}

/// The number in `device[7]`.
fn number(property: &QomProperty) -> u64 {
    let digits = property.name.bytes().filter(u8::is_ascii_digit);
    digits.fold(0, |number, digit| number * 10 + u64::from(digit - b'0'))
}

/// The place of a PCI device; `None` for any other.
fn place(qmp: &mut QmpClient, path: &str) -> Option<PciPlace> {
    let devfn = match qmp.qom_get(path, "addr").ok()? {
        Value::Number(number) => number.as_u64()?,
        _ => return None,
    };
    let bus = match qmp.qom_get(path, "parent_bus").ok()? {
        Value::String(path) => path.rsplit('/').next()?.to_owned(),
        _ => return None,
    };
    Some(PciPlace {
        bus,
        slot: u8::try_from(devfn >> 3).ok()?,
        function: u8::try_from(devfn & 7).ok()?,
    })
}
