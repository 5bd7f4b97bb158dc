"""`edgestill devices`: what is known about each device, and adding one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import complete, console
from cli.commands.shared import UNKNOWN, JsonOption, examples, facts, number, plain_table

if TYPE_CHECKING:
    from profiles.device import Device

app = typer.Typer(
    invoke_without_command=True,
    help="The known devices: processor, memory, what software runs on them, and how to add your own.",
    epilog=examples(
        "edgestill devices",
        "edgestill devices show jetson-orin-nano",
        "edgestill devices show jetson-orin-nano --toml > my-board.toml",
        "edgestill devices add my-board.toml",
        "edgestill devices calibrate",
    ),
)


@app.callback()
def devices(context: typer.Context, as_json: JsonOption = False) -> None:
    if context.invoked_subcommand is None:
        _print_list(as_json)


@app.command("list", epilog=examples("edgestill devices list", "edgestill devices list --json"))
def list_(as_json: JsonOption = False) -> None:
    """List the devices that a target can name."""
    _print_list(as_json)


@app.command(epilog=examples("edgestill devices show raspberry-pi-5", "edgestill devices show ./my-board.toml"))
def show(
    name: Annotated[str, typer.Argument(help="A device's name, or a .toml file.", autocompletion=complete.devices)],
    as_toml: Annotated[bool, typer.Option("--toml", help="Print a device file, to start your own from.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print everything that is known about one device, with its sources, and what is not known."""
    from profiles.device import load_device
    from profiles.errors import InputError

    if as_toml and as_json:
        raise InputError("--toml and --json exclude each other", where="edgestill devices show", fix="name one of them")
    device = load_device(name, where="NAME")
    if as_toml:
        console.emit(_to_toml(device))
    else:
        _print_device(device, as_json)


@app.command(epilog=examples("edgestill devices detect", "edgestill devices detect --json"))
def detect(as_json: JsonOption = False) -> None:
    """Print what was found out about this machine, as a device."""
    from profiles.device import detect as detect_machine

    _print_device(detect_machine(), as_json)


