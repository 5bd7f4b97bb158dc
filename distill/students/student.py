"""What a student is: a body that gives an embedding, and one Linear head."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from distill.data.dataset import InputSpec
from distill.networks import (
    ImageAdapter,
    call_factory,
    find_linear,
    first_tensor,
    load_state,
    read_state,
    seeded,
)
from distill.outputs import StudentOutput
from distill.students.arch import ConvArch, check_family, default_arch, parse_arch
from distill.students.section import StudentSection, torch_word
from profiles.errors import InputError


class Student(nn.Module):
    """A network from raw inputs to embedding and head output. Its normalisation is its first layer.

    Args:
        arch: one word that names the architecture.
        body: inputs (uint8 (N, C, H, W) or int64 (N, T)) -> embedding (N, embedding_dim).
        embedding_dim: D_s.
        head_size: H, which the objective decides.
    """

    def __init__(self, arch: str, body: nn.Module, embedding_dim: int, head_size: int) -> None:
        super().__init__()
        self.arch = arch
        self.embedding_dim = embedding_dim
        self.head_size = head_size
        self.body = body
        self.head = nn.Linear(embedding_dim, head_size)

    def forward(self, x: Tensor) -> StudentOutput:
        embedding: Tensor = self.body(x)
        return StudentOutput(embedding, self.head(embedding))


class TorchBody(nn.Module):
    """A user's network without its final Linear: inputs -> the embedding that this Linear read, (N, D).

    The Linear is replaced by an identity rather than watched by a hook: the graph of the export then holds what ran.
    """

    def __init__(self, network: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return first_tensor(self.network(self.adapter(x)), where="student.factory")


def build_student(
    section: StudentSection,
    spec: InputSpec,
    head_size: int,
    *,
    arch: str | None = None,
    seed: int,
    base: Path,
    allow_code: bool = False,
) -> Student:
    """A student with fresh (or, for kind "torch", the given initial) weights; the same seed gives the same weights.

    Args:
        section: the recipe's `[student]`.
        spec: one sample's shape.
        head_size: outputs of the head, H.
        arch: the target's architecture; None: the section's, or the family's medium default. Ignored for kind "torch".
        seed: of the initialisation; the global generators are not touched.
        base: the recipe's folder.
        allow_code: the user allowed importing code that the recipe names.

    Raises:
        InputError: unknown architecture or one for another kind of input, a factory that fails, weights that do not
            fit.
    """
    with seeded(seed):
        if section.kind == "torch":
            return _torch_student(section, spec, head_size, base, allow_code)
        if section.family is not None:
            check_family(section.family, spec)
        parsed = parse_arch(arch or section.arch or default_arch(section.family, "medium", spec), where="student.arch")
        check_family(parsed.family, spec, where="student.arch")
        body: nn.Module
        # imported here because only one of them is needed
        if isinstance(parsed, ConvArch):
            from distill.students.conv import ConvNet

            body = ConvNet(parsed, spec)
        else:
            from distill.students.text import TextNet

            body = TextNet(parsed, spec)
        return Student(str(parsed), body, int(body.embedding_dim), head_size)


def _torch_student(section: StudentSection, spec: InputSpec, head_size: int, base: Path, allow_code: bool) -> Student:
    import torch

    assert section.factory is not None
    network = call_factory(section.factory, section.kwargs, base=base, where="student", allow_code=allow_code)
    name, linear = find_linear(network, section.head, where="student")
    if section.weights is not None:
        file = base / section.weights
        state = read_state(file, where="student.weights")
        load_state(network, state, file=file, where="student.weights", skip=(name,))
    parent, _, attribute = name.rpartition(".")
    tap = nn.Identity()
    setattr(network.get_submodule(parent), attribute, tap)
    adapter: nn.Module = ImageAdapter(section, spec, where="student") if spec.kind == "image" else nn.Identity()
    body = TorchBody(network, adapter)
    # one probe in eval mode: does what the head read really reach the output, unchanged?
    seen: list[Tensor] = []
    handle = tap.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    body.eval()
    example = torch.zeros(2, *spec.shape, dtype=torch.uint8 if spec.kind == "image" else torch.int64)
    try:
        with torch.no_grad():
            output = body(example)
    except InputError:
        raise
    except Exception as error:  # a user's network may raise anything
        raise InputError(
            f'"{section.factory}" does not run on this data',
            where="student.factory",
            evidence=f"input {tuple(example.shape)}: {type(error).__name__}: {error}",
            fix="check student.input_channels and student.input_size, or the network itself",
        ) from error
    finally:
        handle.remove()
    if len(seen) != 1 or output.shape != (2, linear.in_features) or not torch.equal(seen[0], output):
        raise InputError(
            f'"{name}" is not the last layer of "{section.factory}"',
            where="student.head",
            evidence=f"the network without it returns {tuple(output.shape)}, it read {linear.in_features} features",
            fix="name the final Linear, and return its raw output (no softmax after it)",
        )
    body.train()
    return Student(torch_word(section), body, linear.in_features, head_size)


def save_student(student: nn.Module, file: Path) -> None:
    """Writes all weights and buffers to a .safetensors file."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}, file)


def load_student(student: nn.Module, file: Path) -> None:
    """Copies the weights of a file that `save_student` wrote into a student of the same architecture.

    Raises:
        InputError: missing, truncated or corrupt file, or weights of another architecture; the message names the file.
    """
    load_state(student, read_state(file, where=str(file)), file=file, where=str(file))
