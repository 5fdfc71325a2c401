//! QEMU's numbers under QEMU's names; no behaviour. All integers of the stream are big-endian.
//!
//! Source: QEMU `migration/savevm.h`, `migration/savevm.c`, `migration/ram.h`; spec/qemu-stream.md.

/// The first four bytes of every stream, "QEVM"; §2.
pub const QEMU_VM_FILE_MAGIC: u32 = 0x5145_564d;
/// The only version of the container there is; §2.
pub const QEMU_VM_FILE_VERSION: u32 = 3;

/// Ends the sections; §5.
pub const QEMU_VM_EOF: u8 = 0x00;
/// Begins a live section; §5.
pub const QEMU_VM_SECTION_START: u8 = 0x01;
/// Goes on with a live section; §5.
pub const QEMU_VM_SECTION_PART: u8 = 0x02;
/// The last part of a live section; §5.
pub const QEMU_VM_SECTION_END: u8 = 0x03;
/// A whole section in one; §5.
pub const QEMU_VM_SECTION_FULL: u8 = 0x04;
/// A subsection, in a section's payload and in the configuration; §3.
pub const QEMU_VM_SUBSECTION: u8 = 0x05;
/// The vmdescription, behind the EOF byte; §8.
pub const QEMU_VM_VMDESCRIPTION: u8 = 0x06;
/// The configuration, behind the header; §3.
pub const QEMU_VM_CONFIGURATION: u8 = 0x07;
/// A command to the destination; §4.
pub const QEMU_VM_COMMAND: u8 = 0x08;
/// Ends each section; §5.
pub const QEMU_VM_SECTION_FOOTER: u8 = 0x7e;

/// Asks the destination for a return path; §4.
pub const MIG_CMD_OPEN_RETURN_PATH: u16 = 1;
/// Asks for a PONG; §4.
pub const MIG_CMD_PING: u16 = 2;
/// Announces that postcopy may follow; §4.
pub const MIG_CMD_POSTCOPY_ADVISE: u16 = 3;
/// Postcopy: pages are served from here on; §4.
pub const MIG_CMD_POSTCOPY_LISTEN: u16 = 4;
/// Postcopy: the guest runs on the destination; §4.
pub const MIG_CMD_POSTCOPY_RUN: u16 = 5;
/// Postcopy: pages to be thrown away; §4.
pub const MIG_CMD_POSTCOPY_RAM_DISCARD: u16 = 6;
/// Postcopy: sections wrapped in one command; §4.
pub const MIG_CMD_PACKAGED: u16 = 7;
/// COLO replication; §4.
pub const MIG_CMD_ENABLE_COLO: u16 = 8;
/// Postcopy recovery; §4.
pub const MIG_CMD_POSTCOPY_RESUME: u16 = 9;
/// Postcopy recovery; §4.
pub const MIG_CMD_RECV_BITMAP: u16 = 10;
/// The source has stopped; machine types of 10.0 and later; §4.
pub const MIG_CMD_SWITCHOVER_START: u16 = 11;

/// The bits of a RAM record's first word that hold flags; the others are a byte offset; §6.
pub const RAM_SAVE_FLAG_MASK: u64 = 0xfff;
/// Obsolete since 2009; §6.
pub const RAM_SAVE_FLAG_FULL: u64 = 0x001;
/// One byte fills the page; §6.
pub const RAM_SAVE_FLAG_ZERO: u64 = 0x002;
/// The list of RAMBlocks follows; §6.
pub const RAM_SAVE_FLAG_MEM_SIZE: u64 = 0x004;
/// A page's bytes follow; §6.
pub const RAM_SAVE_FLAG_PAGE: u64 = 0x008;
/// Ends the payload; §6.
pub const RAM_SAVE_FLAG_EOS: u64 = 0x010;
/// The block is the one of the record before; §6.
pub const RAM_SAVE_FLAG_CONTINUE: u64 = 0x020;
/// A difference to the page's last content; §6.
pub const RAM_SAVE_FLAG_XBZRLE: u64 = 0x040;
/// RDMA's; §6.
pub const RAM_SAVE_FLAG_HOOK: u64 = 0x080;
/// A compressed page (until 9.0); §6.
pub const RAM_SAVE_FLAG_COMPRESS_PAGE: u64 = 0x100;
/// A meeting point with multifd's channels; §6.
pub const RAM_SAVE_FLAG_MULTIFD_FLUSH: u64 = 0x200;

/// The configuration's list of capabilities; §3.
pub const CAPABILITIES: &str = "configuration/capabilities";
/// The version of the `ram` section; §6.
pub const RAM_SAVE_VERSION: u32 = 4;
/// The idstr of the `ram` section; §6.
pub const RAM_IDSTR: &str = "ram";