@app.command(epilog=examples("edgestill devices add my-board.toml", "edgestill devices add my-board.toml --force"))
def add(
    file: Annotated[
        Path, typer.Argument(help="A device file. To start from a similar device: edgestill devices show NAME --toml")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace a device of yours of the same name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a device file and remember it, so that targets can name the device.

    It is copied into your own configuration folder; the file that you have is left as it is.
    """
    from profiles.artifact import explain_os_errors, write_text
    from profiles.device import list_devices, load_device
    from profiles.errors import InputError
    from profiles.user_folder import user_devices

    if file.suffix != ".toml":
        raise InputError(f"{file} is not a .toml file", where="FILE", fix="name it after the device: my-board.toml")
    device = load_device(str(file), where="FILE")
    if device.name != Path(device.name).name or device.name.startswith("."):
        raise InputError(f'"{device.name}" is no name for a file', where=f"{file}, name", fix='name = "my-board"')
    place = user_devices() / f"{device.name}.toml"
    if device.name in list_devices() and not place.is_file():
        raise InputError(
            f'"{device.name}" is a device that ships with edgestill', where=f"{file}, name", fix="choose another name"
        )
    if place.is_file() and not force:
        raise InputError(
            f'there is a device "{device.name}" of yours already', where=str(place), fix="add --force to replace it"
        )
    with explain_os_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, file.read_text(encoding="utf-8"))
    if as_json:
        console.emit_json({"name": device.name, "file": str(place)})
    else:
        console.emit(f'added {device.name} ({place})\nuse it in a recipe: device = "{device.name}"')


@app.command(epilog=examples("edgestill devices calibrate", "edgestill devices calibrate this-machine --threads 2"))
def calibrate(
    name: Annotated[
        str, typer.Argument(help="The device. Only this machine can be measured.", autocompletion=complete.devices)
    ] = "this-machine",
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="Threads inside an operator.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Measure how long this machine takes for its work, so that students can be chosen by predicted latency.

    Exports about fifty small models, measures them against each other, fits, and stores the result with its errors on
    models that the fit did not see. It takes some minutes on a quiet machine; on a busy one it refuses. Ctrl-C leaves
    what was stored before.
    """
    from cli.pipeline.calibrate import calibrate as measure_and_fit
    from cli.pipeline.calibrate import error_rows, others_sentence
    from profiles.calibration import save_calibration

    found = measure_and_fit(name, console.make_progress(), threads=threads).calibration
    place = save_calibration(found)
    if as_json:
        console.emit_json({"file": str(place), **found.model_dump(mode="json")})
        return
    console.emit(f"calibrated {found.device} ({found.processor}) on {found.threads} thread(s) in {found.seconds:.0f} s")
    headers = ("Precision", "Architectures", "Median error", "90 % below", "Rank correlation")
    console.emit(plain_table(headers, error_rows(found), right=(1, 2, 3, 4)))
    console.emit(
        f"errors of predicted medians on architectures that the fit did not see; {found.models} models measured, "
        f"spread {found.spread:.1%}\n"
        f"medians are those of the {found.undisturbed:.0%} of the queries during which nothing slowed the core down; "
        f"{others_sentence(found.other_cores)}\n"
        f"{place}"
    )


def _print_list(as_json: bool) -> None:
    from profiles.device import list_devices, load_device

    found = [load_device(name) for name in list_devices()]
    if as_json:
        console.emit_json([_summary(device) for device in found])
        return
    rows = [
        (
            device.name,
            device.title,
            _short(device.memory_gib),
            device.stacks[0].name + (f" +{len(device.stacks) - 1}" if len(device.stacks) > 1 else ""),
        )
        for device in found
    ]
    console.emit(plain_table(("Device", "What it is", "GiB", "Newest software"), rows, right=(2,)))
    console.emit("all facts and their sources: edgestill devices show NAME")


def _summary(device: Device) -> dict[str, object]:
    return {
        "name": device.name,
        "title": device.title,
        "kind": device.kind,
        "compute_capability": device.compute_capability,
        "memory_gib": device.memory_gib,
        "fp32_tflops": device.fp32_tflops,
        "precisions": list(device.precisions),
        "stacks": [stack.name for stack in device.stacks],
        "power_modes": [mode.name for mode in device.power_modes],
    }


_PEAKS = (
    ("fp32_tflops", "FP32 peak", "TFLOPS"),
    ("fp16_tflops", "FP16 peak", "TFLOPS"),
    ("int8_tops", "INT8 peak", "TOPS, dense"),
    ("fp8_tflops", "FP8 peak", "TFLOPS, dense"),
    ("fp4_tflops", "FP4 peak", "TFLOPS, dense"),
    ("bandwidth_gb_s", "memory bandwidth", "GB/s"),
)
_EVIDENCE = {"D": "documented", "C": "computed", "K": "general knowledge, not checked"}


def _print_device(device: Device, as_json: bool) -> None:
    if as_json:
        console.emit_json(device)
        return
    console.emit(f"{device.name}: {device.title}")
    console.emit(facts([(name, value) for name, value in _hardware(device) if value]))
    if device.power_modes:
        modes = [
            (
                mode.name,
                *(_short(value) for value in (mode.watts, mode.fp32_tflops, mode.int8_tops, mode.bandwidth_gb_s)),
                ", ".join(mode.stacks) or "any",
            )
            for mode in device.power_modes
        ]
        headers = ("Power mode", "Watts", "FP32 TFLOPS", "INT8 TOPS", "GB/s", "Software")
        console.emit("")
        console.emit(plain_table(headers, modes, right=(1, 2, 3, 4)))
    stacks = [
        (
            stack.name,
            stack.os,
            f"{stack.runtime} {stack.runtime_version}",
            stack.python or UNKNOWN,
            str(stack.max_opset),
            stack.dialect,
        )
        for stack in device.stacks
    ]
    console.emit("")
    console.emit(
        plain_table(("Software", "System", "Runtime", "Python", "Opset up to", "INT8 form"), stacks, right=(4,))
    )
    console.emit("")
    console.emit(facts([*_calibrations(device), *_origins(device)]))


def _short(value: float | None) -> str:
    return "-" if value is None else number(value)


def _to_toml(device: Device) -> str:
    """The device as the file that `devices add` reads."""
    import tomlkit

    values = device.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    values["power_mode"] = values.pop("power_modes", [])
    values["stack"] = values.pop("stacks")
    first = {key: values.pop(key) for key in ("name", "title", "kind")}
    return tomlkit.dumps(first | {key: value for key, value in values.items() if value != []})


def _hardware(device: Device) -> list[tuple[str, str]]:
    """Name and value of every fact; an empty value means that it does not apply."""
    rows = [
        ("processor", {"cpu": "CPU", "gpu": "GPU"}[device.kind]),
        ("compute capability", device.compute_capability or ("" if device.kind == "cpu" else UNKNOWN)),
        ("cores", str(device.cores) if device.cores else ""),
        ("instruction sets", ", ".join(device.isa)),
        ("memory", number(device.memory_gib, "GiB") + (", shared by CPU and GPU" if device.unified_memory else "")),
        ("precisions", ", ".join(device.precisions)),
    ]
    for fact, title, unit in _PEAKS:
        value = getattr(device, fact)
        precision = fact.partition("_")[0]
        if value is None and precision != "bandwidth" and precision not in device.precisions:
            if device.kind == "gpu" or precision == "fp16":
                rows.append((title, f"not usable: {device.why_not(precision)}"))  # type: ignore[arg-type]
            continue
        evidence = _EVIDENCE.get(device.evidence.get(fact, ""), "")
        rows.append((title, number(value, unit) + (f" ({evidence})" if value is not None and evidence else "")))
    return rows


def _calibrations(device: Device) -> list[tuple[str, str]]:
    """What was stored by `devices calibrate`: a row per number of threads; for this machine also that there is none."""
    from profiles.calibration import stale, stored_calibrations
    from profiles.device import THIS_MACHINE

    rows = []
    for found in stored_calibrations():
        if found.device == device.name:
            errors = ", ".join(f"{name.upper()} {entry.median_error:.1%}" for name, entry in found.held_out.items())
            reason = stale(found, device, device.stacks[0], found.threads)
            state = f"out of date ({reason})" if reason else f"median error {errors}"
            rows.append(("calibration", f"{found.date[:10]}, {found.threads} thread(s): {state}"))
    if not rows and device.name == THIS_MACHINE:
        rows.append(("calibration", "none; edgestill devices calibrate"))
    return rows


def _origins(device: Device) -> list[tuple[str, str]]:
    rows = [("note" if position == 0 else "", note) for position, note in enumerate(device.notes)]
    origins = dict.fromkeys([*device.sources, *(stack.source for stack in device.stacks)])
    rows += [("sources" if position == 0 else "", source) for position, source in enumerate(origins)]
    return [*rows, ("as of", device.date)]
