//! How fast vmstow is beside other tools: `cargo bench --bench compare`, `-- --help` for what can be chosen.
//!
//! Every contender keeps the same guest in an image of its own. A round restores and saves it once with each of them, so
//! that their times come in pairs which saw the same machine; the answer is the median of the paired ratios. The guest
//! is the judge: it counts on without a gap and finds its memory as it was, or the comparison ends with an error.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this is a program"
)]

#[path = "../support/mod.rs"]
mod support;

mod clock;
mod contender;
mod copy;
mod domain;
mod end;
mod first_tick;
mod guests;
mod machine;
mod memory;
mod options;
mod ours;
mod qemu;
mod rounds;
mod size;
mod table;
mod verify;
mod virsh;
mod work_dir;

use std::process::ExitCode;

use clap::Parser;

use crate::guests::Recipe;
use crate::options::{Options, Work};
use crate::table::Results;
use crate::work_dir::WorkDir;

/// What a quiet machine may be busy with.
const CALM_CPUS: f64 = 0.1;

fn main() -> ExitCode {
    let options = Options::parse();
    if !options.is_bench {
        println!(
            "this takes long and needs a quiet machine: run it with `cargo bench --bench compare`"
        );
        return ExitCode::SUCCESS;
    }
    end::explain_panics();
    let done = std::panic::catch_unwind(|| compare(&options));
    end::wait_if_interrupted();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn compare(options: &Options) {
    let mut dir = WorkDir::create(options);
    end::clean_up_when_interrupted(dir.path());
    let busy_cpus = clock::busy_cpus();
    if busy_cpus > CALM_CPUS {
        eprintln!(
            "warning: {busy_cpus:.2} CPUs are busy with other work: the numbers will not mean much"
        );
    }
    let mut results = Results::new(busy_cpus);
    for kind in options.guests() {
        let recipe = Recipe::prepare(kind, &mut dir);
        if options.wants(Work::SaveRestore) {
            rounds::run(&recipe, &dir, options.pairs, &mut results);
        }
        if options.wants(Work::Copy) {
            copy::run(&recipe, &dir, options.pairs, &mut results);
        }
        if options.wants(Work::Verify) || options.wants(Work::Size) {
            let images = verify::Images::make(&recipe, &dir);
            if options.wants(Work::Verify) {
                verify::run(&images, &dir, options.pairs, &mut results);
            }
            if options.wants(Work::Size) {
                size::run(&images, &dir, &mut results);
            }
            images.remove(&dir);
        }
        dir.forget_payload();
    }
    if options.wants_first_tick() {
        first_tick::run_all(&dir, options.pairs, &mut results);
    }
    if options.wants_memory() {
        memory::run(&dir, &mut results);
    }
    end::doing("the table");
    println!("{}", results.markdown());
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&results.json()).unwrap();
        std::fs::write(path, text + "\n")
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
