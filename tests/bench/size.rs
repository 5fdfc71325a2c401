//! Our image beside one zstd frame of the same stream, at zstd's own default level and at ours.

use crate::contender::run as run_command;
use crate::end;
use crate::table::{Results, SizeRow};
use crate::verify::Images;
use crate::work_dir::WorkDir;

pub fn run(images: &Images, work: &WorkDir, results: &mut Results) {
    end::doing(&format!("{}, size", images.guest));
    let zstd = |level: &str| {
        let script = format!("set -o pipefail; zstd -dcq \"$0\" | zstd {level} -cq | wc -c");
        let mut command = work.command("bash");
        let count = run_command(command.args(["-c", &script]).arg(&images.zstd));
        count.trim().parse().expect("wc says a number")
    };
    results.add_size(SizeRow {
        guest: images.guest.clone(),
        ours: std::fs::metadata(&images.zstd).unwrap().len(),
        zstd_3: zstd("-3"),
        zstd_1: zstd("-1"),
    });
}
