//! `WWW-Authenticate`: how a registry wants to be told who asks.
//!
//! Source: RFC 9110 §11.6.1; the distribution project's token authentication specification.

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token that somebody else gives.
    Bearer {
        /// Where.
        realm: String,
        /// For whom, in that one's words.
        service: Option<String>,
    },
}

/// The first challenge in these headers that can be answered; a bearer token is preferred.
pub fn parse<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut found = None;
    for header in headers {
        match one(header) {
            Some(bearer @ Challenge::Bearer { .. }) => return Some(bearer),
            Some(basic) => found = Some(basic),
            None => {}
        }
    }
    found
}

fn one(header: &str) -> Option<Challenge> {
    let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header, ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service) = (None, None);
    for (name, value) in parameters(rest) {
        match name.to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value),
            "service" => service = Some(value),
            _ => {}
        }
    }
    let realm = realm?;
    Some(Challenge::Bearer { realm, service })
}

/// `name="value"` or `name=value`, with commas between; what does not fit ends it.
fn parameters(text: &str) -> Vec<(&str, String)> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some((name, behind)) = rest.split_once('=') {
        let (value, behind) = match behind.strip_prefix('"') {
            Some(quoted) => {
                let Some((value, behind)) = unquote(quoted) else {
                    break;
                };
                (value, behind)
            }
            None => {
                let end = behind.find(',').unwrap_or(behind.len());
                (behind[..end].trim().to_owned(), &behind[end..])
            }
        };
        found.push((name.trim(), value));
        rest = behind.trim_start().trim_start_matches(',');
    }
    found
}

/// What stands before the closing quotation mark, and what follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut is_escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if is_escaped => {
                value.push(c);
                is_escaped = false;
            }
            '\\' => is_escaped = true,
            '"' => return Some((value, &text[at + 1..])),
            _ => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_challenge_names_realm_and_service() {
        let header = r#"Bearer realm="https://auth.example/token?a=b,c",service="reg \"x\"",scope="repository:a:pull,push""#;
        let expected = Challenge::Bearer {
            realm: "https://auth.example/token?a=b,c".to_owned(),
            service: Some("reg \"x\"".to_owned()),
        };
        assert_eq!(parse([header].into_iter()), Some(expected.clone()));
        let both = ["Basic realm=\"x\"", header];
        assert_eq!(parse(both.into_iter()), Some(expected));
        assert_eq!(parse(["basic realm=x"].into_iter()), Some(Challenge::Basic));
    }

    #[test]
    fn nonsense_is_no_challenge() {
        for header in [
            "",
            "Digest realm=\"x\"",
            "Bearer",
            "Bearer service=\"x\"",
            "Bearer realm=\"x",
            "Bearer =\"\\",
        ] {
            assert_eq!(parse([header].into_iter()), None, "{header}");
        }
    }
}
