"""What `edgestill devices` does with a machine that ssh reaches: looks at it, and gives it a runtime."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from profiles.device import Device, Stack
from profiles.errors import EdgestillError, InputError
from profiles.progress import Progress
from profiles.remote import Host, Link
from profiles.remote_device import recognise, remember, stack_of

PLACE = "~/.edgestill/packages"
"""Where the packages go on a prepared machine."""
NEEDED = ("onnxruntime", "numpy")
"""What ONNX Runtime needs to run a model; its other dependencies are those of its tools."""


@dataclass(frozen=True)
class Detected:
    """A machine at a host. device, stack: of the known ones; None: none that is known."""

    host: Host
    facts: dict[str, Any]
    offers: dict[str, Any]
    device: Device | None
    stack: Stack | None

    @property
    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "host": self.host.name,
            "device": self.device.name if self.device is not None else None,
            "stack": self.stack.name if self.stack is not None else None,
            "facts": self.facts,
            "offers": self.offers,
        }


def detect_host(host: Host) -> Detected:
    """What answers at a host; it is remembered.

    Raises:
        EdgestillError: it cannot be reached; see `profiles.remote`.
    """
    import shlex

    wrapper = shlex.split(host.wrapper) if host.wrapper else None
    with Link(host) as link:
        offers = link.ask(
            "offers", names=["onnxruntime", "tensorrt", "tensorrt_rtx", "trtexec"], wrapper=wrapper, patience=600
        )
        facts = {name: value for name, value in link.facts.items() if name not in ("pid", "janitor")}
    device = recognise(facts)
    found = {name: offer["version"] for name, offer in offers.items() if isinstance(offer, dict) and offer["version"]}
    versions = {
        "onnxruntime": found.get("onnxruntime"),
        "tensorrt": found.get("tensorrt") or found.get("trtexec") or found.get("wrapper tensorrt"),
        "tensorrt-rtx": found.get("tensorrt_rtx"),
    }
    stack = None
    if device is not None:
        stack = stack_of(device, facts, {name: version for name, version in versions.items() if version})
    remember(host, device.name if device is not None else None)
    return Detected(host, facts, offers, device, stack)


def prepare_host(host: Host, progress: Progress, *, wheels: Path | None = None, remove: bool = False) -> str:
    """Gives a machine ONNX Runtime: wheels for its Python are fetched here and unpacked there, without internet.

    Args:
        host: the machine; from now on it is remembered with the packages.
        progress: told what is fetched and sent.
        wheels: a folder that has the wheels already; None: pip fetches them.
        remove: remove the packages from the machine instead.

    Returns:
        What was done, in a sentence.

    Raises:
        EdgestillError: there are no wheels for that machine, or they do not work there.
    """
    bare = replace(host, packages=None)
    with Link(bare) as link, tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        if remove:
            link.ask("discard", place=PLACE)
            remember(bare, None)
            return f"removed {PLACE} from {host.name}"
        files = _matching(wheels, link.facts) if wheels is not None else _fetch(link, Path(folder), progress)
        with progress.task(f"sending to {host.name}", len(files), "wheels") as task:
            for file in files:
                link.put(file.name, file)
                task.advance(note=file.name)
        link.ask("unpack", wheels=[file.name for file in files], place=PLACE, patience=600)
        offer = link.ask("offers", names=["onnxruntime"], patience=600)["onnxruntime"]
        if not offer["version"]:
            # they go with the agent's folder; packages of an earlier call stay as they are
            raise EdgestillError(
                "onnxruntime does not work on the device",
                where=host.name,
                evidence=offer["why"],
                fix=f"edgestill devices detect {host.name} --python /path/to/another/python3",
            )
        link.ask("keep", place=PLACE)
        device = recognise(link.facts)
    remember(replace(host, packages=PLACE), device.name if device is not None else None)
    return f"onnxruntime {offer['version']} is in {PLACE} on {host.name}"


def _tags(facts: dict[str, Any]) -> tuple[str, list[str]]:
    """Python's version as pip takes it, and the platforms of wheels that run there."""
    python = ".".join(str(facts["python"]).split(".")[:2])
    machine = str(facts["machine"])
    match = re.fullmatch(r"2\.(\d+)", str(facts.get("libc", "")))
    newest = int(match.group(1)) if match else 17
    return python, [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 16, -1)] + [f"manylinux2014_{machine}"]


def _fetch(link: Link, folder: Path, progress: Progress) -> list[Path]:
    python, platforms = _tags(link.facts)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--only-binary=:all:",
        "--no-deps",
        "-d",
        str(folder),
    ]
    command += ["--implementation", "cp", "--python-version", python]
    command += [word for platform in platforms for word in ("--platform", platform)]
    with progress.task(f"fetching wheels for Python {python}", None, "wheels"):
        done = subprocess.run([*command, *NEEDED], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip gave no reason"]
        raise EdgestillError(
            f"pip finds no wheels for Python {python} on {link.facts['machine']}",
            where=link.host.name,
            evidence=lines[-1],
            fix=f"edgestill devices detect {link.host.name} --python /path/to/another/python3",
        )
    return sorted(folder.glob("*.whl"))


def _matching(folder: Path, facts: dict[str, Any]) -> list[Path]:
    """The wheels of a folder that fit a machine.

    Raises:
        InputError: one that is needed is not there.
    """
    python, _ = _tags(facts)
    tag = "cp" + python.replace(".", "")
    found = []
    for name in NEEDED:
        fitting = [
            path
            for path in sorted(folder.glob(f"{name}-*.whl"))
            if (tag in path.name or "abi3" in path.name) and str(facts["machine"]) in path.name
        ]
        if not fitting:
            raise InputError(
                f"no wheel of {name} for Python {python} on {facts['machine']}",
                where=str(folder),
                fix=f"pip download --only-binary=:all: --python-version {python} -d {folder} {name}",
            )
        found.append(fitting[-1])
    return found


def rows(found: Detected) -> Sequence[tuple[str, str]]:
    """What was found, as name and value."""
    facts = found.facts
    told = [
        ("host", found.host.name),
        ("device", f"{found.device.name} ({found.device.title})" if found.device is not None else "none that is known"),
        ("software", found.stack.name if found.stack is not None else "no stack that is known"),
        ("board", facts.get("board", "")),
        ("processor", f"{facts.get('cpu_model', '')}, {facts.get('cores', '?')} cores, {facts.get('machine', '')}"),
        ("GPU", facts.get("gpu", "")),
        ("memory", f"{facts['memory_mib'] / 1024:.1f} GiB" if "memory_mib" in facts else ""),
        ("system", f"{facts.get('system', '')}{', Jetson Linux ' + facts['l4t'] if 'l4t' in facts else ''}"),
        ("power mode", facts.get("power_mode", "")),
        ("governor", ", ".join(facts.get("governor", ()))),
        ("temperature", ", ".join(f"{name} {value:g} C" for name, value in facts.get("temperatures_c", {}).items())),
        ("Python", facts.get("python", "")),
        ("free disk", f"{found.offers['disk_free_mib'] / 1024:.1f} GiB"),
    ]
    for name, offer in found.offers.items():
        if isinstance(offer, dict):
            told.append((name, offer["version"] or f"no: {offer['why']}"))
    return [(name, value) for name, value in told if value]
