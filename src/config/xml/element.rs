//! Elements, their attributes, and what stands in them.

use std::borrow::Cow;

/// One element.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Element {
    /// Its name, with its prefix if it has one.
    pub name: Cow<'static, str>,
    /// In the order written.
    pub attributes: Vec<Attribute>,
    /// What stands in it, in order.
    pub children: Vec<Node>,
    /// The line its tag starts in, from 1; 0 for an element that was not read.
    pub line: u32,
    /// Its tags where they are not written in the usual way.
    pub(super) form: Form,
}

/// How the tags of an element were written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Form {
    /// Blanks before the end of the start tag.
    pub(super) blanks: Box<str>,
    /// Blanks before the end of the end tag.
    pub(super) end_blanks: Box<str>,
    /// `<a></a>` though nothing stands in it.
    pub(super) has_end_tag: bool,
}

/// One attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    /// Its name, with its prefix if it has one.
    pub name: Cow<'static, str>,
    /// Its value, nothing in it escaped.
    pub(super) value: String,
    /// How it was written, from the blanks before it to the closing quote, if that is not the usual way.
    pub(super) source: Option<Box<str>>,
}

/// What can stand in an element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// An element.
    Element(Element),
    /// Text, blanks between elements too.
    Text(Text),
    /// A comment or a processing instruction, as written.
    Verbatim(String),
}

/// A run of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// Nothing in it escaped.
    pub(super) value: String,
    /// How it was written, if that is not the usual way.
    pub(super) source: Option<Box<str>>,
}

impl Attribute {
    /// An attribute.
    pub fn new(name: impl Into<Cow<'static, str>>, value: impl ToString) -> Self {
        Attribute {
            name: name.into(),
            value: value.to_string(),
            source: None,
        }
    }

    /// Its value, nothing in it escaped.
    pub fn value(&self) -> &str {
        &self.value
    }
}

impl Text {
    /// Text.
    pub fn new(value: impl ToString) -> Self {
        Text {
            value: value.to_string(),
            source: None,
        }
    }

    /// What it says, nothing in it escaped.
    pub fn value(&self) -> &str {
        &self.value
    }
}

/// Making elements.
impl Element {
    /// An element without anything.
    pub fn new(name: impl Into<Cow<'static, str>>) -> Self {
        Element {
            name: name.into(),
            ..Element::default()
        }
    }

    /// An element around `text`.
    pub fn with_text(name: impl Into<Cow<'static, str>>, text: impl ToString) -> Self {
        let mut element = Element::new(name);
        element.children.push(Node::Text(Text::new(text)));
        element
    }

    /// With one attribute more.
    #[must_use]
    pub fn attribute(mut self, name: &'static str, value: impl ToString) -> Self {
        self.attributes.push(Attribute::new(name, value));
        self
    }

    /// With one attribute more, if there is a value.
    #[must_use]
    pub fn attribute_if(self, name: &'static str, value: Option<impl ToString>) -> Self {
        match value {
            Some(value) => self.attribute(name, value),
            None => self,
        }
    }

    /// With one element more in it.
    #[must_use]
    pub fn child(mut self, child: Element) -> Self {
        self.children.push(Node::Element(child));
        self
    }

    /// With these elements more in it.
    #[must_use]
    pub fn children(mut self, children: impl IntoIterator<Item = Element>) -> Self {
        self.children
            .extend(children.into_iter().map(Node::Element));
        self
    }
}

/// Looking into elements.
impl Element {
    /// The value of an attribute.
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut attributes = self.attributes.iter();
        attributes
            .find(|attribute| attribute.name == name)
            .map(Attribute::value)
    }

    /// The elements in it, in order.
    pub fn elements(&self) -> impl DoubleEndedIterator<Item = &Element> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// As [`Element::elements`], to change them.
    pub fn elements_mut(&mut self) -> impl DoubleEndedIterator<Item = &mut Element> {
        self.children.iter_mut().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// The elements of this name in it, in order.
    pub fn all<'a>(&'a self, name: &'a str) -> impl DoubleEndedIterator<Item = &'a Element> {
        self.elements().filter(move |element| element.name == name)
    }

    /// The first element of this name in it.
    pub fn find(&self, name: &str) -> Option<&Element> {
        self.elements().find(|element| element.name == name)
    }

    /// As [`Element::find`], to change it.
    pub fn find_mut(&mut self, name: &str) -> Option<&mut Element> {
        self.elements_mut().find(|element| element.name == name)
    }

    /// As [`Element::find_mut`], for the `number`-th of them, from 0.
    pub fn nth_mut(&mut self, name: &str, number: usize) -> Option<&mut Element> {
        self.elements_mut()
            .filter(|element| element.name == name)
            .nth(number)
    }

    /// Goes down along names: `["devices", "disk"]`.
    pub fn at(&self, path: &[&str]) -> Option<&Element> {
        path.iter()
            .try_fold(self, |element, name| element.find(name))
    }

    /// All text that stands in it, not in the elements in it, without the blanks around.
    pub fn text(&self) -> String {
        let mut all = String::new();
        for node in &self.children {
            if let Node::Text(text) = node {
                all.push_str(&text.value);
            }
        }
        all.trim().to_owned()
    }
}

