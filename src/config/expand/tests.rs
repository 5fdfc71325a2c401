use super::*;

fn knowledge() -> HostKnowledge {
    HostKnowledge {
        machine_aliases: [("q35", "pc-q35-10.0"), ("pc", "pc-i440fx-10.0")]
            .map(|(alias, name)| (alias.to_owned(), name.to_owned()))
            .into(),
        ..HostKnowledge::default()
    }
}

fn domain(machine: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'>\n  <name>g</name>\n  <memory>1048576</memory>\n  <os>\n    <type machine='{machine}'>hvm</type>\n  </os>\n  \
         <devices>\n    {devices}\n  </devices>\n</domain>\n"
    )
}

fn expanded(xml: &str) -> Expanded {
    let document = Document::parse(xml.as_bytes()).unwrap();
    let once = expand(&document, &knowledge()).unwrap();
    let twice = expand(&once.document, &knowledge()).unwrap();
    assert_eq!(once.document.write(), twice.document.write());
    once
}

fn refused(xml: &str) -> String {
    let document = Document::parse(xml.as_bytes()).unwrap();
    expand(&document, &knowledge()).unwrap_err().to_string()
}

/// Alias and address of all that has a PCI address, in the order of aliases.
fn pci(expanded: &Expanded) -> Vec<String> {
    fn walk(element: &crate::config::xml::Element, found: &mut Vec<String>) {
        if let (Some(alias), Some(address)) = (element.find("alias"), element.find("address"))
            && address.get("type") == Some("pci")
        {
            let part = |name: &str| {
                let text = address.get(name).unwrap_or("0x0").trim_start_matches("0x");
                u32::from_str_radix(text, 16).unwrap()
            };
            found.push(format!(
                "{} {:02x}:{:02x}.{:x}",
                alias.get("name").unwrap(),
                part("bus"),
                part("slot"),
                part("function")
            ));
        }
        element.elements().for_each(|child| walk(child, found));
    }
    let mut found = Vec::new();
    walk(&expanded.document.root, &mut found);
    found.sort();
    found
}

/// What `pci` should give, one a line.
fn lines(text: &str) -> Vec<String> {
    let mut all: Vec<String> = text.split(',').map(|line| line.trim().to_owned()).collect();
    all.sort();
    all
}

const DISK: &str = "<disk type='file'><source file='/a'/><target dev='vda' bus='virtio'/></disk>";
const NET: &str = "<interface type='user'><model type='virtio'/></interface>";
const CHANNEL: &str =
    "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
const RNG: &str = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>";
const VIDEO: &str = "<video><model type='vga'/></video>";

#[test]
fn q35_gives_each_endpoint_a_root_port_and_keeps_one_free() {
    let one = expanded(&domain("q35", &[DISK, NET, CHANNEL, RNG].concat()));
    assert_eq!(one.domain.os.machine.as_deref(), Some("pc-q35-10.0"));
    let expected = "ide 00:1f.2, net0 01:00.0, usb 02:00.0, virtio-serial0 03:00.0, virtio-disk0 04:00.0, \
        balloon0 05:00.0, rng0 06:00.0, pci.1 00:01.0, pci.2 00:01.1, pci.3 00:01.2, pci.4 00:01.3, pci.5 00:01.4, \
        pci.6 00:01.5, pci.7 00:01.6";
    assert_eq!(pci(&one), lines(expected));
    let port = one
        .domain
        .devices
        .controllers
        .iter()
        .find(|one| one.index == Some(7));
    let port = port.and_then(|port| port.as_pci()).unwrap();
    assert_eq!((port.chassis, port.port), (Some(7), Some(14)));
}

#[test]
fn with_video_the_ports_of_q35_start_at_slot_two() {
    let one = expanded(&domain("q35", &[NET, VIDEO].concat()));
    let found = pci(&one);
    assert!(found.contains(&"video0 00:01.0".to_owned()), "{found:?}");
    assert!(found.contains(&"pci.1 00:02.0".to_owned()), "{found:?}");
    assert!(found.contains(&"pci.4 00:02.3".to_owned()), "{found:?}");
}

#[test]
fn i440fx_fills_its_one_bus_in_order() {
    let controllers = "<controller type='usb' index='0' model='qemu-xhci'/>";
    let one = expanded(&domain(
        "pc",
        &[DISK, NET, CHANNEL, RNG, VIDEO, controllers].concat(),
    ));
    let expected = "video0 00:02.0, net0 00:03.0, usb 00:04.0, virtio-serial0 00:05.0, virtio-disk0 00:06.0, \
        balloon0 00:07.0, rng0 00:08.0";
    assert_eq!(pci(&one), lines(expected));
}

