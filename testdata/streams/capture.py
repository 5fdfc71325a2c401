#!/usr/bin/env python3
"""Starts a QEMU, stops its guest, and saves its migration stream: capture.py OUT VIA CAPABILITIES -- QEMU ARGS...

VIA is `fd` (a pipe), `file` (QEMU writes OUT itself), `socket` (a unix socket pair; the capture ends after a second
of silence, since a source with a return path waits for an answer that never comes), or `live` (a pipe, and the guest
is not stopped before). CAPABILITIES is a comma-separated list or `none`.
"""
import array, json, os, socket, subprocess, sys

out, via, capabilities = sys.argv[1:4]
qemu = sys.argv[sys.argv.index("--") + 1:]
ours, theirs = socket.socketpair()
process = subprocess.Popen(
    qemu + ["-display", "none", "-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"],
    pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
theirs.close()
lines = ours.makefile("r")


def execute(command, fd=None, **arguments):
    request = json.dumps({"execute": command, "arguments": arguments}).encode()
    ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    ours.sendmsg([request], ancillary)
    while True:
        line = lines.readline()
        if not line:
            raise SystemExit("QEMU ended")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"{command}: {answer['error']['desc']}")
        if "return" in answer:
            return answer["return"]


def wait_for_completion():
    while True:
        status = execute("query-migrate").get("status")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            raise SystemExit(f"migration {status}")


try:
    lines.readline()
    execute("qmp_capabilities")
    if via != "live":
        execute("stop")
    if capabilities != "none":
        wanted = [{"capability": name, "state": True} for name in capabilities.split(",")]
        execute("migrate-set-capabilities", capabilities=wanted)
    execute("migrate-set-parameters", **{"max-bandwidth": 0})
    if via == "file":
        execute("migrate", uri=f"file:{out}")
        wait_for_completion()
    else:
        if via == "socket":
            reader, writer = socket.socketpair()
            reader.settimeout(1)
            read = lambda: reader.recv(1 << 20)
            execute("getfd", fd=writer.fileno(), fdname="out")
            writer.close()
        else:
            reader, writer = os.pipe()
            read = lambda: os.read(reader, 1 << 20)
            execute("getfd", fd=writer, fdname="out")
            os.close(writer)
        execute("migrate", uri="fd:out")
        with open(out, "wb") as file:
            try:
                while data := read():
                    file.write(data)
            except TimeoutError:
                pass
        if via != "socket":
            wait_for_completion()
finally:
    process.kill()
    process.wait()
