"""Which device answers at a host, whether it is what a target says, and what the user told about the host before."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from profiles.artifact import explain_os_errors, write_text
from profiles.device import THIS_MACHINE, Device, Stack, Target, detect, list_devices, load_device
from profiles.errors import InputError
from profiles.remote import Host
from profiles.remote_runtime import Rung
from profiles.user_folder import config_folder

_MACHINES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}


def hosts_file() -> Path:
    """Where hosts are remembered: the user's own configuration, never a recipe or a bundle."""
    return config_folder() / "hosts.toml"


def _stored() -> dict[str, dict[str, Any]]:
    path = hosts_file()
    if not path.is_file():
        return {}
    try:
        found: dict[str, dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8")).get("host", {})
    except (OSError, ValueError) as error:
        raise InputError(
            "the file of remembered hosts cannot be read",
            where=str(path),
            evidence=str(error),
            fix="correct or delete it",
        ) from error
    return found


def remembered(name: str) -> Host:
    """The host of that name with what `devices detect` was told about it.

    Raises:
        InputError: no host by that name can exist, or the file of remembered hosts is damaged.
    """
    known = _stored().get(name, {})
    fields = {
        key: known[key]
        for key in ("python", "folder", "wrapper", "workspace_mib", "packages")
        if known.get(key) is not None
    }
    return replace(Host(name), **fields)


def remembered_for(device: str) -> str | None:
    """The host that was last seen to be that device."""
    return next((name for name, known in reversed(_stored().items()) if known.get("device") == device), None)


def remember(host: Host, device: str | None) -> Path:
    """Stores a host and which device it is; returns the file."""
    import tomlkit

    stored = _stored()
    stored.pop(host.name, None)
    entry = {key: value for key, value in {**asdict(host), "device": device}.items() if value is not None}
    entry.pop("name")
    stored[host.name] = entry
    path = hosts_file()
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, tomlkit.dumps({"host": stored}))
    return path


def recognise(facts: Mapping[str, Any]) -> Device | None:
    """The known device that the facts are of, by the words of its board's or GPU's name; None: none of the known.

    >>> recognise({"board": "NVIDIA Jetson Orin Nano Developer Kit"}).name
    'jetson-orin-nano'
    """
    words = re.findall(r"[a-z0-9]+", f"{facts.get('board', '')} {facts.get('gpu', '')}".lower())
    best: tuple[int, str] | None = None
    for name in list_devices():
        wanted = name.split("-")
        # "jetson-nano" is no Jetson Orin Nano, so the longest name that fits decides
        if name != THIS_MACHINE and set(wanted) <= set(words) and (best is None or len(wanted) > best[0]):
            best = (len(wanted), name)
    return load_device(best[1]) if best is not None else None


def made_for_another(device: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """Why a machine is not the one that a bundle was made for; None: it is, as far as its name tells.

    Args:
        device: name and title, of the bundle's manifest.
        facts: what the agent tells of the machine.

    >>> made_for_another({"name": "l4", "title": "NVIDIA L4"}, {"cpu_model": "Ryzen 7"})
    'measured on a machine with Ryzen 7, the bundle is for NVIDIA L4'
    """
    title, processor = str(device["title"]), str(facts.get("cpu_model") or "")
    if device["name"] == THIS_MACHINE:
        same = bool(processor) and title.startswith(processor)
    else:
        known = recognise(facts)
        same = known is not None and known.name == device["name"]
    what = next((str(facts[key]) for key in ("board", "gpu", "cpu_model") if facts.get(key)), "an unknown processor")
    return None if same else f"measured on a machine with {what}, the bundle is for {title}"


def stack_of(device: Device, facts: Mapping[str, Any], versions: Mapping[str, str]) -> Stack | None:
    """The device's stack whose runtime is installed there, by the versions of its runtimes; None: no known one."""
    return next((stack for stack in device.stacks if not _wrong_stack(stack, facts, versions.get(stack.runtime))), None)


def _wrong_stack(stack: Stack, facts: Mapping[str, Any], version: str | None) -> str | None:
    """What is not as the stack says; None: nothing that is known."""
    system = re.search(r"Jetson Linux (\d+(?:\.\d+)?)", stack.os)
    if system and facts.get("l4t") and not _starts(str(facts["l4t"]), system.group(1)):
        return f"Jetson Linux {facts['l4t']} runs there, {stack.name} is Jetson Linux {system.group(1)}"
    if version is None:
        return f"{stack.runtime} {stack.runtime_version} is not installed there"
    if not _starts(version, stack.runtime_version):
        return f"{stack.runtime} {version} is installed there, {stack.name} has {stack.runtime_version}"
    return None


def _starts(version: str, wanted: str) -> bool:
    """Whether a version is the wanted one or a build of it: 10.3.0.26 is a 10.3.0."""
    parts, prefix = version.split("."), wanted.split(".")
    return parts[: len(prefix)] == prefix


def mismatches(target: Target, facts: Mapping[str, Any], rung: Rung, host: Host) -> tuple[str, ...]:
    """Where the machine is not the one that the target describes: device, stack, power mode. Empty: it is.

    Args:
        target: of the recipe.
        facts: what the agent told.
        rung: who runs the model there.
        host: for the commands that would help.
    """
    found = []
    device = target.device
    if target.is_this_machine:
        here = detect()
        if facts.get("cpu_model") and not here.title.startswith(str(facts["cpu_model"])):
            found.append(f"{host.name} is a {facts['cpu_model']}, and the target is this machine ({here.title})")
    else:
        known = recognise(facts)
        machine = _MACHINES.get(str(facts.get("machine", "")).lower())
        if known is not None and known.name != device.name:
            found.append(f"{host.name} is a {known.title}, not a {device.title}")
        elif known is None and facts.get("board"):
            found.append(f'{host.name} calls itself "{facts["board"]}", not {device.title}')
        elif device.machine is not None and machine is not None and machine != device.machine:
            found.append(f"{host.name} has an {machine} processor, {device.title} an {device.machine} one")
        capability = facts.get("compute_capability")
        if capability and device.compute_capability and capability != device.compute_capability:
            found.append(
                f"the GPU there has compute capability {capability}, {device.title} has {device.compute_capability}"
            )
    wrong = _wrong_stack(target.stack, facts, rung.version)
    if wrong is not None:
        found.append(wrong)
    if target.power_mode is not None and facts.get("power_mode") != target.power_mode.name:
        there = facts.get("power_mode")
        state = f"is in power mode {there}" if there else "does not tell its power mode"
        found.append(
            f"{host.name} {state}, the target asks for {target.power_mode.name}: "
            f"ssh -t {host.shown} sudo nvpmodel -m ID (nvpmodel -p --verbose lists them)"
        )
    return tuple(found)
