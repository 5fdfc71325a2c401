//! `vmstow config`

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Args, Subcommand};
use serde_json::json;

use super::ui::Ui;
use super::{About, Outcome};
use crate::config::abi::{Change, Class};
use crate::config::xml::Document;
use crate::configure::{
    self, ConfigureError, ConfigureReport, Proposal, Wish, check_changeable, differences, value_at,
    with_value_at,
};
use crate::error::Error;
use crate::image::{self, ImageError, OpenedImage};
use crate::progress::Progress;
use crate::store::{Location, StoreError};

/// Show or change the configuration in an image: its domain XML and its labels
///
/// What the guest would see cannot be changed: its saved state fits only what it saw. Other backends (disks, networks,
/// consoles, firmware, displays) are what later restores use; a change of the name or the emulator counts for them too.
/// Nothing is rewritten: a generation is appended, and signed if the image was by somebody you trust.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ConfigArgs {
    /// The image
    image: Location,

    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// Print the domain XML, a label, or one value of the XML
    Get {
        /// A label, or a path in the XML such as domain/devices/emulator
        #[arg(conflicts_with = "labels")]
        name: Option<String>,

        /// Print all labels, one a line
        #[arg(long)]
        labels: bool,
    },
    /// Set labels, or values of the XML
    Set {
        /// A label, or a path in the XML as `get` takes it, and what it shall be
        #[arg(value_name = "NAME=VALUE", value_parser = assignment, required_unless_present = "remove")]
        values: Vec<(String, String)>,

        /// Take a label away. May be given several times
        #[arg(long, value_name = "LABEL")]
        remove: Vec<String>,
    },
    /// Edit the domain XML with $VISUAL or $EDITOR
    Edit,
    /// Put other domain XML in its place
    Replace {
        /// The file; - reads standard input
        file: PathBuf,
    },
    /// Show how the configuration differs from another image's, or from domain XML in a file
    Diff {
        /// The other image or file; - reads XML from standard input
        other: PathBuf,
    },
}

const EXAMPLES: &str = "\
Examples:
  vmstow config web01.stow get
  vmstow config web01.stow set owner=ops domain/title='the web server'
  vmstow config web01.stow edit
  vmstow config web01.stow diff web02.stow";

fn assignment(text: &str) -> Result<(String, String), String> {
    // A path may hold `=` in no place, a value in any.
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("it has to be NAME=VALUE".to_owned()),
    }
}

/// Shows or changes.
pub fn run(args: ConfigArgs, ui: &Ui) -> Outcome {
    let location = args.image;
    let opened = image::open_alone(&location).about(&location)?;
    match args.act {
        Act::Get { name, labels } => get(&opened, name, labels, ui).about(&location),
        Act::Set { values, remove } => set(opened, values, remove, ui).about(&location),
        Act::Edit => edit(opened, &location, ui),
        Act::Replace { file } => {
            let xml = read_text(&file)?;
            propose(opened, xml, ui).about(&location)
        }
        Act::Diff { other } => diff(&opened, &other, ui).about(&location),
    }
}

