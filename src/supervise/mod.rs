//! QEMU processes of ours: launched, listed, frozen, stopped; and the guardian that puts a guest back if a saver is killed.
//!
//! What QEMU is started with is `config`'s business, why it is started the stories'.

mod attendant;
mod damage;
mod error;
mod guard;
mod guardian;
mod keeper;
mod launch;
mod list;
mod probe;
mod serial;
mod serving;
mod side_process;
mod stop;
mod undo;
mod verifier;

pub use attendant::{Attendant, SideProgram, run_attendant, side_programs_of, start_attendant};
pub use damage::{Damage, damage_of, freeze};
pub use error::SuperviseError;
pub use guard::run as run_guardian;
pub use guardian::{Guardian, GuardianInstruction, NodeIdentity, SUBCOMMAND, Then};
pub use keeper::{ask_keeper, run_keeper, start_keeper};
pub use launch::{GuestDescription, Launch, RunningGuest, launch};
pub use list::{GuestList, describe, directory_of, list};
pub use probe::{Probe, ProbePlace};
pub use serial::{SerialPort, serial_port};
pub use serving::{Phase, Serving};
pub use side_process::{
    Failed, Said, SideProcess, detach, fall_silent, say_failed, say_ready,
    start as start_side_process, wait_ready,
};
pub use stop::{Ended, stop};
pub use undo::{put_back, put_back_live, while_draining};
pub use verifier::{
    SUBCOMMAND as VERIFIER_SUBCOMMAND, Verification, WaitingVerifier, is_being_verified,
    start_verifier,
};
