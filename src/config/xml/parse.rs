//! Bytes → tree.

use quick_xml::Reader;
use quick_xml::events::Event;

use super::element::Form;
use super::escape::{escape_text, unescape, unescape_value};
use super::{Attribute, Document, Element, MAX_XML_DEPTH, MAX_XML_LEN, MAX_XML_NODES, Node, Text};
use crate::config::ConfigError;

/// As many attributes one element may have.
const MAX_ATTRIBUTES: usize = 256;

impl Document {
    /// Reads a document.
    ///
    /// # Errors
    /// [`ConfigError::XmlNotRead`] for XML that is not well-formed, is no UTF-8, has a DOCTYPE, or goes beyond
    /// [`MAX_XML_LEN`], [`MAX_XML_DEPTH`] or [`MAX_XML_NODES`].
    pub fn parse(xml: &[u8]) -> Result<Document, ConfigError> {
        if xml.len() > MAX_XML_LEN {
            let fact = format!("it is longer than {MAX_XML_LEN} bytes");
            return Err(ConfigError::XmlNotRead {
                fact,
                at: 0,
                line: 1,
            });
        }
        let source = std::str::from_utf8(xml).map_err(|error| {
            let at = error.valid_up_to();
            let fact = "it is not UTF-8".to_owned();
            let before = xml.get(..at).unwrap_or_default();
            ConfigError::XmlNotRead {
                fact,
                at: at as u64,
                line: 1 + line_breaks(before),
            }
        })?;
        Parser::new(source).run()
    }
}

struct Parser<'a> {
    source: &'a str,
    /// Elements whose end tag has not come yet.
    open: Vec<Element>,
    root: Option<Element>,
    before: String,
    after: String,
    /// The quote of the first attribute.
    quote: Option<char>,
    nodes: usize,
    /// The line of the event that is being taken.
    line: u32,
    /// Text pieces that belong together.
    text: String,
}

impl<'a> Parser<'a> {
    fn new(source: &'a str) -> Self {
        Parser {
            source,
            open: Vec::new(),
            root: None,
            before: String::new(),
            after: String::new(),
            quote: None,
            nodes: 0,
            line: 1,
            text: String::new(),
        }
    }

    fn run(mut self) -> Result<Document, ConfigError> {
        let bom = if self.source.starts_with('\u{feff}') {
            '\u{feff}'.len_utf8()
        } else {
            0
        };
        let source = self.source;
        let body = source.get(bom..).unwrap_or_default();
        self.before.push_str(source.get(..bom).unwrap_or_default());
        let mut reader = Reader::from_str(body);
        reader.config_mut().check_end_names = true;
        let mut at: usize = 0;
        loop {
            let event = reader.read_event().map_err(|error| {
                let at = usize::try_from(reader.error_position())
                    .unwrap_or(usize::MAX)
                    .min(body.len());
                let before = body.as_bytes().get(..at).unwrap_or_default();
                let line = 1 + line_breaks(before);
                ConfigError::XmlNotRead {
                    fact: error.to_string(),
                    at: (bom + at) as u64,
                    line,
                }
            })?;
            let end = usize::try_from(reader.buffer_position())
                .unwrap_or(usize::MAX)
                .min(body.len());
            let raw = body.get(at..end).unwrap_or_default();
            let is_end = matches!(event, Event::Eof);
            let taken = self.take(&event, raw);
            taken.map_err(|fact| ConfigError::XmlNotRead {
                fact,
                at: (bom + at) as u64,
                line: self.line,
            })?;
            if is_end {
                return self.finish((bom + at) as u64);
            }
            self.line = self.line.saturating_add(line_breaks(raw.as_bytes()));
            at = end;
        }
    }

