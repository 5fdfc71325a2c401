//! `<disk type="network">`: block nodes that read from another host.

use crate::config::properties::Properties;
use crate::config::xml::Element;

/// What is told of such a node beside what every node has.
pub(super) const PROPERTIES: [&str; 22] = [
    "server.type",
    "server.host",
    "server.port",
    "server.path",
    "export",
    "reconnect-delay",
    "url",
    "sslverify",
    "readahead",
    "timeout",
    "portal",
    "target",
    "lun",
    "transport",
    "initiator-name",
    "pool",
    "image",
    "snapshot",
    "conf",
    "path",
    "user",
    "group",
];

/// The source of a disk whose node is this; `None` for one that libvirt has no words for.
pub(super) fn source(node: &Properties) -> Option<Element> {
    let source = |protocol: &str, name: Option<String>| {
        Element::new("source")
            .attribute("protocol", protocol)
            .attribute_if("name", name)
    };
    let child = |name: &'static str, key: &'static str, value: Option<String>| {
        Some(Element::new(name).attribute(key, value?))
    };
    let driver = node.get("driver")?;
    Some(match driver.as_str() {
        "nbd" => source("nbd", node.get("export"))
            .child(server(node, "server")?)
            .children(child("reconnect", "delay", node.get("reconnect-delay"))),
        "http" | "https" | "ftp" | "ftps" => {
            let url = node.get("url")?;
            let rest = url.strip_prefix(&format!("{driver}://"))?;
            let (place, path) = rest.split_once('/')?;
            // Whoever logs in there does so by a secret.
            if place.contains('@') {
                return None;
            }
            let (path, query) = match path.split_once('?') {
                Some((path, query)) => (path, Some(query)),
                None => (path, None),
            };
            source(&driver, Some(path.to_owned()))
                .attribute_if("query", query)
                .child(host(place))
                .children(verify(node))
                .children(child("readahead", "size", node.get("readahead")))
                .children(child("timeout", "seconds", node.get("timeout")))
        }
        "iscsi" => {
            let lun = node.get("lun").unwrap_or_else(|| "0".to_owned());
            let name = format!("{}/{lun}", node.get("target")?);
            let initiator = child("iqn", "name", node.get("initiator-name"));
            source("iscsi", Some(name))
                .child(host(&node.get("portal")?))
                .children(initiator.map(|iqn| Element::new("initiator").child(iqn)))
        }
        "rbd" => {
            let name = format!("{}/{}", node.get("pool")?, node.get("image")?);
            let monitors =
                (0..).map_while(|number: usize| server(node, &format!("server.{number}")));
            source("rbd", Some(name))
                .children(monitors)
                .children(child("snapshot", "name", node.get("snapshot")))
                .children(child("config", "file", node.get("conf")))
        }
        "nfs" => {
            let identity = Element::new("identity")
                .attribute_if("user", node.get("user").map(|id| format!("+{id}")))
                .attribute_if("group", node.get("group").map(|id| format!("+{id}")));
            let host = Element::new("host").attribute("name", node.get("server.host")?);
            source("nfs", node.get("path"))
                .child(host)
                .children((!identity.attributes.is_empty()).then_some(identity))
        }
        "ssh" => source("ssh", node.get("path"))
            .child(server(node, "server")?)
            .children(child("identity", "username", node.get("user"))),
        _ => return None,
    })
}

/// Properties of a node that reads from several hosts.
pub(super) fn is_of_server(key: &str) -> bool {
    let mut parts = key.split('.');
    parts.next() == Some("server")
        && parts
            .next()
            .is_some_and(|number| number.parse::<u32>().is_ok())
        && matches!(parts.next(), Some("host" | "port"))
}

fn verify(node: &Properties) -> Option<Element> {
    let verify = node.get("sslverify")?;
    let word = if crate::config::properties::is_yes(&verify) {
        "yes"
    } else {
        "no"
    };
    Some(Element::new("ssl").attribute("verify", word))
}

/// A host with its port, or a socket.
fn server(node: &Properties, prefix: &str) -> Option<Element> {
    let get = |key: &str| node.get(&format!("{prefix}.{key}"));
    if let Some(path) = get("path") {
        return Some(
            Element::new("host")
                .attribute("transport", "unix")
                .attribute("socket", path),
        );
    }
    let host = Element::new("host").attribute("name", get("host")?);
    Some(host.attribute_if("port", get("port")))
}

/// `host:port`, an IPv6 address in brackets.
fn host(place: &str) -> Element {
    let (name, port) = match place.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (name, Some(port)),
        _ => (place, None),
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    Element::new("host")
        .attribute("name", name)
        .attribute_if("port", port)
}
