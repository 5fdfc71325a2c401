//! The way between the program under test and a server: what goes along is counted, and it can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// A port of its own that leads to a server's.
#[derive(Debug)]
pub struct Wire {
    address: String,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    up: AtomicU64,
    down: AtomicU64,
    requests: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

impl Wire {
    /// To a server at `HOST:PORT`.
    pub fn to(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(State::default());
        let (server, shared) = (server.to_owned(), Arc::clone(&state));
        thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                if let Ok(server) = TcpStream::connect(&server) {
                    shared.join(&client, &server);
                }
            }
        });
        Wire { address, state }
    }

    /// `HOST:PORT` of this end.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Bytes that went to the server.
    pub fn up(&self) -> u64 {
        self.state.up.load(Ordering::SeqCst)
    }

    /// Bytes that came from it.
    pub fn down(&self) -> u64 {
        self.state.down.load(Ordering::SeqCst)
    }

    /// Requests that were made.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::SeqCst)
    }

    /// Ends all connections that there are; new ones are let through.
    pub fn cut(&self) -> usize {
        let open = std::mem::take(&mut *self.state.open.lock().unwrap());
        open.iter()
            .filter(|stream| stream.shutdown(Shutdown::Both).is_ok())
            .count()
    }
}

impl State {
    fn join(self: &Arc<Self>, client: &TcpStream, server: &TcpStream) {
        let both = [client, server].map(|stream| stream.try_clone().unwrap());
        self.open.lock().unwrap().extend(both);
        for (from, to, is_up) in [(client, server, true), (server, client, false)] {
            let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            let state = Arc::clone(self);
            thread::spawn(move || state.carry(from, to, is_up));
        }
    }

    fn carry(&self, mut from: TcpStream, mut to: TcpStream, is_up: bool) {
        let mut buf = vec![0; 64 << 10];
        let ends = b" HTTP/1.1\r\n";
        let mut before: Vec<u8> = Vec::new();
        while let Ok(len @ 1..) = from.read(&mut buf) {
            let count = if is_up { &self.up } else { &self.down };
            count.fetch_add(len as u64, Ordering::SeqCst);
            if is_up {
                before.extend_from_slice(&buf[..len]);
                let found = before.windows(ends.len()).filter(|it| it == ends).count();
                self.requests.fetch_add(found as u64, Ordering::SeqCst);
                before.drain(..before.len().saturating_sub(ends.len() - 1));
            }
            if to.write_all(&buf[..len]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }
}
