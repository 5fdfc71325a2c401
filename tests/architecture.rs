//! The picture of the modules as a table, held against the source: arrows point down, the formats are pure, only `cli`
//! prints, and files stay small and well named. A new arrow is a decision: it is made here and seen in review.

#![allow(clippy::unwrap_used, reason = "this is a test")]

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The lines of the picture from top to bottom. A module may use those in lines below its own, never a neighbour.
const LINES: [&[&str]; 8] = [
    &["main"],
    &["cli"],
    &["relocate"],
    &[
        "run",
        "save",
        "restore",
        "transfer",
        "convert",
        "configure",
        "inspect",
        "memory",
    ],
    &["image"],
    &["pipeline", "supervise"],
    &["container", "stream", "config", "qmp", "store", "host"],
    &[
        "error", "progress", "units", "bytes", "codec", "digest", "rate",
    ],
];

/// The line whose modules may use each other.
const GROUND: usize = LINES.len() - 1;

/// What `main` may use; it sees nothing else below.
const BELOW_MAIN: &str = "cli";

/// Bytes in, values out: no file, socket, process, clock, thread or environment variable.
const PURE: [&str; 3] = ["container", "stream", "config"];

/// The ways out of purity.
const OUTSIDE_WORLD: [&str; 16] = [
    "std::env",
    "std::fs",
    "std::net",
    "std::os::fd",
    "std::os::unix",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
    "crossbeam_channel",
    "jiff::Timestamp::now",
    "memmap2",
    "nix",
    "rustix",
    "signal_hook",
    "tempfile",
];

const PRINTING: [&str; 5] = ["print", "println", "eprint", "eprintln", "dbg"];

/// Names that say nothing.
const NO_NAMES: [&str; 6] = ["common", "helper", "helpers", "types", "util", "utils"];

const MOST_LINES_IN_A_FILE: usize = 700;

const TOP: [&str; 7] = [
    "Cargo.lock",
    "Cargo.toml",
    "README.md",
    "spec",
    "src",
    "testdata",
    "tests",
];

#[test]
fn the_source_follows_the_picture() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for path in rust_files(&root.join("src")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap();
        found.extend(violations(name, &text));
    }
    assert!(found.is_empty(), "{}", one_a_line(&found));
}

#[test]
fn the_top_of_the_repository_holds_nothing_else() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let others: Vec<String> = top_entries(root)
        .into_iter()
        .filter(|name| !TOP.contains(&name.as_str()))
        .filter(|name| !(name.starts_with('.') || name.starts_with("LICENSE-") || name == "target"))
        .collect();
    assert!(others.is_empty(), "not expected at the top: {others:?}");
}

/// What is committed; without git, what is there.
fn top_entries(root: &Path) -> Vec<String> {
    let git = Command::new("git")
        .arg("-C")
        .arg(root)
        .args(["ls-tree", "--name-only", "HEAD"])
        .output();
    match git {
        Ok(output) if output.status.success() => String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect(),
        _ => std::fs::read_dir(root)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect(),
    }
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Something that the picture does not allow.
#[derive(Debug, PartialEq)]
struct Violation {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.what)
    }
}

fn one_a_line(violations: &[Violation]) -> String {
    let lines: Vec<String> = violations.iter().map(Violation::to_string).collect();
    lines.join("\n")
}

/// Everything in one file, named as in `src/save/plan.rs`, that the picture does not allow.
fn violations(file: &str, text: &str) -> Vec<Violation> {
    let home = module_path(file);
    let module = home.first().map_or("", String::as_str);
    let mut found = Vec::new();
    let mut complain = |line: usize, what: String| {
        found.push(Violation {
            file: file.to_owned(),
            line,
            what,
        });
    };

    let lines = text.lines().count();
    if lines > MOST_LINES_IN_A_FILE {
        complain(
            lines,
            format!("{lines} lines, more than {MOST_LINES_IN_A_FILE}"),
        );
    }
    for name in home.iter().filter(|name| NO_NAMES.contains(&name.as_str())) {
        complain(1, format!("`{name}` says nothing; an idea lacks a name"));
    }
    if module != "lib" && line_of(module).is_none() {
        complain(1, format!("module `{module}` is not in the picture"));
    }
    for used in uses(&home, text) {
        if let Some(what) = used.wrong_arrow(module) {
            complain(used.line, what);
        }
        if used.is_in_a_test {
            continue;
        }
        if let Some(what) = used.wrong_in_a_pure_module(module) {
            complain(used.line, what);
        }
        if used.is_macro && module != "cli" && PRINTING.contains(&used.path[0].as_str()) {
            complain(used.line, format!("`{}!` outside of cli", used.path[0]));
        }
    }
    found.dedup();
    found
}

