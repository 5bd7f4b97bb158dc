"""Stands in for NVIDIA's `trtexec` on a machine without a GPU: its flags, its files and its failures.

The help is a part of that of TensorRT 10.5; exportTimes has the layout of TensorRT's `exportJSONTrace` in
samples/common/sampleReporting.cpp; the failures are lines that users of the real tool quoted. What an "engine" computes
is computed by ONNX Runtime. TRTEXEC_FAILS names a failure; TRTEXEC_VERSION is the number in the banner; TRTEXEC_MS is
what a query takes by the times that are written. "hangs:NAME" and "crashes:NAME" are about the engines with NAME in
their path, and about more than one query.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

VERSION = os.environ.get("TRTEXEC_VERSION", "100300")
HELP = """=== Model Options ===
  --onnx=<file>               ONNX model
=== Build Options ===
  --minShapes=spec                   Build with dynamic shapes using a profile with the min shapes provided
  --memPoolSize=poolspec             Specify the size constraints of the designated memory pool(s)
  --stronglyTyped                    Create a strongly typed network. (default = disabled)
  --skipInference                    Exit after the engine has been built and skip inference perf measurement
  --timingCacheFile=<file>           Save/load the serialized global timing cache
=== Inference Options ===
  --loadInputs=spec           Load input values from files (default = generate random inputs)
  --iterations=N              Run at least N inference iterations (default = 10)
  --warmUp=N                  Run for N milliseconds to warmup before measuring performance (default = 200)
  --infStreams=N              Instantiate N execution contexts to run inference concurrently (default = 1)
  --noDataTransfers           Disable DMA transfers to and from device (default = enabled).
  --useSpinWait               Actively synchronize on GPU events. (default = disabled)
  --exportTimes=<file>        Write the timing results in a json file (default = disabled)
  --exportOutput=<file>       Write the output tensors to a json file (default = disabled)
"""
FAILURES = {
    "memory": "[11/21/2026-10:00:00] [W] [TRT] Requested amount of GPU memory (57662592 bytes) could not be allocated."
    "\n"
    "[11/21/2026-10:00:00] [E] Error[2]: [virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (no "
    "further information)\n[11/21/2026-10:00:00] [E] Engine could not be created from network",
    "operator": "[11/21/2026-10:00:00] [I] [TRT] No importer registered for op: GridSample. Attempting to import as "
    "plugin.\n[11/21/2026-10:00:00] [E] [TRT] ModelImporter.cpp:729: ERROR: builtin_op_importers.cpp:5412 In function "
    'importFallbackPluginImporter:\n[8] Assertion failed: creator && "Plugin not found, are the plugin name, version, '
    'and namespace correct?"\n[11/21/2026-10:00:00] [E] Failed to parse onnx file',
    "version": "[11/21/2026-10:00:00] [E] Error[1]: [stdArchiveReader.cpp::StdArchiveReader::42] Error Code 1: "
    "Serialization (Serialization assertion stdVersionRead == serializationVersion failed.Version tag does not match. "
    "Note: Current Version: 232, Serialized Engine Version: 236)\n"
    "[11/21/2026-10:00:00] [E] Engine deserialization failed",
}


def main(arguments: list[str]) -> int:
    banner = f"TensorRT.trtexec [TensorRT v{VERSION}] [b17] # trtexec {' '.join(arguments)}"
    print(f"&&&& RUNNING {banner}")
    if "--help" in arguments:
        print(HELP)
        return 0
    options = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments)
    fails = os.environ.get("TRTEXEC_FAILS", "")
    if fails == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    kind, _, engine = fails.partition(":")
    if engine in options.get("loadEngine", "") and int(options.get("iterations", "0")) > 1:
        if kind == "hangs":
            time.sleep(600)
        if kind == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
    if fails in FAILURES and (fails != "version" or "loadEngine" in options):
        print(f"{FAILURES[fails]}\n&&&& FAILED {banner}")
        return 1
    if "onnx" in options:
        shutil.copyfile(options["onnx"], options["saveEngine"])
        Path(options["timingCacheFile"]).write_bytes(b"timings")
    else:
        _infer(options)
    print(f"&&&& PASSED {banner}")
    return 0


def _infer(options: dict[str, str]) -> None:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(options["loadEngine"], providers=["CPUExecutionProvider"])
    shapes = dict(part.split(":") for part in options["shapes"].split(","))
    inputs = {}
    for part in options["loadInputs"].split(","):
        name, path = part.split(":")
        kind = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}[session.get_inputs()[0].type]
        inputs[name] = np.fromfile(path, kind).reshape([int(side) for side in shapes[name].split("x")])
    outputs = session.run(None, inputs)
    before = time.perf_counter()
    session.run(None, inputs)
    took = max(0.5, (time.perf_counter() - before) * 1e3, float(os.environ.get("TRTEXEC_MS", "0")))
    warm = int(options["warmUp"])
    # queries in a row; the real tool's times scatter, too
    count = int(warm / took) + 1 + max(int(options["iterations"]), int(1e3 * float(options["duration"]) / took))
    times = [(index * took, took * (1 + index % 7 / 100)) for index in range(count)]
    if "exportTimes" in options:
        rows = [
            f'{{ "startEnqMs" : {at:g}, "endEnqMs" : {at + 0.01:g}, "startH2dMs" : {at:g}, "endH2dMs" : {at + 0.01:g}, '
            f'"startComputeMs" : {at:g}, "endComputeMs" : {at + ms:g}, "startD2hMs" : {at + ms:g}, '
            f'"endD2hMs" : {at + ms + 0.01:g}, "h2dMs" : 0.01, "computeMs" : {ms:g}, "d2hMs" : 0.01, '
            f'"latencyMs" : {ms + 0.02:g}, "endToEndMs" : {ms + 0.02:g} }}\n'
            for at, ms in times
        ]
        Path(options["exportTimes"]).write_text("[\n  " + ", ".join(rows) + "]\n")
    if "exportOutput" in options:
        rows = [
            f'{{ "name" : "{spec.name}"\n  , "dimensions" : "{"x".join(str(side) for side in value.shape)}"\n'
            f'  , "values" : [ {", ".join(f"{entry:g}" for entry in value.ravel())} ]\n }}\n'
            for spec, value in zip(session.get_outputs(), outputs, strict=True)
        ]
        Path(options["exportOutput"]).write_text("[\n  " + ", ".join(rows) + "]\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
