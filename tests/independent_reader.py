#!/usr/bin/env python3
"""Reads vmstow images by spec/container.md alone, sharing nothing with the Rust code. Needs Python 3 and `zstd`.

    independent_reader.py list IMAGE
    independent_reader.py verify IMAGE...       one line for each: "FILE: good" or "FILE: refused: why"
    independent_reader.py extract IMAGE         the stream to stdout

The parent of a delta is looked for in the delta's directory.
"""
import glob, hashlib, json, os, struct, subprocess, sys, tempfile, uuid

KNOWN = {b"HEAD": 1, b"XML ": 1, b"MANI": 1, b"CHNK": 1, b"PMAP": 0, b"SIGN": 0, b"WSET": 0, b"DIR ": 1, b"FOOT": 1, b"TWIN": 1, b"DATA": 1}
TABLE = []
for n in range(256):
    for _ in range(8):
        n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    TABLE.append(n)


class Refused(Exception):
    pass


def need(condition, why, at=0):
    if not condition:
        raise Refused(f"{why} at file offset {at:#x}")


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def sha256(data):
    return hashlib.sha256(data).digest()


def u32(data, at):
    return struct.unpack_from("<I", data, at)[0]


def u64(data, at):
    return struct.unpack_from("<Q", data, at)[0]


def section(data, at, length, kind):
    """§3: the bytes of the section at `at`, checked."""
    need(length >= 40 and at + length <= len(data), "a section outside the file", at)
    s = data[at : at + length]
    need(s[0:4] == b"\x5b\x2a\x4d\x18" and s[8:16] == b"VMSTOW\x1a\x0a", "no section", at)
    flags = struct.unpack_from("<H", s, 22)[0]
    need(s[16:20] == kind, "another section type", at)
    need(kind in KNOWN or not flags & 1, "an unknown critical section", at)
    need(flags == KNOWN.get(kind, 0), "wrong flags", at)
    need(kind not in KNOWN or s[20:22] == b"\1\0", "an unknown section version", at)
    need(u32(s, 4) + 8 == u64(s, 24) + 40 == u32(s, length - 8) == length, "lengths that disagree", at)
    need(crc32c(s[:-4]) == u32(s, length - 4), "a wrong section checksum", at)
    return s


def directory(data, foot, foot_at):
    """§8: [(type, generation, offset, length, sha256, state)], held against every rule."""
    at, length = u64(foot, 176), u64(foot, 184)
    need(at + length == foot_at, "a directory that is not before the footer", at)
    d = section(data, at, length, b"DIR ")
    need(sha256(d) == foot[192:224], "a wrong directory digest", at)
    need(u32(d, 36) == 64 and u32(d, 32) <= 65536 and 48 + 64 * u32(d, 32) == length, "a wrong ENTRY_COUNT", at)
    entries = []
    for e in range(40, length - 8, 64):
        need(d[e + 60 : e + 64] == bytes(4) and u32(d, e + 56) < 2, "a wrong directory entry", at)
        entries.append((d[e : e + 4], u32(d, e + 4), u64(d, e + 8), u64(d, e + 16), d[e + 24 : e + 56], u32(d, e + 56)))
    is_zstd, payload, payload_len = foot[36] == 1, u64(foot, 152), u64(foot, 160)
    end, generation, previous, footer_at = 0, 1, None, 0
    if is_zstd:
        need(entries and entries[0][0] == b"HEAD", "no HEAD")
        need(entries[0][2] == 0 and entries[0][3] == payload, "a payload that does not follow HEAD")
    else:
        need(payload == 0, "a payload that is not at 0")
    for n, (kind, gen, offset, length, _, _) in enumerate(entries):
        if not (is_zstd and n == 0):
            need(offset == (end or payload + payload_len), "a gap or an overlap", offset)
            end = offset + length
        need(gen == generation and (kind == b"FOOT") == (previous == b"DIR "), "generations out of order", offset)
        need(kind not in (b"CHNK", b"TWIN") or gen == 1, "a second chunk table", offset)
        need(kind != b"DATA", "a DATA section in the directory", offset)
        need(kind != b"HEAD" or (is_zstd and n == 0), "a second HEAD", offset)
        if kind == b"FOOT":
            generation, footer_at = generation + 1, offset
        previous = kind
    need(end == at and previous != b"DIR ", "a gap before the directory", at)
    need(generation == u32(foot, 144) and footer_at == u64(foot, 264), "a wrong GENERATION", foot_at)
    live = [e[0] for e in entries if e[5]]
    for kind, counts in {b"HEAD": [int(is_zstd)], b"XML ": [1], b"MANI": [1], b"CHNK": [1], b"PMAP": [0, 1], b"WSET": [0, 1],
                         b"DIR ": [0], b"FOOT": [0], b"TWIN": [u64(foot, 40) & 1]}.items():
        need(live.count(kind) in counts, f"{live.count(kind)} live sections {kind}")
    return entries


