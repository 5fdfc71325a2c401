//! Files of another host, by way of a program like this one at the other end of a pair of pipes.
//!
//! [`Peer`] is the connection; [`RemoteFile`] reads a file of the other side, [`Peer::give`] and [`Giver`] let the other
//! side read one of ours. What the bytes mean is nobody's business here.
//!
//! Source: spec/transfer.md.

mod ask;
mod error;
mod frame;
mod give;
mod peer;
mod relay;
mod ssh;
mod stream;

pub use ask::{Asker, RemoteFile};
pub use error::RemoteError;
pub use frame::{Frame, FrameType, MAX_BODY_LEN, MAX_TEXT_LEN};
pub use give::{Answer, Comparer, Giver, answer_compare};
pub use peer::{FromClient, Peer, widen};
pub use relay::Relay;
pub use stream::{StreamIn, StreamOut};
