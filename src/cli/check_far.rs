//! `vmstow check --on HOST`: the vmstow of another host reads the image here, and says what speaks against its guest there.

use std::sync::Arc;

use clap::Parser;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::{CheckArgs, check, exit_code, human};
use super::ui::{Ui, printable};
use super::{About, Outcome};
use crate::bytes::ReadAt;
use crate::error::Result;
use crate::image;
use crate::pipeline::PipelineError;
use crate::progress::{Progress, Silent};
use crate::store::SshLocation;
use crate::store::remote::{Asker, FrameType, Peer, RemoteError, RemoteFile};

/// What the other host is asked; spec/transfer.md §4.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    length: u64,
    arguments: Vec<String>,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    verdict: Map<String, Value>,
    text: String,
}

/// Arguments that came from afar.
#[derive(Debug, Parser)]
struct Words {
    #[command(flatten)]
    check: CheckArgs,
}

/// Asks the vmstow there.
pub fn run(args: &CheckArgs, there: &SshLocation, ui: &Ui) -> Outcome {
    let opened = image::open_any(&args.image, ui).about(&args.image)?;
    let file = opened.image().reader();
    let order = Order {
        length: file.len(),
        arguments: args.words()?,
    };
    let order = serde_json::to_vec(&order).map_err(broken(there))?;
    let peer = Peer::connect(there)?;
    let report = peer.give(file, FrameType::Check, &order, &mut |_| !ui.is_cancelled());
    let report = report.about(&args.image)?.ok_or(PipelineError::Cancelled)?;
    let report: Report = serde_json::from_slice(&report).map_err(broken(there))?;
    let can_run = report.verdict.get("can_run").and_then(Value::as_bool);
    let can_run = can_run == Some(true);
    ui.answer(&report.verdict, |_| printable(&report.text))?;
    Ok(exit_code(can_run))
}

fn broken(there: &SshLocation) -> impl Fn(serde_json::Error) -> RemoteError {
    |_| RemoteError::BrokenRule {
        peer: there.host.clone(),
        rule: "a report that is none",
    }
}

/// Answers such a question of another host.
///
/// # Errors
/// What is wrong with the question, or with the image.
pub fn serve(order: &[u8], asker: Arc<Asker>) -> Result<Vec<u8>> {
    let unclear = |words: String| RemoteError::Refused {
        peer: "vmstow".to_owned(),
        kind: crate::error::ErrorKind::Usage,
        words: words.lines().map(str::to_owned).collect(),
    };
    let order: Order = serde_json::from_slice(order).map_err(|error| unclear(error.to_string()))?;
    let words = ["check", "-"].into_iter().map(str::to_owned);
    let words = Words::try_parse_from(words.chain(order.arguments));
    let args = words.map_err(|error| unclear(error.to_string()))?.check;
    let opened = image::open_offered(Arc::new(RemoteFile::offered(asker, order.length)))?;
    let verdict = check(&args, opened, &Silent).map_err(|failure| failure.error)?;
    let text = human(&verdict);
    let verdict = match serde_json::to_value(&verdict) {
        Ok(Value::Object(verdict)) => verdict,
        _ => Map::new(),
    };
    let report = serde_json::to_vec(&Report { verdict, text });
    Ok(report.map_err(|error| unclear(error.to_string()))?)
}
