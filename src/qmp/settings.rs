//! The migration settings of somebody else's QEMU: recorded, changed for a save, put back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::client::QmpClient;
use super::error::QmpError;

/// The capability with which a guest runs on while it is saved.
const LIVE: &str = "background-snapshot";

/// Every capability and the one parameter that a save changes, as they were.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSettings {
    /// Every capability that this QEMU has.
    pub capabilities: BTreeMap<String, bool>,
    /// `max-bandwidth` in bytes a second; 0 is no limit. `None` if QEMU did not tell.
    pub max_bandwidth: Option<u64>,
}

impl SavedSettings {
    /// Records what is set now.
    pub fn record(qmp: &mut QmpClient) -> Result<Self, QmpError> {
        Ok(SavedSettings {
            capabilities: qmp.capabilities()?,
            max_bandwidth: qmp
                .parameters()?
                .get("max-bandwidth")
                .and_then(Value::as_u64),
        })
    }

    /// Sets what a save needs: every capability off but `events`, and no limit of bandwidth.
    ///
    /// `postcopy-ram` or `return-path` left on would make a save into a pipe hang.
    pub fn set_for_save(&self, qmp: &mut QmpClient) -> Result<(), QmpError> {
        let names = self.capabilities.keys().cloned();
        let wanted = names.map(|name| {
            let is_on = name == "events";
            (name, is_on)
        });
        qmp.set_capabilities(&wanted.collect())?;
        qmp.set_parameters(json!({ "max-bandwidth": 0 }))
    }

    /// Whether this QEMU can write a guest's memory while it runs on (6.0 or later).
    pub fn knows_live(&self) -> bool {
        self.capabilities.contains_key(LIVE)
    }

    /// Whether this QEMU is set to let the guest run on while its memory is written.
    pub fn is_live(qmp: &mut QmpClient) -> Result<bool, QmpError> {
        Ok(qmp.capabilities()?.get(LIVE) == Some(&true))
    }

    /// Sets what a save of a guest that runs on needs: every capability off but `events` and `background-snapshot`, and no
    /// limit of bandwidth. QEMU refuses where the host's kernel, or the guest's memory, does not allow it.
    pub fn set_for_live(&self, qmp: &mut QmpClient) -> Result<(), QmpError> {
        let names = self.capabilities.keys().cloned();
        let wanted = names.map(|name| {
            let is_on = name == "events" || name == LIVE;
            (name, is_on)
        });
        qmp.set_capabilities(&wanted.collect())?;
        qmp.set_parameters(json!({ "max-bandwidth": 0 }))
    }

    /// Sets everything as it was.
    pub fn put_back(&self, qmp: &mut QmpClient) -> Result<(), QmpError> {
        qmp.set_capabilities(&self.capabilities)?;
        match self.max_bandwidth {
            Some(bytes) => qmp.set_parameters(json!({ "max-bandwidth": bytes })),
            None => Ok(()),
        }
    }
}
