//! One value of the XML by its path: `domain/devices/disk[2]/source/@file`.

use super::ConfigureError;
use crate::config::xml::{Attribute, Document, Element};
use crate::error::Result;

/// Whether a name is a path in the XML and no label.
pub fn is_path(name: &str) -> bool {
    let name = name.strip_prefix('/').unwrap_or(name);
    name == "domain" || name.starts_with("domain/")
}

/// The attribute or the text at `path`; of an element without text, all of it is told by `config get` alone.
///
/// # Errors
/// [`ConfigureError::Unknown`]; XML that cannot be read.
pub fn value_at(xml: &str, path: &str) -> Result<String> {
    let unknown = || ConfigureError::Unknown {
        name: path.to_owned(),
    };
    let document = Document::parse(xml.as_bytes())?;
    let (steps, attribute) = steps(path, &document).ok_or_else(unknown)?;
    let found = steps.iter().try_fold(&document.root, |element, step| {
        element.all(step.name).nth(step.number)
    });
    let value = found.and_then(|element| match attribute {
        Some(name) => element.get(name).map(str::to_owned),
        None => Some(element.text()),
    });
    Ok(value.ok_or_else(unknown)?)
}

/// The XML with another attribute or text at `path`. A missing attribute is added, and so is a missing element if it is
/// the last one of the path.
///
/// # Errors
/// As [`value_at`].
pub fn with_value_at(xml: &str, path: &str, value: &str) -> Result<String> {
    let unknown = || ConfigureError::Unknown {
        name: path.to_owned(),
    };
    let mut document = Document::parse(xml.as_bytes())?;
    let (steps, attribute) = steps(path, &document).ok_or_else(unknown)?;
    let mut element = &mut document.root;
    for (place, step) in steps.iter().enumerate() {
        let is_last = place + 1 == steps.len() && attribute.is_none();
        if element.all(step.name).nth(step.number).is_none() {
            if !is_last || step.number != element.all(step.name).count() {
                return Err(unknown().into());
            }
            element.push(Element::new(step.name.to_owned()));
        }
        element = element
            .nth_mut(step.name, step.number)
            .ok_or_else(unknown)?;
    }
    match attribute {
        Some(name) => {
            let mut attributes = element.attributes.iter_mut();
            let new = Attribute::new(name.to_owned(), value);
            match attributes.find(|attribute| attribute.name == name) {
                Some(attribute) => *attribute = new,
                None => element.attributes.push(new),
            }
        }
        None if element.elements().next().is_some() => return Err(unknown().into()),
        None => element.set_text(value),
    }
    Ok(document.write())
}

/// One element of a path.
struct Step<'a> {
    name: &'a str,
    /// Which of its name, from 0.
    number: usize,
}

/// The elements below the root, and the attribute of the last.
fn steps<'a>(path: &'a str, document: &Document) -> Option<(Vec<Step<'a>>, Option<&'a str>)> {
    let mut parts = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    if parts.next()? != document.root.name {
        return None;
    }
    let mut steps = Vec::new();
    while let Some(part) = parts.next() {
        if let Some(attribute) = part.strip_prefix('@') {
            let is_name = is_name(attribute) && parts.peek().is_none();
            return is_name.then_some((steps, Some(attribute)));
        }
        let (name, number) = match part.split_once('[') {
            Some((name, rest)) => (name, rest.strip_suffix(']')?.parse().ok()?),
            None => (part, 1_usize),
        };
        let number = number.checked_sub(1)?;
        if !is_name(name) {
            return None;
        }
        steps.push(Step { name, number });
    }
    Some((steps, None))
}

/// What XML takes for a name, as far as domain XML uses it.
fn is_name(text: &str) -> bool {
    let is_first = |c: char| c.is_ascii_alphabetic() || c == '_';
    text.starts_with(is_first)
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-.:".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain><title>a</title><devices>\n  <disk><source file='/a'/></disk>\n  <disk/>\n</devices></domain>";

    #[test]
    fn a_value_is_found_by_its_path() {
        for (path, value) in [
            ("domain/title", "a"),
            ("/domain/devices/disk/source/@file", "/a"),
            ("domain/devices/disk[1]/source/@file", "/a"),
            ("domain/devices/disk[2]", ""),
        ] {
            assert_eq!(value_at(XML, path).unwrap(), value, "{path}");
        }
        for path in [
            "domain/devices/disk[3]",
            "domain/devices/disk[0]",
            "domain/devices/disk[x]",
            "domain/@type",
            "network",
            "domain//title",
            "domain/@a/b",
        ] {
            assert!(value_at(XML, path).is_err(), "{path}");
        }
    }

    #[test]
    fn a_value_is_changed_where_it_stands_and_nothing_else() {
        let changed = with_value_at(XML, "domain/devices/disk/source/@file", "/b&").unwrap();
        assert_eq!(changed, XML.replace("'/a'", "'/b&amp;'"));
        let added = with_value_at(XML, "domain/description", "new").unwrap();
        assert_eq!(value_at(&added, "domain/description").unwrap(), "new");
        assert!(with_value_at(XML, "domain/devices", "text").is_err());
        assert!(with_value_at(XML, "domain/a/b", "x").is_err());
        assert!(with_value_at(XML, "domain/<x>", "x").is_err());
    }
}
