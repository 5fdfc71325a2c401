//! `vmstow mem`

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::hexdump::{self, Dump};
use super::ui::{Ui, printable, threads};
use super::{About, Outcome};
use crate::bytes::Sink;
use crate::error::{Error, Result};
use crate::image;
use crate::memory::{
    self, BlockStats, Found, Match, MemoryView, Pattern, PatternKind, Place, SearchRequest,
    Searched, Stats, Stretch, StringsRequest, TextKind,
};
use crate::pipeline;
use crate::progress::Progress;
use crate::store::{AnyFile, FileSink, Location, StoreError};
use crate::stream::x86_paging::Paging;
use crate::units::human_bytes;

/// Read and search the memory of a saved guest
///
/// Nothing is unpacked: single reads fetch the chunks of their pages, a search skips pages that are zero, and every chunk is
/// verified before a byte of it is used.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct MemArgs {
    /// The image
    image: Location,

    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// List guest-physical addresses and the RAMBlocks behind them
    Map,
    /// Read bytes at an address
    Read(ReadArgs),
    /// Find a pattern in all of memory
    Search(SearchArgs),
    /// Print the text in all of memory
    Strings(StringsArgs),
    /// Count zero pages, duplicates, and how random pages are
    Stats {
        /// In this RAMBlock only
        #[arg(long, value_name = "NAME")]
        block: Option<String>,

        /// Worker threads [default: one a core]
        #[arg(long, value_name = "N", value_parser = threads)]
        threads: Option<usize>,
    },
}

#[derive(Debug, Args)]
struct ReadArgs {
    /// Where: 0x1000, 4096, 4K; guest-physical unless --virtual or --block says otherwise
    #[arg(value_parser = number)]
    address: u64,

    /// How many bytes
    #[arg(default_value = "256", value_parser = number)]
    len: u64,

    /// The address is guest-virtual: it goes through the page tables of a processor
    #[arg(long = "virtual", conflicts_with = "block")]
    is_virtual: bool,

    /// That processor
    #[arg(long, value_name = "N", default_value_t = 0, requires = "is_virtual")]
    cpu: u32,

    /// Another root of its page tables: those of another process, or of a processor whose registers are not known
    #[arg(long, value_name = "ADDRESS", requires = "is_virtual", value_parser = number)]
    cr3: Option<u64>,

    /// The address is an offset in this RAMBlock
    #[arg(long, value_name = "NAME")]
    block: Option<String>,

    /// Write the bytes as they are
    #[arg(long)]
    raw: bool,

    /// Write the bytes as they are to a new file
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Replace FILE if it exists
    #[arg(long, requires = "output")]
    replace: bool,
}

#[derive(Debug, Args)]
struct SearchArgs {
    /// A regular expression over bytes: . and \xff are bytes
    pattern: String,

    /// The pattern is text as it stands
    #[arg(long, short = 'F', conflicts_with = "hex")]
    fixed: bool,

    /// The pattern is text as it stands, and in memory each character has two bytes, the low one first
    #[arg(long, conflicts_with_all = ["hex", "fixed"])]
    utf16: bool,

    /// The pattern is bytes in hexadecimal, ?? for any: 'de ad ?? ef'
    #[arg(long, short = 'x')]
    hex: bool,

    /// Take upper and lower case letters for the same
    #[arg(long, short)]
    ignore_case: bool,

    /// Search this RAMBlock only
    #[arg(long, value_name = "NAME")]
    block: Option<String>,

    /// Bytes to show around a match
    #[arg(long, short = 'C', value_name = "N", default_value_t = 32,
          value_parser = clap::value_parser!(u16).range(0..=4096))]
    context: u16,

    /// Stop after so many matches
    #[arg(long, value_name = "N")]
    limit: Option<u64>,

    /// Print only how many there are
    #[arg(long)]
    count: bool,

    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
}

#[derive(Debug, Args)]
struct StringsArgs {
    /// Characters that a text has at least
    #[arg(long, short = 'n', value_name = "N", default_value_t = 6,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    min_len: u16,

    /// How the text is encoded
    #[arg(long, short, value_enum, default_value = "all")]
    encoding: Encoding,

    /// In this RAMBlock only
    #[arg(long, value_name = "NAME")]
    block: Option<String>,

