//! What a guest wrote on its serial port, kept in a file: the witness of every story.

use std::path::{Path, PathBuf};

use super::wait::{PATIENCE, wait_until};

/// The file behind a guest's serial port.
#[derive(Debug, Clone)]
pub struct Serial(PathBuf);

/// What a serial file held at one moment.
#[derive(Debug, Clone)]
pub struct Mark {
    path: PathBuf,
    text: String,
}

impl Serial {
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Serial(path.into())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// All that was written until now.
    pub fn text(&self) -> String {
        let bytes = std::fs::read(&self.0).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The number of the last complete `tick` line; 0 if there is none.
    pub fn last_tick(&self) -> u64 {
        ticks(&self.text()).last().copied().unwrap_or(0)
    }

    /// All checksums that a Linux guest said of its memory.
    pub fn sums(&self) -> Vec<String> {
        complete_lines(&self.text())
            .filter_map(|line| line.strip_prefix("sum "))
            .map(str::to_owned)
            .collect()
    }

    /// Waits for a complete line that `wanted` likes.
    #[track_caller]
    pub fn wait_for_line(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        wait_until(what, PATIENCE, || {
            let text = self.text();
            let found = complete_lines(&text).find(|line| wanted(line));
            found
                .map(str::to_owned)
                .ok_or_else(|| format!("{} ends with {:?}", self.0.display(), tail(&text)))
        })
    }

    /// As [`Serial::wait_for_line`], of the lines that came after `before` was taken of the same file.
    #[track_caller]
    pub fn wait_for_new_line(&self, before: &Mark, what: &str, wanted: impl Fn(&str) -> bool) {
        assert_eq!(before.path, self.0);
        let known = complete_lines(&before.text).count();
        wait_until(what, PATIENCE, || {
            let text = self.text();
            let found = complete_lines(&text).skip(known).any(&wanted);
            let seen = || format!("{} ends with {:?}", self.0.display(), tail(&text));
            found.then_some(()).ok_or_else(seen)
        });
    }

    /// Waits for tick `number` or a later one, and checks that all until then are good.
    #[track_caller]
    pub fn wait_for_tick(&self, number: u64) {
        wait_until(&format!("tick {number}"), PATIENCE, || {
            let text = self.text();
            assert_unbroken(&text);
            match ticks(&text).last() {
                Some(&last) if last >= number => Ok(()),
                _ => Err(format!("{} ends with {:?}", self.0.display(), tail(&text))),
            }
        });
    }

    /// What it holds now; for a guest that stopped or ended, so that nothing is added after it.
    pub fn mark(&self) -> Mark {
        Mark {
            path: self.0.clone(),
            text: self.text(),
        }
    }

    /// Waits until this goes five ticks on from `before`, without a byte lost or repeated.
    ///
    /// `before` may be of the same file (which was appended to) or of another one, in which the story began.
    #[track_caller]
    pub fn assert_goes_on(&self, before: &Mark) {
        self.assert_goes_on_to(before, before.last_tick() + 5);
    }

    /// As [`Serial::assert_goes_on`], until tick `number`.
    #[track_caller]
    pub fn assert_goes_on_to(&self, before: &Mark, number: u64) {
        wait_until(&format!("tick {number}"), PATIENCE, || {
            let text = self.text();
            let all = if before.path == self.0 {
                assert!(
                    text.starts_with(&before.text),
                    "what {} held is gone: it begins with {:?}",
                    self.0.display(),
                    text.lines().take(5).collect::<Vec<_>>()
                );
                text
            } else {
                format!("{}{text}", before.text)
            };
            assert_unbroken(&all);
            match ticks(&all).last() {
                Some(&last) if last >= number => Ok(()),
                _ => Err(format!("{} ends with {:?}", self.0.display(), tail(&all))),
            }
        });
    }
}

impl Mark {
    /// All that was written until then.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The number of the last complete `tick` line; 0 if there is none.
    pub fn last_tick(&self) -> u64 {
        ticks(&self.text).last().copied().unwrap_or(0)
    }
}

/// Every tick follows the one before it, no guest said that something is BAD, and its checksums are all the same.
#[track_caller]
fn assert_unbroken(text: &str) {
    let mut last_tick = None;
    let mut last_sum = None;
    for line in complete_lines(text) {
        assert!(!line.contains("BAD"), "the guest says {line:?}");
        if let Some(tick) = tick(line) {
            assert!(
                last_tick.is_none_or(|last| tick == last + 1),
                "tick {last_tick:?} is followed by {line:?}"
            );
            last_tick = Some(tick);
        }
        if let Some(sum) = line.strip_prefix("sum ") {
            assert!(
                last_sum.is_none_or(|last| sum == last),
                "the guest's memory changed: {last_sum:?}, then {line:?}"
            );
            last_sum = Some(sum);
        }
    }
}

fn complete_lines(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n'))
        .map(|line| line.trim_end_matches('\r'))
}

fn ticks(text: &str) -> Vec<u64> {
    complete_lines(text).filter_map(tick).collect()
}

fn tick(line: &str) -> Option<u64> {
    line.strip_prefix("tick ")?.split(' ').next()?.parse().ok()
}

fn tail(text: &str) -> String {
    let mut lines: Vec<&str> = text.lines().rev().take(3).collect();
    lines.reverse();
    lines.join("\n")
}
