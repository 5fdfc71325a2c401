//! Objects of an object store that speaks S3: read by ranges, written in parts that appear together.
//!
//! Requests are signed as AWS Signature Version 4 has it, in the address. Buckets are named in the path, which every store
//! understands.

mod answer;
mod bucket;
mod settings;
mod sink;
mod upload;

pub use bucket::{Bucket, may_pass_later, open_object};
pub use sink::ObjectSink;
pub use upload::{MIN_PART_LEN, MOST_PARTS, Part, PartDigest, Upload};