#[test]
fn more_devices_than_one_bus_holds_get_a_bridge() {
    let nets = NET.repeat(40);
    let one = expanded(&domain("pc", &nets));
    let found = pci(&one);
    assert!(found.contains(&"pci.1 00:02.0".to_owned()), "{found:?}");
    assert!(found.contains(&"net0 00:03.0".to_owned()), "{found:?}");
    assert!(found.contains(&"net39 01:0b.0".to_owned()), "{found:?}");
    let refused = refused(&domain("q35", &NET.repeat(300)));
    assert!(refused.contains("no free place"), "{refused}");
}

#[test]
fn a_conventional_device_on_q35_gets_a_bridge_behind_a_port() {
    let one = expanded(&domain(
        "q35",
        "<interface type='user'><model type='rtl8139'/></interface>",
    ));
    let bridge = one.domain.devices.controllers.iter().find(|one| {
        one.pci_model() == Some(crate::config::domain::controllers::PciModel::PcieToPciBridge)
    });
    let index = bridge.unwrap().index.unwrap();
    assert!(
        pci(&one).contains(&format!("net0 {index:02x}:01.0")),
        "{:?}",
        pci(&one)
    );
}

#[test]
fn what_is_written_wins_and_two_at_one_place_are_refused_with_both_lines() {
    let at = |slot: &str| {
        format!(
            "<rng model='virtio'><backend model='random'/><address type='pci' bus='0x00' slot='{slot}' function='0x0'/></rng>\n"
        )
    };
    let one = expanded(&domain("pc", &[NET, &at("0x03"), &at("0x09")].concat()));
    let found = pci(&one);
    for expected in [
        "rng0 00:03.0",
        "rng1 00:09.0",
        "net0 00:02.0",
        "balloon0 00:04.0",
    ] {
        assert!(
            found.contains(&expected.to_owned()),
            "{expected}: {found:?}"
        );
    }
    let refused_twice = refused(&domain("pc", &[at("0x03"), at("0x03")].concat()));
    assert!(
        refused_twice.contains("line 9") && refused_twice.contains("taken by line 8"),
        "{refused_twice}"
    );
    assert!(refused(&domain("pc", &at("0x00"))).contains("host bridge"));
}

#[test]
fn disks_are_placed_by_the_names_of_their_targets() {
    let disks = ["sda", "sdh", "hdc", "fdb"].map(|name| {
        format!("<disk type='file'><source file='/{name}'/><target dev='{name}'/></disk>")
    });
    let one = expanded(&domain("pc", &disks.concat()));
    let aliases: Vec<&str> = one
        .domain
        .devices
        .disks
        .iter()
        .map(|disk| disk.info.alias.as_deref().unwrap())
        .collect();
    assert_eq!(
        aliases,
        ["scsi0-0-0-0", "scsi1-0-0-0", "ide0-1-0", "fdc0-0-1"]
    );
    let twice = "<disk type='file'><target dev='hda'/></disk>\n<disk type='file'><target dev='hdb'/>\
        <address type='drive' controller='0' bus='0' unit='0'/></disk>";
    assert!(refused(&domain("pc", twice)).contains("is taken by line 8"));
}

#[test]
fn ports_of_channels_and_usb_are_counted_on() {
    let devices = [
        CHANNEL,
        CHANNEL,
        "<console type='pty'/><console type='pty'><target type='virtio'/></console>",
        "<input type='tablet'/><input type='keyboard' bus='usb'/><input type='mouse' bus='usb'/>",
    ]
    .concat();
    let one = expanded(&domain("pc", &devices));
    let ports: Vec<Option<u32>> = one
        .domain
        .devices
        .channels
        .iter()
        .map(|channel| channel.device.info.virtio_serial().unwrap().port)
        .collect();
    assert_eq!(ports, [Some(1), Some(2)]);
    assert_eq!(
        one.domain.devices.consoles[1]
            .device
            .info
            .virtio_serial()
            .unwrap()
            .port,
        Some(0)
    );
    assert_eq!(one.domain.devices.hubs.len(), 1);
    let usb: Vec<String> = one
        .domain
        .devices
        .inputs
        .iter()
        .filter_map(|input| Some(input.info.usb()?.port_name()))
        .collect();
    assert_eq!(usb, ["2", "1.1", "1.2"]);
    assert_eq!(one.domain.devices.serials.len(), 1);
}