    fn take(&mut self, event: &Event<'_>, raw: &str) -> Result<(), String> {
        if let Event::Text(_) | Event::GeneralRef(_) = event {
            self.text.push_str(raw);
            return Ok(());
        }
        self.end_text()?;
        match event {
            Event::DocType(_) => Err("it has a DOCTYPE".to_owned()),
            Event::Start(_) => {
                let element = self.start_tag(raw, ">")?;
                self.open.push(element);
                Ok(())
            }
            Event::Empty(_) => {
                let element = self.start_tag(raw, "/>")?;
                self.place(element);
                Ok(())
            }
            Event::End(_) => {
                let mut element = self.open.pop().ok_or("it has an end tag too many")?;
                let inner = raw
                    .strip_prefix("</")
                    .and_then(|inner| inner.strip_suffix('>'));
                let blanks = inner.and_then(|inner| inner.strip_prefix(&*element.name));
                element.form.end_blanks = blanks.unwrap_or_default().into();
                element.form.has_end_tag = true;
                self.place(element);
                Ok(())
            }
            Event::CData(_) => {
                let inner = raw
                    .strip_prefix("<![CDATA[")
                    .and_then(|raw| raw.strip_suffix("]]>"));
                let text = Text {
                    value: inner.unwrap_or_default().to_owned(),
                    source: Some(raw.into()),
                };
                self.add(Node::Text(text), raw)
            }
            Event::Decl(_) if self.open.is_empty() && self.root.is_none() => {
                check_declaration(raw)?;
                self.add(Node::Verbatim(raw.to_owned()), raw)
            }
            Event::Decl(_) => Err("it has a declaration that is not at its start".to_owned()),
            Event::Comment(_) | Event::PI(_) => self.add(Node::Verbatim(raw.to_owned()), raw),
            Event::Text(_) | Event::GeneralRef(_) | Event::Eof => Ok(()),
        }
    }

    /// Puts the text that has been gathered where it belongs.
    fn end_text(&mut self) -> Result<(), String> {
        if self.text.is_empty() {
            return Ok(());
        }
        let raw = std::mem::take(&mut self.text);
        let value = unescape(&raw)?;
        if self.open.is_empty() && !value.trim().is_empty() {
            return Err("there is text outside of its root".to_owned());
        }
        let mut usual = String::with_capacity(raw.len());
        escape_text(&value, &mut usual);
        let source = (usual != raw).then(|| raw.as_str().into());
        self.add(Node::Text(Text { value, source }), &raw)
    }

    /// Adds what is no element.
    fn add(&mut self, node: Node, raw: &str) -> Result<(), String> {
        self.count(1)?;
        match self.open.last_mut() {
            Some(element) => element.children.push(node),
            None if matches!(node, Node::Text(Text { ref value, .. }) if !value.trim().is_empty()) =>
            {
                return Err("there is text outside of its root".to_owned());
            }
            None if self.root.is_none() => self.before.push_str(raw),
            None => self.after.push_str(raw),
        }
        Ok(())
    }

    /// Adds an element that is whole.
    fn place(&mut self, element: Element) {
        match self.open.last_mut() {
            Some(parent) => parent.children.push(Node::Element(element)),
            None => self.root = Some(element),
        }
    }

    fn count(&mut self, more: usize) -> Result<(), String> {
        self.nodes += more;
        if self.nodes > MAX_XML_NODES {
            return Err(format!(
                "it has more than {MAX_XML_NODES} elements and attributes"
            ));
        }
        Ok(())
    }

    /// Reads `<name attribute="value" …` up to `end`.
    fn start_tag(&mut self, raw: &str, end: &str) -> Result<Element, String> {
        if self.open.len() >= MAX_XML_DEPTH {
            return Err(format!("it is nested deeper than {MAX_XML_DEPTH}"));
        }
        let inner = raw
            .strip_prefix('<')
            .and_then(|raw| raw.strip_suffix(end))
            .unwrap_or_default();
        let name_len = inner.find(is_blank).unwrap_or(inner.len());
        let (name, mut rest) = inner.split_at(name_len);
        check_name(name)?;
        if self.root.is_some() && self.open.is_empty() {
            return Err(format!("<{name}> stands beside the root of the document"));
        }
        self.count(1)?;
        let mut element = Element::new(name.to_owned());
        element.line = self.line;
        while !rest.trim_matches(is_blank).is_empty() {
            let (attribute, after) = self.attribute(rest)?;
            if element.get(&attribute.name).is_some() {
                return Err(format!("<{name}> has {} twice", attribute.name));
            }
            element.attributes.push(attribute);
            if element.attributes.len() > MAX_ATTRIBUTES {
                return Err(format!(
                    "<{name}> has more than {MAX_ATTRIBUTES} attributes"
                ));
            }
            rest = after;
        }
        element.form = Form {
            blanks: rest.into(),
            ..Form::default()
        };
        Ok(element)
    }

