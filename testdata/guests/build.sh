#!/bin/sh
# Makes counter.img from counter.asm, byte for byte what is checked in: `build.sh [IMAGE]`. Needs nasm.
set -eu
here=$(dirname "$0")
image=${1:-$here/counter.img}
# nasm removes its output when it fails, so it gets a name of its own.
nasm -f bin -o "$image.part" "$here/counter.asm"
mv "$image.part" "$image"
# SeaBIOS does not read from a disk of less than one cylinder: 16 heads of 63 sectors.
truncate -s $((16 * 63 * 512)) "$image"
