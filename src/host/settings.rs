//! Where the settings of this host and of this user stand.

use std::path::PathBuf;

use super::keys::directory_of;

/// The settings of the host, which nobody else's word counts less than.
const SYSTEM: &str = "/etc/vmstow/config.toml";

/// The files of settings, whether they are there or not; what a later one says counts more.
///
/// `$VMSTOW_SYSTEM_CONFIG` names another file for the host's; empty it names none.
pub fn settings_files() -> Vec<PathBuf> {
    let system = std::env::var_os("VMSTOW_SYSTEM_CONFIG").unwrap_or_else(|| SYSTEM.into());
    let system = Some(PathBuf::from(system)).filter(|path| !path.as_os_str().is_empty());
    let user = directory_of("XDG_CONFIG_HOME", ".config").map(|path| path.join("config.toml"));
    system.into_iter().chain(user).collect()
}