/// `src/save/plan.rs` → `save`, `plan`; `src/save/mod.rs` → `save`; `src/main.rs` → `main`; `src/lib.rs` → `lib`.
fn module_path(file: &str) -> Vec<String> {
    let name = file.strip_prefix("src/").unwrap_or(file);
    let name = name.strip_suffix(".rs").unwrap_or(name);
    let name = name.strip_suffix("/mod").unwrap_or(name);
    name.split('/').map(str::to_owned).collect()
}

fn line_of(module: &str) -> Option<usize> {
    LINES.iter().position(|line| line.contains(&module))
}

/// One path in the source, as written but for `super`, `self` and groups, which are resolved.
#[derive(Debug)]
struct Use {
    path: Vec<String>,
    line: usize,
    is_macro: bool,
    is_in_a_test: bool,
}

impl Use {
    /// Why `module` may not use this, if it may not.
    fn wrong_arrow(&self, module: &str) -> Option<String> {
        let [first, target, ..] = self.path.as_slice() else {
            return None;
        };
        let from = line_of(module)?;
        if first != "crate" || target == module {
            return None;
        }
        let Some(to) = line_of(target) else {
            return Some(format!("`crate::{target}` is not a module of the picture"));
        };
        let is_allowed = match module {
            "main" => target == BELOW_MAIN,
            _ => from < to || (from == GROUND && to == GROUND),
        };
        let why = if from == to {
            "its neighbour"
        } else {
            "which is above it"
        };
        let why = if module == "main" { "past cli" } else { why };
        (!is_allowed).then(|| format!("{module} uses {target}, {why}"))
    }

    /// Why a pure `module` may not use this, if it may not.
    ///
    /// Importing the parent of something forbidden counts as well: `use std::time;` could hide a clock.
    fn wrong_in_a_pure_module(&self, module: &str) -> Option<String> {
        let is_forbidden = |way: &&str| {
            let mut segments = way.split("::").zip(&self.path);
            segments.all(|(theirs, ours)| theirs == ours || ours == "*")
        };
        let way = OUTSIDE_WORLD.iter().find(|way| is_forbidden(way))?;
        (PURE.contains(&module) && self.path[0] != "*").then(|| {
            format!(
                "{module} is pure, but uses `{}` ({way})",
                self.path.join("::")
            )
        })
    }
}

/// Every path in the source of the module `home`.
fn uses(home: &[String], text: &str) -> Vec<Use> {
    let mut walk = Walk {
        tokens: tokens(text),
        at: 0,
        found: Vec::new(),
    };
    let home = if home == ["lib"] { &[] } else { home };
    walk.block(home, false);
    walk.found
}

struct Walk {
    tokens: Vec<Token>,
    at: usize,
    found: Vec<Use>,
}

impl Walk {
    fn text(&self, ahead: usize) -> &str {
        let token = self.tokens.get(self.at + ahead);
        token.map_or("", |token| token.text.as_str())
    }

    fn looks_at(&self, words: &[&str]) -> bool {
        (0..)
            .zip(words)
            .all(|(ahead, word)| self.text(ahead) == *word)
    }

    /// Walks to the brace that closes the block it stands in, or to the end.
    fn block(&mut self, home: &[String], is_in_a_test: bool) {
        let mut next_is_test = false;
        while self.at < self.tokens.len() {
            if self.looks_at(&["}"]) {
                self.at += 1;
                return;
            }
            if self.looks_at(&["#", "[", "cfg", "(", "test", ")", "]"]) {
                next_is_test = true;
                self.at += 7;
            } else if self.looks_at(&["mod"]) && self.text(2) == "{" {
                let mut inner = home.to_vec();
                inner.push(self.text(1).to_owned());
                self.at += 3;
                self.block(&inner, is_in_a_test || next_is_test);
                next_is_test = false;
            } else if self.looks_at(&["{"]) {
                self.at += 1;
                self.block(home, is_in_a_test || next_is_test);
                next_is_test = false;
            } else if self.tokens[self.at].is_word {
                self.path(&Vec::new(), home, is_in_a_test || next_is_test);
            } else {
                next_is_test &= !self.looks_at(&[";"]);
                self.at += 1;
            }
        }
    }

    /// Takes in one path, with all that its groups hold.
    fn path(&mut self, start: &[String], home: &[String], is_in_a_test: bool) {
        let line = self.tokens[self.at].line;
        let mut path = start.to_vec();
        loop {
            path.push(self.text(0).to_owned());
            self.at += 1;
            if !self.looks_at(&["::"]) {
                break;
            }
            self.at += 1;
            if self.looks_at(&["{"]) {
                self.group(&path, home, is_in_a_test);
                return;
            }
            let is_generic = !self.looks_at(&["*"]) && !self.next_is_word();
            if is_generic {
                break;
            }
        }
        self.found.push(Use {
            path: resolve(&path, home),
            line,
            is_macro: self.looks_at(&["!"]),
            is_in_a_test,
        });
        if self.looks_at(&["as"]) && self.text(2) != "::" {
            self.at += 2; // the new name is no path
        }
    }

