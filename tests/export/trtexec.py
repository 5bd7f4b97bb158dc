"""A stand-in for `trtexec` and `tensorrt_rtx`: knows the flags of one version, and leaves what the real one does.

Run as `trtexec.py VERSION FLAG...`. The lists are those of the program's own option parser at 8.2, 8.4, 8.5, 8.6 and 11
(samples/common/sampleOptions.cpp), of the help that 10.5 prints, and, for TensorRT-RTX, of the pages that document it
(quick start, dynamic shapes, best practices); banner and device lines are those of its logs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_IN_8_2 = """
    allowGPUFallback avgRuns avgTiming batch best buildOnly calib consistency deploy device directIO
    dumpLayerInfo dumpOutput dumpProfile dumpRefit duration explicitBatch exportLayerInfo exportOutput
    exportProfile exportTimes exposeDMA fp16 help inputIOFormats int8 iterations loadEngine loadInputs maxBatch
    maxShapes maxShapesCalib minShapes minShapesCalib minTiming model noBuilderCache noDataTransfers noTF32 onnx
    optShapes optShapesCalib output outputIOFormats percentile plugins precisionConstraints profilingVerbosity
    refit restricted safe saveEngine separateProfileRun shapes sleepTime sparsity streams tacticSources threads
    timeDeserialize timeRefit timingCacheFile uff uffInput uffNHWC useCudaGraph useDLACore useManagedMemory
    useSpinWait verbose warmUp workspace
"""
_NEW_IN_8_4 = """
    idleTime layerOutputTypes layerPrecisions memPoolSize
"""
_NEW_IN_8_5 = """
    heuristic persistentCacheRatio preview
"""
_NEW_IN_8_6 = """
    buildDLAStandalone builderOptimizationLevel dynamicPlugins excludeLeanRuntime fp8 hardwareCompatibilityLevel
    ignoreParsedPluginLibs infStreams layerDeviceTypes leanDLLPath maxAuxStreams setPluginsToSerialize
    skipInference staticPlugins tempdir tempfileControls useRuntime vc versionCompatible
"""
_GONE_IN_10 = """
    batch buildOnly consistency deploy explicitBatch heuristic maxBatch minTiming model output plugins streams
    uff uffInput uffNHWC workspace
"""
_NEW_IN_10 = """
    allocationStrategy allowWeightStreaming bf16 calibProfile dumpOptimizationProfile dumpRawBindingsToFile
    errorOnTimingCacheMiss getPlanVersionOnly int4 markDebug maxTactics noCompilationCache pi pluginInstanceNorm
    profile runtimePlatform saveDebugTensors stripAllWeights stripWeights stronglyTyped useProfile
    weightStreamingBudget weightless
"""
_GONE_IN_11 = """
    best bf16 calib calibProfile fp16 fp8 int4 int8 layerOutputTypes layerPrecisions maxShapesCalib
    minShapesCalib optShapesCalib precisionConstraints restricted
"""
_IN_RTX = """
    help loadEngine maxShapes minShapes onnx optShapes runtimeCacheFile saveEngine shapes skipInference
"""
_8_2 = set(_IN_8_2.split())
_8_4 = _8_2 | set(_NEW_IN_8_4.split())
_8_5 = _8_4 | set(_NEW_IN_8_5.split())
_8_6 = _8_5 | set(_NEW_IN_8_6.split())
_10 = (_8_6 - set(_GONE_IN_10.split())) | set(_NEW_IN_10.split())
_11 = _10 - set(_GONE_IN_11.split())
_RTX = set(_IN_RTX.split())
FLAGS = {
    "8201": _8_2,
    "8401": _8_4,
    "8502": _8_5,
    "8601": _8_6,
    "100300": _10,
    "101602": _10,
    "110401": _11,
    "11.4.1.106": _11,
    "rtx": _RTX,
}
_SHAPES = ("minShapes", "optShapes", "maxShapes")


def main(version: str, arguments: list[str]) -> int:
    title = "tensorrt_rtx" if version == "rtx" else "trtexec"
    told = "" if version == "rtx" else f" [TensorRT v{version}]"
    print(f"&&&& RUNNING TensorRT.{title}{told} # {title} {' '.join(arguments)}")
    if "--help" in arguments:
        print("=== Model Options ===")
        return 0
    given: list[tuple[str, str]] = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not name.startswith("--") or name[2:] not in FLAGS[version]:
            print(f"[01/01/2026-00:00:00] [E] Unknown option: {name} {value}")
            return 1
        given.append((name[2:], value))
    names = [name for name, _ in given]
    single = dict(given)
    counts = {names.count(name) for name in _SHAPES}
    if len(counts) != 1 or ("profile" not in single and counts - {0, 1}):
        print("[01/01/2026-00:00:00] [E] Must specify only --optShapes or all of --minShapes, --optShapes, --maxShapes")
        return 1
    if "profile" in single and names.count("profile") != counts.pop():
        return 1
    print("[01/01/2026-00:00:00] [I] === Device Information ===")
    print('[01/01/2026-00:00:00] [I]   Device 0: "Orin" UUID: GPU-0')
    print("[01/01/2026-00:00:00] [I] Selected Device: Orin")
    print("[01/01/2026-00:00:00] [I] Selected Device ID: 0")
    print("[01/01/2026-00:00:00] [I] Compute Capability: 8.7")
    for name, content in (
        ("saveEngine", "engine"),
        ("timingCacheFile", "cache"),
        ("exportLayerInfo", json.dumps({"Layers": [], "Bindings": []})),
        ("exportProfile", "[]"),
    ):
        if name in single:
            Path(single[name]).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