/// Changing elements.
impl Element {
    /// Gives an attribute a value, in its place if it is there, else as the last one.
    pub fn set(&mut self, name: &'static str, value: impl ToString) {
        let value = value.to_string();
        let mut attributes = self.attributes.iter_mut();
        match attributes.find(|attribute| attribute.name == name) {
            Some(attribute) if attribute.value == value => {}
            Some(attribute) => *attribute = Attribute::new(name, value),
            None => self.attributes.push(Attribute::new(name, value)),
        }
    }

    /// Takes an attribute away.
    pub fn unset(&mut self, name: &str) {
        self.attributes.retain(|attribute| attribute.name != name);
    }

    /// Replaces all that stands in it by text.
    pub fn set_text(&mut self, text: impl ToString) {
        let text = text.to_string();
        if self.text() != text || self.elements().next().is_some() {
            self.children = vec![Node::Text(Text::new(text))];
        }
    }

    /// Adds an element behind all others, indented as they are.
    pub fn push(&mut self, child: Element) {
        let place = self.elements().count();
        self.insert(place, child);
    }

    /// Adds an element so that it is the `place`-th, from 0, indented as its neighbours are.
    pub fn insert(&mut self, place: usize, child: Element) {
        let position = self.position_of(place);
        let Some(blanks) = self.indent_of_children() else {
            self.children.insert(position, Node::Element(child));
            return;
        };
        let mut child = child;
        child.indent(&blanks);
        self.children.insert(position, Node::Element(child));
        // The blanks before the place now stand before the new element; its successor needs its own.
        let before = position.checked_sub(1).and_then(|at| self.children.get(at));
        if matches!(before, Some(Node::Text(text)) if text.value.trim().is_empty()) {
            let next_is_element = matches!(self.children.get(position + 1), Some(Node::Element(_)));
            if next_is_element {
                let text = Node::Text(Text::new(&blanks));
                self.children.insert(position + 1, text);
            }
        } else {
            let text = Node::Text(Text::new(&blanks));
            self.children.insert(position, text);
        }
    }

    /// Takes the elements away that `is_gone` names, and the blanks before each.
    pub fn remove(&mut self, mut is_gone: impl FnMut(&Element) -> bool) {
        let mut kept: Vec<Node> = Vec::with_capacity(self.children.len());
        for node in std::mem::take(&mut self.children) {
            match node {
                Node::Element(element) if is_gone(&element) => {
                    let is_blank = matches!(kept.last(), Some(Node::Text(text)) if text.value.trim().is_empty());
                    if is_blank {
                        kept.pop();
                    }
                }
                node => kept.push(node),
            }
        }
        self.children = kept;
    }

    /// Where in `children` the `place`-th element stands; for the last, behind the last element.
    fn position_of(&self, place: usize) -> usize {
        let mut positions = self
            .children
            .iter()
            .enumerate()
            .filter(|(_, node)| matches!(node, Node::Element(_)))
            .map(|(position, _)| position);
        if let Some(position) = positions.nth(place) {
            return position;
        }
        let is_element = |node: &Node| matches!(node, Node::Element(_));
        self.children
            .iter()
            .rposition(is_element)
            .map_or(0, |last| last + 1)
    }

    /// The line break and blanks before the first element in it; `None` if they share a line.
    fn indent_of_children(&self) -> Option<String> {
        let mut blanks = None;
        for node in &self.children {
            match node {
                Node::Text(text) if text.value.trim().is_empty() => blanks = Some(&text.value),
                Node::Element(_) => {
                    let blanks = blanks?;
                    let line = blanks.rfind('\n')?;
                    return blanks.get(line..).map(str::to_owned);
                }
                _ => blanks = None,
            }
        }
        None
    }

    /// Puts every element in it into a line of its own, `outer` being the blanks before its own tag.
    fn indent(&mut self, outer: &str) {
        if self
            .children
            .iter()
            .any(|node| !matches!(node, Node::Element(_)))
            || self.children.is_empty()
        {
            return;
        }
        let inner = format!("{outer}  ");
        let mut children = Vec::with_capacity(self.children.len() * 2 + 1);
        for node in std::mem::take(&mut self.children) {
            children.push(Node::Text(Text::new(&inner)));
            children.push(match node {
                Node::Element(mut element) => {
                    element.indent(&inner);
                    Node::Element(element)
                }
                node => node,
            });
        }
        children.push(Node::Text(Text::new(outer)));
        self.children = children;
    }

    /// Gives lines of their own to the elements of those that got new ones while they had none in lines of their own.
    pub fn tidy(&mut self) {
        let mut blanks = None;
        for node in &mut self.children {
            match node {
                Node::Text(text) => {
                    let line = text
                        .value
                        .rfind('\n')
                        .and_then(|line| text.value.get(line..));
                    blanks = line
                        .filter(|line| line.trim().is_empty())
                        .map(str::to_owned);
                }
                Node::Element(element) => {
                    if let Some(blanks) = blanks.take()
                        && element.elements().any(|child| child.line == 0)
                    {
                        element.indent(&blanks);
                    }
                    element.tidy();
                }
                Node::Verbatim(_) => blanks = None,
            }
        }
    }

    /// As [`Element::indent`], for a root.
    pub(super) fn indent_all(&mut self) {
        self.indent("\n");
    }
}
