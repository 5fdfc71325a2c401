//! The conversation: greeting, commands, replies matched by id, events kept apart.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::{QmpError, excerpt};
use super::event::{Event, EventQueue};
use super::socket::{LineSocket, Patience, WaitError};

/// How long a command may take unless [`QmpClient::set_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to one QEMU's monitor. QEMU serves one client at a time: while this one lives, no other is greeted.
#[derive(Debug)]
pub struct QmpClient {
    socket: LineSocket,
    version: QemuVersion,
    events: EventQueue,
    next_id: u64,
    timeout: Duration,
    cancel: Option<Arc<AtomicBool>>,
}

/// The version a QEMU greets with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuVersion {
    /// The 10 of 10.0.2.
    pub major: u32,
    /// The first 0 of 10.0.2.
    pub minor: u32,
    /// The 2 of 10.0.2.
    pub micro: u32,
    /// The distribution's own version, ` (Debian 1:10.0.2+ds-2)` or nothing, trimmed.
    pub package: String,
}

impl QemuVersion {
    /// Whether it is `major.minor` or later.
    pub fn is_at_least(&self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl std::fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// `{"QMP": {"version": {"qemu": {…}, "package": …}, "capabilities": […]}}`
#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: GreetingVersion,
}

#[derive(Deserialize)]
struct GreetingVersion {
    qemu: GreetingNumbers,
    #[serde(default)]
    package: String,
}

#[derive(Deserialize)]
struct GreetingNumbers {
    major: u32,
    minor: u32,
    micro: u32,
}

/// Everything QEMU sends after its greeting.
#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Event(Event),
    Error {
        error: ErrorBody,
        id: Option<Value>,
    },
    Return {
        #[serde(rename = "return")]
        value: Value,
        id: Option<Value>,
    },
}

#[derive(Deserialize)]
struct ErrorBody {
    class: String,
    desc: String,
}

