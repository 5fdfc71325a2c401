use super::*;
use proptest::prelude::*;

fn facts(machine: &str) -> DomainFacts {
    DomainFacts {
        name: "web<01>".into(),
        uuid: None,
        memory_bytes: 512 << 20,
        vcpus: 2,
        max_vcpus: 4,
        topology: None,
        machine_type: machine.into(),
        accelerator: "kvm".into(),
        emulator: "/usr/bin/qemu-system-x86_64".into(),
        directory: "/srv/vm".into(),
        places: Default::default(),
    }
}

fn xml(words: &[&str], facts: &DomainFacts) -> String {
    let mut all = vec!["qemu"];
    all.extend(words);
    let arguments = Arguments::parse(&all).unwrap();
    let resources = ResourceTable::from_arguments(&arguments, Some(&facts.machine_type));
    let xml = domain_xml(&arguments, &resources, facts);
    let identity = read_identity(xml.as_bytes()).unwrap();
    assert_eq!(identity.name.as_deref(), Some(facts.name.as_str()));
    assert_eq!(identity.uuid, facts.uuid);
    xml
}

fn xml_of(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    xml(&words, &facts("pc-i440fx-10.0"))
}

#[test]
fn an_argument_without_counterpart_is_listed_and_kept_verbatim() {
    let xml = xml(
        &["-fw_cfg", "name=opt/a,string=<&\"\u{1}"],
        &facts("pc-i440fx-10.0"),
    );
    let value = "name=opt/a,string=&lt;&amp;&quot;\u{fffd}";
    assert!(xml.contains(r#"<qemu:arg value="-fw_cfg"/>"#), "{xml}");
    assert!(
        xml.contains(&format!(r#"<qemu:arg value="{value}"/>"#)),
        "{xml}"
    );
    assert!(
        xml.contains(r#"<vmstow:argument index="0">-fw_cfg name=opt/a"#),
        "{xml}"
    );
}

#[test]
fn relative_paths_start_from_the_directory_qemu_ran_in() {
    let xml = xml_of("-nodefaults -hda a.img -kernel k -append a/b -serial file:out/s -hdb /b.img");
    for absolute in [
        r#"file="/srv/vm/a.img""#,
        "<kernel>/srv/vm/k</kernel>",
        "<cmdline>a/b</cmdline>",
        r#"path="/srv/vm/out/s""#,
        r#"file="/b.img""#,
    ] {
        assert!(xml.contains(absolute), "{absolute}: {xml}");
    }
}

#[test]
fn a_property_without_counterpart_is_listed() {
    let xml =
        xml_of("-nodefaults -device virtio-balloon-pci,free-page-reporting=on,page-poison=off");
    assert!(
        xml.contains(r#"<memballoon model="virtio" freePageReporting="on"/>"#),
        "{xml}"
    );
    assert!(
        xml.contains(r#"<vmstow:property index="1">page-poison=off</vmstow:property>"#),
        "{xml}"
    );
    assert!(!xml.contains("qemu:commandline"), "{xml}");
}

#[test]
fn how_qemu_was_run_is_no_part_of_it() {
    let xml =
        xml_of("-nodefaults -S -incoming defer -qmp unix:/q,server -daemonize -pidfile /p -name x");
    assert!(!xml.contains("qemu:") && !xml.contains("metadata"), "{xml}");
}

#[test]
fn acpi_is_there_unless_it_is_off() {
    assert!(xml_of("").contains("<acpi/>"));
    assert!(!xml_of("-machine pc,acpi=off").contains("<acpi/>"));
    assert!(!xml_of("-no-acpi").contains("<acpi/>"));
}

proptest! {
    #[test]
    fn whatever_the_arguments_the_xml_is_well_formed(words in proptest::collection::vec(prop_oneof![
        Just("-device".to_owned()), Just("-drive".to_owned()), Just("-serial".to_owned()), Just("-netdev".to_owned()),
        Just("file=/a,id=d,if=none".to_owned()), Just("virtio-blk-pci,drive=d,addr=4.1".to_owned()), Just("user,id=n".to_owned()),
        Just("-vga".to_owned()), Just("none".to_owned()), Just("std".to_owned()), "\\PC{0,12}",
    ], 0..10)) {
        let words: Vec<&str> = std::iter::once("qemu").chain(words.iter().map(String::as_str)).collect();
        if let Ok(arguments) = Arguments::parse(&words) {
            let resources = ResourceTable::from_arguments(&arguments, None);
            let xml = domain_xml(&arguments, &resources, &facts("pc-q35-10.0"));
            prop_assert!(read_identity(xml.as_bytes()).is_ok(), "{}", xml);
        }
    }
}
