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
from collections.abc import Iterator, Sequence
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
    address: str
    home: Path
    """Its own keys and settings; several servers may share `root` and `config`."""
    aliases: list[str] = field(default_factory=list)

    def device(self, alias: str, before: str = "", *, options: str = "", authorised: bool = True) -> Path:
        """Adds a device: `before` is shell that runs ahead of every command there. Its folder is returned."""
        folder = self.root / alias
        folder.mkdir(exist_ok=True)
        key = self.root / f"{alias}.key"
        keygen("-f", str(key))
        script = self.root / f"{alias}.sh"
        script.write_text(f'export TMPDIR="{folder}"\n{before}\neval "$SSH_ORIGINAL_COMMAND"\n')
        if authorised:
            public = key.with_suffix(".key.pub").read_text().strip()
            with (self.home / "authorized_keys").open("a") as file:
                file.write(f'command="sh {script}" {public}\n')
        with self.config.open("a") as file:
            file.write(
                f"Host {alias}\n  HostName {self.address}\n  Port {self.port}\n  User {getpass.getuser()}\n"
                f"  IdentityFile {key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
                f"  GlobalKnownHostsFile none\n  HostKeyAlias device\n"
                f"{options or f'  UserKnownHostsFile {self.home}/known'}\n"
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
def serve(
    root: Path, *, home: Path | None = None, address: str = "127.0.0.1", inside: tuple[str, ...] = ()
) -> Iterator[Server]:
    """Runs the server in `root` until the block ends; its own files lie in `home`.

    address: that it listens on. inside: a command that the server runs in, such as one that enters a namespace.
    Skips the test where OpenSSH's server is not installed.
    """
    devices, root = root, home or root
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
        f"Port {port}\nListenAddress {address}\nHostKey {root}/host\nAuthorizedKeysFile {root}/authorized_keys\n"
        f"PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin yes\nMaxStartups 50\nLogLevel ERROR\n"
    )
    log = (root / "sshd.log").open("wb")
    process = subprocess.Popen([*inside, SSHD, "-D", "-e", "-f", str(root / "sshd_config")], stderr=log)
    try:
        _wait(address, port, process)
        yield Server(devices, port, devices / "ssh_config", address, root)
    finally:
        process.terminate()
        process.wait(10)
        log.close()


@contextlib.contextmanager
def serve_apart(root: Path, *names: str) -> Iterator[dict[str, Server]]:
    """A server for each name in a network of its own, as on as many machines.

    Where networks cannot be made (that takes root and `ip netns`), one server on loopback stands for all.
    """
    with contextlib.ExitStack() as stack:
        places = stack.enter_context(_networks(names))
        if not places:
            alone = stack.enter_context(serve(root))
            yield dict.fromkeys(names, alone)
            return
        servers = {}
        for name, (network, address) in places.items():
            home = root / f"sshd-{name}"
            home.mkdir()
            inside = ("ip", "netns", "exec", network)
            servers[name] = stack.enter_context(serve(root, home=home, address=address, inside=inside))
        yield servers


@contextlib.contextmanager
def _networks(names: Sequence[str]) -> Iterator[dict[str, tuple[str, str]]]:
    """Network namespaces, each joined to this one by a pair of interfaces: its name and its address; {} without."""
    tool = shutil.which("ip", path=PATH)
    made: list[str] = []
    found = {}

    def ip(*words: str) -> None:
        assert tool is not None
        subprocess.run([tool, *words], check=True, capture_output=True)

    try:
        for index, name in enumerate(names if tool is not None and os.getuid() == 0 else ()):
            network, link = f"edgestill-{os.getpid()}-{name}", f"es{os.getpid()}{index}"
            # 198.18.0.0/15 is set aside for such tests (RFC 2544)
            near, far = (f"198.18.{os.getpid() % 256}.{4 * index + host}" for host in (1, 2))
            ip("netns", "add", network)
            made.append(network)
            ip("link", "add", link, "type", "veth", "peer", "name", f"{link}p", "netns", network)
            ip("address", "add", f"{near}/30", "dev", link)
            ip("link", "set", link, "up")
            ip("-n", network, "address", "add", f"{far}/30", "dev", f"{link}p")
            ip("-n", network, "link", "set", f"{link}p", "up")
            ip("-n", network, "link", "set", "lo", "up")
            found[name] = (network, far)
    except (OSError, subprocess.CalledProcessError):
        found = {}
    try:
        yield found
    finally:
        for network in made:  # its interfaces, and their other ends here, go with it
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", network)


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[bool]:
    """A file system of so many KiB on the folder, which is made; whether that worked (it takes root)."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def _wait(address: str, port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex((address, port)) == 0:
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