    /// Stop after so many texts
    #[arg(long, value_name = "N")]
    limit: Option<u64>,

    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Encoding {
    /// A byte for a character
    Ascii,
    /// Two, the low one first
    Utf16le,
    /// Both
    All,
}

const EXAMPLES: &str = "\
Examples:
  vmstow mem web01.stow map
  vmstow mem web01.stow read 0x7c00 512
  vmstow mem web01.stow read --virtual 0xffffffff81000000 64
  vmstow mem web01.stow search -F 'Linux version'
  vmstow mem web01.stow search --hex '7f 45 4c 46 02'
  vmstow mem web01.stow strings -n 12 | less";

/// A number as people write it: `0x1000`, `4096`, `4K`.
fn number(text: &str) -> std::result::Result<u64, String> {
    let wrong = || "it has to be a number such as 4096, 0x1000 or 4K".to_owned();
    let plain = text.replace('_', "");
    if let Some(digits) = plain.strip_prefix("0x").or(plain.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    let shift = match plain.chars().next_back().map(|c| c.to_ascii_uppercase()) {
        Some('K') => 10,
        Some('M') => 20,
        Some('G') => 30,
        Some('T') => 40,
        _ => 0,
    };
    let digits = if shift == 0 {
        &*plain
    } else {
        &plain[..plain.len() - 1]
    };
    let value: u64 = digits.parse().map_err(|_| wrong())?;
    value.checked_mul(1 << shift).ok_or_else(wrong)
}

/// Reads, searches or counts.
pub fn run(args: &MemArgs, ui: &Ui) -> Outcome {
    let opened = image::open_any(&args.image, ui).about(&args.image)?;
    if opened.torn().is_some() {
        ui.warn("the image's last edit was cut off; the generation before it is read");
    }
    let view = MemoryView::open(opened.image()).about(&args.image)?;
    let done = match &args.act {
        Act::Map => map(&view, ui),
        Act::Read(read) => read_bytes(&view, read, ui),
        Act::Search(search) => find(&view, search, ui),
        Act::Strings(strings) => find_text(&view, strings, ui),
        Act::Stats { block, threads } => count(&view, block.as_deref(), *threads, ui),
    };
    done.about(&args.image)?;
    Ok(ExitCode::SUCCESS)
}

type View<'a> = MemoryView<'a, AnyFile>;

fn map(view: &View<'_>, ui: &Ui) -> Result<()> {
    let stretches = memory::map(view);
    let text = |_: &Value| stretches.iter().map(of_stretch).collect();
    ui.answer(&json!({ "memory": stretches }), text)?;
    Ok(())
}

fn of_stretch(stretch: &Stretch) -> String {
    let place = match stretch.address {
        Some(address) => format!("{address:#014x}-{:#014x}", address + (stretch.len - 1)),
        None => "at no known address".to_owned(),
    };
    let (data, zero) = (stretch.data_pages, stretch.zero_pages);
    format!(
        "{place:<29}  {:>9}  {}+{:#x}  {data} pages with bytes, {zero} zero\n",
        human_bytes(stretch.len),
        printable(&stretch.block),
        stretch.offset
    )
}

/// Where bytes are read from.
enum Source {
    Block(usize),
    Physical,
    Virtual(Paging),
}

/// Bytes read at a time.
const PIECE: u64 = 4 << 20;

fn read_bytes(view: &View<'_>, args: &ReadArgs, ui: &Ui) -> Result<()> {
    let source = match (&args.block, args.is_virtual, args.cr3) {
        (Some(idstr), ..) => Source::Block(view.block(idstr)?),
        (None, false, _) => Source::Physical,
        (None, true, None) => Source::Virtual(view.paging(args.cpu)?),
        (None, true, Some(cr3)) => Source::Virtual(view.paging_from(args.cpu, cr3)),
    };
    if let Some(path) = &args.output {
        let mut sink = FileSink::create(path, args.replace)?;
        let failed = |act, source| StoreError::File {
            act,
            path: path.clone(),
            source,
        };
        pieces(view, &source, args, ui, &mut |_, bytes| {
            Ok(sink.append(bytes).map_err(|error| failed("write", error))?)
        })?;
        sink.sync().map_err(|error| failed("sync", error))?;
        let published = sink.publish();
        published.map_err(|error| failed("publish", std::io::Error::other(error)))?;
        return Ok(());
    }
    if args.raw {
        return pieces(
            view,
            &source,
            args,
            ui,
            &mut |_, bytes| Ok(ui.write(bytes)?),
        );
    }
    if ui.is_json() {
        let mut all = Vec::new();
        pieces(view, &source, args, ui, &mut |_, bytes| {
            all.extend_from_slice(bytes);
            Ok(())
        })?;
        let answer =
            json!({ "address": args.address, "len": args.len, "bytes": hexdump::digits(&all) });
        return Ok(ui.answer(&answer, |_| String::new())?);
    }
    let mut dump = Dump::default();
    pieces(view, &source, args, ui, &mut |at, bytes| {
        Ok(ui.print(&dump.lines(at, bytes))?)
    })?;
    Ok(ui.print(&dump.end(args.address.wrapping_add(args.len)))?)
}

fn pieces(
    view: &View<'_>,
    source: &Source,
    args: &ReadArgs,
    ui: &Ui,
    take: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let (mut by_block, mut by_address) = (view.reader(), view.address_reader());
    let mut buffer = Vec::new();
    let mut done = 0;
    while done < args.len {
        if ui.is_cancelled() {
            return Err(pipeline::PipelineError::Cancelled.into());
        }
        let len = (args.len - done).min(PIECE);
        let at = args.address.wrapping_add(done);
        buffer.resize(usize::try_from(len).unwrap_or(0), 0);
        match source {
            Source::Block(block) => by_block.read(*block, at, &mut buffer),
            Source::Physical => by_address.read(at, &mut buffer),
            Source::Virtual(paging) => by_address.read_virtual(paging, at, &mut buffer),
        }?;
        take(at, &buffer)?;
        done += len;
    }
    Ok(())
}

/// Text for stdout, collected so that not each line is a write.
struct Lines<'u> {
    ui: &'u Ui,
    text: String,
}

impl Lines<'_> {
    fn add(&mut self, line: &str) -> Result<()> {
        self.text.push_str(line);
        match self.text.len() {
            ..0x1_0000 => Ok(()),
            _ => self.flush(),
        }
    }