    /// Takes in the `{…}` behind `start::`.
    fn group(&mut self, start: &[String], home: &[String], is_in_a_test: bool) {
        self.at += 1;
        while self.at < self.tokens.len() && !self.looks_at(&["}"]) {
            if self.next_is_word() || self.looks_at(&["*"]) {
                self.path(start, home, is_in_a_test);
            } else {
                self.at += 1;
            }
        }
        self.at += 1;
    }

    fn next_is_word(&self) -> bool {
        self.tokens.get(self.at).is_some_and(|token| token.is_word)
    }
}

/// A path as seen from the crate: `super` and `self` become what they stand for, `vmstow` is this crate.
fn resolve(path: &[String], home: &[String]) -> Vec<String> {
    let Some(first) = path.first() else {
        return Vec::new();
    };
    let ups = path.iter().take_while(|word| *word == "super").count();
    let base = match first.as_str() {
        "super" => &home[..home.len().saturating_sub(ups)],
        "self" => home,
        "crate" | "vmstow" => &[],
        _ => return path.to_vec(),
    };
    let rest = &path[ups.max(1)..];
    let inner = base.iter().chain(rest).cloned();
    std::iter::once("crate".to_owned()).chain(inner).collect()
}

/// A word, `::` or any other single character of code.
#[derive(Debug)]
struct Token {
    text: String,
    line: usize,
    is_word: bool,
}

/// The code of a source file without comments, strings and characters.
fn tokens(text: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let len = blank_len(rest).unwrap_or(0);
        if len > 0 {
            rest = &rest[len..];
            continue;
        }
        let is_word = first.is_alphanumeric() || first == '_';
        let len = if is_word {
            rest.find(|c: char| !(c.is_alphanumeric() || c == '_'))
                .unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        found.push(Token {
            text: rest[..len].to_owned(),
            line: 1 + text[..text.len() - rest.len()].matches('\n').count(),
            is_word,
        });
        rest = &rest[len..];
    }
    found
}

/// The length of the space, comment, string, character or lifetime that `rest` begins with, if it does.
fn blank_len(rest: &str) -> Option<usize> {
    let space = rest.len() - rest.trim_start().len();
    if space > 0 {
        return Some(space);
    }
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(block_comment_len(rest));
    }
    let literal = rest.trim_start_matches(['b', 'c', 'r']);
    let prefix = rest.len() - literal.len();
    if prefix > 2 {
        return None;
    }
    let hashes = literal.len() - literal.trim_start_matches('#').len();
    let is_raw = rest[..prefix].contains('r');
    if is_raw && literal[hashes..].starts_with('"') {
        let end = format!("\"{}", "#".repeat(hashes));
        let body = &literal[hashes + 1..];
        let body_len = body.find(&end).map_or(body.len(), |at| at + end.len());
        return Some(prefix + hashes + 1 + body_len);
    }
    match literal.chars().next() {
        Some('"') => Some(prefix + quoted_len(literal, '"')),
        Some('\'') if prefix <= 1 => Some(prefix + character_or_lifetime_len(literal)),
        _ => None,
    }
}

