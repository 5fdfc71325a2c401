//! Text ⇄ escaped text.

/// Text with everything escaped that could not stand in an element.
pub(super) fn escape_text(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\r' => out.push_str("&#13;"),
            c => out.push(legal(c)),
        }
    }
}

/// A value with everything escaped that could not stand between these quotes.
pub(super) fn escape_value(value: &str, quote: char, out: &mut String) {
    for c in value.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' if quote == '"' => out.push_str("&quot;"),
            '\'' if quote == '\'' => out.push_str("&apos;"),
            '\t' => out.push_str("&#9;"),
            '\n' => out.push_str("&#10;"),
            '\r' => out.push_str("&#13;"),
            c => out.push(legal(c)),
        }
    }
}

/// Escaped text as what it says; `Err` holds what is wrong with it.
///
/// Only the five entities of XML itself and character references are known.
pub(super) fn unescape(source: &str) -> Result<String, String> {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, reference)) = rest.split_once('&') {
        text.push_str(before);
        let Some((name, after)) = reference.split_once(';') else {
            return Err("it has an & that is not escaped".to_owned());
        };
        text.push(
            character(name)
                .ok_or_else(|| format!("it has an unknown entity {:?}", shorten(name)))?,
        );
        rest = after;
    }
    text.push_str(rest);
    match text.chars().find(|c| !is_legal(*c)) {
        Some(c) => Err(format!("it has the character {c:?}, which XML forbids")),
        None => Ok(text),
    }
}

/// A value as an XML reader sees it: line breaks and tabs that are not escaped are blanks.
pub(super) fn unescape_value(source: &str) -> Result<String, String> {
    if source.contains(['\n', '\t', '\r']) {
        let blanks = source.replace("\r\n", " ").replace(['\n', '\t', '\r'], " ");
        return unescape(&blanks);
    }
    unescape(source)
}

fn character(name: &str) -> Option<char> {
    match name {
        "lt" => Some('<'),
        "gt" => Some('>'),
        "amp" => Some('&'),
        "quot" => Some('"'),
        "apos" => Some('\''),
        name => {
            let number = name.strip_prefix('#')?;
            let code = match number.strip_prefix('x') {
                Some(hexadecimal) => u32::from_str_radix(hexadecimal, 16),
                None => number.parse(),
            };
            char::from_u32(code.ok()?).filter(|c| is_legal(*c))
        }
    }
}

fn shorten(name: &str) -> String {
    name.chars().take(32).collect()
}

/// XML 1.0 has no way to write most control characters.
fn is_legal(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r') || (c >= ' ' && c != '\u{fffe}' && c != '\u{ffff}')
}

/// U+FFFD stands in for what cannot be written.
fn legal(c: char) -> char {
    if is_legal(c) { c } else { '\u{fffd}' }
}