    fn flush(&mut self) -> Result<()> {
        let text = std::mem::take(&mut self.text);
        Ok(self.ui.print(&text)?)
    }
}

fn find(view: &View<'_>, args: &SearchArgs, ui: &Ui) -> Result<()> {
    let kind = match (args.fixed, args.utf16, args.hex) {
        (true, ..) => PatternKind::Text,
        (_, true, _) => PatternKind::Utf16,
        (.., true) => PatternKind::Hex,
        _ => PatternKind::Regex,
    };
    let pattern = Pattern::parse(&args.pattern, kind, args.ignore_case)?;
    let request = SearchRequest {
        pattern: &pattern,
        block: args.block.as_deref(),
        context: args.context.into(),
        threads: args.threads.unwrap_or_else(pipeline::default_threads),
    };
    let mut left = args.limit.unwrap_or(u64::MAX);
    let mut matches = Vec::new();
    let text = String::new();
    let mut lines = Lines { ui, text };
    let searched = memory::search(view, &request, ui, &mut |found| {
        if left == 0 {
            return Ok(false);
        }
        left -= 1;
        match (args.count, ui.is_json()) {
            (true, _) => {}
            (_, true) => matches.push(match_as_json(found)),
            (_, false) => lines.add(&of_match(found))?,
        }
        Ok(left > 0)
    })?;
    lines.flush()?;
    let answer = match args.count {
        true => json!({ "searched": searched }),
        false => json!({ "matches": matches, "searched": searched }),
    };
    let human = |_: &Value| match args.count {
        true => format!("{}\n", searched.matches),
        false => String::new(),
    };
    ui.answer(&answer, human)?;
    if !ui.is_json() {
        ui.note(&of_search(&searched));
    }
    Ok(())
}

fn of_search(searched: &Searched) -> String {
    let matches = match searched.matches {
        1 => "1 match".to_owned(),
        count => format!("{count} matches"),
    };
    format!(
        "{matches} in {} of guest memory, {} of it zero",
        human_bytes(searched.bytes),
        human_bytes(searched.zero_bytes)
    )
}

