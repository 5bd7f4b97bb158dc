#!/usr/bin/env python3
"""Runs the model of this folder. Needs Python >= 3.6, NumPy and the runtime: onnxruntime, or TensorRT for an engine.

python infer.py --selftest            runs the golden sample and compares with what was computed at export
python infer.py samples.npy           one sample or a batch, as the manifest says: dtype and shape of the input; prints
                                      the classes, or the output as JSON where it is no scores of classes
python infer.py photo.jpg             images only; needs Pillow
python infer.py texts.txt             texts only, one per line; needs tokenizers
python infer.py --engine model.engine samples.npy
"""
# ruff: noqa: T201, UP031, RUF005, PTH100, PTH110, PTH118, PTH119, PTH120, PTH123
# mypy: ignore-errors

import argparse
import ctypes
import ctypes.util
import json
import os
import sys
import zipfile

import numpy as np
from engine_check import changed, mismatch, sha256_of, this_gpu  # lies beside this file

HERE = os.path.dirname(os.path.abspath(__file__))


def refuse_changed(manifest, names):
    """Ends with the reason when a file of this folder is not the one that the manifest describes."""
    for name in names:
        expected = manifest["files"].get(name)
        if expected is None:
            sys.exit("%s is not used: manifest.json has no hash of it; export the model again" % name)
        try:
            found = sha256_of(os.path.join(HERE, name))
        except OSError as error:
            sys.exit("%s cannot be read: %s" % (name, error))
        if found != expected:
            sys.exit(
                "%s is not the file that manifest.json describes (SHA-256 %s..., not %s...); copy the folder again"
                % (name, found[:12], expected[:12])
            )


class OnnxModel:
    """The ONNX graph in ONNX Runtime."""

    def __init__(self, path, info):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it cannot run, its exceptions say
        if not info["fuse_quantized"]:
            # quantised for TensorRT: ONNX Runtime's own integer kernels are for other forms and give wrong figures
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.title = "onnxruntime " + onnxruntime.__version__

    def run(self, inputs):
        return self.session.run(None, inputs)[0]


