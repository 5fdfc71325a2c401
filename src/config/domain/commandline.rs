//! What is handed to QEMU past the model: `<qemu:commandline>` and `<qemu:override>`.
//!
//! Both reach beyond what is modelled. They are read here; whether they are used is for the caller to decide, by whose
//! domain it is.

use super::view::View;
use super::word::words;

/// `<qemu:commandline>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExtraArguments {
    /// The line of its element; 0 if there is none.
    pub line: u32,
    /// `<qemu:arg value>`, in order.
    pub arguments: Vec<String>,
    /// `<qemu:env>`: name and value, in order.
    pub environment: Vec<(String, String)>,
}

words! {
    /// How a property's value is meant.
    PropertyType {
        String = "string",
        Unsigned = "unsigned",
        Signed = "signed",
        Bool = "bool",
        /// QEMU's own value is put back.
        Remove = "remove",
    }
}

/// One property of `<qemu:override><qemu:device>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PropertyOverride {
    /// The line of its element.
    pub line: u32,
    /// The alias of the device.
    pub alias: String,
    /// The property, by QEMU's name.
    pub name: String,
    /// How its value is meant.
    pub kind: PropertyType,
    /// Its value; `None` for remove.
    pub value: Option<String>,
}

pub(super) fn read_extra_arguments(view: &View<'_>) -> ExtraArguments {
    ExtraArguments {
        line: view.line(),
        arguments: view.each("qemu:arg", |arg| {
            if arg.element().get("value").is_none() {
                arg.error("it needs a value", None);
            }
            arg.attribute("value").unwrap_or_default()
        }),
        environment: view.each("qemu:env", |env| {
            (
                env.required("name"),
                env.attribute("value").unwrap_or_default(),
            )
        }),
    }
}

pub(super) fn read_overrides(view: &View<'_>) -> Vec<PropertyOverride> {
    let devices = view.each("qemu:device", |device| {
        let alias = device.required("alias");
        let front = device.one("qemu:frontend", |front| {
            front.each_some("qemu:property", |property| {
                let kind = property.required_word("type");
                Some(PropertyOverride {
                    line: property.line(),
                    alias: alias.clone(),
                    name: property.required("name"),
                    value: property.attribute("value"),
                    kind: kind?,
                })
            })
        });
        front.unwrap_or_default()
    });
    devices.into_iter().flatten().collect()
}
