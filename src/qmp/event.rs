//! What QEMU tells unasked.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

/// Events kept while nobody takes them; beyond it the oldest go.
pub const EVENT_LIMIT: usize = 4096;

/// One event.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// Its name: `STOP`, `RESUME`, `MIGRATION`, …
    #[serde(rename = "event")]
    pub name: String,
    /// Its data; null where it has none.
    #[serde(default)]
    pub data: Value,
    /// When QEMU says it happened.
    #[serde(default)]
    pub timestamp: EventTime,
}

/// Host time of an event; both are -1 where QEMU could not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub struct EventTime {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Microseconds within the second.
    pub microseconds: i64,
}

impl EventTime {
    /// From `earlier` to this; `None` if one of them is not known, or the clock was set back between them.
    pub fn since(self, earlier: EventTime) -> Option<Duration> {
        let micros = |time: EventTime| {
            let is_known = time.seconds >= 0 && time.microseconds >= 0;
            let whole = time.seconds.checked_mul(1_000_000)?;
            is_known.then_some(whole.checked_add(time.microseconds)?)
        };
        let passed = micros(self)?.checked_sub(micros(earlier)?)?;
        u64::try_from(passed).ok().map(Duration::from_micros)
    }
}

/// Events in the order of arrival, at most [`EVENT_LIMIT`].
#[derive(Debug, Default)]
pub(super) struct EventQueue(VecDeque<Event>);

impl EventQueue {
    pub(super) fn push(&mut self, event: Event) {
        if self.0.len() >= EVENT_LIMIT {
            self.0.pop_front();
        }
        self.0.push_back(event);
    }

    /// Takes the oldest event of that name and leaves all others.
    pub(super) fn take_named(&mut self, name: &str) -> Option<Event> {
        let index = self.0.iter().position(|event| event.name == name)?;
        self.0.remove(index)
    }

    pub(super) fn has_named(&self, name: &str) -> bool {
        self.0.iter().any(|event| event.name == name)
    }

    pub(super) fn take_all(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.0).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str) -> Event {
        serde_json::from_value(serde_json::json!({ "event": name })).unwrap()
    }

    #[test]
    fn the_oldest_event_goes_when_there_are_too_many() {
        let mut queue = EventQueue::default();
        queue.push(event("FIRST"));
        for _ in 0..EVENT_LIMIT {
            queue.push(event("LATER"));
        }
        assert!(queue.take_named("FIRST").is_none());
        assert_eq!(queue.take_all().len(), EVENT_LIMIT);
    }

    #[test]
    fn the_time_between_events_is_exact_where_it_is_known() {
        let time = |seconds, microseconds| EventTime {
            seconds,
            microseconds,
        };
        let passed = time(8, 500).since(time(7, 999_000));
        assert_eq!(passed, Some(Duration::from_micros(1500)));
        assert_eq!(time(7, 0).since(time(7, 1)), None);
        assert_eq!(time(7, 0).since(time(-1, -1)), None);
    }

    #[test]
    fn taking_an_event_by_name_leaves_the_others_in_order() {
        let mut queue = EventQueue::default();
        for name in ["STOP", "MIGRATION", "RESUME", "MIGRATION"] {
            queue.push(event(name));
        }
        assert_eq!(queue.take_named("MIGRATION"), Some(event("MIGRATION")));
        let names: Vec<String> = queue.take_all().into_iter().map(|e| e.name).collect();
        assert_eq!(names, ["STOP", "RESUME", "MIGRATION"]);
    }
}
