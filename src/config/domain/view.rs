//! One element while it is read: what nobody asks for is found.
//!
//! A [`View`] notes which attributes and elements were asked for. When its reading is over, every other one is a problem:
//! an error, unless the reader said that the guest is the same without it. So an element that is not modelled cannot be
//! dropped silently. Problems are gathered, never returned, so that all of them are found at once.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use super::word::Word;
use crate::config::error::Unmodelled;
use crate::config::xml::Element;

/// As many problems are kept; more would tell nobody more.
const MOST_PROBLEMS: usize = 1000;

/// What is wrong with a document, gathered while it is read.
#[derive(Debug, Default)]
pub(in crate::config) struct Problems {
    /// What stands against it.
    pub(in crate::config) errors: Vec<Unmodelled>,
    /// What is left out without the guest being another one.
    pub(in crate::config) warnings: Vec<Unmodelled>,
}

impl Problems {
    /// Something that stands against it.
    pub(in crate::config) fn error(&mut self, problem: Unmodelled) {
        if self.errors.len() < MOST_PROBLEMS {
            self.errors.push(problem);
        }
    }

    /// Something that is left out.
    pub(in crate::config) fn warning(&mut self, problem: Unmodelled) {
        if self.warnings.len() < MOST_PROBLEMS {
            self.warnings.push(problem);
        }
    }
}

/// An element that is being read.
pub(super) struct View<'a> {
    element: &'a Element,
    path: String,
    problems: &'a RefCell<Problems>,
    asked: RefCell<Vec<&'static str>>,
    asked_elements: RefCell<Vec<&'static str>>,
    /// Nothing in it is looked at any more.
    is_done: Cell<bool>,
}

impl<'a> View<'a> {
    /// The root. Call [`View::finish`] at the end.
    pub(super) fn root(element: &'a Element, problems: &'a RefCell<Problems>) -> Self {
        View::new(element, element.name.to_string(), problems)
    }

    fn new(element: &'a Element, path: String, problems: &'a RefCell<Problems>) -> Self {
        View {
            element,
            path,
            problems,
            asked: RefCell::new(Vec::new()),
            asked_elements: RefCell::new(Vec::new()),
            is_done: Cell::new(false),
        }
    }

    /// The line of its tag.
    pub(super) fn line(&self) -> u32 {
        self.element.line
    }

    /// Its name.
    pub(super) fn name(&self) -> &'a str {
        &self.element.name
    }

    /// The element itself; what is looked at through it counts as not asked for.
    pub(super) fn element(&self) -> &'a Element {
        self.element
    }

    /// Where it stands.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    fn problem(&self, part: &str, why: impl Into<String>, try_: Option<&str>) -> Unmodelled {
        Unmodelled {
            path: format!("{}{part}", self.path),
            line: self.element.line,
            why: why.into(),
            try_: try_.map(str::to_owned),
        }
    }

    /// Something about this element that stands against the guest.
    pub(super) fn error(&self, why: impl Into<String>, try_: Option<&str>) {
        let problem = self.problem("", why, try_);
        self.problems.borrow_mut().error(problem);
    }

    fn bad_value(&self, attribute: &str, why: String) {
        let problem = self.problem(&format!("/@{attribute}"), why, None);
        self.problems.borrow_mut().error(problem);
    }
}