def frame_len(f):
    """RFC 8878: (length, content size) of the zstd frame at the start of `f`."""
    need(len(f) > 5 and f[:4] == b"\x28\xb5\x2f\xfd" and not f[4] & 8, "no zstd frame")
    single, dictionary, size = f[4] >> 5 & 1, [0, 1, 2, 4][f[4] & 3], [f[4] >> 5 & 1, 2, 4, 8][f[4] >> 6]
    at = 5 + (1 - single) + dictionary
    need(size and not any(f[at - dictionary : at]), "a frame without content size or with a dictionary")
    content = int.from_bytes(f[at : at + size], "little") + (256 if size == 2 else 0)
    at, last = at + size, False
    while not last:
        need(at + 3 <= len(f), "a frame that is cut off")
        block = int.from_bytes(f[at : at + 3], "little")
        last, kind = block & 1, block >> 1 & 3
        need(kind != 3, "a reserved zstd block")
        at += 3 + (1 if kind == 1 else block >> 3)
    return at + (4 if f[4] & 4 else 0), content


def unpacked(frame, raw_len, at, *prefix):
    """What the one zstd frame decodes to, behind the prefix if there is one."""
    need(frame_len(frame) == (len(frame), raw_len), "not one frame", at)
    with tempfile.NamedTemporaryFile() as file:
        for twin in prefix:
            file.write(twin)
        file.flush()
        words = [f"--patch-from={file.name}" for _ in prefix]
        done = subprocess.run(["zstd", "-dcq", *words], input=frame, capture_output=True)
    need(done.returncode == 0, "a frame that does not decode", at)
    return done.stdout


def twins(data, foot, entries, count):
    """§16: for each chunk of a delta the number of its twin, and the parent's name."""
    at, length = next((e[2], e[3]) for e in entries if e[0] == b"TWIN")
    t = section(data, at, length, b"TWIN")
    name_len = struct.unpack_from("<H", t, 36)[0]
    need(u32(t, 32) == count and t[38:40] == bytes(2) and name_len <= 255, "a wrong TWIN", at)
    need(length == 48 + name_len + 4 * count, "a wrong length of TWIN", at)
    name = t[40 : 40 + name_len].decode()
    need(name not in (".", "..") and "/" not in name and "\0" not in name, "a name that is none", at)
    return struct.unpack_from(f"<{count}I", t, 40 + name_len)


def chunks_of_parent(foot, path, depth):
    """§16: the raw bytes of every chunk of a delta's parent."""
    need(depth < 16, "more than 16 deltas in a row")
    for other in sorted(glob.glob(os.path.join(os.path.dirname(path) or ".", "*.stow"))):
        with open(other, "rb") as file:
            data = file.read()
        if data[-448:-432] == foot[96:112] and data[-288:-256] == foot[112:144]:
            theirs = footer(data, len(data))
            entries = directory(data, theirs, len(data) - 512)
            return list(chunks(data, theirs, entries, other, depth + 1))
    raise Refused("a delta without its parent")


