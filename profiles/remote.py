"""A device at the other end of ssh: one connection, one agent in one folder there, and nothing left afterwards.

The system's own `ssh` is used, with the user's configuration, keys, agents and jump hosts, because SSH libraries trip
over hardware keys; everything goes over that one connection, so a hardware key is touched once. The agent
(`profiles/agent.py`) is sent over it and never stored by hand.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import shlex
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from profiles import agent
from profiles.errors import EdgestillError, InputError, Interrupted

SSH = "EDGESTILL_SSH"
"""Environment variable with another ssh command, such as `ssh -F file`."""
_OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=15",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=3",
    "ClearAllForwardings=yes",
)
_HEARTBEAT = 10.0
_HELLO_SECONDS = 60.0
_ANSWER_SECONDS = 120.0
_FAREWELL_SECONDS = 45.0
_CHUNK = 1 << 20
_BOOT = "import os;exec(os.fdopen(0,'rb',0,closefd=False).readline())"
_SIMPLE_PATH = re.compile(r"[\w./~+@%=:-]+")


@dataclass(frozen=True)
class Host:
    """A machine to measure on.

    name: anything that ssh accepts: a host, user@host, an alias of the user's configuration, host:port. python: its
    Python >= 3.6. folder: where the agent makes its own folder; None: the machine's temporary folder. wrapper: a
    command in which TensorRT runs, `{folder}` in it is the agent's folder. workspace_mib: memory that TensorRT's
    builder may use; None: half of what is free. packages: a folder of Python packages there, from `devices prepare`.
    """

    name: str
    python: str = "python3"
    folder: str | None = None
    wrapper: str | None = None
    workspace_mib: int | None = None
    packages: str | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith("-") or any(mark.isspace() for mark in self.name):
            raise InputError(
                f'"{self.name}" is no host', where="HOST", fix="a name that ssh accepts, such as user@host"
            )
        if not _SIMPLE_PATH.fullmatch(self.python):
            raise InputError(f'"{self.python}" is no path of a Python', where="--python", fix="a path without blanks")

    @property
    def words(self) -> list[str]:
        """The host as arguments of ssh."""
        match = re.fullmatch(r"(?P<host>.+?):(?P<port>\d+)", self.name)
        bracketed = re.fullmatch(r"(?P<user>.*@)?\[(?P<host>.+)\](:(?P<port>\d+))?", self.name)
        if bracketed:
            port = ["-p", bracketed["port"]] if bracketed["port"] else []
            return [*port, "--", (bracketed["user"] or "") + bracketed["host"]]
        if match and ":" not in match["host"]:
            return ["-p", match["port"], "--", match["host"]]
        return ["--", self.name]

    @property
    def shown(self) -> str:
        """The host as a person types it behind `ssh`."""
        return shlex.join(word for word in self.words if word != "--")


class DeviceError(EdgestillError):
    """What the agent told. kind: which of its problems; see `explain_problem`."""

    def __init__(self, message: str, *, kind: str, where: str, evidence: str | None, fix: str | None) -> None:
        super().__init__(message, where=where, evidence=evidence, fix=fix)
        self.kind = kind


def _on_stderr(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")


class Link:
    """An open connection to the agent on a host. A context manager: leaving it ends the agent, and with it its folder.

    Requests are numbered and answered in order, so one thread at a time may ask; `stop` may come from any.

    Args:
        host: the machine.
        tell: told, a sentence each, what is left on the host at the end in spite of all.

    Raises:
        EdgestillError: the host cannot be reached or has no Python; see `explain`.
    """

    def __init__(self, host: Host, tell: Callable[[str], None] = _on_stderr) -> None:
        self.host = host
        self._tell = tell
        self._number = 0
        self._lost: str | None = None
        self._left: list[str] | None = None
        self._closed = False
        self._errors = bytearray()
        self._buffer = b""
        self._write_lock = threading.Lock()
        self._closing = threading.Event()
        self.folder: str | None = None
        self._process = _start_ssh(host)
        threads = [threading.Thread(target=work, daemon=True) for work in (self._collect_errors, self._beat)]
        self._collector = threads[0]
        try:
            threads[0].start()
            self._send_source()
            self.facts: dict[str, Any] = self._hello()
            self.folder = str(self.facts.pop("folder"))
            threads[1].start()
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self.close()

    # -- requests

    def ask(self, do: str, /, *, patience: float = _ANSWER_SECONDS, **request: Any) -> dict[str, Any]:
        """The agent's answer to one request.

        Raises:
            EdgestillError: what the agent told, or that the link broke. After `patience` seconds without an answer the
                link is closed, since nobody knows what the device does.
            Interrupted: `stop` was called.
        """
        return self._answer(do, self._request(do, request), patience)

    def put(self, name: str, data: bytes | Path, *, more: bool = False) -> None:
        """Stores bytes or a file as `name` in the agent's folder; `more` appends."""
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        number = self._request("put", {"name": name, "bytes": size, "more": more})
        with self._whole("put"):
            for piece in _pieces(data):
                self._write(piece)
        self._answer("put", number, _ANSWER_SECONDS + size / 1e5)

    def get(self, name: str, target: Path) -> None:
        """Writes the file `name` of the agent's folder to `target`."""
        answer = self.ask("get", name=name)
        with self._whole("get"), target.open("wb") as file:
            for piece in self._payload(int(answer["payload"]), "get"):
                file.write(piece)

    def stop(self) -> None:
        """Tells the agent to end what it does and itself, at once; does not wait for it."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._number += 1
        # a thread that waits to send more than the device takes is stopped with ssh
        if not self._write_lock.acquire(timeout=2.0):
            self._process.kill()
            return
        try:
            assert self._process.stdin is not None
            # a link that is gone already takes no good-bye; what is left there is found by `sweep`
            with contextlib.suppress(OSError, ValueError):
                self._process.stdin.write(json.dumps({"do": "bye", "n": self._number}).encode() + b"\n")
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        finally:
            self._write_lock.release()

    def close(self) -> None:
        """Ends the agent and waits until it has removed its folder; after a broken link, makes sure that it did."""
        if self._closed:
            return
        self._closed = True
        self.stop()
        left = self._farewell()
        self._kill()
        if left is None and self.folder is not None:
            left = sweep(self.host, self.folder)
        for text in left or ():
            self._tell(f"{self.host.name}: {text}")

    def _farewell(self) -> list[str] | None:
        """What the agent leaves, in its own last words; None: it had none."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        try:
            while self._left is None:
                with contextlib.suppress(ValueError):  # what is left of an answer that was not read to its end
                    self._take(json.loads(self._line(deadline, "bye")))
            self._process.wait(timeout=_FAREWELL_SECONDS)
        except (EdgestillError, OSError, ValueError, subprocess.TimeoutExpired):
            pass  # it died without last words, which the answer below tells
        return self._left

    def _take(self, answer: Any) -> None:
        if isinstance(answer, dict) and "left" in answer:
            self._left = list(answer["left"])

    # -- the connection

    def _send_source(self) -> None:
        source = Path(agent.__file__).read_text(encoding="utf-8")
        given: dict[str, Any] = {"SOURCE": source, "BASE": self.host.folder, "PACKAGES": self.host.packages}
        with contextlib.suppress(OSError, EdgestillError):  # what went wrong stands in ssh's own words
            self._write(boot_line(given))

    def _hello(self) -> dict[str, Any]:
        deadline = time.monotonic() + _HELLO_SECONDS
        noise: list[str] = []
        while True:
            # a login script may print something before
            line = self._line(deadline, "connect", noise)
            try:
                hello = json.loads(line)
            except ValueError:
                hello = None
            if isinstance(hello, dict) and "agent" in hello:
                break
            noise.append(line.decode("utf-8", "replace").strip())
        if "error" in hello:
            raise self.explained(hello["error"])
        del hello["agent"]
        return hello

    def _request(self, do: str, request: Mapping[str, Any]) -> int:
        """Sends a request and returns its number."""
        if self._lost is not None:
            raise EdgestillError(f"the link to {self.host.name} was closed", where=self.host.name, evidence=self._lost)
        self._number += 1
        number = self._number
        self._write(json.dumps({"do": do, "n": number, **request}).encode() + b"\n")
        return number

    def _answer(self, do: str, number: int, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            answer: dict[str, Any] = json.loads(self._line(deadline, do) or b"{}")
            self._take(answer)
            if self._closing.is_set():
                raise self._stopped()
            if answer.get("n") == number:
                break
            # of a request that nobody waits for any more, as after Ctrl-C
            for _ in self._payload(int(answer.get("payload", 0)), do):
                pass
        if "error" in answer:
            raise self.explained(answer["error"])
        del answer["n"]
        return answer

    def _payload(self, size: int, doing: str) -> Iterator[bytes]:
        while size:
            if not self._buffer:
                self._fill(time.monotonic() + _ANSWER_SECONDS, doing)
            piece, self._buffer = self._buffer[:size], self._buffer[size:]
            size -= len(piece)
            yield piece

    @contextlib.contextmanager
    def _whole(self, doing: str) -> Iterator[None]:
        """What is sent or read in here cannot be left half done: the next request would be taken for its rest."""
        try:
            yield
        except BaseException:
            self._lost = self._lost or f'"{doing}" was broken off'
            raise

    def _stopped(self) -> Interrupted:
        return Interrupted("what ran on the device was stopped", where=self.host.name)

    def _line(self, deadline: float, doing: str, noise: Sequence[str] = ()) -> bytes:
        while b"\n" not in self._buffer:
            self._fill(deadline, doing, noise)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _fill(self, deadline: float, doing: str, noise: Sequence[str] = ()) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        ready = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            # an answer that came later would be none to what is asked next
            self._lost = f'no answer to "{doing}" in time'
            self._process.kill()
            raise EdgestillError(
                f"{self.host.name} did not answer in time, and the link was closed",
                where=self.host.name,
                evidence=self._lost,
                fix=f"ssh {self.host.shown} uptime",
            )
        data = os.read(descriptor, _CHUNK)
        if not data:
            raise self._broken(noise)
        self._buffer += data

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            with self._write_lock:
                self._process.stdin.write(data)
                self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise self._broken() from error

    def _beat(self) -> None:
        """Tells the agent that the host still is there, while neither side has anything to say."""
        while not self._closing.wait(_HEARTBEAT):
            try:
                self._write(b'{"do": "ping"}\n')
            except EdgestillError:
                return

    def _collect_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors += line
            del self._errors[:-65536]

    def _broken(self, noise: Sequence[str] = ()) -> EdgestillError:
        if self._closing.is_set():
            return self._stopped()
        with contextlib.suppress(subprocess.TimeoutExpired):  # an ssh that lives on has no status, and that is told
            self._process.wait(timeout=5)
        self._collector.join(2.0)
        text = self._errors.decode("utf-8", "replace")
        return explain_ssh(self.host, self._process.poll(), text, noise, started=self.folder is not None)

    def explained(self, told: Mapping[str, str]) -> DeviceError:
        """An agent's problem, with what its user can do about it."""
        return explain_problem(self.host, told["kind"], told["message"], told["evidence"])

    def _kill(self) -> None:
        self._closing.set()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._collector.join(2.0)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # bytes that could not be sent go with the process
                    stream.close()


def boot_line(given: Mapping[str, Any]) -> bytes:
    """What the remote Python reads and runs first: the agent, packed into one line of Python, and its settings."""
    packed = base64.b85encode(zlib.compress(json.dumps(given).encode(), 9)).decode()
    # the working folder is the user's home, where a file may be called like a module
    return (
        "import sys,zlib,base64,json;sys.path[:]=[p for p in sys.path if p];"
        f"globals().update(json.loads(zlib.decompress(base64.b85decode({packed!r})).decode()));"
        "exec(compile(SOURCE,'agent.py','exec'))\n"
    ).encode()


def ssh_command(host: Host, *command: str) -> list[str]:
    """ssh, never asking anything, with one remote command."""
    own = shlex.split(os.environ.get(SSH) or "ssh")
    options = [word for option in _OPTIONS for word in ("-o", option)]
    return [*own, "-T", *options, *host.words, *command]


def _start_ssh(host: Host) -> subprocess.Popen[bytes]:
    command = ssh_command(host, f'exec {host.python} -B -c "{_BOOT}"')
    try:
        # a group of its own: Ctrl-C is for this process, which then says good-bye
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
    except OSError as error:
        own = os.environ.get(SSH)
        raise EdgestillError(
            f"{SSH} names a program that is not here" if own else "there is no ssh on this machine",
            where=f"{SSH}={own}" if own else command[0],
            evidence=str(error),
            fix=f'{SSH}="ssh -F file", or unset it' if own else "install OpenSSH's client",
        ) from error


def sweep(host: Host, folder: str) -> list[str]:
    """Makes sure that an agent whose link broke is gone from the host, by a connection of its own.

    Returns:
        What is left there, a sentence each.
    """
    source = Path(agent.__file__).read_text(encoding="utf-8")
    command = ssh_command(host, f'exec {host.python} -B -c "{_BOOT}"')
    line = boot_line({"SOURCE": source, "SWEEP": folder})
    try:
        done = subprocess.run(command, input=line, capture_output=True, timeout=60, check=False)
        return list(json.loads(done.stdout.splitlines()[-1])["left"])
    except (OSError, ValueError, IndexError, KeyError, subprocess.TimeoutExpired):
        return [
            f"the folder {folder} and processes that work in it may be left, and ssh does not get through to look; "
            f"the agent ends and removes them by itself {agent.SILENCE:.0f} s after the link was cut, if it runs"
        ]


def _pieces(data: bytes | Path) -> Iterator[bytes]:
    if isinstance(data, bytes):
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]
        return
    with data.open("rb") as file:
        yield from iter(lambda: file.read(_CHUNK), b"")


