//! `vmstow repair`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::ui::Ui;
use super::{About, Outcome};
use crate::image;
use crate::store::{self, Location, StoreError};
use crate::units::human_bytes;

/// Cut off the torn end of an image whose last edit was interrupted
///
/// The generation before that edit becomes the last one; nothing else is changed. Damage inside an image cannot be
/// repaired.
#[derive(Debug, Args)]
pub struct RepairArgs {
    /// The image
    image: PathBuf,
}

/// Cuts, if there is something to cut.
pub fn run(args: &RepairArgs, ui: &Ui) -> Outcome {
    let name = args.image.display();
    let open = || image::open_alone(&Location::Path(args.image.clone()));
    if open().about(&name)?.torn().is_none() {
        return nothing_to_cut(args, ui);
    }
    let file = store::open_to_change(&args.image).about(&name)?;
    // Looked at again with the lock in hand: somebody else may have repaired it.
    let opened = open().about(&name)?;
    let Some(torn) = opened.torn() else {
        return nothing_to_cut(args, ui);
    };
    let cut = torn.file_len - torn.valid_len;
    let error = |source| StoreError::File {
        act: "cut",
        path: args.image.clone(),
        source,
    };
    file.set_len(torn.valid_len)
        .and_then(|()| file.sync_all())
        .map_err(error)?;
    let generation = opened.image().generation();
    let answer = json!({ "image": args.image, "cut_bytes": cut, "generation": generation });
    ui.answer(&answer, |_| {
        format!(
            "{name} ends with generation {generation} again; {} were cut off\n",
            human_bytes(cut)
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

fn nothing_to_cut(args: &RepairArgs, ui: &Ui) -> Outcome {
    let answer = json!({ "image": args.image, "cut_bytes": 0 });
    ui.answer(&answer, |_| {
        format!(
            "{} ends as it should; nothing was changed\n",
            args.image.display()
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
