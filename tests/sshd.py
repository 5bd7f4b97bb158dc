"""A real OpenSSH server on loopback, with one client key per kind of device that the tests need."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PATH = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
SSHD = shutil.which("sshd", path=PATH)


@dataclass
class Server:
    """Devices by alias: `ssh -F config ALIAS`. Each has a folder of its own where the agent works."""

    root: Path
    port: int
    config: Path
    aliases: list[str] = field(default_factory=list)

    def device(self, alias: str, before: str = "", *, options: str = "", authorised: bool = True) -> Path:
        """Adds a device: `before` is shell that runs ahead of every command there. Its folder is returned."""
        folder = self.root / alias
        folder.mkdir()
        key = self.root / f"{alias}.key"
        keygen("-f", str(key))
        script = self.root / f"{alias}.sh"
        script.write_text(f'export TMPDIR="{folder}"\n{before}\neval "$SSH_ORIGINAL_COMMAND"\n')
        if authorised:
            public = key.with_suffix(".key.pub").read_text().strip()
            with (self.root / "authorized_keys").open("a") as file:
                file.write(f'command="sh {script}" {public}\n')
        with self.config.open("a") as file:
            file.write(
                f"Host {alias}\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
                f"  IdentityFile {key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
                f"  GlobalKnownHostsFile none\n  HostKeyAlias device\n"
                f"{options or f'  UserKnownHostsFile {self.root}/known'}\n"
            )
        self.aliases.append(alias)
        return folder

    @property
    def command(self) -> str:
        """What EDGESTILL_SSH is set to."""
        return f"ssh -F {self.config}"


def keygen(*arguments: str) -> None:
    """Makes a key without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", *arguments], check=True)


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Server]:
    """Runs the server in `root` until the block ends.

    Skips the test where OpenSSH's server is not installed.
    """
    if SSHD is None:
        pytest.skip("sshd is not installed (apt-get install openssh-server)")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keygen("-f", str(root / "host"))
    (root / "authorized_keys").write_text("")
    (root / "known").write_text("device " + " ".join((root / "host.pub").read_text().split()[:2]) + "\n")
    (root / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {root}/host\nAuthorizedKeysFile {root}/authorized_keys\n"
        f"PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin yes\nMaxStartups 50\nLogLevel ERROR\n"
    )
    log = (root / "sshd.log").open("wb")
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(root / "sshd_config")], stderr=log)
    try:
        _wait(port, process)
        yield Server(root, port, root / "ssh_config")
    finally:
        process.terminate()
        process.wait(10)
        log.close()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "sshd ended"
        time.sleep(0.05)
    raise AssertionError("sshd does not listen")


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that name the folder or work in it."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if int(place.name) != os.getpid() and (
                str(folder) in line or (place / "cwd").resolve().is_relative_to(folder)
            ):
                found.append(line)
    return found


def assert_nothing_left(folder: Path, *pids: int, seconds: float = 10.0) -> None:
    """No file in the device's folder, and no process of the agent."""
    end = time.monotonic() + seconds
    while True:
        left = [*(str(path) for path in folder.iterdir()), *processes_of(folder)]
        left += [str(pid) for pid in pids if _alive(pid)]
        if not left:
            return
        assert time.monotonic() < end, left
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PYTHON = sys.executable
