"""The training loop and the exported student on a CUDA GPU, in one command and under 8 minutes.

    python -m tests.benchmarks.gpu [--rounds 5]

Writes results/gpu-<card>.json: images/s of our loop (cached KD and EC; bf16, channels_last, resident data, fused
optimiser; eager and compiled student), its share of the bare loop, images/s of a teacher in eager and compiled mode,
and the exported student's ONNX Runtime CUDA latency against PyTorch eager and compiled. Without a GPU it says so and
exits with status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.networks import Normalize
from distill.students import Student
from tests.benchmarks.resnet import Body, resnet
from tests.benchmarks.training_loop import (
    AUGMENTATION,
    CLASSES,
    RESULTS,
    Cache,
    bare_round,
    dataset,
    interleave,
    our_round,
    ratios,
)

ROWS = 32_768
BATCH = 512


class Logits(nn.Module):
    """A student as it is exported: raw images in, class logits out."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> Tensor:
        head: Tensor = self.student(image).head
        return head


def student(data: Any) -> Student:
    """resnet8x4 with its normalisation; the same initial weights each time."""
    torch.manual_seed(0)
    return Student("resnet8x4", nn.Sequential(Normalize(data.input.mean, data.input.std), Body(8)), 256, CLASSES)


def training(rounds: int, folder: Path) -> dict[str, Any]:
    """Images/s of every side and the share of the bare loop."""
    data = dataset(ROWS, 32, CLASSES)
    rng = np.random.default_rng(1)
    cache = Cache(
        rng.normal(size=(AUGMENTATION.views, ROWS, 256)).astype(np.float16),
        rng.normal(size=(AUGMENTATION.views, ROWS, CLASSES)).astype(np.float16),
    )
    sides: dict[str, Callable[[], float]] = {"bare": bare_round(student(data), data, BATCH, "cuda", bf16=True)}
    for kind in ("kd", "ec"):
        for compiled in (False, True):
            name = kind + (" compiled" if compiled else "")
            sides[name] = our_round(
                student(data), kind, data, cache, BATCH, folder / name, "cuda", compile=compiled, precision="bf16"
            )
    rates = interleave(sides, rounds)
    return {
        "batch_size": BATCH,
        "images_per_second": {name: median(values) for name, values in rates.items()},
        "share_of_bare": ratios(rates, "bare"),
    }


@torch.inference_mode()
def teacher() -> dict[str, float]:
    """Images/s of a resnet32x4 in bf16 and channels_last, as it fills a cache: eager and compiled."""
    net = resnet(32, CLASSES).cuda().to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    images = torch.randn(BATCH, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    found = {}
    for name, run in (("eager", net), ("compiled", torch.compile(net))):
        with torch.autocast("cuda", torch.bfloat16):
            milliseconds = latency(lambda run=run: run(images), 50)  # type: ignore[misc]
        found[name] = BATCH / milliseconds * 1e3
    return found


def latency(run: Callable[[], object], samples: int = 500) -> float:
    """Median milliseconds of one call, each waited for."""
    for _ in range(20):
        run()
    times = []
    for _ in range(samples):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times) * 1e3


@torch.inference_mode()
def inference() -> dict[str, Any]:
    """Median milliseconds for one image in float32, host to host: ONNX Runtime CUDA, PyTorch eager and compiled."""
    data = dataset(8, 32, CLASSES)
    model = Logits(student(data)).eval()
    image = data.train.inputs[:1]
    on_gpu = Logits(student(data)).eval().cuda()
    compiled = torch.compile(on_gpu)
    found: dict[str, Any] = {
        "pytorch_eager_ms": latency(lambda: on_gpu(torch.from_numpy(image).cuda()).cpu()),
        "pytorch_compiled_ms": latency(lambda: compiled(torch.from_numpy(image).cuda()).cpu()),
    }
    try:
        import onnxruntime
    except ImportError as error:
        return {**found, "onnxruntime_cuda": f"not measured: {error}"}
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return {**found, "onnxruntime_cuda": "not measured: pip install onnxruntime-gpu in the place of onnxruntime"}
    names = {"input_names": ["image"], "output_names": ["logits"]}
    program = torch.onnx.export(model, (torch.from_numpy(image),), **names, dynamo=True)
    assert program is not None
    graph = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CUDAExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        return {**found, "onnxruntime_cuda": "not measured: the CUDA provider did not load, see the message above"}
    return {**found, "onnxruntime_cuda_ms": latency(lambda: session.run(None, {"image": image}))}


def main() -> int:
    """Runs everything and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU here (torch.cuda.is_available() is false): nothing was measured", file=sys.stderr)
        return 1
    card = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as temporary:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "card": card,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "rounds": options.rounds,
            "training": training(options.rounds, Path(temporary)),
            "teacher_images_per_second": teacher(),
            "inference_batch_1": inference(),
        }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"gpu-{card.lower().replace(' ', '-').replace('/', '-')}.json"
    text = json.dumps(report, indent=2)
    file.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