class TensorRTModel:
    """An engine in TensorRT (8.5 or newer) or TensorRT-RTX, with memory from the CUDA runtime through ctypes."""

    def __init__(self, path, built, allow_code):
        trt = import_tensorrt(built)
        if trt is None:
            sys.exit("TensorRT is not installed here, so " + os.path.basename(path) + " cannot run")
        self.trt = trt
        self.title = ("TensorRT-RTX" if trt.__name__ == "tensorrt_rtx" else "TensorRT") + " " + trt.__version__
        self.refuse_elsewhere(path, built)
        if built is not None and built.get("version_compatible") and not allow_code:
            sys.exit(
                os.path.basename(path) + " is version-compatible: it brings its own runtime, code that would run here "
                "with your rights; where you trust who built it: --allow-code"
            )
        self.cuda = load_cuda()
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(self.logger)
        if allow_code and hasattr(self.runtime, "engine_host_code_allowed"):
            # nothing that a file says sets this: its writer may be anybody
            self.runtime.engine_host_code_allowed = True
        with open(path, "rb") as file:
            self.engine = self.runtime.deserialize_cuda_engine(file.read())
        if self.engine is None:
            sys.exit("the engine cannot be loaded by " + self.title + "; it runs where it was built for only")
        if not hasattr(self.engine, "num_io_tensors"):
            sys.exit(
                self.title
                + " is older than 8.5, which this example needs; trtexec --loadEngine=%s runs it"
                % os.path.basename(path)
            )
        self.context = self.engine.create_execution_context()

    def refuse_elsewhere(self, path, built):
        """Ends with the reason when the manifest or the engine's own file says that it does not run here."""
        gpu = this_gpu()
        if gpu is None:
            sys.exit("an engine needs an NVIDIA GPU with its driver, and none was found here")
        if built is None:
            return
        runtime, version = self.title.split(" ")
        here = dict(gpu, runtime=runtime, version=version)
        reason = changed(path, built.get("sha256")) or mismatch(built, here)
        if reason is not None:
            sys.exit(reason + "; build one here: sh build_engine.sh")

    def choose_profile(self, inputs, stream):
        """Selects the optimisation profile that is tuned for this batch, else the first that takes it."""
        names = [name for name in inputs if -1 in tuple(self.engine.get_tensor_shape(name))]
        takes, tuned = [], []
        for index in range(self.engine.num_optimization_profiles):
            ranges = [(self.engine.get_tensor_profile_shape(name, index), inputs[name].shape) for name in names]
            if all(low[0] <= shape[0] <= high[0] for (low, _, high), shape in ranges):
                takes.append(index)
                if all(best[0] == shape[0] for (_, best, _), shape in ranges):
                    tuned.append(index)
        for index in (tuned + takes)[:1]:
            if index != self.context.active_optimization_profile:
                self.context.set_optimization_profile_async(index, stream.value)

    def run(self, inputs):
        trt = self.trt
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        pointers, outputs = [], {}
        stream = ctypes.c_void_p()
        self.check(self.cuda.cudaStreamCreate(ctypes.byref(stream)))
        try:
            self.choose_profile(inputs, stream)
            for name in names:
                if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                    array = np.ascontiguousarray(inputs[name])
                    if not self.context.set_input_shape(name, array.shape):
                        sys.exit("the engine takes no input of shape %s for %s" % (array.shape, name))
                    pointer = self.allocate(array.nbytes, pointers)
                    self.check(self.cuda.cudaMemcpy(pointer, array.ctypes.data_as(ctypes.c_void_p), array.nbytes, 1))
                    self.context.set_tensor_address(name, pointer.value)
            for name in names:
                if self.engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
                    shape = tuple(self.context.get_tensor_shape(name))
                    array = np.empty(shape, trt.nptype(self.engine.get_tensor_dtype(name)))
                    pointer = self.allocate(array.nbytes, pointers)
                    self.context.set_tensor_address(name, pointer.value)
                    outputs[name] = (array, pointer)
            if not self.context.execute_async_v3(stream.value):
                sys.exit("the engine failed to run")
            self.check(self.cuda.cudaStreamSynchronize(stream))
            for array, pointer in outputs.values():
                self.check(self.cuda.cudaMemcpy(array.ctypes.data_as(ctypes.c_void_p), pointer, array.nbytes, 2))
        finally:
            self.cuda.cudaStreamDestroy(stream)
            for pointer in pointers:
                self.cuda.cudaFree(pointer)
        return next(iter(outputs.values()))[0]

    def allocate(self, size, pointers):
        pointer = ctypes.c_void_p()
        self.check(self.cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(max(size, 1))))
        pointers.append(pointer)
        return pointer

    def check(self, status):
        if status != 0:
            self.cuda.cudaGetErrorString.restype = ctypes.c_char_p
            sys.exit("CUDA: " + self.cuda.cudaGetErrorString(status).decode())


def import_tensorrt(built=None):
    rtx = built is not None and (built.get("builder") or "").startswith("TensorRT-RTX")
    for name in ("tensorrt_rtx", "tensorrt") if rtx else ("tensorrt", "tensorrt_rtx"):
        try:
            return __import__(name)
        except (ImportError, OSError):
            continue
    return None


def shipped(path, info):
    """What the manifest says of an engine that came with this folder; None: it did not, or another took its place."""
    if os.path.exists(path + ".json") or os.path.dirname(os.path.abspath(path)) != HERE:
        return None
    known = {entry["file"]: entry for entry in (info["engine"], info["static_engine"]) if entry is not None}
    return known.get(os.path.basename(path))


def find_engine(options, info):
    """(path or None, what is known of it or None): of the engine named, else of the shipped one or the one built here.

    One that `build_engine.sh` built has its facts beside it; the shipped ones have theirs in the manifest.
    """
    names = [options.engine] if options.engine else [os.path.join(HERE, name) for name in info["engine_files"]]
    for path in names:
        if os.path.exists(path + ".json"):
            with open(path + ".json", encoding="utf-8") as file:
                built = json.load(file)
        else:
            built = shipped(path, info)
        if options.engine:
            return path, built
        if built is None or not os.path.exists(path) or options.runtime == "onnxruntime":
            continue
        if options.runtime == "tensorrt" or (this_gpu() is not None and import_tensorrt(built) is not None):
            return path, built
    return None, None