    /// Reads one attribute and the blanks before it.
    fn attribute<'b>(&mut self, text: &'b str) -> Result<(Attribute, &'b str), String> {
        self.count(1)?;
        let trimmed = text.trim_start_matches(is_blank);
        if trimmed.len() == text.len() {
            return Err("an attribute does not follow a blank".to_owned());
        }
        let (name, after) = trimmed.split_once('=').ok_or("an attribute has no value")?;
        let name = name.trim_end_matches(is_blank);
        check_name(name)?;
        let after = after.trim_start_matches(is_blank);
        let quote = after.chars().next().filter(|c| matches!(c, '"' | '\''));
        let quote = quote.ok_or_else(|| format!("the value of {name} is not quoted"))?;
        let (value, rest) = after
            .get(1..)
            .and_then(|after| after.split_once(quote))
            .ok_or_else(|| format!("the value of {name} does not end"))?;
        if value.contains('<') {
            return Err(format!("the value of {name} has a < that is not escaped"));
        }
        let mut attribute = Attribute::new(name.to_owned(), unescape_value(value)?);
        let document_quote = *self.quote.get_or_insert(quote);
        let raw = text.get(..text.len() - rest.len()).unwrap_or_default();
        let mut usual = String::with_capacity(raw.len());
        attribute.write_usually(document_quote, &mut usual);
        attribute.source = (usual != raw).then(|| raw.into());
        Ok((attribute, rest))
    }

    fn finish(mut self, at: u64) -> Result<Document, ConfigError> {
        let line = self.line;
        let not_read = |fact: String| ConfigError::XmlNotRead { fact, at, line };
        self.end_text().map_err(not_read)?;
        if let Some(element) = self.open.last() {
            return Err(not_read(format!("it ends within <{}>", element.name)));
        }
        let root = self
            .root
            .ok_or_else(|| not_read("it ends without an element".to_owned()))?;
        Ok(Document {
            root,
            before: self.before,
            after: self.after,
            quote: self.quote.unwrap_or('"'),
        })
    }
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

fn check_name(name: &str) -> Result<(), String> {
    let is_start = |c: char| c.is_alphabetic() || c == '_' || c == ':';
    let is_rest = |c: char| is_start(c) || c.is_numeric() || matches!(c, '-' | '.' | '\u{b7}');
    let mut characters = name.chars();
    if characters.next().is_some_and(is_start) && characters.all(is_rest) {
        return Ok(());
    }
    let shown: String = name.chars().take(32).collect();
    Err(format!("{shown:?} is no name"))
}

/// An encoding other than UTF-8 may not be announced.
fn check_declaration(raw: &str) -> Result<(), String> {
    let Some((_, encoding)) = raw.split_once("encoding") else {
        return Ok(());
    };
    let value = encoding.trim_start_matches([' ', '\t', '\n', '\r', '=']);
    let value = value.get(1..).unwrap_or_default();
    let value = value.split(['"', '\'']).next().unwrap_or_default();
    match value.to_ascii_lowercase().as_str() {
        "utf-8" | "utf8" | "us-ascii" | "ascii" => Ok(()),
        _ => Err(format!("it says that it is {value:?}, only UTF-8 is read")),
    }
}

fn line_breaks(bytes: &[u8]) -> u32 {
    let count = bytes.iter().filter(|byte| **byte == b'\n').count();
    u32::try_from(count).unwrap_or(u32::MAX)
}
