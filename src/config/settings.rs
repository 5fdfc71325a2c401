//! What a user, or this host, always wants: `config.toml`.
//!
//! ```toml
//! qemu = "/opt/qemu/bin/qemu-system-x86_64"        # as --qemu
//! remap = [                                         # as --remap, for whatever of it fits a guest
//!   "disk:/var/lib/libvirt/images/=/srv/images/",
//!   "net:*=bridge=br0",
//! ]
//!
//! [allow]                                           # what an image that nobody you trust signed may use by itself
//! paths = ["/srv/images/"]
//! interfaces = ["br0"]
//! user-network = true
//! ```
//!
//! A key that is not known is an error: a word spelled wrongly would do nothing, silently.

use serde::Deserialize;
use toml::Spanned;

use super::error::ConfigError;
use super::remap::Remap;

/// What one file says, or several one above the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// The QEMU to start instead of the one that an image names.
    pub qemu: Option<String>,
    /// Other backends for resources; those that fit nothing of a guest mean nothing.
    pub remaps: Vec<Remap>,
    /// What an image of a stranger may use.
    pub allow: Allow,
}

/// What an image that nobody vouches for may use of this host by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allow {
    /// Files; one that ends in `/` stands for all below it.
    pub paths: Vec<String>,
    /// Bridges and taps.
    pub interfaces: Vec<String>,
    /// Whether it may have a network that leads to this host and beyond.
    pub user_network: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    qemu: Option<String>,
    #[serde(default)]
    remap: Vec<Spanned<String>>,
    #[serde(default)]
    allow: AllowTable,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct AllowTable {
    paths: Vec<Spanned<String>>,
    interfaces: Vec<String>,
    user_network: bool,
}

impl Settings {
    /// Reads the text of `file`, whose relative paths start in `directory`.
    ///
    /// # Errors
    /// [`ConfigError::FileLine`] with the first thing that is wrong, and its line.
    pub fn parse(file: &str, directory: &str, text: &str) -> Result<Self, ConfigError> {
        let wrong = |at: usize, fact: String| ConfigError::FileLine {
            file: file.to_owned(),
            line: line_of(text, at),
            fact,
        };
        let read: File = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            wrong(at, error.message().to_owned())
        })?;
        let mut remaps = Vec::new();
        for remap in &read.remap {
            let line = line_of(text, remap.span().start);
            let mut remap = Remap::parse_at(remap.get_ref(), file, line)?;
            remap.start_paths_in(directory);
            remaps.push(remap);
        }
        for path in &read.allow.paths {
            if !path.get_ref().starts_with('/') {
                let fact = format!("{:?} is not an absolute path", path.get_ref());
                return Err(wrong(path.span().start, fact));
            }
        }
        Ok(Settings {
            qemu: read.qemu,
            remaps,
            allow: Allow {
                paths: read
                    .allow
                    .paths
                    .into_iter()
                    .map(Spanned::into_inner)
                    .collect(),
                interfaces: read.allow.interfaces,
                user_network: read.allow.user_network,
            },
        })
    }

    /// With a file above this one, whose word counts more.
    pub fn below(mut self, above: Settings) -> Self {
        self.qemu = above.qemu.or(self.qemu);
        self.remaps.extend(above.remaps);
        self.allow.paths.extend(above.allow.paths);
        self.allow.interfaces.extend(above.allow.interfaces);
        self.allow.user_network |= above.allow.user_network;
        self
    }
}

impl Allow {
    /// Whether this file may be used. A path that climbs may lead anywhere.
    pub fn has_path(&self, path: &str) -> bool {
        let climbs = path.split('/').any(|part| part == "..");
        let is_it = |allowed: &String| match allowed.ends_with('/') {
            true => path.starts_with(allowed.as_str()) && path.len() > allowed.len(),
            false => path == allowed,
        };
        path.starts_with('/') && !climbs && self.paths.iter().any(is_it)
    }

    /// Whether this bridge or tap may be used.
    pub fn has_interface(&self, name: &str) -> bool {
        self.interfaces.iter().any(|allowed| allowed == name)
    }
}

/// The line, from 1, in which byte `at` stands.
fn line_of(text: &str, at: usize) -> u32 {
    let before = text.bytes().take(at).filter(|byte| *byte == b'\n').count();
    u32::try_from(before).unwrap_or(u32::MAX).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, ConfigError> {
        Settings::parse("c.toml", "/etc/vmstow", text)
    }

    #[test]
    fn the_file_above_counts_more() {
        let below = "qemu = '/a'\nremap = ['net:*=user', 'disk:a=x.img']\n[allow]\npaths = ['/i/']";
        let above = "qemu = '/b'\nremap = ['net:*=bridge=br0']\n[allow]\nuser-network = true";
        let both = parse(below).unwrap().below(parse(above).unwrap());
        assert_eq!(both.qemu.as_deref(), Some("/b"));
        let remaps: Vec<String> = both.remaps.iter().map(Remap::to_string).collect();
        let expected = ["net:*=user", "disk:a=/etc/vmstow/x.img", "net:*=bridge=br0"];
        assert_eq!(remaps, expected);
        assert!(both.allow.user_network && both.allow.has_path("/i/x"));
        assert_eq!(parse("").unwrap(), Settings::default());
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, line, says) in [
            ("qemu = 1", 1, "string"),
            ("\nqmeu = '/a'", 2, "qmeu"),
            (
                "remap = [\n  'net:*=user',\n  'net:*=tap',\n]",
                3,
                "net:*=tap",
            ),
            ("[allow]\npath = ['/a']", 2, "path"),
            ("[allow]\npaths = ['a']", 2, "absolute"),
            ("\n\n= 1", 3, ""),
        ] {
            let error = parse(text).unwrap_err();
            let ConfigError::FileLine {
                line: found, fact, ..
            } = &error
            else {
                panic!("{error}");
            };
            assert!(*found == line && fact.contains(says), "{text:?}: {error}");
        }
    }

    #[test]
    fn what_is_allowed_is_no_more_than_it_says() {
        let allow = parse("[allow]\npaths = ['/i/', '/one']\ninterfaces = ['br0']")
            .unwrap()
            .allow;
        for path in ["/i/a", "/i/a/b", "/one"] {
            assert!(allow.has_path(path), "{path}");
        }
        for path in ["/i", "/i/", "/i/../etc/shadow", "/one/two", "i/a", ""] {
            assert!(!allow.has_path(path), "{path}");
        }
        assert!(allow.has_interface("br0") && !allow.has_interface("br1"));
    }
}
