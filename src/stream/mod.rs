//! QEMU's migration stream ⇄ events.
//!
//! In go the bytes that QEMU 5 to 10 writes when it migrates a guest to a file; out come page records, the list of
//! RAMBlocks and of device sections. Pure: no file, no thread. `spec/qemu-stream.md` is what it relies on.
//!
//! | file | what it is for |
//! |---|---|
//! | [`wire`] | QEMU's numbers under QEMU's names |
//! | [`parser`] | bytes → elements, one after the other |
//! | `ram`, `page_set` | the records of the `ram` section; which pages came |
//! | `device_state`, `device_walk`, `footer_search` | the device sections: with their description and without |
//! | `marks` | what device sections look like where nothing describes them |
//! | `vmdescription` | the JSON that tells how long they are |
//! | [`writer`] | the stream around page records that were not made by QEMU |
//! | [`postcopy`] | what the source of a postcopy migration sends and hears |
//! | [`mapped_ram`] | the layout in which pages lie at places of their own |
//! | [`x86_cpu`] | the registers of a processor |
//! | [`x86_paging`] | its page tables: from guest-virtual to guest-physical addresses |
//! | `section` | the header and the footer of every section |
//! | [`error`] | what can be wrong with a stream |
//! | `cursor` | big-endian integers and names, read forward |

mod cursor;
mod device_fields;
mod device_state;
mod device_walk;
pub mod error;
mod footer_search;
pub mod mapped_ram;
mod marks;
mod page_set;
pub mod parser;
pub mod postcopy;
mod ram;
#[cfg(test)]
mod sample;
mod section;
mod vmdescription;
pub mod wire;
pub mod writer;
pub mod x86_cpu;
pub mod x86_paging;

pub use device_fields::{DeviceFields, Field, Subsection, Value, device_fields, device_fields_by};
pub use device_state::{DeviceSection, VmDescription, sections_of};
pub use error::{Place, StreamError};
pub use marks::{likely_sections, subsection_names};
pub use parser::{Element, Event, Parser, StreamSummary, is_stream_start};
pub use ram::RamBlock;
