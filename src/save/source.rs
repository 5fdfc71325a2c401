//! Which guest is meant.

use std::path::PathBuf;

use super::SaveError;

/// A guest, as a person names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `qmp:PATH`: the QEMU whose monitor listens there.
    Monitor(PathBuf),
    /// `pid:N`: that QEMU process; its monitor is found from its arguments.
    Process(i32),
    /// A guest that vmstow runs, by its name.
    Name(String),
}

impl std::str::FromStr for Source {
    type Err = SaveError;

    fn from_str(text: &str) -> Result<Self, SaveError> {
        let not_a_source = || SaveError::NotASource {
            text: text.to_owned(),
        };
        match text.split_once(':') {
            Some(("qmp", path)) if !path.is_empty() => Ok(Source::Monitor(path.into())),
            Some(("pid", number)) => match number.parse() {
                Ok(pid) if pid > 0 => Ok(Source::Process(pid)),
                _ => Err(not_a_source()),
            },
            None if !text.is_empty() && !text.contains('/') => Ok(Source::Name(text.to_owned())),
            _ => Err(not_a_source()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_named_by_monitor_process_or_name() {
        assert_eq!(
            "qmp:/run/a:b".parse::<Source>().unwrap(),
            Source::Monitor("/run/a:b".into())
        );
        assert_eq!("pid:42".parse::<Source>().unwrap(), Source::Process(42));
        assert_eq!(
            "web01".parse::<Source>().unwrap(),
            Source::Name("web01".into())
        );
        for text in [
            "",
            "qmp:",
            "pid:0",
            "pid:-1",
            "pid:x",
            "/run/qmp.sock",
            "vnc:1",
        ] {
            assert!(
                matches!(text.parse::<Source>(), Err(SaveError::NotASource { .. })),
                "{text}"
            );
        }
    }
}
