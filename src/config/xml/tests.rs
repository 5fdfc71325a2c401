use super::*;
use crate::config::ConfigError;
use proptest::prelude::*;

fn refused(xml: &[u8]) -> String {
    Document::parse(xml).unwrap_err().to_string()
}

const ODD: &str = "\u{feff}<?xml version='1.0' encoding='UTF-8'?>\n<!-- before -->\r\n<a:domain  type = 'kvm'\n\t id=\"7&quot;&#x41;'\" >\n\
    <!-- in > it -->\n  <name\t>a &amp; b &#10; &gt; ></name >\n  <empty></empty><empty /><empty/>\n  <![CDATA[<x>&]]>tail\n\
    <?target data?>\n  <x:y xmlns:x='urn:x' x:z=''/>text<b/>more\r\n</a:domain\n>\n<!-- after -->\n";

#[test]
fn what_is_not_changed_is_written_back_byte_for_byte() {
    let document = Document::parse(ODD.as_bytes()).unwrap();
    assert_eq!(document.write(), ODD);
}

#[test]
fn values_and_texts_are_read_without_their_escapes() {
    let document = Document::parse(ODD.as_bytes()).unwrap();
    let root = &document.root;
    assert_eq!(root.get("type"), Some("kvm"));
    assert_eq!(root.get("id"), Some("7\"A'"));
    assert_eq!(root.find("name").unwrap().text(), "a & b \n > >");
    assert!(root.text().contains("<x>&tail"));
    assert_eq!(root.all("empty").count(), 3);
    assert_eq!(root.find("x:y").unwrap().get("x:z"), Some(""));
    assert_eq!(root.find("name").unwrap().line, 6);
    assert_eq!(root.line, 3);
}

#[test]
fn a_change_touches_nothing_else() {
    let xml = "<domain type='kvm'>\n  <name>a</name>\n  <!-- kept -->\n  <vcpu   placement='static'>2</vcpu>\n</domain>\n";
    let mut document = Document::parse(xml.as_bytes()).unwrap();
    document.root.set("type", "qe'mu");
    document.root.find_mut("vcpu").unwrap().set_text(4);
    document
        .root
        .push(Element::new("devices").child(Element::with_text("emulator", "/q")));
    assert_eq!(
        document.write(),
        "<domain type='qe&apos;mu'>\n  <name>a</name>\n  <!-- kept -->\n  <vcpu   placement='static'>4</vcpu>\n  <devices>\n    \
         <emulator>/q</emulator>\n  </devices>\n</domain>\n"
    );
}

#[test]
fn elements_are_put_where_they_belong_and_taken_away() {
    let xml = "<a>\n  <b/>\n  <c/>\n</a>";
    let mut document = Document::parse(xml.as_bytes()).unwrap();
    document.root.insert(0, Element::new("first"));
    document.root.insert(2, Element::new("middle"));
    document.root.push(Element::new("last"));
    assert_eq!(
        document.write(),
        "<a>\n  <first/>\n  <b/>\n  <middle/>\n  <c/>\n  <last/>\n</a>"
    );
    document
        .root
        .remove(|element| ["first", "middle", "last"].contains(&&*element.name));
    assert_eq!(document.write(), xml);
}

#[test]
fn what_is_new_in_an_element_without_lines_gets_lines() {
    let mut document = Document::parse(b"<a>\n  <b/>\n</a>").unwrap();
    let b = document.root.find_mut("b").unwrap();
    b.push(Element::new("c"));
    document.root.tidy();
    assert_eq!(document.write(), "<a>\n  <b>\n    <c/>\n  </b>\n</a>");
}

#[test]
fn hostile_documents_are_refused() {
    assert!(refused(b"<!DOCTYPE a [<!ENTITY b 'c'>]><a/>").contains("DOCTYPE"));
    assert!(refused(b"<a>&lol;</a>").contains("lol"));
    assert!(refused(b"<a b='&lol;'/>").contains("lol"));
    assert!(refused(b"<a>&#0;</a>").contains("entity"));
    assert!(refused(b"<a>\x01</a>").contains("forbids"));
    assert!(refused(b"<a><b></a>").contains("b"));
    assert!(refused(b"<a>").contains("ends within"));
    assert!(refused(b"").contains("without an element"));
    assert!(refused(b"<a/><b/>").contains("beside the root"));
    assert!(refused(b"<a/>tail").contains("outside"));
    assert!(refused(b"<a b='1' b='2'/>").contains("twice"));
    assert!(refused(b"<a b=1/>").contains("not quoted"));
    assert!(refused(b"<a b/>").contains("no value"));
    assert!(refused(b"<a b='1'c='2'/>").contains("blank"));
    assert!(refused(b"<a b='<'/>").contains("not escaped"));
    assert!(refused(b"<a>\xff</a>").contains("UTF-8"));
    assert!(refused(b"<?xml version='1.0' encoding='UTF-16'?><a/>").contains("only UTF-8 is read"));
    let deep = "<a>".repeat(MAX_XML_DEPTH + 1);
    assert!(refused(deep.as_bytes()).contains("deeper"));
    assert!(refused(&vec![b' '; MAX_XML_LEN + 1]).contains("longer"));
}