def chunks(data, foot, entries, path, depth=0):
    """§6, §16: yields the raw bytes of every chunk, verified."""
    at, length = next((e[2], e[3]) for e in entries if e[0] == b"CHNK")
    t = section(data, at, length, b"CHNK")
    count, pages, largest, stream_len = u64(t, 40), u32(t, 48), u32(t, 52), u64(t, 56)
    need(u32(t, 32) == 1 and u32(t, 36) == 4096 and largest <= 64 << 20, "an unknown chunk table", at)
    need(count and pages == -(-count // 4096) and length == 104 + 32 * pages + 64 * count, "wrong counts", at)
    need(sha256(t[96 : 96 + 32 * pages]) == t[64:96], "a wrong root", at)
    digest = sha256(b"vmstow image digest\0" + t[32:36] + foot[80:96] + t[40:48] + t[56:64] + t[64:96])
    need(digest == foot[224:256] and stream_len == u64(foot, 168), "another image digest", at)
    layout, end, stream_at = foot[36], u64(foot, 152), 0
    payload_end = end + u64(foot, 160)
    table = [t[e : e + 64] for e in range(96 + 32 * pages, length - 8, 64)]
    is_delta, twin_of, around = u64(foot, 40) == 1, [None] * count, 0
    if is_delta:
        ids = uuid.UUID(bytes=foot[64:80]), uuid.UUID(bytes=foot[96:112]), foot[112:144].hex()
        text = b"vmstow: this is the delta %s; it needs its parent, image %s with digest sha256:%s\n"
        text %= tuple(str(one).encode() for one in ids)
        text = b"\x28\xb5\x2f\xfd\x20" + bytes([len(text)]) + (len(text) * 8 + 1).to_bytes(3, "little") + text
        need(data[end : end + len(text)] == text, "a wrong text", end)
        twin_of, parent, end = twins(data, foot, entries, count), chunks_of_parent(foot, path, depth), end + len(text)
    for n in range(pages):
        page = b"".join(e[20:24] + e[32:64] for e in table[4096 * n : 4096 * (n + 1)])
        need(sha256(page) == t[96 + 32 * n : 128 + 32 * n], "a wrong table page digest", at)
    for e, twin in zip(table, twin_of):
        offset, stored_len, raw_len, kind = u64(e, 0), u32(e, 16), u32(e, 20), e[24]
        need(u64(e, 8) == stream_at and 1 <= raw_len <= largest, "a wrong chunk entry", offset)
        need(e[25:28] == bytes(3) and kind in ((1, 3, 4) if is_delta else (1 if layout == 1 else 2,)), "a wrong KIND", offset)
        need((stored_len == 0) == (kind == 4), "a wrong STORED_LEN", offset)
        if is_delta:
            need((kind == 1) == (twin == 0xFFFFFFFF) and (kind == 1 or twin < len(parent)), "a wrong twin", offset)
            if kind != 4:
                section(data, end, stored_len + 40, b"DATA")
                end, around = end + 32, 8
            else:
                around = 0
        need(offset == end or (layout == 3 and offset > end), "a gap between chunks", offset)
        need(offset + stored_len + around <= payload_end, "a chunk outside the payload", offset)
        need(not any(data[end:offset]), "a gap that is not zero", offset)
        limit = raw_len + raw_len // 128 + 256
        need(stored_len <= limit if layout == 1 else stored_len == raw_len, "a wrong STORED_LEN", offset)
        stored = data[offset : offset + stored_len]
        need(crc32c(stored) == u32(e, 28), "a wrong chunk checksum", offset)
        raw = stored
        if kind == 1:
            raw = unpacked(stored, raw_len, offset)
        elif kind == 3:
            raw = unpacked(stored, raw_len, offset, parent[twin])
        elif kind == 4:
            raw = parent[twin]
        need(len(raw) == raw_len and sha256(raw) == e[32:64], "a wrong chunk digest", offset)
        yield raw
        end, stream_at = offset + stored_len + around, stream_at + raw_len
    need(stream_at == stream_len, "a wrong STREAM_LEN", at)
    need(end == payload_end or (layout == 3 and not any(data[end:payload_end])), "payload behind the last chunk", end)


def footer(data, end):
    need(end >= 512, "a file that is too short")
    foot = data[end - 512 : end]
    need(foot[0:4] == b"\x5b\x2a\x4d\x18" and foot[8:20] == b"VMSTOW\x1a\x0aFOOT", "no footer", end - 512)
    need(u32(foot, 32) == 1, "an unknown FORMAT_VERSION", end - 512)
    section(data, end - 512, 512, b"FOOT")
    need(u64(foot, 40) in (0, 1), "an unknown incompatible feature", end - 512)
    if u64(foot, 40):
        need(foot[36] == 1 and any(foot[96:112]) and foot[96:112] != foot[64:80], "a wrong delta", end - 512)
    else:
        need(not any(foot[96:144]), "a parent of no delta", end - 512)
    need(foot[36] in (1, 2, 3) and u64(foot, 256) == end - 512, "a wrong footer", end - 512)
    need(not any(foot[37:40] + foot[148:152] + foot[272:504]), "a footer that is not zero", end - 512)
    return foot


def page_map(p, at, raw_lens):
    """§7."""
    count, runs, list_len = u32(p, 32), u64(p, 40), u64(p, 48)
    need(u32(p, 36) == 4096 and count <= 65535 and len(p) == 64 + list_len + 32 * runs, "a wrong page map", at)
    lengths, named, pos = [], [[] for _ in range(count)], 56
    for _ in range(count):
        lengths.append(-(-u64(p, pos + 1 + p[pos]) // 4096))
        pos += 9 + p[pos]
    need(pos == 56 + list_len, "a wrong block list", at)
    for r in range(pos, len(p) - 8, 32):
        block, kind, zero, pages, first, chunk, body, bits = struct.unpack_from("<HBBIQIIQ", p, r)
        need(block < count and kind < 3 and not zero and pages, "a wrong run", at)
        need(not (chunk or body or bits) if kind == 0 else pages <= 64 and bits >> pages == 0, "a wrong run", at)
        need(first + pages <= lengths[block], "a run outside its block", at)
        full = pages if kind == 2 else bits.bit_count()
        end = body + 4096 * full + (0 if kind == 2 else 8 * (pages - 1) + pages - full)
        need(kind == 0 or (chunk < len(raw_lens) and end <= raw_lens[chunk]), "a run outside its chunk", at)
        named[block].append((first, first + pages))
    for length, runs in zip(lengths, named):
        end = 0
        for first, behind in sorted(runs):
            end = max(end, behind) if first <= end else end
        need(end == length, "a page that no run names", at)


def read(data, path):
    """Everything, verified: (footer, directory, stream)."""
    foot = footer(data, len(data))
    entries = directory(data, foot, len(data) - 512)
    for kind, generation, at, length, digest, state in entries:
        s = section(data, at, length, kind)
        need(sha256(s) == digest, "a wrong section digest", at)
        if kind == b"FOOT":
            earlier = footer(data, at + 512)
            same = earlier[36:48] + earlier[64:144] + earlier[152:176] + earlier[224:256]
            need(same == foot[36:48] + foot[64:144] + foot[152:176] + foot[224:256], "another earlier footer", at)
            need(u32(earlier, 144) == generation, "a wrong earlier GENERATION", at)
        elif kind == b"HEAD":
            need(u32(s, 32) == 1 and s[36:40] == b"\1\0\0\0" and s[40:48] == foot[40:48], "a wrong HEAD", at)
            need(s[48:80] == foot[64:96] and s[92:96] == bytes(4), "a HEAD of another image", at)
            need(104 + u32(s, 84) + u32(s, 88) == length and u32(s, 80) <= 64 << 20, "wrong lengths in HEAD", at)
            table = next(e[2] for e in entries if e[0] == b"CHNK")
            need(u32(s, 80) >= u32(data, table + 52), "a MAX_CHUNK_LEN that is too small", at)
        elif kind == b"XML " and state:
            need(b"<!DOCTYPE" not in s and s[32:-8].decode() is not None, "XML with a DOCTYPE", at)
        elif kind == b"MANI" and state:
            need(json.loads(s[32:-8])["schema"] == 1, "an unknown manifest schema", at)
        elif kind == b"SIGN" and state:
            need(48 + u32(s, 32) + u32(s, 36) == length, "wrong lengths in SIGN", at)
    raw = list(chunks(data, foot, entries, path))
    for kind, _, at, length, _, state in entries:
        if kind == b"WSET" and state:
            chosen = struct.unpack_from(f"<{u32(section(data, at, length, kind), 32)}I", data, at + 40)
            need(48 + 4 * len(chosen) == length and data[at + 36:at + 40] == bytes(4), "a wrong length in WSET", at)
            need(len(set(chosen)) == len(chosen) and all(one < len(raw) for one in chosen), "a wrong chunk in WSET", at)
        if kind == b"PMAP" and state:
            page_map(section(data, at, length, kind), at, [len(chunk) for chunk in raw])
    return foot, entries, b"".join(raw)


def main(command, *paths):
    result = 0
    for path in paths:
        with open(path, "rb") as file:
            data = file.read()
        try:
            foot, entries, stream = read(data, path)
        except (Refused, ValueError, KeyError, struct.error, IndexError) as why:
            print(f"{path}: refused: {why}", file=sys.stdout if command == "verify" else sys.stderr)
            result = 3
            continue
        if command == "verify":
            print(f"{path}: good")
        elif command == "extract":
            sys.stdout.buffer.write(stream)
        elif command == "list":
            print(f"generation {u32(foot, 144)} image-digest sha256:{foot[224:256].hex()} stream {len(stream)} bytes")
            for kind, generation, at, length, _, state in entries:
                print(f"{at:#10x} {length:8} {kind.decode()} generation {generation} {'live' if state else 'superseded'}")
    return result


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
