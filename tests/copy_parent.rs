//! Copies to where an earlier save of the guest is already: what lands is the same, and little comes over.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde_json::{Value, json};
use support::{Guest, GuestSpec, OtherHost, TestDir, fill, flip_bit, write_memory};
use vmstow::container::Image;
use vmstow::store::FileSource;
use vmstow::store::remote::{Asker, FrameType, Peer, RemoteError, RemoteFile};

const MEMORY_MIB: u32 = 128;

/// What `fill` filled: from 64 MiB on.
const FULL_FROM: u64 = 64 << 20;
const FULL_PAGES: u64 = (MEMORY_MIB as u64 - 64) << 8;

const UUID: [&str; 2] = ["-uuid", "6f0b1d0e-0a3c-4a52-9d0b-5f9a8c3d2e11"];

/// A directory with two saves of a guest, `before.stow` and `after.stow`: between them every so many-th page changed.
fn saved_twice(every: u64, level: &str) -> TestDir {
    let dir = TestDir::new();
    let spec = GuestSpec {
        memory_mib: MEMORY_MIB,
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(&dir, spec.with(&UUID));
    guest.serial().wait_for_tick(5);
    fill(guest.pid(), &mut guest.qmp(), u64::from(MEMORY_MIB) << 20);
    let source = guest.source();
    let save = |name: &str, then: &str| {
        dir.json(&["save", &source, name, "--level", level, "--then", then]);
    };
    save("before.stow", "resume");
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..FULL_PAGES / every {
        let mut page = [0; 4096];
        for word in page.chunks_exact_mut(8) {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            word.copy_from_slice(&seed.to_le_bytes());
        }
        let at = FULL_FROM + seed % FULL_PAGES * 4096;
        write_memory(guest.pid(), &mut guest.qmp(), at, &page);
    }
    save("after.stow", "quit");
    guest.wait_for_exit();
    dir
}

fn command(dir: &TestDir, other: &OtherHost, arguments: &[&str]) -> Command {
    let mut command = dir.vmstow_command();
    command.envs(other.environment()).args(arguments);
    command
}

fn copied(dir: &TestDir, other: &OtherHost, arguments: &[&str]) -> Value {
    let arguments = [&["--json", "copy"], arguments].concat();
    let output = command(dir, other, &arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(report: &Value, name: &str) -> u64 {
    report[name]
        .as_u64()
        .unwrap_or_else(|| panic!("{name}: {report}"))
}

#[track_caller]
fn assert_same(a: &Path, b: &Path) {
    let [first, second] = [a, b].map(|path| std::fs::read(path).unwrap());
    assert!(first == second, "{} and {}", a.display(), b.display());
}

#[test]
fn of_one_page_in_a_hundred_little_more_than_that_comes_over_in_any_layout() {
    let dir = saved_twice(100, "2");
    let other = OtherHost::new(&dir, "other");
    for layout in ["zstd", "raw", "mapped"] {
        let [before, after] = ["before", "after"].map(|name| {
            let made = format!("{name}-{layout}.stow");
            let image = format!("{name}.stow");
            dir.json(&["convert", &image, &made, "--layout", layout]);
            made
        });
        // Found beside the destination, which is a directory.
        let there = other.path(layout);
        std::fs::create_dir(&there).unwrap();
        std::fs::copy(dir.join(&before), there.join("earlier.stow")).unwrap();
        let report = copied(&dir, &other, &[&after, &other.location(layout)]);
        let landed = there.join(&after);
        assert_same(&dir.join(&after), &landed);
        assert_eq!(
            report["target"],
            json!(other.location(&format!("{layout}/{after}")))
        );
        let found = there.join("earlier.stow").display().to_string();
        assert_eq!(report["parent"], json!(found));
        let holds = number(&report, "from_parent_bytes") + number(&report, "fetched_bytes");
        assert!(
            number(&report, "from_parent_bytes") > holds * 9 / 10,
            "{report}"
        );
        let changed = FULL_PAGES / 100 * 4096;
        let crossed = number(&report, "crossed_bytes");
        assert!(crossed * 20 < FULL_PAGES * 4096, "{report}");
        assert!(
            crossed * 10 < changed * 13,
            "{layout}: {crossed} for {changed}"
        );
        // The other way, named.
        let from = other.location(&format!("{layout}/{after}"));
        let back = format!("back-{layout}.stow");
        let report = copied(&dir, &other, &[&from, &back, "--parent", &before]);
        assert_same(&landed, &dir.join(&back));
        assert!(
            number(&report, "crossed_bytes") * 10 < changed * 13,
            "{report}"
        );
        // What it replaces is an earlier save too, but not asked for.
        let report = copied(&dir, &other, &[&from, &back, "--replace", "--no-parent"]);
        assert_eq!(report["parent"], Value::Null);
        assert_eq!(number(&report, "from_parent_bytes"), 0);
        assert!(number(&report, "crossed_bytes") > number(&report, "fetched_bytes"));
    }
}

/// `vmstow serve`, to be talked to by the test.
fn peer(dir: &TestDir) -> Peer {
    let mut command = dir.vmstow_command();
    command
        .args(["serve", "--stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let (input, output) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
    Peer::greet("the test".to_owned(), input, output, Some(child)).unwrap()
}

#[test]
fn a_parent_that_is_wrong_makes_no_wrong_file() {
    let dir = saved_twice(10, "5");
    let other = OtherHost::new(&dir, "other");
    std::fs::copy(dir.join("after.stow"), other.path("after.stow")).unwrap();
    let from = other.location("after.stow");
    let copied = |parent: &str| {
        let report = copied(&dir, &other, &[&from, "made.stow", "--parent", parent]);
        assert_same(&dir.join("after.stow"), &dir.join("made.stow"));
        std::fs::remove_file(dir.join("made.stow")).unwrap();
        report
    };
    // Saved with another level than the usual one, which is found out.
    let right = copied("before.stow");
    assert!(
        number(&right, "from_parent_bytes") > number(&right, "file_bytes") / 3,
        "{right}"
    );

    // Two chunks of it are damaged, one of which has not changed since.
    let damaged = |name: &str| {
        std::fs::copy(dir.join("before.stow"), dir.join(name)).unwrap();
        let image = Image::open(FileSource::open(&dir.join(name)).unwrap()).unwrap();
        let offset = |chunk: u64| {
            let chunk = image.chunk(vmstow::units::ChunkIndex(chunk)).unwrap();
            chunk.stored_offset.0 + u64::from(chunk.stored_len) / 2
        };
        for chunk in [1, image.chunk_count() / 2, image.chunk_count() * 3 / 4] {
            flip_bit(dir.join(name), offset(chunk), 3);
        }
    };
    damaged("damaged.stow");
    let report = copied("damaged.stow");
    assert!(
        number(&report, "fetched_bytes") > number(&right, "fetched_bytes"),
        "{report}"
    );

    // Another guest; one that is no image.
    let spec = GuestSpec::default().named("stranger");
    let mut stranger = Guest::start(&dir, spec);
    stranger.serial().wait_for_tick(5);
    dir.json(&["save", &stranger.source(), "stranger.stow"]);
    stranger.wait_for_exit();
    let report = copied("stranger.stow");
    assert!(
        number(&report, "fetched_bytes") > number(&right, "fetched_bytes"),
        "{report}"
    );
    let refused = |parent: &str| {
        let output = command(
            &dir,
            &other,
            &["copy", &from, "made.stow", "--parent", parent],
        )
        .output()
        .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (text, output.status.code().unwrap())
    };
    let (text, code) = refused("nowhere.stow");
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("cannot help as the image of an earlier save"),
        "{text}"
    );
    assert!(text.contains("No such file"), "{text}");
    std::fs::write(dir.join("none.stow"), [7; 3000]).unwrap();
    assert_eq!(refused("none.stow").1, 3);
    let (text, code) = refused(&other.location("after.stow"));
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("is not on the host of the copy"), "{text}");

    // By itself it takes the right one of them all, on the other side too, and none of another guest.
    let there = other.path("there");
    std::fs::create_dir(&there).unwrap();
    for name in ["stranger.stow", "none.stow"] {
        std::fs::copy(dir.join(name), there.join(name)).unwrap();
    }
    let to = format!("{}/", other.location("there"));
    let push = |arguments: &[&str]| {
        let arguments = [&["after.stow", &to, "--replace"], arguments].concat();
        let report = self::copied(&dir, &other, &arguments);
        assert_same(&dir.join("after.stow"), &there.join("after.stow"));
        report["parent"].clone()
    };
    assert_eq!(push(&[]), Value::Null);
    std::fs::copy(dir.join("before.stow"), there.join("after.stow")).unwrap();
    assert_eq!(
        push(&[]),
        json!(there.join("after.stow").display().to_string())
    );
    std::fs::rename(dir.join("before.stow"), there.join("before.stow")).unwrap();
    std::fs::remove_file(there.join("after.stow")).unwrap();
    for named in ["before.stow", &other.location("there/before.stow")] {
        let found = push(&["--parent", named]);
        assert_eq!(
            found,
            json!(there.join("before.stow").display().to_string())
        );
    }

    // Between two files of this host only what is the same is taken.
    let parent = there.join("before.stow").display().to_string();
    let report = self::copied(
        &dir,
        &other,
        &["after.stow", "near.stow", "--parent", &parent],
    );
    assert_same(&dir.join("after.stow"), &dir.join("near.stow"));
    assert_eq!(number(&report, "crossed_bytes"), 0);
    std::fs::create_dir(dir.join("into")).unwrap();
    self::copied(&dir, &other, &["after.stow", "into"]);
    assert_same(&dir.join("after.stow"), &dir.join("into/after.stow"));
}

/// Flips bits of a byte, if there is one.
fn flip(bytes: &mut [u8], at: usize, bits: u8) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= bits;
    }
}

#[test]
fn nobody_has_to_be_believed_and_a_part_goes_on_with_a_parent() {
    let dir = saved_twice(10, "2");
    let offered = FileSource::open(&dir.join("after.stow")).unwrap();
    let len = offered.file().metadata().unwrap().len();
    let made = dir.join("made.stow");
    let order = |parent: &str| {
        let order = json!({ "path": made.display().to_string(), "length": len, "replace": false,
            "bytes_per_second": null, "parent": parent });
        serde_json::to_vec(&order).unwrap()
    };
    let honest =
        || vmstow::pipeline::Replier::open(FileSource::open(&dir.join("after.stow")).unwrap());
    type Lie<'a> = (
        &'static str,
        Box<dyn Fn(&[u8], Vec<u8>) -> Result<Vec<u8>, String> + 'a>,
    );
    let lies: Vec<Lie> = vec![
        ("nothing", Box::new(|_, reply| Ok(reply))),
        (
            "it is all right",
            Box::new(|_, reply| Ok(vec![0; reply.len().min(18)])),
        ),
        ("it is all later", Box::new(|_, _| Ok(vec![2; 8]))),
        (
            "no reply",
            Box::new(|_, _| Err("I do not want to".to_owned())),
        ),
        ("an empty reply", Box::new(|_, _| Ok(Vec::new()))),
        (
            "half a reply",
            Box::new(|_, reply| Ok(reply[..reply.len() / 2].to_vec())),
        ),
        (
            "another bit in the states",
            Box::new(|_, mut reply| {
                flip(&mut reply, 3, 4);
                Ok(reply)
            }),
        ),
        (
            "another bit in the frame",
            Box::new(|_, mut reply| {
                let at = reply.len() * 3 / 4;
                flip(&mut reply, at, 1);
                Ok(reply)
            }),
        ),
        ("noise", Box::new(|question, _| Ok(question.repeat(3)))),
    ];
    for (lie, tell) in lies {
        let mut replier = honest().unwrap();
        let mut count = 0;
        let mut comparer = |question: &[u8]| {
            count += 1;
            let reply = replier.reply(question).map_err(|error| error.to_string())?;
            tell(question, reply)
        };
        let report = peer(&dir)
            .give_compared(
                &offered,
                &mut comparer,
                FrameType::Receive,
                &order("before.stow"),
                &mut |_| true,
            )
            .unwrap()
            .unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        assert_same(&dir.join("after.stow"), &made);
        assert!(count > 0, "{lie}");
        let from_parent = number(&report, "from_parent_bytes");
        if lie == "nothing" {
            assert!(from_parent > len / 2, "{report}");
        }
        std::fs::remove_file(&made).unwrap();
    }

    // A part with holes in it.
    let mut part = std::fs::read(dir.join("after.stow")).unwrap();
    let (quarter, half) = (part.len() / 4, part.len() / 2);
    part[quarter..half].fill(0);
    std::fs::write(dir.join("made.stow.part"), part).unwrap();
    let mut replier = honest().unwrap();
    let mut comparer = |question: &[u8]| replier.reply(question).map_err(|error| error.to_string());
    let report = peer(&dir)
        .give_compared(
            &offered,
            &mut comparer,
            FrameType::Receive,
            &order("before.stow"),
            &mut |_| true,
        )
        .unwrap()
        .unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    assert_same(&dir.join("after.stow"), &made);
    assert!(number(&report, "kept_bytes") > len / 2, "{report}");
    assert!(number(&report, "from_parent_bytes") > len / 8, "{report}");
    std::fs::remove_file(&made).unwrap();

    // Whoever asks about what is not there, or not clearly, is told so and answered further on.
    let asker = Arc::new(Asker::new(Arc::new(peer(&dir))));
    let compare = |question: &[u8]| asker.ask(FrameType::Compare, question, FrameType::Compared);
    let refusal = |question: &[u8]| match compare(question).unwrap_err() {
        RemoteError::Refused { words, .. } => words.join(" "),
        other => panic!("{other:?}"),
    };
    let one = [&[0; 8][..], &[7, 7, 0, 0]].concat();
    assert!(refusal(&one).contains("no file is open"));
    RemoteFile::open(Arc::clone(&asker), Path::new("before.stow")).unwrap();
    assert!(refusal(b"").contains("not clear"));
    assert!(refusal(&one[..11]).contains("not clear"));
    assert!(refusal(&one.repeat(65)).contains("not clear"));
    assert!(
        refusal(&[&u64::MAX.to_le_bytes()[..], &[7, 7, 0, 0]].concat()).contains("chunk table")
    );
    let page = |first: u32| {
        let run = [&first.to_le_bytes()[..], &[1, 0, 0, 0], &[9, 9]].concat();
        [&[0; 8][..], &[7, 7, 1, 0], &run].concat()
    };
    assert_eq!(compare(&page(u32::MAX - 5000)).unwrap(), [1]);
    assert_eq!(compare(&one).unwrap(), [1]);
    RemoteFile::open(Arc::clone(&asker), Path::new("guest.img")).unwrap();
    assert!(refusal(&one).contains("no image"));
}
