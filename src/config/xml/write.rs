//! Tree → text.

use super::escape::{escape_text, escape_value};
use super::{Attribute, Document, Element, Node, Text};

impl Document {
    /// The document as text.
    pub fn write(&self) -> String {
        let mut out = self.before.clone();
        self.root.write_to(self.quote, &mut out);
        out.push_str(&self.after);
        out
    }

    /// As [`Document::write`], every element in a line of its own where nothing but elements stands beside it.
    pub fn write_indented(&self) -> String {
        let mut document = self.clone();
        document.root.indent_all();
        document.write()
    }
}

impl Element {
    fn write_to(&self, quote: char, out: &mut String) {
        out.push('<');
        out.push_str(&self.name);
        for attribute in &self.attributes {
            attribute.write_to(quote, out);
        }
        out.push_str(&self.form.blanks);
        if self.children.is_empty() && !self.form.has_end_tag {
            out.push_str("/>");
            return;
        }
        out.push('>');
        for node in &self.children {
            match node {
                Node::Element(element) => element.write_to(quote, out),
                Node::Text(text) => text.write_to(out),
                Node::Verbatim(source) => out.push_str(source),
            }
        }
        out.push_str("</");
        out.push_str(&self.name);
        out.push_str(&self.form.end_blanks);
        out.push('>');
    }
}

impl Attribute {
    fn write_to(&self, quote: char, out: &mut String) {
        match &self.source {
            Some(source) => out.push_str(source),
            None => self.write_usually(quote, out),
        }
    }

    /// As if it were new.
    pub(super) fn write_usually(&self, quote: char, out: &mut String) {
        out.push(' ');
        out.push_str(&self.name);
        out.push('=');
        out.push(quote);
        escape_value(&self.value, quote, out);
        out.push(quote);
    }
}

impl Text {
    fn write_to(&self, out: &mut String) {
        match &self.source {
            Some(source) => out.push_str(source),
            None => escape_text(&self.value, out),
        }
    }
}
