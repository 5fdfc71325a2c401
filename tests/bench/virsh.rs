//! `virsh save --image-format …` and `virsh restore`.

use crate::contender::{Contender, Place, run};
use crate::domain;
use crate::support::{Adopted, Libvirtd};

pub struct Virsh<'a> {
    pub libvirtd: &'a Libvirtd,
    pub place: Place,
    /// `raw`, `zstd` or `sparse`; the domain's name too.
    pub format: &'static str,
}

impl Contender for Virsh<'_> {
    fn boot(&mut self) -> Adopted {
        let xml = self.place.dir.join("domain.xml");
        std::fs::write(
            &xml,
            domain::xml(&self.place.recipe, self.format, &self.place.dir),
        )
        .unwrap();
        run(self.libvirtd.virsh().arg("create").arg(xml));
        Adopted(self.libvirtd.qemu(self.format))
    }

    fn save(&mut self) {
        let image = self.place.image();
        let mut virsh = self.libvirtd.virsh();
        run(virsh
            .args(["save", self.format])
            .arg(image)
            .args(["--image-format", self.format]));
    }

    fn restore(&mut self) -> Adopted {
        run(self.libvirtd.virsh().arg("restore").arg(self.place.image()));
        Adopted(self.libvirtd.qemu(self.format))
    }
}
