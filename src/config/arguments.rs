//! A QEMU argument vector as a typed sequence that loses nothing.
//!
//! In: the words of `/proc/PID/cmdline`. Out: [`Arguments`], which write back to the same words. To tell an option's
//! value from a disk image that stands alone, one has to know which options take a value: that is [`OPTIONS`], for
//! every x86 QEMU from 5.0 to 10.0. An option that is not in it takes the next word as its value unless that word
//! begins with `-`.
//!
//! Source: `qemu-system-x86_64 -help` of 7.2 and 10.0, and the list of removed features in QEMU's manual.

use super::ConfigError;
use super::properties::Properties;

/// A QEMU argument vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// The first word: what was executed.
    pub program: String,
    /// All that follows, in order.
    pub items: Vec<Argument>,
}

/// One option with its value, or a disk image that stands alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Argument {
    /// `-name value`, `--name value` or `-name`.
    Option {
        /// The option as written, dashes included.
        word: String,
        /// Its value, if it takes one.
        value: Option<String>,
    },
    /// A word that no option claims: the image of the first hard disk.
    Image(String),
}

impl Arguments {
    /// Reads a vector whose first word is the program.
    ///
    /// # Errors
    /// [`ConfigError::NoProgram`] if there is no word, [`ConfigError::MissingValue`] if the last one needs another.
    pub fn parse<S: AsRef<str>>(words: &[S]) -> Result<Self, ConfigError> {
        let mut words = words.iter().map(AsRef::as_ref).peekable();
        let program = words.next().ok_or(ConfigError::NoProgram)?.to_owned();
        let mut items = Vec::new();
        while let Some(word) = words.next() {
            if !word.starts_with('-') {
                items.push(Argument::Image(word.to_owned()));
                continue;
            }
            let value = match takes_value(canonical(word)) {
                Some(true) => Some(words.next().ok_or_else(|| missing_value(word))?),
                Some(false) => None,
                None => words.next_if(|next| !next.starts_with('-')),
            };
            items.push(Argument::Option {
                word: word.to_owned(),
                value: value.map(str::to_owned),
            });
        }
        Ok(Arguments { program, items })
    }

    /// Reads the bytes of `/proc/PID/cmdline`: words that each end with a NUL.
    ///
    /// # Errors
    /// [`ConfigError::NotUtf8`] if a word is not UTF-8; what [`Arguments::parse`] says.
    pub fn from_cmdline(bytes: &[u8]) -> Result<Self, ConfigError> {
        let text = std::str::from_utf8(bytes).map_err(|error| ConfigError::NotUtf8 {
            at: error.valid_up_to(),
        })?;
        let text = text.strip_suffix('\0').unwrap_or(text);
        if text.is_empty() {
            return Err(ConfigError::NoProgram);
        }
        let words: Vec<&str> = text.split('\0').collect();
        Self::parse(&words)
    }

    /// The vector, program first.
    pub fn write(&self) -> Vec<String> {
        let mut words = vec![self.program.clone()];
        for item in &self.items {
            match item {
                Argument::Image(path) => words.push(path.clone()),
                Argument::Option { word, value } => {
                    words.push(word.clone());
                    words.extend(value.clone());
                }
            }
        }
        words
    }

    /// The options named `name`, with their index among [`Arguments::items`].
    pub fn options<'a>(
        &'a self,
        name: &'a str,
    ) -> impl DoubleEndedIterator<Item = (usize, &'a Argument)> {
        let items = self.items.iter().enumerate();
        items.filter(move |(_, item)| item.name() == Some(name))
    }

    /// The value of the last option named `name`: the one that counts where an option counts once.
    pub fn last_value(&self, name: &str) -> Option<&str> {
        let mut items = self.items.iter().rev();
        items.find(|item| item.name() == Some(name))?.value()
    }

    /// Whether QEMU makes a first serial port on its terminal that no argument names: because of `-nographic`.
    pub fn has_implicit_terminal(&self) -> bool {
        let is_serial = |(_, device): (usize, &Argument)| {
            device.properties().get("driver").as_deref() == Some("isa-serial")
        };
        self.has("nographic")
            && !self.has("serial")
            && !self.has("nodefaults")
            && !self.options("device").any(is_serial)
    }

    /// Whether an option is there.
    pub fn has(&self, name: &str) -> bool {
        self.items.iter().any(|item| item.name() == Some(name))
    }
}