def load_cuda():
    names = [
        "libcudart.so",
        "libcudart.so.13",
        "libcudart.so.12",
        "libcudart.so.11.0",
        "cudart64_13.dll",
        "cudart64_12.dll",
    ]
    for name in [ctypes.util.find_library("cudart")] + names:
        try:
            if name:
                library = ctypes.CDLL(name)
                # without these the 64-bit addresses and sizes are cut to 32 bits
                library.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
                library.cudaFree.argtypes = [ctypes.c_void_p]
                library.cudaStreamSynchronize.argtypes = [ctypes.c_void_p]
                library.cudaStreamDestroy.argtypes = [ctypes.c_void_p]
                return library
        except (OSError, AttributeError):
            continue
    sys.exit("the CUDA runtime (libcudart) was not found; add its folder to LD_LIBRARY_PATH")


def read_samples(path, info):
    """{input name: array with a batch} from .npy, .npz, an image or a text file, as the data's kind is."""
    specs = info["inputs"]
    first, preprocessing = specs[0]["name"], info["preprocessing"]
    kind = preprocessing.get("kind")
    try:
        if path.endswith(".npz"):
            with np.load(path) as stored:
                found = {name: stored[name] for name in stored.files}
        elif path.endswith(".npy"):
            found = {first: np.load(path)}
        elif kind == "image":
            found = {first: read_image(path, specs[0]["shape"][1:], preprocessing)}
        elif kind == "tokens" and path.endswith(".txt"):
            found = {first: read_texts(path, specs[0]["shape"][1], preprocessing)}
        else:
            more = ", or texts as .txt, one per line" if kind == "tokens" else ""
            sys.exit("%s cannot be read: this model takes arrays as .npy or .npz%s" % (path, more))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        sys.exit("%s cannot be read: %s" % (path, error))
    inputs = {}
    for spec in specs:
        if spec["name"] not in found:
            sys.exit("%s lacks the input %s" % (path, spec["name"]))
        array = found[spec["name"]]
        if array.dtype.kind not in "biuf":
            sys.exit("%s holds %s, the model takes %s" % (path, array.dtype, spec["dtype"]))
        if array.ndim == len(spec["shape"]) - 1:
            array = array[None]
        fixed = [(axis, size) for axis, size in enumerate(spec["shape"]) if axis and isinstance(size, int)]
        if array.ndim != len(spec["shape"]) or any(array.shape[axis] != size for axis, size in fixed):
            sys.exit("%s has shape %s, the model takes %s" % (path, list(array.shape), spec["shape"]))
        if kind == "tokens" and array.size and not 0 <= array.min() <= array.max() < preprocessing["vocabulary"]:
            sys.exit("%s has token ids outside 0 to %d" % (path, preprocessing["vocabulary"] - 1))
        inputs[spec["name"]] = np.ascontiguousarray(array.astype(spec["dtype"]))
    rows = {name: len(array) for name, array in inputs.items()}
    if len(set(rows.values())) > 1:
        sys.exit("%s has different numbers of samples: %s" % (path, rows))
    return inputs


def read_texts(path, length, preprocessing):
    """int64 (texts, length): one text per line, its first tokens, padded, as the training data was."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        sys.exit("texts need tokenizers (pip install tokenizers); token ids as .npy do not")
    with open(path, encoding="utf-8-sig") as file:
        texts = [line.rstrip("\n") for line in file]
    if not texts:
        sys.exit("%s holds no text" % path)
    stored = os.path.join(HERE, "tokenizer.json")
    if not os.path.exists(stored):
        sys.exit("tokenizer.json is missing here; give token ids as .npy")
    tokenizer = Tokenizer.from_file(stored)
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    padding = preprocessing["pad_id"]
    unknown = [tokenizer.token_to_id(name) for name in ("[UNK]", "<unk>")]
    # a text without any token is one unknown token, as in training
    empty = [([entry for entry in unknown if entry is not None] + [padding])[0]]
    tokens = np.full((len(texts), length), padding, np.int64)
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        ids = encoding.ids or empty
        tokens[row, : len(ids)] = ids
    return tokens


def read_image(path, shape, preprocessing):
    """uint8 (channels, height, width), resized by the rule of the training data."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        sys.exit("images need Pillow (pip install pillow); .npy files do not")
    channels, height, width = shape
    image = ImageOps.exif_transpose(Image.open(path)).convert("L" if channels == 1 else "RGB")
    rule = preprocessing.get("resize", "stretch")
    if image.size != (width, height):
        if rule == "stretch":
            image = image.resize((width, height), Image.BILINEAR)
        else:
            ratios = (height / image.height, width / image.width)
            ratio = max(ratios) if rule == "center-crop" else min(ratios)
            scaled = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
            image = image.resize(scaled, Image.BILINEAR)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def selftest(model, info):
    """Exit status 0 when the golden sample gives what it gave at export, else 1."""
    with np.load(os.path.join(HERE, "golden.npz")) as golden:
        inputs = {spec["name"]: golden["input_" + spec["name"]] for spec in info["inputs"]}
        expected = golden["output"]
    found = model.run(inputs)
    if found.shape != expected.shape or not np.isfinite(found).all():
        print("FAIL: the output has shape %s (expected %s) or is not finite" % (found.shape, expected.shape))
        return 1
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    limit = info["golden"]["tolerance"]
    passed = difference <= limit
    print(
        "%s: largest difference %.3g, limit %.3g (%s)" % ("PASS" if passed else "FAIL", difference, limit, model.title)
    )
    return 0 if passed else 1


