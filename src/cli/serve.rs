//! `vmstow serve`

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser};

use super::start::{GuestArgs, LazyArgs};
use super::{Outcome, check_far, this_program};
use crate::error::Result;
use crate::relocate::{MoveError, Reception};
use crate::restore::{Invocation, LazyRequest, RestoreRequest};
use crate::store::remote::{Asker, Frame, FrameType, FromClient, Peer, widen};
use crate::store::{Location, StoreError};
use crate::transfer::{self, Orders};

/// Read and make images, and start guests, for a vmstow on another host
///
/// Started by `vmstow copy`, `vmstow move` and the like, by way of ssh. It may do what this user may.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Talk over standard input and output
    #[arg(long, required = true)]
    stdio: bool,
}

/// Serves until the other side ends.
pub fn run(_args: &ServeArgs) -> Outcome {
    let failed = |source| StoreError::Pipe {
        act: "open",
        source,
    };
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    let output = std::io::stdout().as_fd().try_clone_to_owned();
    let (input, output) = (input.map_err(failed)?, output.map_err(failed)?);
    widen(&input);
    widen(&output);
    let name = "the other side".to_owned();
    let input = FromClient(File::from(input));
    let peer = Peer::greet(name, input, File::from(output), None)?;
    peer.show_life()?;
    let reception = Reception {
        request: &request,
        program: this_program()?,
    };
    transfer::serve(peer, &Receptionist(reception))?;
    Ok(ExitCode::SUCCESS)
}

/// Answers what is ordered besides files.
struct Receptionist<'a>(Reception<'a>);

impl Orders for Receptionist<'_> {
    fn answer(&self, order: &Frame, asker: &Arc<Asker>) -> Result<bool> {
        if order.frame_type != FrameType::Check {
            return self.0.answer(order, asker);
        }
        let report = check_far::serve(&order.body, Arc::clone(asker))?;
        asker
            .peer()
            .write(FrameType::Checked, order.number, &report)?;
        Ok(true)
    }
}

/// Arguments that came from afar.
#[derive(Debug, Parser)]
struct Words {
    #[command(flatten)]
    guest: GuestArgs,

    #[arg(long)]
    trust: bool,

    #[command(flatten)]
    lazy: LazyArgs,
}

/// The request that these arguments of `vmstow restore` make of an image.
fn request(words: &[String], image: Location) -> Result<RestoreRequest> {
    let begin = ["restore".to_owned(), image.to_string()];
    // As `vmstow restore` would be told here, so that a restore that was cut off can be done once more.
    let again = begin.iter().chain(words).map(OsString::from).collect();
    let words = begin.iter().take(1).chain(words);
    let words = Words::try_parse_from(words).map_err(|error| MoveError::Order {
        what: error.to_string(),
    });
    let words = words?;
    let mut request = words.guest.request(image, words.trust)?;
    if words.lazy.lazy {
        request.lazy = Some(LazyRequest {
            options: words.lazy.options(),
            invocation: Invocation {
                program: this_program()?,
                arguments: again,
                cwd: PathBuf::from("/"),
            },
        });
    }
    Ok(request)
}
