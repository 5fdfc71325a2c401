//! QEMU processes of ours: launched, listed, stopped; and the guardian that puts a guest back if a saver is killed.
//!
//! What QEMU is started with is `config`'s business, why it is started the stories'.

mod error;
mod guard;
mod guardian;
mod launch;
mod list;
mod stop;
mod undo;

pub use error::SuperviseError;
pub use guard::run as run_guardian;
pub use guardian::{Guardian, GuardianInstruction, NodeIdentity, SUBCOMMAND, Then};
pub use launch::{GuestDescription, Launch, RunningGuest, launch};
pub use list::{GuestList, describe, list};
pub use stop::{Ended, stop};
pub use undo::{put_back, put_back_live, while_draining};