impl QmpClient {
    /// Connects, waits for the greeting and leaves negotiation mode, all within `timeout`.
    ///
    /// # Errors
    /// [`QmpError::Connect`] if nobody listens, [`QmpError::MonitorBusy`] if nobody greets,
    /// [`QmpError::NotQmp`] if the greeting is another protocol's.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        Self::connect_with(path, timeout, Value::Null)
    }

    /// As [`QmpClient::connect`], with the capability `oob`: see [`QmpClient::execute_oob`].
    ///
    /// # Errors
    /// As [`QmpClient::connect`].
    pub fn connect_oob(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        Self::connect_with(path, timeout, json!({ "enable": ["oob"] }))
    }

    fn connect_with(path: &Path, timeout: Duration, wanted: Value) -> Result<Self, QmpError> {
        let patience = Patience::new(timeout, None);
        let not_greeted = |error| match error {
            WaitError::TimedOut { waited } => QmpError::MonitorBusy {
                path: path.to_owned(),
                waited,
            },
            WaitError::Cancelled => QmpError::Cancelled {
                command: "connect".to_owned(),
            },
            WaitError::Failed(error) => error,
        };
        let mut socket = LineSocket::connect(path, &patience).map_err(not_greeted)?;
        let mut line = socket.line(&patience).map_err(not_greeted)?;
        // A guest that is just starting may have an event on its way before the greeting, and the answer to a client that
        // was killed reaches the next one.
        while serde_json::from_slice::<Message>(&line).is_ok() {
            line = socket.line(&patience).map_err(not_greeted)?;
        }
        let version = parse_greeting(&line).ok_or_else(|| QmpError::NotQmp {
            path: path.to_owned(),
            found: excerpt(&line),
        })?;
        let mut client = QmpClient {
            socket,
            version,
            events: EventQueue::default(),
            next_id: 1,
            timeout,
            cancel: None,
        };
        client.execute::<IgnoredAny>("qmp_capabilities", wanted)?;
        client.timeout = DEFAULT_TIMEOUT;
        Ok(client)
    }

    /// Executes a command. `arguments` is an object, or null for none.
    ///
    /// # Errors
    /// [`QmpError::Refused`] if QEMU refuses; every other kind leaves open whether the command was executed.
    pub fn execute<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        self.converse("execute", command, arguments, None)
    }

    /// Executes a command out of band: it is answered even while QEMU's main loop waits for a page of guest memory. Few
    /// commands allow it, and only on a connection made by [`QmpClient::connect_oob`].
    ///
    /// # Errors
    /// As [`QmpClient::execute`].
    pub fn execute_oob<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        self.converse("exec-oob", command, arguments, None)
    }

    /// Executes a command and passes a descriptor along with it (`SCM_RIGHTS`), as `getfd` and `add-fd` want.
    ///
    /// # Errors
    /// As [`QmpClient::execute`].
    pub fn execute_with_fd<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<T, QmpError> {
        self.converse("execute", command, arguments, Some(fd))
    }

    /// How long each following command may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Makes every following wait end with [`QmpError::Cancelled`] soon after the flag is set.
    pub fn set_cancel(&mut self, cancel: Arc<AtomicBool>) {
        self.cancel = Some(cancel);
    }

    /// Forgets the cancel flag and gives it back: what puts a guest back must not be cancelled.
    pub fn take_cancel(&mut self) -> Option<Arc<AtomicBool>> {
        self.cancel.take()
    }

    /// The version that QEMU greeted with.
    pub fn version(&self) -> &QemuVersion {
        &self.version
    }

    /// Takes all events that were read so far, in order of arrival. It reads nothing: see [`QmpClient::poll_events`].
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.take_all()
    }

    /// Reads what has arrived, without waiting.
    ///
    /// # Errors
    /// [`QmpError::Disconnected`] if QEMU hung up; events from before can still be taken.
    pub fn poll_events(&mut self) -> Result<(), QmpError> {
        while let Some(line) = self.socket.line_now()? {
            // A reply here comes too late: whoever waited for it has gone.
            self.accept(&line, "nothing")?;
        }
        Ok(())
    }

    /// Takes the oldest event of that name; waits for one if there is none. Other events stay.
    ///
    /// # Errors
    /// [`QmpError::NoEvent`] if none comes in time.
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<Event, QmpError> {
        let patience = Patience::new(timeout, self.cancel.clone());
        let missed = |error| match error {
            WaitError::TimedOut { waited } => QmpError::NoEvent {
                event: name.to_owned(),
                waited,
            },
            error => ended(error, name),
        };
        loop {
            if let Some(event) = self.events.take_named(name) {
                return Ok(event);
            }
            let line = self.socket.line(&patience).map_err(missed)?;
            self.accept(&line, name)?;
            if !self.events.has_named(name) {
                patience.check().map_err(missed)?;
            }
        }
    }

    fn converse<T: DeserializeOwned>(
        &mut self,
        how: &str,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<T, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let patience = Patience::new(self.timeout, self.cancel.clone());
        let bytes = command_line(how, command, arguments, id)?;
        let sent = self.socket.send(&bytes, fd, &patience);
        sent.map_err(|error| ended(error, command))?;
        loop {
            let line = self.socket.line(&patience);
            let line = line.map_err(|error| ended(error, command))?;
            match self.accept(&line, command)? {
                // Without an id QEMU complains about a line that it could not read; only this one can be meant.
                Some((None, Err(refused))) => return Err(refused),
                Some((Some(found), outcome)) if found == id => {
                    return serde_json::from_value(outcome?).map_err(|source| {
                        QmpError::UnexpectedReply {
                            command: command.to_owned(),
                            source,
                        }
                    });
                }
                _ => {}
            }
            // However much arrives, the waiting has an end.
            patience.check().map_err(|error| ended(error, command))?;
        }
    }

    /// Keeps an event; gives back a reply and its id. `command` is named in a refusal.
    #[expect(clippy::type_complexity, reason = "used in this file only")]
    fn accept(
        &mut self,
        line: &[u8],
        command: &str,
    ) -> Result<Option<(Option<u64>, Result<Value, QmpError>)>, QmpError> {
        let message = serde_json::from_slice(line).map_err(|_| QmpError::Garbage {
            found: excerpt(line),
        })?;
        let (id, outcome) = match message {
            Message::Event(event) => {
                self.events.push(event);
                return Ok(None);
            }
            Message::Return { value, id } => (id, Ok(value)),
            Message::Error { error, id } => (
                id,
                Err(QmpError::Refused {
                    command: command.to_owned(),
                    class: error.class,
                    desc: error.desc,
                }),
            ),
        };
        Ok(Some((id.and_then(|id| id.as_u64()), outcome)))
    }
}

