//! Two domain XMLs compared: what of the difference the guest would see.
//!
//! What a guest sees, its ABI, has to stay as it was when it was saved; what stands behind it, and what people wrote about
//! it, may change. [`compare`] lists every difference with its [`Class`]; whatever is not known to be invisible counts as
//! seen. How the XML is written does not matter: the order of attributes, comments, white space, `0x03` for `3`, `GiB` for
//! `KiB`, and attributes that say what holds without them.
//!
//! | file | what it is for |
//! |---|---|
//! | `normal` | an element without all that does not matter |
//! | `rules` | the table: what is seen by the guest and what is not |
//! | `backend` | other backends in the XML → remaps of the kept arguments |
//!
//! Source: libvirt's documentation of the domain format; what a migration stream depends on, seen with QEMU 7.2 and 10.0.

mod backend;
mod normal;
mod rules;

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use super::xml::Document;
use normal::Plain;

pub use backend::{Carried, carry_over, names_of_disks};
pub use rules::Class;

/// One difference between two domain XMLs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Where: `domain/devices/disk[2]/source/@file`, counted in the XML that has it, the new one if both do.
    pub path: String,
    /// Its line in the new XML, or in the old one if it is gone; 0 if nobody wrote it and it was filled in.
    pub line: u32,
    /// What it was; `None` if it was not there.
    pub old: Option<String>,
    /// What it is now; `None` if it is gone.
    pub new: Option<String>,
    /// Whom it concerns.
    pub class: Class,
}

/// Everything in which two domain XMLs differ.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// The differences, in the order of the new XML; what is gone follows what stands beside it.
    pub changes: Vec<Change>,
    /// The children of `<os>` and `<devices>` that differ.
    pairs: Vec<Pair>,
    /// The old devices, among which a device has its number.
    old_devices: Vec<Plain>,
}

/// An element that differs.
#[derive(Debug, Clone)]
struct Pair {
    old: Option<Plain>,
    new: Option<Plain>,
    /// Where it is shown to stand.
    path: String,
    /// How it differs: places in [`Comparison::changes`].
    changes: std::ops::Range<usize>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change {
            path, line, new, ..
        } = self;
        // What nobody wrote has no line, what is gone has one in another text.
        if *line > 0 && (new.is_some() || self.old.is_none()) {
            write!(f, "line {line}: ")?;
        }
        match (&self.old, new) {
            (Some(old), Some(new)) => write!(f, "{path} is {old:?} and would be {new:?}"),
            (None, Some(new)) => write!(f, "{path} is not there and would be {new:?}"),
            (Some(old), None) => write!(f, "{path} is {old:?} and would be gone"),
            (None, None) => f.write_str(path),
        }
    }
}

impl Comparison {
    /// The differences of one class.
    pub fn of(&self, class: Class) -> impl Iterator<Item = &Change> {
        self.changes
            .iter()
            .filter(move |change| change.class == class)
    }
}

/// Compares two domain XMLs.
pub fn compare(old: &Document, new: &Document) -> Comparison {
    let (old, new) = (Plain::of(&old.root), Plain::of(&new.root));
    let mut comparison = Comparison {
        old_devices: old.below("devices"),
        ..Comparison::default()
    };
    let place = Place {
        shown: new.name.clone(),
        rule: Vec::new(),
    };
    if old.name == new.name {
        comparison.elements(&place, &old, &new);
    } else {
        comparison.tell(&place, new.line, Some(old.name), Some(new.name));
    }
    comparison
}

/// A place in the tree: as it is shown, and as the rules know it, without the root and without numbers.
#[derive(Clone)]
struct Place {
    shown: String,
    rule: Vec<String>,
}

impl Place {
    fn below(&self, name: &str, number: Option<usize>) -> Self {
        let number = number.map_or(String::new(), |number| format!("[{number}]"));
        let mut rule = self.rule.clone();
        rule.push(name.to_owned());
        Place {
            shown: format!("{}/{name}{number}", self.shown),
            rule,
        }
    }

    /// Whether it is an element that stands for one thing of the guest.
    fn is_thing(&self) -> bool {
        matches!(self.rule.as_slice(), [parent, _] if parent == "devices" || parent == "os")
    }
}