impl Argument {
    /// `-name value`.
    pub fn with_value(name: &str, value: impl Into<String>) -> Self {
        Argument::Option {
            word: format!("-{name}"),
            value: Some(value.into()),
        }
    }

    /// `-name`.
    pub fn switch(name: &str) -> Self {
        Argument::Option {
            word: format!("-{name}"),
            value: None,
        }
    }

    /// The option's name without dashes, `M` as `machine`; `None` for an image that stands alone.
    pub fn name(&self) -> Option<&str> {
        match self {
            Argument::Option { word, .. } => Some(canonical(word)),
            Argument::Image(_) => None,
        }
    }

    /// The option's value, or the path of an image that stands alone.
    pub fn value(&self) -> Option<&str> {
        match self {
            Argument::Option { value, .. } => value.as_deref(),
            Argument::Image(path) => Some(path),
        }
    }

    /// The value as properties; empty ones for an option without value.
    pub fn properties(&self) -> Properties {
        let implied = self.name().and_then(implied_key);
        Properties::parse(self.value().unwrap_or_default(), implied)
    }

    /// Replaces the value.
    pub fn set_value(&mut self, new: impl Into<String>) {
        match self {
            Argument::Option { value, .. } => *value = Some(new.into()),
            Argument::Image(path) => *path = new.into(),
        }
    }

    /// Changes the properties of the value and leaves it untouched, byte for byte, if they stay the same.
    pub fn edit(&mut self, change: impl FnOnce(&mut Properties)) {
        let before = self.properties();
        let mut after = before.clone();
        change(&mut after);
        if after != before {
            self.set_value(after.write());
        }
    }

    /// The words as a person would write them in a message: `-drive file=/a.img`.
    pub fn shown(&self) -> String {
        match self {
            Argument::Image(path) => path.clone(),
            Argument::Option { word, value: None } => word.clone(),
            Argument::Option {
                word,
                value: Some(value),
            } => format!("{word} {value}"),
        }
    }
}

fn missing_value(word: &str) -> ConfigError {
    ConfigError::MissingValue {
        option: word.to_owned(),
    }
}

/// An option's name: one or two dashes taken off, aliases resolved.
fn canonical(word: &str) -> &str {
    let name = word
        .strip_prefix("--")
        .or_else(|| word.strip_prefix('-'))
        .unwrap_or(word);
    match name {
        "M" => "machine",
        "h" => "help",
        _ => name,
    }
}

/// Whether the option takes a value; `None` if it is not known.
pub fn takes_value(name: &str) -> Option<bool> {
    let found = OPTIONS.iter().find(|option| option.0 == name)?;
    Some(found.1 != Switch)
}

fn implied_key(name: &str) -> Option<&'static str> {
    let found = OPTIONS.iter().find(|option| option.0 == name)?;
    match found.1 {
        Implied(key) => Some(key),
        Switch | Value => None,
    }
}

/// What follows an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arity {
    /// Nothing.
    Switch,
    /// One word.
    Value,
    /// One word of properties; a first element without `=` is the value of this key.
    Implied(&'static str),
}

use Arity::{Implied, Switch, Value};