def print_classes(logits, info, count):
    labels = []
    if os.path.exists(os.path.join(HERE, "labels.txt")):
        with open(os.path.join(HERE, "labels.txt"), encoding="utf-8") as file:
            labels = file.read().splitlines()
    for row in logits.astype(np.float64):
        if info["exclusive"]:
            scores = np.exp(row - row.max())
            scores /= scores.sum()
        else:
            scores = 1 / (1 + np.exp(-row))
        best = np.argsort(-scores, kind="stable")[:count]
        print("  ".join("%s %.1f%%" % (labels[i] if i < len(labels) else i, 100 * scores[i]) for i in best))


def print_values(output):
    """One line of JSON per sample: what the model gave, for outputs that are no class scores."""
    for row in output:
        print(json.dumps(shortened(row.tolist())))


def shortened(value):
    """Floats with the digits that a float32 has."""
    if isinstance(value, list):
        return [shortened(entry) for entry in value]
    return float("%.8g" % value) if isinstance(value, float) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", help=".npy, .npz, an image, or a .txt of one text per line")
    parser.add_argument("--selftest", action="store_true", help="check the golden sample; exit status 0 or 1")
    parser.add_argument("--engine", help="a TensorRT engine in place of the ONNX graph")
    parser.add_argument("--runtime", choices=["auto", "onnxruntime", "tensorrt"], default="auto")
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="load a version-compatible engine: it brings code, which then runs here",
    )
    parser.add_argument("--top", type=int, default=3, help="classes to print, where the output is class scores")
    options = parser.parse_args()
    if not options.selftest and options.input is None:
        parser.error("name an input, or --selftest")
    with open(os.path.join(HERE, "manifest.json"), encoding="utf-8") as file:
        manifest = json.load(file)
    info = manifest["info"]
    engine, built = find_engine(options, info)
    if engine is None and options.runtime == "tensorrt":
        script = os.path.exists(os.path.join(HERE, "build_engine.sh"))
        parser.error(
            "no engine here; " + ("build one: sh build_engine.sh" if script else "this bundle is for ONNX Runtime")
        )
    if engine:
        if shipped(engine, info):
            refuse_changed(manifest, [os.path.basename(engine)])
        model = TensorRTModel(engine, built, options.allow_code)
    else:
        # weights may lie beside the graph, as model.onnx.data
        refuse_changed(
            manifest,
            [info["model"]] + sorted(name for name in manifest["files"] if name.startswith(info["model"] + ".")),
        )
        model = OnnxModel(os.path.join(HERE, info["model"]), info)
    if options.selftest:
        refuse_changed(manifest, ["golden.npz"])
        return selftest(model, info)
    samples = read_samples(options.input, info)
    try:
        output = model.run(samples)
    except Exception as error:  # the runtimes' exceptions share no base class
        sys.exit("the model cannot compute %s: %s" % (options.input, (str(error).splitlines() or [repr(error)])[0]))
    if info["decides"]:
        print_classes(output, info, options.top)
    else:
        print_values(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
