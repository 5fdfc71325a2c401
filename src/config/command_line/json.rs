//! The values of `-device`, `-object`, `-blockdev` and `-netdev` as JSON objects, and of other options as pairs.
//!
//! Members stand in the order of their names, as everywhere in this program: what is changed later is written back alike.

use serde_json::{Map, Value};

use crate::config::properties::escape;

/// A JSON object that becomes the value of an option.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Json(Map<String, Value>);

impl Json {
    /// The value of a `-device`.
    pub(super) fn device(driver: &str) -> Self {
        Json::empty().with("driver", driver)
    }

    /// The value of an `-object`.
    pub(super) fn object(kind: &str, id: &str) -> Self {
        Json::empty().with("qom-type", kind).with("id", id)
    }

    /// The value of a `-netdev`.
    pub(super) fn netdev(kind: &str, id: &str) -> Self {
        Json::empty().with("type", kind).with("id", id)
    }

    /// The value of a `-blockdev` that has no name yet.
    pub(super) fn node(driver: &str) -> Self {
        Json::empty().with("driver", driver)
    }

    /// An object without members.
    pub(super) fn empty() -> Self {
        Json(Map::new())
    }

    /// Adds a member.
    pub(super) fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.set(key, value);
        self
    }

    /// Adds a member if it has a value.
    pub(super) fn with_some(mut self, key: &str, value: Option<impl Into<Value>>) -> Self {
        self.set_some(key, value);
        self
    }

    /// Adds a member that QEMU wants as `on` or `off`, if it has a value.
    pub(super) fn with_switch(mut self, key: &str, is_on: Option<bool>) -> Self {
        self.set_some(key, is_on.map(on_off));
        self
    }

    /// Adds an object as a member.
    pub(super) fn with_json(self, key: &str, value: Json) -> Self {
        self.with(key, Value::Object(value.0))
    }

    /// As [`Json::with`], in place.
    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// As [`Json::with_some`], in place.
    pub(super) fn set_some(&mut self, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.set(key, value);
        }
    }

    /// Takes a member out.
    pub(super) fn remove(&mut self, key: &str) {
        self.0.remove(key);
    }

    /// As QEMU reads it.
    pub(super) fn write(&self) -> String {
        Value::Object(self.0.clone()).to_string()
    }

    /// As a member of another object.
    pub(super) fn into_value(self) -> Value {
        Value::Object(self.0)
    }
}

/// `on` or `off`.
pub(super) fn on_off(is_on: bool) -> &'static str {
    if is_on { "on" } else { "off" }
}

/// The value of an option in the key=value form, its commas doubled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pairs(String);

impl Pairs {
    /// A value that begins with `first`, as it stands.
    pub(super) fn new(first: &str) -> Self {
        Pairs(escape(first))
    }

    /// Adds `key=value`.
    pub(super) fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.push(key, value);
        self
    }

    /// Adds `key=value` if there is a value.
    pub(super) fn with_some(mut self, key: &str, value: Option<impl ToString>) -> Self {
        if let Some(value) = value {
            self.push(key, value);
        }
        self
    }

    /// Adds `key=on` or `key=off` if there is a value.
    pub(super) fn with_switch(self, key: &str, is_on: Option<bool>) -> Self {
        self.with_some(key, is_on.map(on_off))
    }

    /// As [`Pairs::with`], in place.
    pub(super) fn push(&mut self, key: &str, value: impl ToString) {
        if !self.0.is_empty() {
            self.0.push(',');
        }
        self.0.push_str(key);
        self.0.push('=');
        self.0.push_str(&escape(&value.to_string()));
    }

    /// As QEMU reads it.
    pub(super) fn write(self) -> String {
        self.0
    }
}
