//! The name and UUID in somebody's domain XML.

use quick_xml::Reader;
use quick_xml::events::Event;

use crate::config::ConfigError;

/// The longest domain XML that is read.
pub const MAX_XML_LEN: usize = 16 << 20;
/// The deepest nesting that is read.
pub const MAX_XML_DEPTH: usize = 64;

/// Who a domain is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// `<name>`.
    pub name: Option<String>,
    /// `<uuid>`, if there is one.
    pub uuid: Option<uuid::Uuid>,
}

/// Reads name and UUID of a domain. The whole text is read, so that damage anywhere in it is found.
///
/// # Errors
/// [`ConfigError::XmlNotRead`] for XML that is not well-formed, is too long or too deep, has a DOCTYPE, is no `<domain>`,
/// or whose UUID is none.
pub fn read_identity(xml: &[u8]) -> Result<Identity, ConfigError> {
    if xml.len() > MAX_XML_LEN {
        return Err(not_read(
            format!("it is longer than {MAX_XML_LEN} bytes"),
            0,
        ));
    }
    let text = std::str::from_utf8(xml)
        .map_err(|error| not_read("it is not UTF-8".to_owned(), error.valid_up_to() as u64))?;
    let mut reader = Reader::from_str(text);
    let mut walk = Walk::default();
    loop {
        let at = reader.buffer_position();
        let event = reader
            .read_event()
            .map_err(|error| not_read(error.to_string(), reader.error_position()))?;
        if matches!(event, Event::Eof) {
            return walk.finish(at);
        }
        walk.take(&event).map_err(|fact| not_read(fact, at))?;
    }
}

fn not_read(fact: String, at: u64) -> ConfigError {
    ConfigError::XmlNotRead { fact, at }
}

#[derive(Default)]
struct Walk {
    path: Vec<String>,
    has_root: bool,
    name: Option<String>,
    uuid: Option<String>,
}

impl Walk {
    fn take(&mut self, event: &Event<'_>) -> Result<(), String> {
        match event {
            Event::DocType(_) => Err("it has a DOCTYPE".to_owned()),
            Event::Start(start) => self.enter(start.name().as_ref().to_owned()),
            Event::Empty(start) => {
                self.enter(start.name().as_ref().to_owned())?;
                self.path.pop();
                Ok(())
            }
            Event::End(_) => {
                self.path.pop();
                Ok(())
            }
            Event::Text(text) => self.text(text),
            Event::CData(text) => self.text(text),
            Event::GeneralRef(reference) => {
                let source = format!("&{};", &**reference);
                let text =
                    quick_xml::escape::unescape(&source).map_err(|error| error.to_string())?;
                self.text(&text)
            }
            _ => Ok(()),
        }
    }

    fn enter(&mut self, name: String) -> Result<(), String> {
        if self.path.len() >= MAX_XML_DEPTH {
            return Err(format!("it is nested deeper than {MAX_XML_DEPTH}"));
        }
        if self.path.is_empty() {
            if name != "domain" || self.has_root {
                return Err(format!("<{name}> stands where one <domain> should"));
            }
            self.has_root = true;
        }
        self.path.push(name);
        Ok(())
    }

    fn text(&mut self, text: &str) -> Result<(), String> {
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        match path.as_slice() {
            ["domain", "name"] => self.name.get_or_insert_default().push_str(text),
            ["domain", "uuid"] => self.uuid.get_or_insert_default().push_str(text),
            [] if !text.trim().is_empty() => {
                return Err("there is text outside of the domain".to_owned());
            }
            _ => {}
        }
        Ok(())
    }

    fn finish(self, at: u64) -> Result<Identity, ConfigError> {
        if !self.path.is_empty() || !self.has_root {
            return Err(not_read("it ends within the domain".to_owned(), at));
        }
        let uuid = match self.uuid.as_deref().map(str::trim) {
            Some(text) => Some(
                text.parse()
                    .map_err(|_| not_read(format!("{text:?} is not a UUID"), at))?,
            ),
            None => None,
        };
        Ok(Identity {
            name: self
                .name
                .map(|name| name.trim().to_owned())
                .filter(|name| !name.is_empty()),
            uuid,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refused(xml: &[u8]) -> String {
        read_identity(xml).unwrap_err().to_string()
    }

    #[test]
    fn name_and_uuid_are_read() {
        let xml = b"<?xml version='1.0'?><domain type='kvm'><name>a&amp;b&#33;</name>\
            <uuid> 8e1c6dc5-5f4c-4d2c-9f37-4f6ff4d5c0a1 </uuid><metadata><name>other</name></metadata></domain>\n";
        let identity = read_identity(xml).unwrap();
        assert_eq!(identity.name.as_deref(), Some("a&b!"));
        assert_eq!(
            identity.uuid.unwrap().to_string(),
            "8e1c6dc5-5f4c-4d2c-9f37-4f6ff4d5c0a1"
        );
        assert_eq!(read_identity(b"<domain/>").unwrap(), Identity::default());
    }

    #[test]
    fn what_is_no_domain_is_refused() {
        assert!(refused(b"<!DOCTYPE a [<!ENTITY b 'c'>]><domain/>").contains("DOCTYPE"));
        assert!(refused(b"<domain><name>a</name>").contains("ends within"));
        assert!(refused(b"").contains("ends within"));
        assert!(refused(b"<network/>").contains("<network>"));
        assert!(refused(b"<domain/><domain/>").contains("one <domain>"));
        assert!(refused(b"<domain/>tail").contains("outside"));
        assert!(refused(b"<domain><name>&lol;</name></domain>").contains("lol"));
        assert!(refused(b"<domain><uuid>1</uuid></domain>").contains("not a UUID"));
        assert!(refused(b"<domain>\xff</domain>").contains("UTF-8"));
        assert!(refused("<a>".repeat(3).as_bytes()).contains("<a>"));
        let deep = format!("<domain>{}", "<a>".repeat(MAX_XML_DEPTH));
        assert!(refused(deep.as_bytes()).contains("deeper"));
        assert!(refused(&vec![b' '; MAX_XML_LEN + 1]).contains("longer"));
        assert!(!refused(b"<domain></name>").is_empty());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(xml in "(<domain>|<name>|</name>|</domain>|<!|\\[CDATA\\[|]]>|&|;|<\\?|[ -~]){0,20}") {
            let _ = read_identity(xml.as_bytes());
        }

        #[test]
        fn arbitrary_bytes_do_not_make_it_panic(xml in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = read_identity(&xml);
        }
    }
}
