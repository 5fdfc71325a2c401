#!/bin/sh
# Makes the Linux guest's initrd: `build-initrd.sh MODULES INITRD`.
#
# MODULES is the directory of a kernel's modules (lib/modules/VERSION); INITRD is the file to write. In it are busybox,
# `init` from here, `fill`, `witness` and `writer` compiled from their .c files and the virtio drivers with what they need,
# in the order to load them.
# Needs busybox-static, cpio, gzip, gcc.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
modules=$1
initrd=$2
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

mkdir -p "$root/bin" "$root/modules"
cp /bin/busybox "$root/bin/busybox"
install -m 755 "$here/init" "$root/init"
for program in fill witness writer; do
    gcc -O2 -static -o "$root/bin/$program" "$here/$program.c"
done

for module in \
    virtio/virtio_ring virtio/virtio virtio/virtio_pci_legacy_dev virtio/virtio_pci_modern_dev virtio/virtio_pci \
    block/virtio_blk net/core/failover net/net_failover net/virtio_net char/hw_random/virtio-rng \
    char/virtio_console virtio/virtio_balloon; do
    case $module in
    net/core/*) file=$modules/kernel/$module.ko ;;
    *) file=$modules/kernel/drivers/$module.ko ;;
    esac
    cp "$file" "$root/modules/"
    echo "${module##*/}.ko" >>"$root/modules/order"
done

(cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc --reproducible -R 0:0) | gzip -1n >"$initrd.part"
mv "$initrd.part" "$initrd"