#[test]
fn devices_that_are_always_there_are_added_unless_the_domain_goes_without() {
    let one = expanded(&domain("q35", ""));
    assert!(one.domain.devices.balloon.is_some());
    assert_eq!(one.domain.devices.inputs.len(), 2);
    assert_eq!(one.domain.devices.watchdogs.len(), 1);
    let without = "<controller type='usb' index='0' model='none'/><memballoon model='none'/>";
    let one = expanded(&domain("pc", without));
    assert_eq!(pci(&one), Vec::<String>::new());
}

#[test]
fn a_mac_address_is_made_up_once_and_for_each() {
    let one = expanded(&domain("pc", &NET.repeat(2)));
    let macs: Vec<&String> = one
        .domain
        .devices
        .interfaces
        .iter()
        .map(|one| one.mac.as_ref().unwrap())
        .collect();
    assert_ne!(macs[0], macs[1]);
    assert!(macs[0].starts_with("52:54:00:"));
}

#[test]
fn hundreds_of_thousands_of_devices_are_refused_at_once() {
    let refused = refused(&domain("pc", &"<hub type='usb'/>".repeat(100_000)));
    assert!(refused.contains("more than 2048"), "{refused}");
    let most = domain("pc", &NET.repeat(1500));
    let document = Document::parse(most.as_bytes()).unwrap();
    assert!(expand(&document, &knowledge()).is_ok());
}

fn firmware(features: &[&str], code: &str) -> Firmware {
    let json = format!(
        r#"{{"description":"d","interface-types":["uefi"],"mapping":{{"device":"flash","mode":"split",
        "executable":{{"filename":"{code}","format":"raw"}},"nvram-template":{{"filename":"{code}.vars","format":"raw"}}}},
        "targets":[{{"architecture":"x86_64","machines":["pc-i440fx-*","pc-q35-*"]}}],"features":{features:?},"tags":[]}}"#
    );
    Firmware {
        path: format!("{code}.json"),
        descriptor: serde_json::from_str(&json).unwrap(),
    }
}

#[test]
fn firmware_is_chosen_by_what_its_descriptor_says() {
    let mut knowledge = knowledge();
    knowledge.firmware = vec![
        firmware(&["secure-boot", "requires-smm", "enrolled-keys"], "/fw/ms"),
        firmware(&["acpi-s3"], "/fw/plain"),
    ];
    knowledge.nvram_directory = Some("/nvram".to_owned());
    let choose = |machine: &str, inner: &str| {
        let xml = domain(machine, "")
            .replace("<os>", "<os firmware='efi'>")
            .replace("</type>", &format!("</type>{inner}"));
        expand(&Document::parse(xml.as_bytes()).unwrap(), &knowledge)
    };
    let secure = choose("q35", "").unwrap();
    let loader = secure.domain.os.loader.clone().unwrap();
    assert_eq!(loader.path.as_deref(), Some("/fw/ms"));
    assert_eq!(
        (loader.secure, secure.domain.features.smm),
        (Some(true), Some(true))
    );
    let nvram = secure.domain.os.nvram.clone().unwrap();
    assert_eq!(nvram.path.as_deref(), Some("/nvram/g_VARS.fd"));
    assert_eq!(nvram.template.as_deref(), Some("/fw/ms.vars"));
    assert_eq!(
        expand(&secure.document, &knowledge).unwrap().document,
        secure.document
    );
    let plain = "<firmware><feature name='secure-boot' enabled='no'/></firmware>";
    for (machine, inner) in [("pc", ""), ("q35", plain), ("q35", "<loader secure='no'/>")] {
        let chosen = choose(machine, inner).unwrap().domain.os.loader.unwrap();
        assert_eq!(
            chosen.path.as_deref(),
            Some("/fw/plain"),
            "{machine} {inner}"
        );
    }
    let none = choose("pc", "<loader secure='yes'/>")
        .unwrap_err()
        .to_string();
    assert!(
        none.contains("/fw/ms.json: it needs SMM")
            && none.contains("/fw/plain.json: it lacks secure-boot"),
        "{none}"
    );
}

