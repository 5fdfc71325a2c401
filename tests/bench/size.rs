//! Our image beside one zstd frame of the same stream.

use crate::contender::run as run_command;
use crate::end;
use crate::table::{Results, SizeRow};
use crate::verify::Images;
use crate::work_dir::WorkDir;

pub fn run(images: &Images, work: &WorkDir, results: &mut Results) {
    end::doing(&format!("{}, size", images.guest));
    let script = "set -o pipefail; zstd -dcq \"$0\" | zstd -3 -cq | wc -c";
    let theirs = run_command(work.command("bash").args(["-c", script]).arg(&images.zstd));
    results.add_size(SizeRow {
        guest: images.guest.clone(),
        ours: std::fs::metadata(&images.zstd).unwrap().len(),
        theirs: theirs.trim().parse().expect("wc says a number"),
    });
}