fn block_comment_len(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        let here = &rest.as_bytes()[at..];
        if here.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if here.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// The length of a quoted text with its two quotes; a backslash protects what follows it.
fn quoted_len(rest: &str, quote: char) -> usize {
    let mut is_protected = true; // the first quote
    for (at, c) in rest.char_indices() {
        if is_protected {
            is_protected = false;
        } else if c == '\\' {
            is_protected = true;
        } else if c == quote {
            return at + c.len_utf8();
        }
    }
    rest.len()
}

/// `'x'` and `'\n'` are characters, `'static` is a lifetime.
fn character_or_lifetime_len(rest: &str) -> usize {
    let mut inner = rest.chars().skip(1);
    match (inner.next(), inner.next()) {
        (Some('\\'), _) | (_, Some('\'')) => quoted_len(rest, '\''),
        _ => {
            let name = &rest[1..];
            1 + name
                .find(|c: char| !(c.is_alphanumeric() || c == '_'))
                .unwrap_or(name.len())
        }
    }
}

mod the_checker {
    use super::*;

    /// What the checker says about a file, without its name.
    fn says(file: &str, text: &str) -> Vec<String> {
        let found = violations(file, text);
        assert!(found.iter().all(|violation| violation.file == file));
        found
            .iter()
            .map(|violation| format!("{}: {}", violation.line, violation.what))
            .collect()
    }

    #[test]
    fn accepts_arrows_that_point_down() {
        let text = "//! crate::cli\nuse crate::{container::Footer, qmp, error::{self, Result}};\nuse super::plan::Plan;";
        assert_eq!(says("src/save/guest.rs", text), [""; 0]);
        assert_eq!(says("src/codec.rs", "use crate::digest::Digest;"), [""; 0]);
        assert_eq!(
            says("src/main.rs", "fn main() { vmstow::cli::main() }"),
            [""; 0]
        );
        assert_eq!(
            says("src/cli/save.rs", "use crate::save; println!();"),
            [""; 0]
        );
    }

    #[test]
    fn finds_an_arrow_to_a_neighbour() {
        let text = "\nuse crate::{bytes::ReadAt, stream::wire};";
        let found = ["2: container uses stream, its neighbour"];
        assert_eq!(says("src/container/reader.rs", text), found);
        let text = "use crate::container::Footer;";
        let found = ["1: store uses container, its neighbour"];
        assert_eq!(says("src/store/file.rs", text), found);
    }

    #[test]
    fn finds_an_arrow_upwards_however_it_is_written() {
        let found = ["1: qmp uses save, which is above it"];
        for text in [
            "use crate::save;",
            "use crate::save::{plan, guest::*};",
            "use crate::{save::plan as p};",
            "use super::super::save::Plan;",
            "use super::super::{save};",
            "fn f() { let x = crate::save::Plan::default(); }",
            "mod tests { use super::super::super::save; }",
            "fn f<'a>(c: char) -> crate::save::Plan<'a> { if c == '\"' {} }",
        ] {
            assert_eq!(says("src/qmp/client.rs", text), found, "{text}");
        }
    }

    #[test]
    fn finds_what_goes_past_cli() {
        let found = ["1: main uses save, past cli"];
        assert_eq!(says("src/main.rs", "use vmstow::save;"), found);
        let found = ["1: inspect uses cli, which is above it"];
        assert_eq!(says("src/inspect/mod.rs", "use crate::cli::ui;"), found);
    }

    #[test]
    fn finds_modules_that_the_picture_lacks() {
        let found = ["1: module `snapshot` is not in the picture"];
        assert_eq!(says("src/snapshot.rs", ""), found);
        let found = ["1: `crate::Error` is not a module of the picture"];
        assert_eq!(says("src/save/mod.rs", "use crate::Error;"), found);
    }

    #[test]
    fn finds_the_outside_world_in_a_pure_module() {
        for text in [
            "use std::fs;",
            "use std::{fs::File, io};",
            "use std::time;",
            "use std::time::{Duration, SystemTime};",
            "use std::os::unix::net::UnixStream;",
            "use std::*;",
            "fn f() { std::thread::spawn(|| {}); }",
            "use rustix::fs;",
        ] {
            let found = says("src/stream/parser.rs", text);
            assert_eq!(found.len(), 1, "{text}: {found:?}");
            assert!(found[0].contains("stream is pure, but uses"), "{found:?}");
            assert_eq!(says("src/host/files.rs", text), [""; 0]);
        }
        let text = "use std::time::Duration; use std::io::Read; // std::fs\nlet s = \"std::fs\";";
        assert_eq!(says("src/config/domain.rs", text), [""; 0]);
    }

    #[test]
    fn lets_the_tests_of_a_pure_module_read_files() {
        let text =
            "#[cfg(test)]\nmod tests { fn f() { std::fs::read(x); println!(); } }\nuse std::fs;";
        let found = ["3: stream is pure, but uses `std::fs` (std::fs)"];
        assert_eq!(says("src/stream/parser.rs", text), found);
    }

    #[test]
    fn finds_printing_outside_cli() {
        let text = "/* println! /* */ */ fn f() {\n    println!(\"{}\", r#\"\"eprintln!\"#);\n}";
        assert_eq!(
            says("src/save/mod.rs", text),
            ["2: `println!` outside of cli"]
        );
        assert_eq!(
            says("src/main.rs", "eprint!()"),
            ["1: `eprint!` outside of cli"]
        );
    }

    #[test]
    fn finds_long_files_and_names_that_say_nothing() {
        let long = "\n".repeat(MOST_LINES_IN_A_FILE + 1);
        assert_eq!(
            says("src/qmp/event.rs", &long),
            ["701: 701 lines, more than 700"]
        );
        let found = ["1: `util` says nothing; an idea lacks a name"];
        assert_eq!(says("src/qmp/util.rs", ""), found);
    }
}
