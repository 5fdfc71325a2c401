//! Network interfaces of the network namespace that we are in.

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Whether there is a network interface of this name: the kernel is asked, since `/sys` may show another namespace's.
pub fn has_interface(name: &str) -> bool {
    // Any socket will do; a host that has none of the usual kind has one of this.
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    );
    socket.is_ok_and(|socket| name_to_index(socket, name).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_there_and_what_nobody_made_is_not() {
        assert!(has_interface("lo"));
        assert!(!has_interface("no-such-bridge"));
        assert!(!has_interface(
            "a name that is longer than any interface has"
        ));
    }
}