impl AsFd for QmpClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn parse_greeting(line: &[u8]) -> Option<QemuVersion> {
    let greeting: Greeting = serde_json::from_slice(line).ok()?;
    let version = greeting.qmp.version;
    Some(QemuVersion {
        major: version.qemu.major,
        minor: version.qemu.minor,
        micro: version.qemu.micro,
        package: version.package.trim().to_owned(),
    })
}

fn command_line(how: &str, command: &str, arguments: Value, id: u64) -> Result<Vec<u8>, QmpError> {
    let mut message = json!({ how: command, "id": id });
    if let (Some(fields), false) = (message.as_object_mut(), arguments.is_null()) {
        fields.insert("arguments".to_owned(), arguments);
    }
    let bytes = serde_json::to_vec(&message);
    let mut bytes = bytes.map_err(|source| QmpError::Arguments {
        command: command.to_owned(),
        source,
    })?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn ended(error: WaitError, command: &str) -> QmpError {
    let command = command.to_owned();
    match error {
        WaitError::TimedOut { waited } => QmpError::TimedOut { command, waited },
        WaitError::Cancelled => QmpError::Cancelled { command },
        WaitError::Failed(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;
    use std::sync::atomic::Ordering;
    use std::thread::JoinHandle;
    use std::time::Instant;

    const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \"package\": \"Debian 1:10\"}, \"capabilities\": [\"oob\"]}}\r\n";
    const CAPABLE: &str = "{\"return\": {}, \"id\": 1}\r\n";

    /// A monitor that follows a script; it lives until the client hangs up.
    struct FakeMonitor {
        _dir: tempfile::TempDir,
        path: PathBuf,
        thread: JoinHandle<()>,
    }

    fn fake(script: impl FnOnce(&mut UnixStream) + Send + 'static) -> FakeMonitor {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || script(&mut listener.accept().unwrap().0));
        FakeMonitor {
            _dir: dir,
            path,
            thread,
        }
    }

    impl FakeMonitor {
        fn connect(&self) -> Result<QmpClient, QmpError> {
            QmpClient::connect(&self.path, Duration::from_secs(10))
        }
    }

    /// Greets, then answers the n-th command with the n-th text.
    fn answering(texts: Vec<Vec<u8>>) -> FakeMonitor {
        fake(move |stream| {
            stream.write_all(GREETING.as_bytes()).unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            for text in texts {
                line.clear();
                reader.read_line(&mut line).unwrap();
                stream.write_all(&text).unwrap();
            }
            line.clear();
            let _ = reader.read_line(&mut line);
        })
    }

    #[test]
    fn a_transcript_gives_the_same_answers_wherever_it_is_split() {
        let transcript = [
            GREETING,
            CAPABLE,
            "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\"}\r\n",
            "{\"return\": {\"late\": true}, \"id\": 0}\r\n",
            "{\"return\": {\"name\": \"h\u{f6}st\"}, \"id\": 2}\r\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\\n way\"}, \"id\": 3}\r\n",
        ]
        .concat()
        .into_bytes();
        for split in 0..=transcript.len() {
            let bytes = transcript.clone();
            let monitor = fake(move |stream| {
                stream.write_all(&bytes[..split]).unwrap();
                std::thread::yield_now();
                stream.write_all(&bytes[split..]).unwrap();
                // It stays until the client hangs up.
                BufReader::new(stream).lines().for_each(drop);
            });
            let mut qmp = monitor.connect().unwrap();
            assert_eq!(qmp.version().to_string(), "10.0.2");
            let name: Value = qmp.execute("query-name", Value::Null).unwrap();
            assert_eq!(name, json!({ "name": "höst" }));
            assert_eq!(qmp.take_events()[0].timestamp.microseconds, 2);
        }
    }

    #[test]
    fn a_refusal_keeps_the_words_of_qemu() {
        let refusal = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"State blocked by non-migratable device '0000:00:02.0/nvme'\"}, \"id\": 2}\n";
        let monitor = answering(vec![CAPABLE.into(), refusal.into()]);
        let mut qmp = monitor.connect().unwrap();
        let error = qmp.execute::<Value>("migrate", json!({})).unwrap_err();
        let QmpError::Refused { desc, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(
            desc,
            "State blocked by non-migratable device '0000:00:02.0/nvme'"
        );
    }

    #[test]
    fn a_monitor_that_never_greets_is_busy() {
        let monitor = fake(|stream| {
            let _ = BufReader::new(stream).read_line(&mut String::new());
        });
        let error = QmpClient::connect(&monitor.path, Duration::from_millis(100)).unwrap_err();
        assert!(
            matches!(error, QmpError::MonitorBusy { waited, .. } if waited >= Duration::from_millis(100))
        );
        monitor.thread.join().unwrap();
    }

    #[test]
    fn a_full_backlog_is_a_busy_monitor_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        let error = QmpClient::connect(&path, Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error, QmpError::MonitorBusy { .. }), "{error}");
    }

    #[test]
    fn a_human_monitor_is_not_taken_for_qmp() {
        let monitor = fake(|stream| {
            stream
                .write_all(b"QEMU 10.0.2 monitor - type 'help' for more information\r\n(qemu) ")
                .unwrap();
        });
        assert!(
            matches!(monitor.connect(), Err(QmpError::NotQmp { found, .. }) if found.starts_with("QEMU 10"))
        );
    }

    #[test]
    fn a_missing_socket_is_a_connect_error_of_a_qemu_that_is_gone() {
        let error = QmpClient::connect(Path::new("/nonexistent/qmp"), DEFAULT_TIMEOUT).unwrap_err();
        assert!(error.is_gone() && matches!(error, QmpError::Connect { .. }));
    }

    #[test]
    fn an_answer_that_does_not_come_is_a_timeout_and_is_dropped_when_it_comes() {
        let late = "{\"return\": 2, \"id\": 2}\n{\"return\": 3, \"id\": 3}\n";
        let monitor = answering(vec![CAPABLE.into(), Vec::new(), late.into()]);
        let mut qmp = monitor.connect().unwrap();
        qmp.set_timeout(Duration::from_millis(60));
        let error = qmp.execute::<Value>("stop", Value::Null).unwrap_err();
        assert!(matches!(error, QmpError::TimedOut { command, .. } if command == "stop"));
        qmp.set_timeout(DEFAULT_TIMEOUT);
        assert_eq!(qmp.execute::<u64>("query-status", Value::Null).unwrap(), 3);
    }

    #[test]
    fn a_cancelled_wait_ends_within_a_tenth_of_a_second() {
        let monitor = answering(vec![CAPABLE.into(), Vec::new()]);
        let mut qmp = monitor.connect().unwrap();
        let flag = Arc::new(AtomicBool::new(false));
        qmp.set_cancel(flag.clone());
        let setter = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            flag.store(true, Ordering::Relaxed);
            Instant::now()
        });
        let error = qmp.execute::<Value>("stop", Value::Null).unwrap_err();
        assert!(setter.join().unwrap().elapsed() < Duration::from_millis(100));
        assert!(matches!(error, QmpError::Cancelled { .. }));
        let error = qmp.wait_event("STOP", DEFAULT_TIMEOUT).unwrap_err();
        assert!(matches!(error, QmpError::Cancelled { .. }));
    }

    #[test]
    fn a_command_after_the_cancel_is_not_sent() {
        let (tell, told) = std::sync::mpsc::channel();
        let monitor = fake(move |stream| {
            stream.write_all(GREETING.as_bytes()).unwrap();
            stream.write_all(CAPABLE.as_bytes()).unwrap();
            let lines = BufReader::new(stream).lines().map_while(Result::ok);
            tell.send(lines.count()).unwrap();
        });
        let mut qmp = monitor.connect().unwrap();
        qmp.set_cancel(Arc::new(AtomicBool::new(true)));
        let error = qmp.stop().unwrap_err();
        assert!(matches!(error, QmpError::Cancelled { command } if command == "stop"));
        drop(qmp);
        assert_eq!(told.recv().unwrap(), 1);
    }

    #[test]
    fn a_flood_of_events_does_not_stretch_the_waiting() {
        let monitor = fake(|stream| {
            stream.write_all(GREETING.as_bytes()).unwrap();
            stream.write_all(CAPABLE.as_bytes()).unwrap();
            while stream.write_all(b"{\"event\": \"NOISE\"}\n").is_ok() {}
        });
        let mut qmp = monitor.connect().unwrap();
        qmp.set_timeout(Duration::from_millis(50));
        let error = qmp.stop().unwrap_err();
        assert!(matches!(error, QmpError::TimedOut { .. }));
        let error = qmp.wait_event("STOP", Duration::from_millis(50));
        assert!(matches!(error, Err(QmpError::NoEvent { .. })));
    }

    proptest::proptest! {
        #[test]
        fn any_line_is_a_message_or_an_error(line in proptest::collection::vec(proptest::num::u8::ANY, 0..99)) {
            let _ = parse_greeting(&line);
            let _ = serde_json::from_slice::<Message>(&line);
        }
    }

    #[test]
    fn garbage_and_the_end_are_told_apart() {
        let monitor = answering(vec![CAPABLE.into(), b"{\"return\": tru\n".to_vec()]);
        let mut qmp = monitor.connect().unwrap();
        let error = qmp.execute::<Value>("stop", Value::Null).unwrap_err();
        assert!(matches!(error, QmpError::Garbage { .. }));
        let monitor = fake(|stream| stream.write_all(GREETING.as_bytes()).unwrap());
        assert!(matches!(
            monitor.connect().unwrap_err(),
            QmpError::Disconnected
        ));
    }

    #[test]
    fn an_answer_of_another_shape_is_no_panic() {
        let monitor = answering(vec![
            CAPABLE.into(),
            b"{\"return\": [], \"id\": 2}\n".into(),
        ]);
        let mut qmp = monitor.connect().unwrap();
        let error = qmp.query_status().unwrap_err();
        assert!(matches!(error, QmpError::UnexpectedReply { .. }));
    }

    #[test]
    fn events_wait_in_order_until_they_are_taken() {
        let events = "{\"event\": \"STOP\"}\n{\"event\": \"MIGRATION\", \"data\": {\"status\": \"setup\"}}\n{\"return\": {}, \"id\": 2}\n{\"event\": \"MIGRATION\", \"data\": {\"status\": \"active\"}}\n";
        let monitor = answering(vec![CAPABLE.into(), events.into()]);
        let mut qmp = monitor.connect().unwrap();
        qmp.execute::<Value>("migrate", json!({})).unwrap();
        for status in ["setup", "active"] {
            let event = qmp.wait_event("MIGRATION", DEFAULT_TIMEOUT).unwrap();
            assert_eq!(event.data["status"], status);
        }
        assert!(matches!(
            qmp.wait_event("RESUME", Duration::from_millis(20)),
            Err(QmpError::NoEvent { .. })
        ));
        qmp.poll_events().unwrap();
        assert_eq!(qmp.take_events().len(), 1);
    }

    #[test]
    fn a_command_longer_than_the_socket_buffer_arrives_whole() {
        let monitor = answering(vec![
            CAPABLE.into(),
            b"{\"return\": {}, \"id\": 2}\n".into(),
        ]);
        let mut qmp = monitor.connect().unwrap();
        let long = "x".repeat(4 << 20);
        qmp.execute::<Value>("set", json!({ "value": long }))
            .unwrap();
    }
}