fn get(
    opened: &OpenedImage,
    name: Option<String>,
    all_labels: bool,
    ui: &Ui,
) -> Result<ExitCode, Error> {
    let xml = opened.image().xml()?;
    let labels = opened.image().manifest()?.labels;
    match name {
        Some(name) => {
            let value = match labels.get(&name) {
                Some(value) => value.clone(),
                None => value_at(&xml, &name)?,
            };
            ui.answer(&json!({ "name": name, "value": value }), |_| {
                value.clone() + "\n"
            })?;
        }
        None if all_labels => {
            let lines = |labels: &BTreeMap<String, String>| {
                let lines = labels
                    .iter()
                    .map(|(name, value)| format!("{name}={value}\n"));
                lines.collect()
            };
            ui.answer(&json!({ "labels": labels }), |_| lines(&labels))?;
        }
        None => {
            let text = xml.clone();
            ui.answer(&json!({ "xml": xml, "labels": labels }), |_| text)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn set(
    opened: OpenedImage,
    values: Vec<(String, String)>,
    removed: Vec<String>,
    ui: &Ui,
) -> Result<ExitCode, Error> {
    check_changeable(&opened)?;
    let mut wish = Wish {
        removed_labels: BTreeSet::from_iter(removed),
        ..Wish::default()
    };
    let manifest = opened.image().manifest()?;
    let mut unknown = wish.removed_labels.iter();
    if let Some(name) = unknown.find(|name| !manifest.labels.contains_key(*name)) {
        let name = name.clone();
        return Err(ConfigureError::Unknown { name }.into());
    }
    for (name, value) in values {
        match configure::is_path(&name) {
            true => {
                let xml = wish.xml.map_or_else(|| opened.image().xml(), Ok)?;
                wish.xml = Some(with_value_at(&xml, &name, &value)?);
            }
            false => drop(wish.labels.insert(name, value)),
        }
    }
    apply(opened, wish, ui)
}

fn propose(opened: OpenedImage, xml: String, ui: &Ui) -> Result<ExitCode, Error> {
    check_changeable(&opened)?;
    let wish = Wish {
        xml: Some(xml),
        ..Wish::default()
    };
    apply(opened, wish, ui)
}

fn apply(opened: OpenedImage, wish: Wish, ui: &Ui) -> Result<ExitCode, Error> {
    let proposal = Proposal::check(&opened, wish)?;
    let unheeded: Vec<String> = proposal.unheeded().map(unheeded).collect();
    let report = proposal.apply(opened)?;
    unheeded.iter().for_each(|text| ui.warn(text));
    if report.is_changed && !report.is_signed {
        ui.warn("the image is not signed by anybody you trust, and this change did not sign it");
    }
    ui.answer(&report, changed)?;
    Ok(ExitCode::SUCCESS)
}

fn unheeded(change: &Change) -> String {
    format!(
        "line {}: {} differs now, but a restore goes by the arguments that the guest was saved with",
        change.line, change.path
    )
}

fn changed(report: &ConfigureReport) -> String {
    if !report.is_changed {
        return format!("{} says so already; nothing was changed\n", report.image);
    }
    let mut text = format!(
        "changed {}: it is at generation {} now\n",
        report.image, report.generation
    );
    for remap in &report.remaps {
        text.push_str(&format!("a restore uses {remap}\n"));
    }
    text
}

/// Lets the user edit the XML; what cannot be taken is kept in its file.
fn edit(opened: OpenedImage, location: &Location, ui: &Ui) -> Outcome {
    check_changeable(&opened).about(location)?;
    let xml = opened.image().xml().about(location)?;
    let file = text_file(&xml)?;
    let edited = run_editor(file.path()).and_then(|()| Ok(read_text(file.path())?));
    let edited = match edited {
        Ok(edited) if edited == xml => {
            ui.note(&"nothing was changed");
            return Ok(ExitCode::SUCCESS);
        }
        other => other,
    };
    let done = edited.and_then(|edited| propose(opened, edited, ui));
    if done.is_err() && std::fs::read_to_string(file.path()).is_ok_and(|text| text != xml) {
        keep(file, location, ui);
    }
    done.about(location)
}

/// Says where the text is that could not be taken.
fn keep(file: tempfile::NamedTempFile, location: &Location, ui: &Ui) {
    match file.keep() {
        Ok((_, path)) => ui.warn(&format!(
            "your text is kept in {}; mend it, then: vmstow config {location} replace {}",
            path.display(),
            path.display()
        )),
        Err(error) => ui.warn(&format!("your text could not be kept: {error}")),
    }
}

/// A file of this user's alone, which ends in `.xml` for the editor's sake.
fn text_file(xml: &str) -> Result<tempfile::NamedTempFile, Error> {
    let failed = |source| StoreError::File {
        act: "write",
        path: std::env::temp_dir(),
        source,
    };
    let mut file = tempfile::Builder::new()
        .prefix("vmstow-")
        .suffix(".xml")
        .tempfile()
        .map_err(failed)?;
    file.write_all(xml.as_bytes()).map_err(failed)?;
    file.flush().map_err(failed)?;
    Ok(file)
}

/// Runs the editor as a shell would: the variable may hold options.
fn run_editor(path: &Path) -> Result<(), Error> {
    let chosen = ["VISUAL", "EDITOR"]
        .into_iter()
        .filter_map(std::env::var_os);
    let editor = chosen.into_iter().find(|editor| !editor.is_empty());
    let editor = editor.unwrap_or_else(|| OsString::from("vi"));
    let mut words = editor.clone();
    words.push(" \"$@\"");
    let status = Command::new("sh")
        .arg("-c")
        .arg(words)
        .arg("sh")
        .arg(path)
        .status();
    let editor = editor.to_string_lossy().into_owned();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(ConfigureError::Editor {
            editor,
            status: status.to_string(),
        }
        .into()),
        Err(source) => Err(StoreError::File {
            act: "run",
            path: editor.into(),
            source,
        }
        .into()),
    }
}

/// The text of a file, or of standard input.
fn read_text(path: &Path) -> Result<String, StoreError> {
    let mut text = String::new();
    let read = match path.as_os_str() == "-" {
        true => std::io::stdin().lock().read_to_string(&mut text).map(drop),
        false => std::fs::read_to_string(path).map(|read| text = read),
    };
    read.map(|()| text).map_err(|source| StoreError::File {
        act: "read",
        path: path.to_owned(),
        source,
    })
}

/// One label that differs.
#[derive(Debug, serde::Serialize)]
struct LabelChange {
    name: String,
    old: Option<String>,
    new: Option<String>,
}

fn diff(opened: &OpenedImage, other: &Path, ui: &Ui) -> Result<ExitCode, Error> {
    let (xml, labels) = other_configuration(other)?;
    let changes = differences(&opened.image().xml()?, &xml)?;
    let labels = match labels {
        Some(labels) => label_changes(&opened.image().manifest()?.labels, &labels),
        None => Vec::new(),
    };
    let is_same = changes.is_empty() && labels.is_empty();
    let answer = json!({ "is_same": is_same, "changes": changes, "labels": labels });
    ui.answer(&answer, |_| {
        let changes = changes.iter().map(change_line);
        changes.chain(labels.iter().map(label_line)).collect()
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The XML, and the labels if it is an image's.
fn other_configuration(path: &Path) -> Result<(String, Option<BTreeMap<String, String>>), Error> {
    if path.as_os_str() != "-" {
        match image::open_alone(&Location::Path(path.to_owned())) {
            Ok(opened) => {
                let manifest = opened.image().manifest()?;
                return Ok((opened.image().xml()?, Some(manifest.labels)));
            }
            Err(error) if matches!(error.downcast_ref(), Some(ImageError::NotAnImage)) => {}
            Err(error) => return Err(error),
        }
    }
    let text = read_text(path)?;
    Document::parse(text.as_bytes())?;
    Ok((text, None))
}

fn label_changes(
    old: &BTreeMap<String, String>,
    new: &BTreeMap<String, String>,
) -> Vec<LabelChange> {
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let changes = names.into_iter().map(|name| LabelChange {
        name: name.clone(),
        old: old.get(name).cloned(),
        new: new.get(name).cloned(),
    });
    changes.filter(|change| change.old != change.new).collect()
}

/// `~ domain/devices/disk/source/@file: "/a" → "/b" (backend)`
pub(super) fn change_line(change: &Change) -> String {
    let what = line(&change.path, change.old.as_deref(), change.new.as_deref());
    match change.class {
        Class::Note => format!("{what}\n"),
        class => format!("{what} ({})\n", class.word()),
    }
}

fn label_line(change: &LabelChange) -> String {
    let name = format!("label {}", change.name);
    line(&name, change.old.as_deref(), change.new.as_deref()) + "\n"
}

/// `~ NAME: old → new`, `+` for what is new, `-` for what is gone.
pub(super) fn line(name: &str, old: Option<&str>, new: Option<&str>) -> String {
    match (old, new) {
        (Some(old), Some(new)) => format!("~ {name}: {old:?} → {new:?}"),
        (None, Some(new)) => format!("+ {name}: {new:?}"),
        (Some(old), None) => format!("- {name}: {old:?}"),
        (None, None) => format!("~ {name}"),
    }
}