def explain_ssh(
    host: Host, status: int | None, errors: str, noise: Iterable[str] = (), *, started: bool
) -> EdgestillError:
    """Why a connection could not be made, or why it ended.

    Args:
        host: the machine.
        status: of ssh; 255 is its own failure, others are the remote command's; negative: ssh was killed by a signal.
        errors: what ssh and the remote side wrote on standard error.
        noise: lines that came before the agent's own.
        started: whether the agent had answered before.
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = (lines or list(noise) or [f"exit status {status}"])[-1]

    def told(message: str, fix: str, pattern: str | None = None) -> EdgestillError:
        found = [line for line in lines if pattern is not None and re.search(pattern, line)]
        return EdgestillError(message, where=host.name, evidence=(found or [last])[0].strip("@ "), fix=fix)

    name = host.shown
    if started:
        # ssh says so when it loses its connection, and nothing when the remote command was killed
        cut = r"[Bb]roken pipe|closed by remote host|not responding|[Cc]onnection (?:reset|closed)|Timeout|disconnect"
        if (status is not None and status < 0) or re.search(cut, errors) or status is None:
            return told(
                "the link to the device was cut",
                "run the same command again; the agent removes its folder by itself. A run keeps the targets that it "
                "had measured and the engines that it had brought here; the target under way is measured anew",
                cut,
            )
        return told(
            "the agent on the device was killed",
            f"ssh {name} 'dmesg | tail' shows whether the memory ran out; then run the same command again",
        )
    for pattern, message, fix in (
        (
            r"REMOTE HOST IDENTIFICATION HAS CHANGED",
            "the device's host key is not the one that is known",
            f"if the device was installed anew: ssh-keygen -R {host.words[-1].rpartition('@')[2]}, then ssh {name}",
        ),
        (
            r"Host key verification failed",
            "the device's host key is not known yet",
            f"ssh {name}    and compare the key that it shows",
        ),
        (
            r"Permission denied|Too many authentication failures|no mutual signature",
            "the device does not let this user in",
            f"ssh-copy-id {name}",
        ),
        (
            r"Can't open user config file|Bad configuration option|terminating, \d+ bad configuration",
            "ssh does not accept its configuration",
            f"ssh {name}    until it works" + (f"; {SSH} is {os.environ[SSH]}" if os.environ.get(SSH) else ""),
        ),
        (r"Could not resolve hostname", "there is no such host", f"ssh {name}    with the name that works"),
        (
            r"refused|timed out|No route to host|unreachable|kex_exchange|[Cc]onnection (?:closed|reset)|UNKNOWN port",
            "the device cannot be reached",
            f"ssh {name}    until it works; is the device on and its ssh server running?",
        ),
        (
            r"not found|No such file or directory|not recognized",
            f"the device has no {host.python}",
            f"edgestill devices detect {host.name} --python /path/to/python3",
        ),
        (
            r"SyntaxError|No module named",
            f"{host.python} on the device cannot run the agent, which needs Python 3.6 or newer",
            f"edgestill devices detect {host.name} --python /path/to/python3",
        ),
    ):
        if re.search(pattern, errors):
            return told(message, fix, pattern)
    if status in (126, 127):
        return told(
            f"the device has no {host.python}", f"edgestill devices detect {host.name} --python /path/to/python3"
        )
    return told("the agent cannot start on the device", f"ssh {name} {host.python} --version")


def explain_problem(host: Host, kind: str, message: str, evidence: str) -> DeviceError:
    """What the agent told, with one command that helps; where it has to do with a limit of the device."""
    name = host.shown
    fixes = {
        "disk_full": f"ssh {name} df -h    or another disk: edgestill devices detect {host.name} --folder /mnt/ssd",
        "builder_memory": f"a smaller workspace: edgestill devices detect {host.name} --workspace-mib 256; or add swap",
        "crashed": "another runtime or version; the model runs in a process of its own, the others are not concerned",
        "hung": "raise measure.timeout_seconds if one query may take that long, else report it to the runtime's makers",
        "killed": f"ssh {name} 'dmesg | tail' shows whether the memory ran out",
        "unsupported_operator": "edgestill check MODEL.onnx --device NAME    says which operators the device takes",
        "other_engine": "delete the run's folder measurements; the engine is built anew on the device",
        "sudo_needed": f"ssh -t {name} sudo jetson_clocks    then the same command without --lock-clocks",
        "no_clocks": "leave --lock-clocks out",
        "no_gpu": f"ssh {name} nvidia-smi    or: edgestill devices detect {host.name} --wrapper 'docker run ...'",
    }
    return DeviceError(message, kind=kind, where=host.name, evidence=evidence or None, fix=fixes.get(kind))
