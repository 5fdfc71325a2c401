//! An XML document as a tree that loses nothing.
//!
//! [`Document::parse`] reads bytes, [`Document::write`] gives them back: what was not changed comes out byte for byte,
//! comments, processing instructions, blanks and the quotes around attributes too. What was changed or added is written
//! with the document's own kind of quotes. Hostile input ends in an error before it costs much: no DOCTYPE and so no
//! entities of the document's own, UTF-8 only, and bounds on length, depth and the number of things in it.
//!
//! Source: XML 1.0, of which this is the part that domain XML uses; names keep their prefix and are not resolved.

mod element;
mod escape;
mod parse;
mod write;

pub use element::{Attribute, Element, Node, Text};

/// The longest XML that is read, in bytes.
pub const MAX_XML_LEN: usize = 16 << 20;
/// The deepest nesting that is read.
pub const MAX_XML_DEPTH: usize = 64;
/// As many elements, attributes, texts and comments together are read.
pub const MAX_XML_NODES: usize = 1 << 18;

/// A whole document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The one element that holds all others.
    pub root: Element,
    /// What stands before the root: the declaration, comments, blanks; as written.
    before: String,
    /// What stands after it; as written.
    after: String,
    /// The quote around values that are new.
    quote: char,
}

impl Document {
    /// A document around `root`, with a newline at its end.
    pub fn new(root: Element) -> Self {
        Document {
            root,
            before: String::new(),
            after: "\n".to_owned(),
            quote: '"',
        }
    }
}

#[cfg(test)]
mod tests;
