use super::*;
use crate::config::domain::disks::{CacheMode, DiskBus, DiskDevice};
use crate::config::domain::hostdevs::HostdevSource;

fn read(xml: &str) -> Result<Reading, ConfigError> {
    Domain::read(&Document::parse(xml.as_bytes()).unwrap())
}

fn with(inner: &str, devices: &str) -> String {
    format!(
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\n<name>g</name>\n\
         <memory unit='MiB'>512</memory>\n<os><type>hvm</type></os>\n{inner}\n<devices>\n{devices}\n</devices>\n</domain>"
    )
}

fn errors(inner: &str, devices: &str) -> Vec<String> {
    match read(&with(inner, devices)) {
        Err(ConfigError::Unsupported { elements }) => {
            elements.iter().map(Unmodelled::to_string).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn warnings(inner: &str, devices: &str) -> Vec<String> {
    let reading = read(&with(inner, devices)).unwrap();
    reading.warnings.iter().map(Unmodelled::to_string).collect()
}

#[test]
fn everything_that_is_wrong_is_told_at_once_with_path_and_line() {
    let found = errors(
        "<vcpu>zwei</vcpu>\n<turbo/>",
        "<disk type='file' colour='red'><target dev='vda'/></disk>\n<disk type='floppy'><target dev='vdb'/></disk>\n<laser/>",
    );
    for expected in [
        "line 5, domain/vcpu: \"zwei\" is not a number that fits",
        "line 6, domain/turbo: <turbo> is not known here",
        "line 8, domain/devices/disk[1]/@colour: attribute colour is not known here",
        "line 9, domain/devices/disk[2]/@type: \"floppy\" is none of file, block, dir, network, nvme, volume, vhostuser, vhostvdpa",
        "line 10, domain/devices/laser: <laser> is not known here",
    ] {
        assert!(
            found.contains(&expected.to_owned()),
            "{expected}: {found:#?}"
        );
    }
}

#[test]
fn what_only_the_host_would_notice_is_a_warning() {
    let found = warnings(
        "<cputune><shares>1</shares></cputune><numatune><memory mode='strict' nodeset='0'/></numatune>",
        "<interface type='bridge'><source bridge='br0'/><bandwidth/><vlan/></interface>",
    );
    assert_eq!(found.len(), 4, "{found:#?}");
    let silent = "<metadata><x:y xmlns:x='urn:x'/></metadata><seclabel type='dynamic'/><resource><partition>/m</partition></resource>";
    assert_eq!(warnings(silent, ""), Vec::<String>::new());
}

#[test]
fn sizes_have_units_and_limits() {
    let memory = |text: &str| {
        let xml = with("", "").replace("<memory unit='MiB'>512</memory>", text);
        read(&xml).map(|reading| reading.domain.memory.initial(&[]))
    };
    assert_eq!(memory("<memory>219100</memory>").unwrap(), 224_395_264);
    assert_eq!(memory("<memory unit='GB'>1</memory>").unwrap(), 954 << 20);
    assert!(memory("<memory unit='GiB'>99999999999</memory>").is_err());
    let unit = memory("<memory unit='furlong'>1</memory>")
        .unwrap_err()
        .to_string();
    assert!(
        unit.contains("\"furlong\" is none of b, bytes, KB, KiB"),
        "{unit}"
    );
    assert!(
        memory("")
            .unwrap_err()
            .to_string()
            .contains("it has no <memory>")
    );
}

#[test]
fn a_disk_is_read_with_all_that_stands_behind_it() {
    let disk = "<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap'/>\
        <source file='/top' index='3'><seclabel model='dac' relabel='no'/></source>\
        <backingStore type='network' index='4'><format type='raw'/><source protocol='nbd' name='e'><host name='h' port='10809'/></source>\
        <backingStore/></backingStore><target dev='sdb' bus='scsi' rotation_rate='1'/><serial>S</serial><alias name='scsi0-0-0-1'/>\
        <address type='drive' controller='0' bus='0' target='0' unit='1'/></disk>";
    let reading = read(&with("", disk)).unwrap();
    let disk = &reading.domain.devices.disks[0];
    assert_eq!(disk.device, DiskDevice::Disk);
    assert_eq!(disk.bus, Some(DiskBus::Scsi));
    assert_eq!(disk.driver.cache, Some(CacheMode::None));
    assert_eq!(disk.target_number(), Some(1));
    assert_eq!(disk.info.line, 7);
    let image = disk.image.as_ref().unwrap();
    let disk_source::Backing::Image(backing) = &image.backing else {
        panic!("{image:?}");
    };
    assert!(
        matches!(&backing.location, disk_source::Location::Network(source) if source.hosts.len() == 1)
    );
    assert_eq!(backing.backing, disk_source::Backing::End);
}

#[test]
fn the_boot_order_is_computed_and_may_be_told_once_only() {
    let disks = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>\
        <disk type='file'><source file='/a'/><target dev='vda'/></disk><interface type='user'/>";
    let boot = "<os><type>hvm</type><boot dev='hd'/><boot dev='network'/><boot dev='cdrom'/></os>";
    let xml = with("", disks).replace("<os><type>hvm</type></os>", boot);
    let devices = read(&xml).unwrap().domain.devices;
    let indexes: Vec<Option<u32>> = devices
        .disks
        .iter()
        .map(|disk| disk.info.boot_index)
        .collect();
    assert_eq!(indexes, [Some(3), Some(1)]);
    assert_eq!(devices.interfaces[0].info.boot_index, Some(2));
    let both = xml.replace(
        "<interface type='user'/>",
        "<interface type='user'><boot order='1'/></interface>",
    );
    assert!(read(&both).unwrap_err().to_string().contains("both"));
}

#[test]
fn devices_of_the_host_are_read_so_that_they_can_be_named() {
    let hostdev = "<hostdev mode='subsystem' type='pci' managed='yes'><driver name='vfio'/><source>\
        <address domain='0x0000' bus='0x06' slot='0x12' function='0x5'/></source></hostdev>";
    let reading = read(&with("", hostdev)).unwrap();
    let source = &reading.domain.devices.hostdevs[0].source;
    assert_eq!(source.describe(), "PCI device 0000:06:12.5");
    assert!(matches!(source, HostdevSource::Pci { .. }));
}

#[test]
fn what_is_handed_to_qemu_past_the_model_is_read_and_kept_apart() {
    let inner = "<qemu:commandline><qemu:arg value='-fw_cfg'/><qemu:env name='A' value='b'/></qemu:commandline>\
        <qemu:override><qemu:device alias='net0'><qemu:frontend><qemu:property name='x' type='unsigned' value='1'/>\
        </qemu:frontend></qemu:device></qemu:override>";
    let domain = read(&with(inner, "")).unwrap().domain;
    assert_eq!(domain.extra.arguments, ["-fw_cfg"]);
    assert_eq!(domain.extra.environment, [("A".to_owned(), "b".to_owned())]);
    assert_eq!(domain.overrides[0].alias, "net0");
}

#[test]
fn what_cannot_be_honoured_says_so() {
    for (inner, devices, expected) in [
        ("<launchSecurity type='sev'/>", "", "encrypted"),
        (
            "",
            "<disk type='volume'><source pool='p' volume='v'/><target dev='vda'/></disk>",
            "storage pool",
        ),
        (
            "",
            "<disk type='file'><source file='/a'/><target dev='vda'/><transient/></disk>",
            "transient",
        ),
        ("", "<interface type='hostdev'/>", "cannot be saved"),
        ("", "<rng model='virtio'/>", "<backend>"),
        ("", "<serial type='nmdm'/>", "FreeBSD"),
        ("<iothreads>4000000000</iothreads>", "", "more than 4096"),
        ("<vcpu current='3'>2</vcpu>", "", "3 of 2"),
    ] {
        let found = errors(inner, devices);
        assert!(
            found.iter().any(|one| one.contains(expected)),
            "{expected}: {found:#?}"
        );
    }
}

#[test]
fn many_problems_are_counted_not_kept() {
    let found = errors("", &"<hub><x/><y/></hub>".repeat(2000));
    assert!(found.len() <= 1000);
}

#[test]
fn another_root_is_refused() {
    assert!(
        read("<network/>")
            .unwrap_err()
            .to_string()
            .contains("one <domain>")
    );
}