#[test]
fn a_cpu_that_is_the_host_s_becomes_a_model_with_features() {
    let mut knowledge = knowledge();
    knowledge.host_model = Some(CpuExpansion {
        model: "Nehalem".to_owned(),
        vendor: Some("GenuineIntel".to_owned()),
        features: vec![
            ("avx".to_owned(), true),
            ("svm".to_owned(), false),
            ("vme".to_owned(), true),
        ],
    });
    let cpu = "<cpu mode='host-model'><topology sockets='1' cores='2' threads='1'/><feature policy='disable' name='avx'/></cpu>";
    let xml = domain("pc", "").replace("<devices>", &format!("{cpu}<devices>"));
    let one = expand(&Document::parse(xml.as_bytes()).unwrap(), &knowledge).unwrap();
    let cpu = one.domain.cpu.unwrap();
    assert_eq!(cpu.model.as_deref(), Some("Nehalem"));
    assert_eq!(cpu.vendor.as_deref(), Some("Intel"));
    let features: Vec<(&str, &str)> = cpu
        .features
        .iter()
        .map(|one| {
            (
                one.name.as_str(),
                crate::config::domain::Word::word(one.policy),
            )
        })
        .collect();
    assert_eq!(
        features,
        [("avx", "disable"), ("svm", "disable"), ("vme", "require")]
    );
    assert!(cpu.topology.is_some());
}

/// Every kind of device once, and some that want the same places.
const PIECES: [&str; 30] = [
    "<disk type='file'><source file='/a'/><target dev='vdb'/></disk>",
    "<disk type='file'><source file='/b'/><target dev='vda'/></disk>",
    "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>",
    "<disk type='file'><source file='/c'/><target dev='sdz' bus='scsi'/></disk>",
    "<disk type='file'><source file='/d'/><target dev='hdd' bus='ide'/></disk>",
    "<disk type='file' device='floppy'><target dev='fda'/></disk>",
    "<disk type='file'><source file='/e'/><target dev='sdb' bus='usb'/></disk>",
    "<interface type='user'><model type='virtio'/></interface>",
    "<interface type='user'/>",
    "<interface type='user'><model type='e1000e'/><address type='pci' bus='0x00' slot='0x12'/></interface>",
    "<controller type='scsi' model='virtio-scsi'/>",
    "<controller type='usb' index='1' model='ich9-ehci1'/>",
    "<controller type='usb' index='1' model='ich9-uhci1'><master startport='0'/></controller>",
    "<controller type='usb' index='1' model='ich9-uhci2'><master startport='2'/></controller>",
    "<controller type='virtio-serial' index='2' ports='2'/>",
    "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>",
    "<channel type='unix'><target type='virtio'/><address type='virtio-serial' controller='0' bus='0' port='3'/></channel>",
    "<console type='pty'><target type='virtio'/></console>",
    "<serial type='pty'/>",
    "<serial type='pty'><target type='pci-serial'/></serial>",
    "<smartcard mode='passthrough' type='spicevmc'/>",
    "<input type='tablet'/>",
    "<input type='keyboard' bus='virtio'/>",
    "<hub type='usb'/>",
    "<redirdev bus='usb' type='spicevmc'/>",
    "<sound model='ich9'/>",
    "<video><model type='qxl'/></video>",
    "<graphics type='spice' autoport='yes'/>",
    "<filesystem type='mount'><driver type='virtiofs'/><source dir='/s'/><target dir='t'/></filesystem>",
    "<rng model='virtio'><backend model='builtin'/></rng>",
];

proptest::proptest! {
    #[test]
    fn expanding_twice_is_expanding_once_and_no_place_is_given_twice(
        picks in proptest::collection::vec(0..PIECES.len(), 0..24),
        machine in proptest::sample::select(vec!["pc", "q35"]),
    ) {
        let devices: String = picks.iter().map(|pick| PIECES[*pick]).collect();
        let xml = domain(machine, &devices);
        let document = Document::parse(xml.as_bytes()).unwrap();
        // Twice the same target or address is refused.
        if let Ok(once) = expand(&document, &knowledge()) {
            let twice = expand(&once.document, &knowledge()).unwrap();
            proptest::prop_assert_eq!(once.document.write(), twice.document.write());
            let mut places: Vec<String> = pci(&once).iter()
                .map(|line| line.split_once(' ').unwrap().1.to_owned()).collect();
            let count = places.len();
            places.sort();
            places.dedup();
            proptest::prop_assert_eq!(places.len(), count);
            proptest::prop_assert!(once.document.write().contains("memballoon"));
        }
    }
}

#[test]
fn machines_without_rules_for_addresses_are_refused() {
    let why = refused(&domain("microvm", ""));
    assert!(
        why.contains("microvm is neither of the i440fx nor of the q35 family"),
        "{why}"
    );
    assert!(why.contains("line 5"), "{why}");
}
