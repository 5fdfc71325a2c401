#!/bin/sh
# Makes the streams in this directory anew. Needs QEMU 10.0 (Debian: qemu-system-x86), QEMU 7.2, python3 and zstd.
#
# QEMU_7_2 is the command of the 7.2, with the -L options it needs; without it the streams of 7.2 are left as they are.
# The guest has 2 MiB of RAM and a firmware of 64 KiB that halts at once, so a stream is little but device state.
set -eu
cd "$(dirname "$0")"
qemu=${QEMU:-qemu-system-x86_64}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -c 'import sys; sys.stdout.buffer.write(bytes(i * i % 251 for i in range(32768)) + b"\xf4\xeb\xfd" * 10922 + b"\xf4\xf4")' > "$work/halt.bin"
common="-accel tcg -nodefaults -vga none -bios $work/halt.bin"

memory="-m 2"

# capture NAME VIA CAPABILITIES QEMU ARGS...
capture() {
    name=$1 via=$2 capabilities=$3
    shift 3
    # shellcheck disable=SC2086  # $common and $memory are several words
    python3 capture.py "$work/$name" "$via" "$capabilities" -- "$@" $common $memory
    zstd -q -19 -f "$work/$name" -o "$name.zst"
    chmod 644 "$name.zst"
    echo "$name: $(stat -c %s "$work/$name") bytes, $(stat -c %s "$name.zst") compressed"
}

net="-netdev user,id=n0 -device virtio-net-pci,netdev=n0,romfile="
capture i440fx-10.0.mig fd none "$qemu" -machine pc-i440fx-7.2
capture q35-10.0.mig fd none "$qemu" -machine pc-q35-10.0 -smp 2 $net -device virtio-rng-pci
capture q35-10.0-file.mig file none "$qemu" -machine pc-q35-10.0
capture suppress-vmdesc-10.0.mig fd none "$qemu" -machine pc-i440fx-7.2,suppress-vmdesc=on $net
capture uuid-10.0.mig fd validate-uuid "$qemu" -machine pc-i440fx-7.2 -uuid 6b1f0e4a-52d1-4c8f-9f3e-0a1b2c3d4e5f
capture live-10.0.mig live none "$qemu" -machine pc-q35-10.0
capture return-path-10.0.mig socket return-path "$qemu" -machine pc-q35-10.0
capture postcopy-10.0.mig socket postcopy-ram "$qemu" -machine pc-q35-10.0
capture mapped-ram-10.0.mig file mapped-ram "$qemu" -machine pc-i440fx-7.2
capture ignore-shared-10.0.mig fd x-ignore-shared "$qemu" -machine pc-i440fx-7.2
memory="-m 4M,maxmem=64M -object memory-backend-ram,id=vm0,size=2M"
capture virtio-mem-10.0.mig fd none "$qemu" -machine pc-q35-10.0 -device virtio-mem-pci,memdev=vm0
memory="-m 2"
if [ -n "${QEMU_7_2:-}" ]; then
    capture i440fx-7.2.mig fd none $QEMU_7_2 -machine pc-i440fx-7.2 $net
    capture q35-7.2.mig fd none $QEMU_7_2 -machine pc-q35-7.2 -smp 2 $net
fi