#[test]
fn a_billion_laughs_are_refused_at_the_doctype() {
    let xml = "<?xml version=\"1.0\"?>\n<!DOCTYPE lolz [\n <!ENTITY lol \"lol\">\n <!ENTITY lol2 \"&lol;&lol;&lol;\">\n]>\n\
        <domain><name>&lol2;</name></domain>";
    match Document::parse(xml.as_bytes()) {
        Err(ConfigError::XmlNotRead { fact, line, .. }) => {
            assert!(fact.contains("DOCTYPE"));
            assert_eq!(line, 2);
        }
        other => panic!("{other:?}"),
    }
}

/// As few bytes as one of them can take, so that nothing but their number stands against them.
#[test]
fn a_million_elements_attributes_or_comments_are_too_many() {
    for one in ["<hub/>", "<!---->", "<a b=''/>", "x<!---->", "<?a?>"] {
        let xml = format!(
            "<domain><devices>{}</devices></domain>",
            one.repeat(1_000_000)
        );
        assert!(
            refused(xml.as_bytes()).contains("more than 262144"),
            "{one}"
        );
    }
    let many: String = (0..1000).map(|number| format!(" a{number}=''")).collect();
    assert!(refused(format!("<a{many}/>").as_bytes()).contains("more than 256 attributes"));
}

#[test]
fn an_error_names_its_line() {
    match Document::parse(b"<a>\n\n  <b>&no;</b>\n</a>") {
        Err(ConfigError::XmlNotRead { line, at, .. }) => {
            assert_eq!(line, 3);
            assert!(at > 5);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn characters_that_xml_cannot_hold_are_replaced() {
    let document = Document::new(Element::with_text("a", "\u{1}<&>").attribute("b", "\n\"\u{b}"));
    let text = document.write();
    assert_eq!(
        text,
        "<a b=\"&#10;&quot;\u{fffd}\">\u{fffd}&lt;&amp;&gt;</a>\n"
    );
    let read = Document::parse(text.as_bytes()).unwrap();
    assert_eq!(read.write(), text);
}

fn any_element() -> impl Strategy<Value = Element> {
    let name = "[a-z][a-z0-9_.-]{0,6}(:[a-z]{1,4})?";
    let attributes = proptest::collection::btree_map(name, "\\PC{0,12}", 0..4);
    let leaf = (name, attributes.clone(), proptest::option::of("\\PC{1,12}")).prop_map(
        |(name, attributes, text)| {
            let mut element = Element::new(name);
            for (name, value) in attributes {
                element.attributes.push(Attribute::new(name, value));
            }
            element
                .children
                .extend(text.map(|text| Node::Text(Text::new(text))));
            element
        },
    );
    leaf.prop_recursive(4, 40, 5, move |inner| {
        (
            name,
            attributes.clone(),
            proptest::collection::vec(inner, 0..5),
        )
            .prop_map(|(name, attributes, children)| {
                let mut element = Element::new(name).children(children);
                for (name, value) in attributes {
                    element.attributes.push(Attribute::new(name, value));
                }
                element
            })
    })
}

proptest! {
    #[test]
    fn what_was_written_is_read_back_and_written_the_same(root in any_element()) {
        let text = Document::new(root).write();
        let document = Document::parse(text.as_bytes()).unwrap();
        prop_assert_eq!(document.write(), text.clone());
        let indented = Document::parse(document.write_indented().as_bytes()).unwrap();
        prop_assert_eq!(indented.write(), document.write_indented());
    }

    #[test]
    fn whatever_can_be_read_is_written_back_byte_for_byte(
        xml in "(<a>|<b c='d'>|<b\n c = \"d\" >|</a>|</b >|<!-- x -->|<!\\[CDATA\\[|]]>|&amp;|&#65;|&|;|<\\?x y\\?>|<e/>|<e />|[ -~\n\t]){0,30}"
    ) {
        for xml in [xml.clone(), format!("<a>{xml}</a>")] {
            if let Ok(document) = Document::parse(xml.as_bytes()) {
                prop_assert_eq!(document.write(), xml);
            }
        }
    }

    #[test]
    fn no_bytes_make_it_panic(xml in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = Document::parse(&xml);
    }
}
