//! The commands that make, watch and steer a migration.
//!
//! Source: QEMU `qapi/migration.json`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::client::QmpClient;
use super::error::QmpError;
use super::name::qmp_names;

qmp_names! {
    /// How far a migration is.
    ///
    /// Source: QEMU `qapi/migration.json`, `MigrationStatus`.
    MigrationStatus {
        /// There never was one.
        None = "none",
        /// Begun, nothing sent.
        Setup = "setup",
        /// Told to end, but has not ended yet.
        Cancelling = "cancelling",
        /// Ended since it was told to.
        Cancelled = "cancelled",
        /// Sends memory.
        Active = "active",
        /// The destination runs and asks for memory.
        PostcopyActive = "postcopy-active",
        /// The destination loads its devices; from QEMU 10.1 on.
        PostcopyDevice = "postcopy-device",
        /// The connection broke while the destination ran.
        PostcopyPaused = "postcopy-paused",
        /// A broken postcopy gets its new connection.
        PostcopyRecoverSetup = "postcopy-recover-setup",
        /// A broken postcopy is taken up again.
        PostcopyRecover = "postcopy-recover",
        /// Done.
        Completed = "completed",
        /// Failed; `error_desc` tells why, except in one case of QEMU 7.2.
        Failed = "failed",
        /// A COLO pair runs.
        Colo = "colo",
        /// Waits for `migrate-continue`.
        PreSwitchover = "pre-switchover",
        /// Sends devices.
        Device = "device",
        /// Waits for devices to be unplugged.
        WaitUnplug = "wait-unplug",
    }
}

impl MigrationStatus {
    /// Whether a migration is going on, so that none can be started and no capability changed. Of a status that we
    /// do not know we assume it.
    pub fn is_active(&self) -> bool {
        use MigrationStatus::{Cancelled, Completed, Failed, None};
        !matches!(self, None | Cancelled | Completed | Failed)
    }

    /// Whether a guest runs of which part of the memory is elsewhere.
    pub fn is_postcopy(&self) -> bool {
        matches!(
            self,
            MigrationStatus::PostcopyActive
                | MigrationStatus::PostcopyDevice
                | MigrationStatus::PostcopyPaused
                | MigrationStatus::PostcopyRecoverSetup
                | MigrationStatus::PostcopyRecover
        )
    }
}

/// What `query-migrate` tells.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// How far it is.
    #[serde(default = "no_migration")]
    pub status: MigrationStatus,
    /// QEMU's words for what failed.
    #[serde(default)]
    pub error_desc: Option<String>,
    /// Why this guest cannot be migrated: QEMU's words, one a blocker.
    #[serde(default)]
    pub blocked_reasons: Vec<String>,
    /// Memory, once there is or was a migration.
    #[serde(default)]
    pub ram: Option<RamProgress>,
    /// Milliseconds since it began, or that it took.
    #[serde(default)]
    pub total_time: Option<u64>,
}

fn no_migration() -> MigrationStatus {
    MigrationStatus::None
}

/// How much memory was sent; all but the page counts in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct RamProgress {
    /// What went over the wire.
    pub transferred: u64,
    /// What the guest has.
    pub total: u64,
    /// What is still to be sent.
    pub remaining: u64,
    /// Pages sent whole.
    pub normal: u64,
    /// Pages of one repeated byte, zero mostly.
    pub duplicate: u64,
    /// Bytes in a page.
    pub page_size: u64,
}

impl QmpClient {
    /// How the migration goes, and what would block one.
    pub fn query_migrate(&mut self) -> Result<MigrationInfo, QmpError> {
        self.query("query-migrate")
    }

    /// Every capability that this QEMU has, and whether it is on.
    pub fn capabilities(&mut self) -> Result<BTreeMap<String, bool>, QmpError> {
        #[derive(Deserialize)]
        struct Entry {
            capability: String,
            state: bool,
        }
        let entries: Vec<Entry> = self.query("query-migrate-capabilities")?;
        let pairs = entries.into_iter().map(|one| (one.capability, one.state));
        Ok(pairs.collect())
    }

    /// Sets capabilities, all or none. QEMU refuses while a migration runs.
    pub fn set_capabilities(
        &mut self,
        capabilities: &BTreeMap<String, bool>,
    ) -> Result<(), QmpError> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(name, is_on)| json!({ "capability": name, "state": is_on }))
            .collect();
        let arguments = json!({ "capabilities": list });
        self.order("migrate-set-capabilities", arguments)
    }

    /// The migration parameters, an object.
    pub fn parameters(&mut self) -> Result<Value, QmpError> {
        self.query("query-migrate-parameters")
    }

    /// Sets migration parameters, an object of those to change.
    pub fn set_parameters(&mut self, parameters: Value) -> Result<(), QmpError> {
        self.order("migrate-set-parameters", parameters)
    }

    /// Begins to migrate to `uri`. It returns at once; [`QmpClient::query_migrate`] tells how it goes.
    pub fn migrate(&mut self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate", json!({ "uri": uri }))
    }

    /// Tells a migration to end. Into a pipe that nobody reads it stays `cancelling` until the reader closes it.
    pub fn migrate_cancel(&mut self) -> Result<(), QmpError> {
        self.order("migrate_cancel", Value::Null)
    }

    /// Begins to load a migration; only once, in a QEMU started with `-incoming defer`.
    pub fn migrate_incoming(&mut self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate-incoming", json!({ "uri": uri }))
    }

    /// Lets a broken postcopy be taken up again by whoever connects to `uri`; out of band.
    pub fn migrate_recover(&mut self, uri: &str) -> Result<(), QmpError> {
        self.execute_oob::<IgnoredAny>("migrate-recover", json!({ "uri": uri }))
            .map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_that_never_migrated_tells_nothing() {
        let info: MigrationInfo = serde_json::from_value(json!({})).unwrap();
        assert_eq!(info.status, MigrationStatus::None);
        assert!(!info.status.is_active() && info.ram.is_none());
    }

    #[test]
    fn blockers_and_failures_are_read() {
        let info: MigrationInfo = serde_json::from_value(json!({
            "status": "failed", "error-desc": "Broken pipe", "blocked-reasons": ["a", "b"],
            "ram": { "transferred": 7, "total": 9, "remaining": 2, "mbps": 0.5, "page-size": 4096 },
        }))
        .unwrap();
        assert_eq!(info.error_desc.as_deref(), Some("Broken pipe"));
        assert_eq!(info.blocked_reasons, ["a", "b"]);
        assert_eq!(info.ram.map(|ram| ram.remaining), Some(2));
    }

    #[test]
    fn a_status_we_do_not_know_counts_as_active() {
        assert!(MigrationStatus::Unknown("brand-new".to_owned()).is_active());
        assert!(MigrationStatus::Cancelling.is_active());
        assert!(!MigrationStatus::Completed.is_active());
    }
}
