"""What a Jetson's own tools print, as their users recorded it, and stand-ins that print it."""

from __future__ import annotations

from pathlib import Path

NVPMODEL = {
    "15W": "NV Power Mode: 15W\n0\n",
    "MAXN_SUPER": "NV Power Mode: MAXN_SUPER\n2\n",
    "10W": "NV Power Mode: MODE_10W\n1\n",
}
"""By the mode's name: Orin Nano under JetPack 6, under 6.2, and a module under JetPack 4."""

ORIN_NANO = (
    "09-17-2026 02:10:16 RAM 1483/7620MB (lfb 105x4MB) SWAP 253/12002MB (cached 2MB) "
    "CPU [0%@729,0%@729,0%@729,0%@729,0%@729,0%@729] GR3D_FREQ 62%@612 cpu@47.75C soc2@46.718C soc0@47.25C gpu@50C "
    "tj@50C soc1@48.093C VDD_IN 4541mW/4541mW VDD_CPU_GPU_CV 521mW/521mW VDD_SOC 1446mW/1446mW"
)
ORIN_NX = (
    "RAM 1224/15368MB (lfb 8x4MB) SWAP 0/7684MB (cached 0MB) CPU [1%@729,0%@729,0%@729,0%@729,off,off,off,off] "
    "EMC_FREQ 0% GR3D_FREQ 0%@[305] CPU@43.5C GPU@42.5C tj@43.5C SOC0@42.906C SOC1@42.156C CV0@-256C "
    "VDD_IN 4319mW/4319mW VDD_CPU_GPU_CV 499mW/499mW VDD_SOC 1200mW/1200mW"
)
NANO = (
    "RAM 2448/3964MB (lfb 2x1MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [18%@1479,12%@1479,13%@1479,"
    "20%@1479] EMC_FREQ 6%@1600 GR3D_FREQ 31%@76 APE 25 PLL@34C CPU@36.5C PMIC@100C GPU@35C AO@40.5C thermal@35.75C "
    "POM_5V_IN 3045/3045 POM_5V_GPU 123/123 POM_5V_CPU 820/820"
)
TEGRA_RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"


def install(folder: Path, *, python: str, mode: str = "15W", sudo: bool = False) -> None:
    """Puts the tools into a folder for the PATH: nvpmodel, tegrastats, trtexec, jetson_clocks, sudo.

    While the folder has a file `stuck`, clocks cannot be given back.
    """
    folder.mkdir()
    here = Path(__file__).parent
    scripts = {
        "nvpmodel": f"cat <<X\n{NVPMODEL[mode]}X",
        "tegrastats": f"while true; do echo '{ORIN_NANO}'; sleep 1; done",
        "trtexec": f'exec {python} {here / "trtexec.py"} "$@"',
        "jetson_clocks": f'echo "$@" >> {folder / "clocks.log"}; [ "$1" = --store ] && echo stored > "$2"\n'
        f'[ "$1" = --restore ] && [ -e {folder / "stuck"} ] && echo "Error: no such clock" && exit 1\nexit 0',
        "sudo": 'shift; exec "$@"' if sudo else "echo 'sudo: a password is required' >&2; exit 1",
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
