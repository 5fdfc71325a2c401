//! The XML of an object store's answers, as far as it is needed.
//!
//! Stores differ in the names of root elements and in namespaces; neither is looked at.

use quick_xml::Reader;
use quick_xml::escape::unescape;
use quick_xml::events::Event;

use crate::store::web::Words;

/// Elements within elements that are followed.
const MOST_OPEN: usize = 16;

/// An element: its local name, its text, its children.
#[derive(Debug, Default)]
pub struct Element {
    name: String,
    text: String,
    children: Vec<Element>,
}

impl Element {
    /// The root of a document; `None` if it is none.
    pub fn parse(text: &str) -> Option<Element> {
        let mut reader = Reader::from_str(text);
        let mut open = vec![Element::default()];
        loop {
            let event = reader.read_event().ok()?;
            match event {
                Event::Start(start) => {
                    if open.len() > MOST_OPEN {
                        return None;
                    }
                    open.push(Element::named(start.local_name().as_ref()));
                }
                Event::Empty(start) => {
                    let element = Element::named(start.local_name().as_ref());
                    open.last_mut()?.children.push(element);
                }
                Event::Text(text) => open.last_mut()?.text.push_str(&text.into_inner()),
                Event::GeneralRef(name) => {
                    let text = &mut open.last_mut()?.text;
                    text.extend(["&", &name.into_inner(), ";"]);
                }
                Event::End(_) => {
                    let mut element = open.pop()?;
                    element.text = unescape(&element.text).ok()?.trim().to_owned();
                    open.last_mut()?.children.push(element);
                }
                Event::DocType(_) => return None,
                Event::Eof => break,
                _ => {}
            }
        }
        match (open.pop(), open.is_empty()) {
            (Some(mut document), true) if document.children.len() == 1 => document.children.pop(),
            _ => None,
        }
    }

    fn named(name: &str) -> Element {
        Element {
            name: name.to_owned(),
            ..Element::default()
        }
    }

    /// Whether it is called so.
    pub fn is(&self, name: &str) -> bool {
        self.name == name
    }

    /// Its children of this name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.is(name))
    }

    /// The text of the first child of this name; `None` if there is none, or no text in it.
    pub fn text_of(&self, name: &str) -> Option<&str> {
        let child = self.children.iter().find(|child| child.is(name))?;
        Some(child.text.as_str()).filter(|text| !text.is_empty())
    }

    /// As [`Element::text_of`], of a number.
    pub fn number_of(&self, name: &str) -> Option<u64> {
        self.text_of(name)?.parse().ok()
    }
}

/// What an answer says that is an error; `None` if it says that of nothing.
pub fn error_words(text: &str) -> Option<Words> {
    let root = Element::parse(text).filter(|root| root.is("Error"))?;
    let own = |name| root.text_of(name).map(str::to_owned);
    Some(Words {
        code: own("Code"),
        message: own("Message"),
    })
}

/// The body that completes an upload.
pub fn completion<'a>(parts: impl Iterator<Item = (u32, &'a str)>) -> String {
    let mut text = "<CompleteMultipartUpload>".to_owned();
    for (number, etag) in parts {
        let etag = quick_xml::escape::escape(etag);
        let part = format!("<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>");
        text.push_str(&part);
    }
    text + "</CompleteMultipartUpload>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_several_stores_are_read_alike() {
        let aws = r#"<?xml version="1.0" encoding="UTF-8"?>
            <ListPartsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
            <IsTruncated>false</IsTruncated><Part><PartNumber>2</PartNumber>
            <ETag>"7778aef83f66abc1fa1e8477f296d394"</ETag><Size>10485760</Size></Part></ListPartsResult>"#;
        let other = "<ListParts><IsTruncated/><Part><Size>10485760</Size><PartNumber>2</PartNumber>\
            <ETag>&#34;7778aef83f66abc1fa1e8477f296d394&quot;</ETag></Part></ListParts>";
        for text in [aws, other] {
            let root = Element::parse(text).unwrap();
            let part = root.all("Part").next().unwrap();
            assert_eq!(part.number_of("PartNumber"), Some(2));
            assert_eq!(part.number_of("Size"), Some(10_485_760));
            assert_eq!(
                part.text_of("ETag"),
                Some("\"7778aef83f66abc1fa1e8477f296d394\"")
            );
            assert_eq!(part.text_of("Owner"), None);
        }
    }

    #[test]
    fn an_error_is_told_from_a_result() {
        let text = "<Error><Code>NoSuchKey</Code><Message>It isn't there.</Message></Error>";
        let words = error_words(text).unwrap();
        assert!(words.say(&["NoSuchBucket", "NoSuchKey"]));
        assert_eq!(error_words("<Result><Code>NoSuchKey</Code></Result>"), None);
    }

    #[test]
    fn what_is_no_document_is_none() {
        let deep = "<a>".repeat(1000) + &"</a>".repeat(1000);
        for text in [
            "",
            "502 Bad Gateway",
            "<a>",
            "<a></b>",
            "<a/><b/>",
            "<!DOCTYPE a><a/>",
            &deep,
        ] {
            assert!(Element::parse(text).is_none(), "{text}");
        }
    }
}