/// Every option of an x86 QEMU from 5.0 to 10.0, and what follows it.
pub const OPTIONS: &[(&str, Arity)] = &[
    ("D", Value),
    ("L", Value),
    ("S", Switch),
    ("accel", Implied("accel")),
    ("acpitable", Value),
    ("action", Value),
    ("add-fd", Value),
    ("alt-grab", Switch),
    ("append", Value),
    ("async-teardown", Switch),
    ("audio", Implied("driver")),
    ("audio-help", Switch),
    ("audiodev", Implied("driver")),
    ("bios", Value),
    ("blockdev", Implied("driver")),
    ("boot", Implied("order")),
    ("bt", Value),
    ("cdrom", Value),
    ("chardev", Implied("backend")),
    ("chroot", Value),
    ("clock", Value),
    ("compat", Value),
    ("cpu", Implied("model")),
    ("ctrl-grab", Switch),
    ("curses", Switch),
    ("d", Value),
    ("daemonize", Switch),
    ("debugcon", Value),
    ("device", Implied("driver")),
    ("dfilter", Value),
    ("display", Implied("type")),
    ("drive", Value),
    ("dtb", Value),
    ("dump-vmstate", Value),
    ("echr", Value),
    ("enable-fips", Switch),
    ("enable-hax", Switch),
    ("enable-kvm", Switch),
    ("enable-sync-profile", Switch),
    ("fda", Value),
    ("fdb", Value),
    ("fsdev", Implied("fsdriver")),
    ("full-screen", Switch),
    ("fw_cfg", Implied("name")),
    ("g", Value),
    ("gdb", Value),
    ("global", Value),
    ("hda", Value),
    ("hdb", Value),
    ("hdc", Value),
    ("hdd", Value),
    ("help", Switch),
    ("icount", Implied("shift")),
    ("incoming", Value),
    ("initrd", Value),
    ("iscsi", Value),
    ("jitdump", Switch),
    ("k", Value),
    ("kernel", Value),
    ("loadvm", Value),
    ("m", Implied("size")),
    ("machine", Implied("type")),
    ("mem-path", Value),
    ("mem-prealloc", Switch),
    ("mon", Implied("chardev")),
    ("monitor", Value),
    ("msg", Value),
    ("mtdblock", Value),
    ("name", Implied("guest")),
    ("net", Implied("type")),
    ("netdev", Implied("type")),
    ("nic", Implied("type")),
    ("no-acpi", Switch),
    ("no-fd-bootchk", Switch),
    ("no-frame", Switch),
    ("no-hpet", Switch),
    ("no-kvm", Switch),
    ("no-quit", Switch),
    ("no-reboot", Switch),
    ("no-shutdown", Switch),
    ("no-user-config", Switch),
    ("nodefaults", Switch),
    ("nodefconfig", Switch),
    ("nographic", Switch),
    ("numa", Implied("type")),
    ("object", Implied("qom-type")),
    ("old-param", Switch),
    ("only-migratable", Switch),
    ("option-rom", Implied("romfile")),
    ("overcommit", Value),
    ("parallel", Value),
    ("perfmap", Switch),
    ("pflash", Value),
    ("pidfile", Value),
    ("plugin", Implied("file")),
    ("portrait", Switch),
    ("preconfig", Switch),
    ("prom-env", Value),
    ("qmp", Value),
    ("qmp-pretty", Value),
    ("qtest", Value),
    ("qtest-log", Value),
    ("readconfig", Value),
    ("realtime", Value),
    ("rotate", Value),
    ("rtc", Value),
    ("run-with", Value),
    ("runas", Value),
    ("s", Switch),
    ("sandbox", Implied("enable")),
    ("sd", Value),
    ("sdl", Switch),
    ("seed", Value),
    ("semihosting", Switch),
    ("semihosting-config", Value),
    ("serial", Value),
    ("set", Value),
    ("shim", Value),
    ("show-cursor", Switch),
    ("singlestep", Switch),
    ("smbios", Value),
    ("smp", Implied("cpus")),
    ("snapshot", Switch),
    ("soundhw", Value),
    ("spice", Value),
    ("tb-size", Value),
    ("tpmdev", Implied("type")),
    ("trace", Implied("enable")),
    ("usb", Switch),
    ("usbdevice", Value),
    ("uuid", Value),
    ("version", Switch),
    ("vga", Value),
    ("virtfs", Implied("fsdriver")),
    ("virtfs_synth", Switch),
    ("virtioconsole", Value),
    ("vnc", Implied("vnc")),
    ("watchdog", Value),
    ("watchdog-action", Value),
    ("win2k-hack", Switch),
    ("writeconfig", Value),
    ("xen-attach", Switch),
    ("xen-domid", Value),
    ("xen-domid-restrict", Switch),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(words: &[&str]) -> Arguments {
        Arguments::parse(words).unwrap()
    }

    #[test]
    fn values_are_told_from_an_image_that_stands_alone() {
        let arguments = parse(&[
            "qemu",
            "-m",
            "512",
            "--enable-kvm",
            "disk.img",
            "-append",
            "-x",
        ]);
        let shown: Vec<String> = arguments.items.iter().map(Argument::shown).collect();
        assert_eq!(shown, ["-m 512", "--enable-kvm", "disk.img", "-append -x"]);
        assert_eq!(arguments.items[2], Argument::Image("disk.img".into()));
        assert_eq!(arguments.last_value("append"), Some("-x"));
    }

    #[test]
    fn upper_and_lower_case_options_differ() {
        let arguments = parse(&[
            "qemu", "-s", "-S", "-M", "q35", "-m", "1G", "-d", "int", "-D", "log",
        ]);
        assert_eq!(arguments.last_value("machine"), Some("q35"));
        assert_eq!(arguments.last_value("m"), Some("1G"));
        assert_eq!(arguments.last_value("D"), Some("log"));
        assert!(arguments.has("s") && arguments.has("S"));
    }

    #[test]
    fn an_option_without_its_value_is_refused() {
        let error = Arguments::parse(&["qemu", "-m"]).unwrap_err();
        assert_eq!(
            error,
            ConfigError::MissingValue {
                option: "-m".into()
            }
        );
        assert_eq!(Arguments::parse::<&str>(&[]), Err(ConfigError::NoProgram));
    }

    #[test]
    fn an_option_of_a_later_qemu_is_kept() {
        let words = ["qemu", "-brand-new", "value", "-newer", "-S"];
        let arguments = parse(&words);
        assert_eq!(arguments.items.len(), 3);
        assert_eq!(arguments.write(), words);
    }

    #[test]
    fn a_cmdline_of_proc_is_split_at_its_nuls() {
        let arguments = Arguments::from_cmdline(b"qemu\0-append\0\0-S\0").unwrap();
        assert_eq!(arguments.write(), ["qemu", "-append", "", "-S"]);
        assert_eq!(Arguments::from_cmdline(b""), Err(ConfigError::NoProgram));
        let error = Arguments::from_cmdline(b"qemu\0\xff\0").unwrap_err();
        assert_eq!(error, ConfigError::NotUtf8 { at: 5 });
    }

    #[test]
    fn an_edit_that_changes_nothing_keeps_the_bytes() {
        let text = r#"{ "driver" : "e1000" }"#;
        let mut device = Argument::with_value("device", text);
        device.edit(|properties| properties.set("driver", "e1000"));
        assert_eq!(device.value(), Some(text));
    }

    #[test]
    fn the_table_is_sorted_and_names_each_option_once() {
        assert!(OPTIONS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    proptest! {
        #[test]
        fn every_vector_is_written_back(words in proptest::collection::vec(
            prop_oneof!["-?-?[a-z,=]{0,8}", Just("-m".to_owned()), Just("-S".to_owned()), "\\PC{0,8}"], 1..12))
        {
            if let Ok(arguments) = Arguments::parse(&words) {
                prop_assert_eq!(arguments.write(), words);
            }
        }
    }
}