impl Comparison {
    fn tell(&mut self, place: &Place, line: u32, old: Option<String>, new: Option<String>) {
        let class = rules::class_of(&place.rule, old.as_deref(), new.as_deref());
        self.changes.push(Change {
            path: place.shown.clone(),
            line,
            old,
            new,
            class,
        });
    }

    fn elements(&mut self, place: &Place, old: &Plain, new: &Plain) {
        if old.is_same(new) {
            return;
        }
        let first = self.changes.len();
        if rules::is_told_as_a_whole(&place.rule) {
            self.tell(place, new.line, Some(old.shown()), Some(new.shown()));
        } else {
            if old.text != new.text {
                let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
                self.tell(place, new.line, text(&old.text), text(&new.text));
            }
            self.attributes(place, old, new);
            self.children(place, old, new);
        }
        self.note_pair(place, Some(old), Some(new), first);
    }

    fn note_pair(&mut self, place: &Place, old: Option<&Plain>, new: Option<&Plain>, first: usize) {
        if place.is_thing() {
            self.pairs.push(Pair {
                old: old.cloned(),
                new: new.cloned(),
                path: place.shown.clone(),
                changes: first..self.changes.len(),
            });
        }
    }

    fn attributes(&mut self, place: &Place, old: &Plain, new: &Plain) {
        let names: BTreeSet<&String> = old.attributes.keys().chain(new.attributes.keys()).collect();
        for name in names {
            let (before, now) = (old.attributes.get(name), new.attributes.get(name));
            if before != now {
                let place = place.below(&format!("@{name}"), None);
                self.tell(&place, new.line, before.cloned(), now.cloned());
            }
        }
    }

    fn children(&mut self, place: &Place, old: &Plain, new: &Plain) {
        for name in names_of(new, old) {
            let (olds, news) = (old.all(name), new.all(name));
            let is_one = olds.len().max(news.len()) == 1;
            let number = |index: usize| (!is_one).then_some(index + 1);
            let matched = match_up(&olds, &news, rules::is_ordered(name));
            for (index, (now, before)) in news.iter().zip(&matched).enumerate() {
                let place = place.below(name, number(index));
                match before.and_then(|before| olds.get(before)) {
                    Some(before) => self.elements(&place, before, now),
                    None => self.alone(&place, None, Some(now)),
                }
            }
            for (index, before) in olds.iter().enumerate() {
                if !matched.contains(&Some(index)) {
                    self.alone(&place.below(name, number(index)), Some(before), None);
                }
            }
        }
    }

    /// An element that only one of the two has.
    fn alone(&mut self, place: &Place, old: Option<&Plain>, new: Option<&Plain>) {
        let first = self.changes.len();
        let line = new.or(old).map_or(0, |it| it.line);
        self.tell(place, line, old.map(Plain::shown), new.map(Plain::shown));
        self.note_pair(place, old, new, first);
    }
}

/// The names of the children of both, those of the new one first.
fn names_of<'a>(new: &'a Plain, old: &'a Plain) -> Vec<&'a str> {
    let mut names = Vec::new();
    for child in new.children.iter().chain(&old.children) {
        if !names.contains(&child.name.as_str()) {
            names.push(child.name.as_str());
        }
    }
    names
}

/// Whether an old and a new element are one.
type Way<'a> = &'a dyn Fn(&Plain, &Plain) -> bool;

/// For each new element the old one that it was: the same, else the one with its name or address, else the next.
fn match_up(olds: &[&Plain], news: &[&Plain], is_ordered: bool) -> Vec<Option<usize>> {
    let mut matched = vec![None; news.len()];
    let mut free: Vec<usize> = (0..olds.len()).collect();
    let is_same = |old: &Plain, new: &Plain| old.is_same(new);
    let is_alike = |old: &Plain, new: &Plain| old.key().is_some_and(|key| Some(key) == new.key());
    let is_next = |_: &Plain, _: &Plain| true;
    let ways: [Way<'_>; 3] = [&is_same, &is_alike, &is_next];
    let ways = if is_ordered { &ways[2..] } else { &ways[..] };
    for way in ways {
        for (new, found) in news.iter().zip(&mut matched) {
            if found.is_some() {
                continue;
            }
            let place = free
                .iter()
                .position(|old| olds.get(*old).is_some_and(|old| way(old, new)));
            *found = place.map(|place| free.remove(place));
        }
    }
    matched
}

#[cfg(test)]
mod tests;