/// Attributes.
impl View<'_> {
    /// An attribute as it stands; an empty one counts as absent.
    pub(super) fn attribute(&self, name: &'static str) -> Option<String> {
        self.asked.borrow_mut().push(name);
        let value = self.element.get(name)?;
        (!value.is_empty()).then(|| value.to_owned())
    }

    /// An attribute that has to be there; empty if it is not, which is then a problem.
    pub(super) fn required(&self, name: &'static str) -> String {
        self.attribute(name).unwrap_or_else(|| {
            self.bad_value(name, "it has to be there".to_owned());
            String::new()
        })
    }

    /// A number, decimal or with `0x`.
    pub(super) fn number<N: TryFrom<u64>>(&self, name: &'static str) -> Option<N> {
        let text = self.attribute(name)?;
        let number = parse_number(&text).and_then(|number| N::try_from(number).ok());
        if number.is_none() {
            self.bad_value(name, format!("{text:?} is not a number that fits"));
        }
        number
    }

    /// A hexadecimal number, with `0x` or without.
    pub(super) fn hexadecimal(&self, name: &'static str) -> Option<u64> {
        let text = self.attribute(name)?;
        let digits = text.strip_prefix("0x").unwrap_or(&text);
        let number = u64::from_str_radix(digits, 16).ok();
        if number.is_none() {
            self.bad_value(name, format!("{text:?} is not a hexadecimal number"));
        }
        number
    }

    /// `yes` or `no`, also `on` or `off`.
    pub(super) fn switch(&self, name: &'static str) -> Option<bool> {
        let text = self.attribute(name)?;
        match text.as_str() {
            "yes" | "on" => Some(true),
            "no" | "off" => Some(false),
            _ => {
                let why = format!("{text:?} is none of yes, no, on, off");
                self.bad_value(name, why);
                None
            }
        }
    }

    /// One of the words of `W`.
    pub(super) fn word<W: Word>(&self, name: &'static str) -> Option<W> {
        let text = self.attribute(name)?;
        let word = W::from_word(&text);
        if word.is_none() {
            self.bad_value(name, none_of::<W>(&text));
        }
        word
    }

    /// As [`View::word`], for an attribute that has to be there.
    pub(super) fn required_word<W: Word>(&self, name: &'static str) -> Option<W> {
        if self.element.get(name).is_none_or(str::is_empty) {
            self.asked.borrow_mut().push(name);
            let why = format!("it has to be there, one of {}", W::words().join(", "));
            self.bad_value(name, why);
            return None;
        }
        self.word(name)
    }

    /// Attributes that are no business of the guest's.
    pub(super) fn ignore(&self, names: &[&'static str]) {
        self.asked.borrow_mut().extend_from_slice(names);
    }

    /// Attributes that are left out, with a warning for each that is there.
    pub(super) fn leave_out(&self, names: &[&'static str], why: &str) {
        for name in names {
            if self.element.get(name).is_some() {
                let problem = self.problem(&format!("/@{name}"), why, None);
                self.problems.borrow_mut().warning(problem);
            }
        }
        self.ignore(names);
    }
}

/// Text.
impl View<'_> {
    /// Its text, if there is any.
    pub(super) fn text(&self) -> Option<String> {
        let text = self.element.text();
        (!text.is_empty()).then_some(text)
    }

    /// Its text, which has to be there.
    pub(super) fn required_text(&self) -> String {
        self.text().unwrap_or_else(|| {
            self.error("it has to hold text", None);
            String::new()
        })
    }

    /// Its text as a number, decimal or with `0x`.
    pub(super) fn text_number<N: TryFrom<u64>>(&self) -> Option<N> {
        let text = self.required_text();
        let number = parse_number(&text).and_then(|number| N::try_from(number).ok());
        if number.is_none() && !text.is_empty() {
            self.error(format!("{text:?} is not a number that fits"), None);
        }
        number
    }

    /// Its text as one of the words of `W`.
    pub(super) fn text_word<W: Word>(&self) -> Option<W> {
        let text = self.required_text();
        let word = W::from_word(&text);
        if word.is_none() && !text.is_empty() {
            self.error(none_of::<W>(&text), None);
        }
        word
    }
}

