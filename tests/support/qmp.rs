//! A QMP client of the tests' own, so that it can judge the program's.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::wait::{PATIENCE, wait_until};

/// A connection to a QMP socket; QEMU serves one at a time on each socket.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects and negotiates; waits while the socket is not there yet.
    #[track_caller]
    pub fn connect(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let stream = wait_until("a QMP socket", PATIENCE, || {
            UnixStream::connect(path).map_err(|error| format!("{}: {error}", path.display()))
        });
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp = Qmp {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        let greeting = qmp.read();
        assert!(greeting["QMP"].is_object(), "no greeting: {greeting}");
        qmp.command("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs a command that must succeed; gives what it returns.
    #[track_caller]
    pub fn command(&mut self, name: &str, arguments: Value) -> Value {
        self.try_command(name, arguments)
            .unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Runs a command; gives what it returns, or QEMU's error object.
    pub fn try_command(&mut self, name: &str, arguments: Value) -> Result<Value, Value> {
        let mut line = json!({ "execute": name, "arguments": arguments }).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let answer = self.read();
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(error) = answer.get("error") {
                return Err(error.clone());
            } else {
                return Ok(answer["return"].clone());
            }
        }
    }

    /// The run state, as `query-status` says it.
    pub fn status(&mut self) -> String {
        let status = self.command("query-status", json!({}));
        status["status"].as_str().unwrap().to_owned()
    }

    /// Waits for an event; those that came before it are forgotten.
    pub fn wait_for_event(&mut self, name: &str) -> Value {
        loop {
            while let Some(event) = (!self.events.is_empty()).then(|| self.events.remove(0)) {
                if event["event"] == name {
                    return event;
                }
            }
            let message = self.read();
            self.events.push(message);
        }
    }

    /// Migrates to `uri` and waits until QEMU says `completed`.
    #[track_caller]
    pub fn migrate(&mut self, uri: &str) {
        self.command("migrate", json!({ "uri": uri }));
        wait_until("a migration to complete", PATIENCE, || {
            let migration = self.command("query-migrate", json!({}));
            match migration["status"].as_str() {
                Some("completed") => Ok(()),
                Some("failed" | "cancelled") => panic!("migration to {uri}: {migration}"),
                _ => Err(migration.to_string()),
            }
        });
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("QMP answers");
        assert!(!line.is_empty(), "QEMU closed its QMP connection");
        serde_json::from_str(&line).expect("QMP speaks JSON")
    }
}