/// `0x0000000001a2b3c0  pc.ram+0x1a2b3c0`
fn of_place(place: &Place) -> String {
    let address = match place.address {
        Some(address) => format!("{address:#018x}"),
        None => "-".to_owned(),
    };
    let (block, offset) = (printable(&place.block), place.offset);
    format!("{address:<18}  {block}+{offset:#x}")
}

fn of_match(found: &Match) -> String {
    let [before, bytes, after] =
        [&found.before, &found.bytes, &found.after].map(|it| hexdump::shown(it));
    let more = match found.len > found.bytes.len() as u64 {
        true => "…",
        false => "",
    };
    let place = of_place(&found.place);
    format!(
        "{place}  {} bytes  {before}[{bytes}{more}]{after}\n",
        found.len
    )
}

fn match_as_json(found: &Match) -> Value {
    json!({
        "address": found.place.address,
        "block": found.place.block,
        "offset": found.place.offset,
        "len": found.len,
        "bytes": hexdump::digits(&found.bytes),
        "before": hexdump::digits(&found.before),
        "after": hexdump::digits(&found.after),
        "text": hexdump::shown(&found.bytes),
    })
}

fn find_text(view: &View<'_>, args: &StringsArgs, ui: &Ui) -> Result<()> {
    let kinds: &[TextKind] = match args.encoding {
        Encoding::Ascii => &[TextKind::Ascii],
        Encoding::Utf16le => &[TextKind::Utf16],
        Encoding::All => &[TextKind::Ascii, TextKind::Utf16],
    };
    let request = StringsRequest {
        kinds,
        min_len: args.min_len.into(),
        block: args.block.as_deref(),
        threads: args.threads.unwrap_or_else(pipeline::default_threads),
    };
    let mut left = args.limit.unwrap_or(u64::MAX);
    let mut texts = Vec::new();
    let text = String::new();
    let mut lines = Lines { ui, text };
    memory::strings(view, &request, ui, &mut |found| {
        if left == 0 {
            return Ok(false);
        }
        left -= 1;
        match ui.is_json() {
            true => texts.push(text_as_json(found)),
            false => lines.add(&of_text(found))?,
        }
        Ok::<bool, Error>(left > 0)
    })?;
    lines.flush()?;
    Ok(ui.answer(&json!({ "strings": texts }), |_| String::new())?)
}

fn encoding_of(kind: TextKind) -> &'static str {
    match kind {
        TextKind::Ascii => "ascii",
        TextKind::Utf16 => "utf16le",
    }
}

fn of_text(found: &Found) -> String {
    let place = of_place(&found.place);
    format!("{place}  {:<7}  {}\n", encoding_of(found.kind), found.text)
}

fn text_as_json(found: &Found) -> Value {
    json!({
        "address": found.place.address,
        "block": found.place.block,
        "offset": found.place.offset,
        "encoding": encoding_of(found.kind),
        "text": found.text,
    })
}

fn count(view: &View<'_>, block: Option<&str>, threads: Option<usize>, ui: &Ui) -> Result<()> {
    let threads = threads.unwrap_or_else(pipeline::default_threads);
    let stats = memory::stats(view, block, threads, ui)?;
    Ok(ui.answer(&stats, of_stats)?)
}

fn of_stats(stats: &Stats) -> String {
    let mut text = format!(
        "{:<32} {:>9} {:>9} {:>9} {:>9}  pages by bits a byte, 0-1 1-2 … 7-8\n",
        "block", "pages", "zero", "one byte", "twice"
    );
    let total = BlockStats {
        block: "all".to_owned(),
        ..stats.total.clone()
    };
    for block in stats.blocks.iter().chain([&total]) {
        let entropy: Vec<String> = block.entropy.iter().map(u64::to_string).collect();
        let _ = writeln!(
            text,
            "{:<32} {:>9} {:>9} {:>9} {:>9}  {}",
            printable(&block.block),
            block.pages,
            block.zero,
            block.same_byte,
            block.duplicate,
            entropy.join(" ")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_people_write_them() {
        for (text, value) in [
            ("0", 0),
            ("0x7c00", 0x7c00),
            ("0xffff_ffff_8100_0000", 0xffff_ffff_8100_0000),
            ("4K", 4096),
            ("2g", 2 << 30),
        ] {
            assert_eq!(number(text), Ok(value), "{text}");
        }
        for text in ["", "K", "-1", "0x", "12q", "99999999999T"] {
            assert!(number(text).is_err(), "{text}");
        }
    }
}
