//! What QEMU and libvirt say when a guest does not load, told in other words: why, and what to do.
//!
//! In: their text, a line or a whole log. Out: an [`Explanation`] for each line that is known, the telling ones first. QEMU
//! ends every failed load with a line that only says that it failed; that one is explained if no other is known.
//!
//! Source: messages seen with QEMU 7.2 and 10.0 and libvirt 11.3.

mod known;

use serde::Serialize;

use known::{KNOWN, Known};

/// The longest line that is looked at, in bytes.
const LINE_LIMIT: usize = 4096;

/// What QEMU puts behind some messages without telling anything by it.
const ERRNO: &str = ": Invalid argument";

/// A message in other words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The line, untouched.
    pub line: String,
    /// A stable code for programs: `machine.other`.
    pub code: &'static str,
    /// Why QEMU or libvirt says that.
    pub cause: String,
    /// What to do.
    pub remedy: String,
}

/// How much a message tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Weight {
    /// It names the cause.
    Cause,
    /// It follows from another one, which may stand before it.
    Consequence,
    /// It only says that all has failed.
    Verdict,
}

/// Explains what is known of a text. What follows from something else in it is left out.
pub fn explain(text: &str) -> Vec<Explanation> {
    let lines = text
        .lines()
        .map(str::trim)
        .filter(|line| line.len() <= LINE_LIMIT);
    let found: Vec<(Weight, Explanation)> = lines.filter_map(explain_line).collect();
    let most = found.iter().map(|(weight, _)| *weight).min();
    let telling = found
        .into_iter()
        .filter(|(weight, _)| Some(*weight) == most);
    let mut explanations: Vec<Explanation> = Vec::new();
    for (_, explanation) in telling {
        let is_new = |one: &Explanation| one.cause != explanation.cause;
        if explanations.iter().all(is_new) {
            explanations.push(explanation);
        }
    }
    explanations
}

fn explain_line(line: &str) -> Option<(Weight, Explanation)> {
    let message = without_program(line);
    KNOWN.iter().find_map(|known| {
        let values = known.values_in(message)?;
        let explanation = Explanation {
            line: line.to_owned(),
            code: known.code,
            cause: fill(known.cause, &values),
            remedy: fill(known.remedy, &values),
        };
        Some((known.weight, explanation))
    })
}

/// The line behind `qemu-system-x86_64: `.
fn without_program(line: &str) -> &str {
    match line.split_once(": ") {
        Some((program, message)) if program.contains("qemu-") && !program.contains(' ') => message,
        _ => line,
    }
}

/// Puts values in the places of `{}` and `{0}`, `{1}`, ….
fn fill(template: &str, values: &[&str]) -> String {
    let mut text = template.to_owned();
    for (number, value) in values.iter().enumerate() {
        text = text.replace(&format!("{{{number}}}"), value);
    }
    text
}

impl Known {
    /// What stands in the line in the places of the pattern's `*`; `None` if it is another message. The pattern may
    /// begin and end anywhere in the line.
    fn values_in<'l>(&self, line: &'l str) -> Option<Vec<&'l str>> {
        let mut pieces = self.pattern.split('*');
        let first = pieces.next()?;
        let mut rest = &line[line.find(first)? + first.len()..];
        let mut values = Vec::new();
        for piece in pieces {
            // One at the end takes all that is left.
            let len = if piece.is_empty() {
                rest.len()
            } else {
                rest.find(piece)?
            };
            values.push(rest[..len].trim().trim_end_matches(ERRNO));
            rest = &rest[len + piece.len()..];
        }
        Some(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn only(text: &str) -> Explanation {
        let mut found = explain(text);
        assert_eq!(found.len(), 1, "{text}: {found:#?}");
        found.remove(0)
    }

    #[test]
    fn the_line_that_tells_the_cause_is_explained_and_its_consequences_are_not() {
        let log = "qemu-system-x86_64: warning: TSC frequency unknown\n\
            qemu-system-x86_64: Size mismatch: pc.ram: 0x8000000 != 0xc000000: Invalid argument\n\
            qemu-system-x86_64: error while loading state for instance 0x0 of device 'ram'\n\
            qemu-system-x86_64: load of migration failed: Invalid argument\n";
        let found = only(log);
        assert_eq!(found.code, "ramblock.length");
        assert!(found.cause.contains("pc.ram") && found.cause.contains("0xc000000"));
        assert!(found.line.starts_with("qemu-system-x86_64: Size mismatch"));
    }

    #[test]
    fn what_only_says_that_it_failed_is_explained_if_nothing_else_is_known() {
        let found = only("qemu-system-x86_64: load of migration failed: No such file or directory");
        assert_eq!(found.code, "section.unknown");
        let found = only("load of migration failed: Operation not permitted\nsomething else");
        assert_eq!(found.code, "load.failed");
    }

    #[test]
    fn values_of_the_message_stand_in_the_explanation() {
        let line = "Machine type received is 'pc-i440fx-7.2' and local is 'pc-i440fx-10.0'";
        let found = only(line);
        assert!(found.remedy.contains("pc-i440fx-7.2"), "{found:?}");
        let line = "Unknown savevm section or instance '0000:00:03.0/virtio-net' 0. Make sure that your current VM \
            setup matches your saved VM setup, including any hotplugged devices";
        assert!(only(line).cause.contains("0000:00:03.0/virtio-net"));
    }

    #[test]
    fn a_text_that_is_not_known_has_no_explanation() {
        assert_eq!(explain("all is well"), []);
        assert_eq!(explain(""), []);
        assert_eq!(explain("Not a migration stream ").len(), 1);
    }

    #[test]
    fn the_table_is_in_order() {
        assert!(KNOWN.len() >= 40);
        let mut patterns = BTreeSet::new();
        for known in KNOWN {
            assert!(patterns.insert(known.pattern), "twice: {}", known.pattern);
            let count = known.pattern.matches('*').count();
            for text in [known.cause, known.remedy] {
                let most = (0..9)
                    .filter(|number| text.contains(&format!("{{{number}}}")))
                    .max();
                assert!(most.is_none_or(|most| most < count), "{text}");
                assert!(!text.ends_with('.') && !text.is_empty(), "{text}");
            }
            // Each message is found by its own row, not by one before it.
            let line = known.pattern.replace('*', "7");
            let (_, found) = explain_line(&line).unwrap();
            assert_eq!(found.code, known.code, "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_looked_at_without_a_panic(text in "\\PC{0,300}", row in 0..KNOWN.len(), cut in 0_usize..60) {
            explain(&text);
            let mixed = KNOWN[row].pattern.replace('*', &text);
            let end = mixed.char_indices().map(|(at, _)| at).nth(cut).unwrap_or(mixed.len());
            explain(&mixed[..end]);
            explain(&mixed);
        }
    }
}
