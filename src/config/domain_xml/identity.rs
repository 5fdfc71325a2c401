//! The name and UUID in somebody's domain XML.

use crate::config::ConfigError;
use crate::config::xml::Document;

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
/// [`ConfigError::XmlNotRead`] for what [`Document::parse`] refuses, for what is no `<domain>`, and for a UUID that is none.
pub fn read_identity(xml: &[u8]) -> Result<Identity, ConfigError> {
    let document = Document::parse(xml)?;
    let root = &document.root;
    let not_read = |fact: String, line: u32| ConfigError::XmlNotRead { fact, at: 0, line };
    if root.name != "domain" {
        let fact = format!("<{}> stands where one <domain> should", root.name);
        return Err(not_read(fact, root.line));
    }
    let name = root.find("name").map(|name| name.text());
    let uuid = match root.find("uuid") {
        Some(element) => {
            let text = element.text();
            let uuid = text.parse();
            Some(uuid.map_err(|_| not_read(format!("{text:?} is not a UUID"), element.line))?)
        }
        None => None,
    };
    Ok(Identity {
        name: name.filter(|name| !name.is_empty()),
        uuid,
    })
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
        assert!(refused(b"<network/>").contains("<network>"));
        assert!(refused(b"<domain><uuid>1</uuid></domain>").contains("not a UUID"));
        assert!(refused(b"<domain><name>a</name>").contains("ends within"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(xml in "(<domain>|<name>|</name>|</domain>|<!|\\[CDATA\\[|]]>|&|;|<\\?|[ -~]){0,20}") {
            let _ = read_identity(xml.as_bytes());
        }
    }
}