/// Elements in it.
impl<'a> View<'a> {
    /// Reads every element of this name.
    pub(super) fn each<T>(&self, name: &'static str, read: impl Fn(&View<'a>) -> T) -> Vec<T> {
        self.asked_elements.borrow_mut().push(name);
        let count = self.element.all(name).count();
        let mut found = Vec::with_capacity(count);
        for (index, element) in self
            .element
            .elements()
            .filter(|one| one.name == name)
            .enumerate()
        {
            let number = (count > 1).then_some(index + 1);
            let view = View::new(element, step(&self.path, name, number), self.problems);
            found.push(read(&view));
            view.finish();
        }
        found
    }

    /// As [`View::each`], for what reading makes nothing of if it is wrong.
    pub(super) fn each_some<T>(
        &self,
        name: &'static str,
        read: impl Fn(&View<'a>) -> Option<T>,
    ) -> Vec<T> {
        self.each(name, read).into_iter().flatten().collect()
    }

    /// Reads the element of this name; two of them are a problem.
    pub(super) fn one<T>(&self, name: &'static str, read: impl Fn(&View<'a>) -> T) -> Option<T> {
        let mut all = self.each(name, read);
        if all.len() > 1 {
            self.error(format!("it has more than one <{name}>"), None);
        }
        (!all.is_empty()).then(|| all.swap_remove(0))
    }

    /// As [`View::one`], for what reading makes nothing of if it is wrong.
    pub(super) fn one_some<T>(
        &self,
        name: &'static str,
        read: impl Fn(&View<'a>) -> Option<T>,
    ) -> Option<T> {
        self.one(name, read).flatten()
    }

    /// The text of the element of this name.
    pub(super) fn child_text(&self, name: &'static str) -> Option<String> {
        self.one_some(name, View::text)
    }

    /// Whether there is an element of this name.
    pub(super) fn has(&self, name: &'static str) -> bool {
        self.one(name, |_| ()).is_some()
    }

    /// Elements that are no business of the guest's, with all that is in them.
    pub(super) fn ignore_elements(&self, names: &[&'static str]) {
        self.asked_elements.borrow_mut().extend_from_slice(names);
    }

    /// Elements that are left out, with a warning for each that is there.
    pub(super) fn leave_out_elements(&self, names: &[&'static str], why: &str) {
        for name in names {
            for element in self.element.all(name) {
                self.about(element, name, why, None, false);
            }
        }
        self.ignore_elements(names);
    }

    /// Elements that cannot be honoured, with an error for each that is there.
    pub(super) fn refuse_elements(&self, names: &[&'static str], why: &str, try_: Option<&str>) {
        for name in names {
            for element in self.element.all(name) {
                self.about(element, name, why, try_, true);
            }
        }
        self.ignore_elements(names);
    }

    fn about(&self, element: &Element, name: &str, why: &str, try_: Option<&str>, is_error: bool) {
        let problem = Unmodelled {
            path: step(&self.path, name, None),
            line: element.line,
            why: why.to_owned(),
            try_: try_.map(str::to_owned),
        };
        let mut problems = self.problems.borrow_mut();
        if is_error {
            problems.error(problem);
        } else {
            problems.warning(problem);
        }
    }

    /// Nothing more in it is looked at: it was refused or left out as a whole.
    pub(super) fn skip(&self) {
        self.is_done.set(true);
    }

    /// Finds what nobody asked for.
    pub(super) fn finish(self) {
        if self.is_done.get() {
            return;
        }
        let asked = self.asked.into_inner();
        let asked_elements = self.asked_elements.into_inner();
        let mut problems = self.problems.borrow_mut();
        for attribute in &self.element.attributes {
            let name = &*attribute.name;
            if !asked.contains(&name) && name != "xmlns" && !name.starts_with("xmlns:") {
                problems.error(Unmodelled {
                    path: format!("{}/@{name}", self.path),
                    line: self.element.line,
                    why: format!("attribute {name} is not known here"),
                    try_: None,
                });
            }
        }
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        for element in self.element.elements() {
            let name = &*element.name;
            if asked_elements.contains(&name) {
                continue;
            }
            let number = numbers.entry(name).or_default();
            *number += 1;
            problems.error(Unmodelled {
                path: step(&self.path, name, (*number > 1).then_some(*number)),
                line: element.line,
                why: format!("<{name}> is not known here"),
                try_: None,
            });
        }
    }
}

fn step(path: &str, name: &str, number: Option<usize>) -> String {
    match number {
        Some(number) => format!("{path}/{name}[{number}]"),
        None => format!("{path}/{name}"),
    }
}

fn none_of<W: Word>(text: &str) -> String {
    let shown: String = text.chars().take(64).collect();
    format!("{shown:?} is none of {}", W::words().join(", "))
}

/// A number as libvirt reads it.
pub(super) fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
