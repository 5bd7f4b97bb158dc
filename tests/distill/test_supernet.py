"""The supernet: every member is the standalone student, touches only its own slices, and costs only its own memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.data import InputSpec
from distill.networks import fingerprint
from distill.students import Student, build_student, family_pool, load_student, parse_arch, save_student
from distill.students.arch import Arch, ConvArch
from distill.students.conv import ConvNet
from distill.students.pool import largest, stage_boundaries
from distill.students.section import StudentSection
from distill.students.supernet import Supernet
from distill.students.text import TextNet

IMAGES = InputSpec("image", (2, 20, 18), (0.3, 0.5), (0.3, 0.2))  # three stages, the last of 3 x 3 pixels
TOKENS = InputSpec("tokens", (9,), vocabulary=30, pad_id=0)
HEAD = 5
SPECS = {"conv": IMAGES, "convi": IMAGES, "text": TOKENS, "textc": TOKENS}
TEACHERS = {"conv": "conv-w16-d1-k3", "convi": "conv-w16-d1-k3", "text": "text-w40-d3-h2", "textc": "text-w40-d3-h2"}


def pool(kind: str) -> tuple[Arch, ...]:
    """Two of each choice; of the three numbers of heads, one divides only the larger width."""
    if kind == "text":
        like = parse_arch("text-w16-d1-h1")
        chosen = {"widths": (16, 24), "depths": (1, 3), "heads": (2, 3, 4)}
    else:
        like = parse_arch({"conv": "conv-w8-d1-k3", "convi": "convi-w8-d1-k3", "textc": "textc-w16-d1-k3"}[kind])
        chosen = {"widths": (16, 24) if kind == "textc" else (4, 8), "depths": (1, 2), "kernels": (3, 5)}
    return family_pool(parse_arch(TEACHERS[kind]), SPECS[kind], like=like, **chosen)


EVERY_CHOICE = [pytest.param(kind, arch, id=str(arch)) for kind in SPECS for arch in pool(kind)]


def new_supernet(kind: str) -> Supernet:
    """With weights, biases and running statistics that are all unlike their initial values."""
    net = Supernet(pool(kind), SPECS[kind], HEAD, teacher=parse_arch(TEACHERS[kind]), seed=3).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.1)
        for name, buffer in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return net


@cache
def built(kind: str) -> tuple[Supernet, dict[str, Tensor]]:
    net = new_supernet(kind)
    return net, {name: tensor.clone() for name, tensor in net.state_dict().items()}


def supernet(kind: str) -> Supernet:
    """The same object in every test, which saves building it, set back to the state of `new_supernet`."""
    net, state = built(kind)
    net.load_state_dict(state)
    net.zero_grad()
    return net.train()


def inputs(kind: str, count: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if SPECS[kind].kind == "image":
        return torch.randint(0, 256, (count, *IMAGES.shape), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, TOKENS.vocabulary, (count, *TOKENS.shape), generator=generator)
    lengths = torch.randint(1, TOKENS.shape[0] + 1, (count, 1), generator=generator)
    return torch.where(torch.arange(TOKENS.shape[0]) < lengths, tokens, TOKENS.pad_id)


def build(arch: Arch | str, kind: str, seed: int = 0) -> Student:
    return build_student(StudentSection(), SPECS[kind], HEAD, arch=str(arch), seed=seed, base=Path())


def cut(large: Tensor, small: Tensor) -> Tensor:
    """Oracle of the slicing: leading channels, then as many rows and columns off both sides of a kernel."""
    for axis in range(large.ndim):
        surplus = large.shape[axis] - small.shape[axis]
        if axis >= 2:
            assert surplus % 2 == 0
            large = large.narrow(axis, surplus // 2, small.shape[axis])
        else:
            large = large.narrow(axis, 0, small.shape[axis])
    return large


def by_hand(net: Supernet, arch: Arch, kind: str) -> Student:
    """Oracle: a student that `build_student` made, with copied weights and buffers."""
    student = build(arch, kind).double().train(net.training)
    source = net.shared.state_dict()
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            tensor.copy_(cut(source[name], tensor))
    return student


def statistics(student: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in student.named_buffers() if "running" in name}


@pytest.mark.parametrize(("kind", "arch"), EVERY_CHOICE)
def test_a_path_is_the_standalone_student_in_train_and_in_eval_mode(kind: str, arch: Arch) -> None:
    net = supernet(kind)
    expected, alone, x = by_hand(net, arch, kind), net.standalone(arch), inputs(kind)
    assert alone.arch == str(arch)
    for training in (True, False):
        assert net.train(training).standalone(arch).training is training
        wanted, path, own = expected.train(training)(x), net.path(arch, x), alone.train(training)(x)
        for output in (path, own):
            torch.testing.assert_close(output.embedding, wanted.embedding, rtol=0, atol=1e-6)
            torch.testing.assert_close(output.head, wanted.head, rtol=0, atol=1e-6)
        # the statistics that the training pass left are those of the standalone student, in the channels of the path
        after = net.shared.state_dict()
        for name, buffer in statistics(expected).items():
            torch.testing.assert_close(cut(after[name], buffer), buffer, rtol=0, atol=1e-6)
            torch.testing.assert_close(dict(alone.named_buffers())[name], buffer, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "arch"), EVERY_CHOICE)
def test_gradients_and_statistics_stay_inside_the_sampled_slices(kind: str, arch: Arch) -> None:
    net = supernet(kind).train()
    before = {name: buffer.clone() for name, buffer in net.shared.named_buffers()}
    expected = by_hand(net, arch, kind)
    x = inputs(kind)
    net.path(arch, x).head.square().sum().backward()
    expected(x).head.square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in expected.named_parameters()}
    for name, parameter in net.shared.named_parameters():
        if name not in wanted:  # a block beyond the path's depth
            assert parameter.grad is None
            continue
        gradient = wanted[name]
        assert gradient is not None
        assert parameter.grad is not None
        torch.testing.assert_close(cut(parameter.grad, gradient), gradient, rtol=1e-9, atol=1e-12)
        outside = parameter.grad.clone()
        cut(outside, gradient).zero_()
        assert not outside.any()
    small = dict(expected.named_buffers())
    for name, buffer in net.shared.named_buffers():
        difference = buffer - before[name]
        if name in small:
            cut(difference, small[name]).zero_()
        assert not difference.any()


@pytest.mark.parametrize("kind", SPECS)
def test_two_paths_share_one_backward_pass(kind: str) -> None:
    net, x = supernet(kind).train(), inputs(kind)
    alone = copy.deepcopy(net)
    first, last = net.archs[0], net.archs[-1]
    (net.path(first, x).head.sum() + 2 * net.path(last, x).head.sum()).backward()
    alone.path(first, x).head.sum().backward()
    (2 * alone.path(last, x).head.sum()).backward()
    for (name, joint), (_, apart) in zip(net.shared.named_parameters(), alone.shared.named_parameters(), strict=True):
        torch.testing.assert_close(joint.grad, apart.grad, msg=name)


@pytest.mark.parametrize("kind", SPECS)
def test_a_standalone_student_owns_its_weights(kind: str) -> None:
    net = supernet(kind)
    shared = {tensor.untyped_storage().data_ptr() for tensor in net.state_dict().values()}
    before = fingerprint(net)
    for arch in net.archs:
        alone = net.standalone(arch)
        assert all(tensor.is_contiguous() for tensor in alone.state_dict().values())
        assert not shared & {tensor.untyped_storage().data_ptr() for tensor in alone.state_dict().values()}
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in alone.parameters())
        optimizer = torch.optim.SGD(alone.parameters(), lr=1.0)
        alone(inputs(kind)).head.square().sum().backward()
        optimizer.step()
    assert fingerprint(net) == before


@pytest.mark.parametrize("kind", SPECS)
def test_a_pool_of_one_is_that_student(kind: str) -> None:
    arch = pool(kind)[3]
    net = Supernet([arch], SPECS[kind], HEAD, teacher=parse_arch(TEACHERS[kind]), seed=7)
    fresh = build(arch, kind, seed=7)
    assert fingerprint(net.shared) == fingerprint(net.standalone(arch)) == fingerprint(fresh)
    x = inputs(kind)
    assert torch.equal(net.path(arch, x).head, fresh(x).head)
    assert fingerprint(net.shared) == fingerprint(fresh)  # the statistics of that pass included


@pytest.mark.parametrize("kind", SPECS)
def test_names_are_those_of_the_largest_student_and_of_the_adapters_and_using_it_changes_none(
    kind: str, tmp_path: Path
) -> None:
    net, x = new_supernet(kind), inputs(kind)
    names = list(net.state_dict())
    student = [f"shared.{name}" for name in build(largest(net.archs), kind).state_dict()]
    assert names[: len(student)] == student
    assert {name.split(".")[1] for name in names[len(student) :]} == {str(i) for i in range(net.boundaries)}
    assert all(name.startswith("adapters.") for name in names[len(student) :])
    for arch in net.archs:
        net.path(arch, x)
    assert list(net.state_dict()) == names
    assert len(list(net.parameters())) == len(list(net.shared.parameters())) + len(list(net.adapters.parameters()))

    save_student(net, tmp_path / "supernet.safetensors")
    other = Supernet(net.archs, SPECS[kind], HEAD, teacher=parse_arch(TEACHERS[kind]), seed=99).double()
    load_student(other, tmp_path / "supernet.safetensors")
    assert fingerprint(other) == fingerprint(net)
    twin = copy.deepcopy(net)
    for arch in net.archs:
        wanted = net.eval().path(arch, x).head
        assert torch.equal(other.eval().path(arch, x).head, wanted)
        assert torch.equal(twin.eval().path(arch, x).head, wanted)
    twin.shared.head.weight.data.zero_()
    assert net.shared.head.weight.any()  # the copy is one of its own


def test_the_seed_alone_decides_the_weights_and_the_global_generator_is_not_touched() -> None:
    def make(seed: int) -> str:
        net = Supernet(pool("conv"), IMAGES, HEAD, teacher=parse_arch("conv-w16-d1-k3"), seed=seed)
        for arch in net.archs:
            net.path(arch, inputs("conv"))
        return fingerprint(net)

    state = torch.get_rng_state()
    assert make(1) == make(1) != make(2)
    assert torch.equal(torch.get_rng_state(), state)


def teacher_features(kind: str) -> tuple[Student, list[Tensor], Tensor | None]:
    """A teacher, what it computes after each of its stages or blocks but the last, and the real tokens."""
    teacher = build(TEACHERS[kind], kind, seed=11).double()
    body, x = teacher.body, inputs(kind)
    features: list[Tensor] = []
    if isinstance(body, ConvNet):
        h = body.stem(body.normalize(x).double())
        for stage in body.stages:
            h = stage(h)
            features.append(h)
        return teacher, features[:-1], None
    assert isinstance(body, TextNet)
    h, real = body.tokens(x) + body.positions, body.real(x)
    for block in body.blocks:
        h = block(h, real)
        features.append(h)
    return teacher, features[:-1], real


def branch_by_hand(net: Supernet, arch: Arch, kind: str, boundary: int, h: Tensor, real: Tensor | None) -> Tensor:
    """Oracle: functional adapter of the leading channels, then the stages or blocks that follow in the student."""
    student, adapter = by_hand(net, arch, kind), net.adapters[boundary]
    body, state = student.body, adapter.state_dict()
    if isinstance(body, ConvNet):
        channels = arch.width * 2**boundary  # of the stage after which the branch begins
        h = nn.functional.conv2d(h, state["0.weight"][:channels])
        mean, var = (state[f"1.running_{name}"][:channels].clone() for name in ("mean", "var"))
        scale, shift = state["1.weight"][:channels], state["1.bias"][:channels]
        h = nn.functional.batch_norm(h, mean, var, scale, shift, training=net.training)
        for stage in list(body.stages)[boundary + 1 :]:
            h = stage(h)
        return student.head(h.mean((2, 3)))  # type: ignore[no-any-return]
    assert isinstance(body, TextNet)
    assert real is not None
    width = arch.width
    h = nn.functional.linear(h, state["0.weight"][:width], state["0.bias"][:width])
    h = nn.functional.layer_norm(h, (width,), state["1.weight"][:width], state["1.bias"][:width])
    first = {(1, 0): 0, (1, 1): 0, (2, 0): 0, (2, 1): 1, (3, 0): 1, (3, 1): 2}[arch.depth, boundary]
    for block in list(body.blocks)[first:]:
        h = block(h, real)
    h = body.norm(h) * real
    return student.head(h.sum(1) / real.sum(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", SPECS)
def test_a_branch_goes_on_where_the_student_would_be(kind: str, training: bool) -> None:
    net = supernet(kind).train(training)
    with torch.no_grad():
        _, features, real = teacher_features(kind)
    assert net.boundaries == len(features) == 2
    for arch in net.archs:
        for boundary, h in enumerate(features):
            wanted = branch_by_hand(net, arch, kind, boundary, h, real)
            found = net.branch(arch, boundary, h, real)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SPECS)
def test_a_branch_sends_its_gradient_into_the_teacher_up_to_its_boundary(kind: str) -> None:
    net = supernet(kind).train()
    teacher, features, real = teacher_features(kind)
    arch = net.archs[0]
    net.branch(arch, 0, features[0], real).square().sum().backward()
    assert isinstance(teacher.body, ConvNet | TextNet)
    layers = teacher.body.stages if isinstance(teacher.body, ConvNet) else teacher.body.blocks
    touched = [any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters()) for layer in layers]
    assert touched == [True, False, False]
    assert all(parameter.grad is None for parameter in net.adapters[1].parameters())
    gradient = dict(net.adapters[0].named_parameters())["0.weight"].grad
    assert gradient is not None
    assert gradient[: arch.width].any()
    assert not gradient[arch.width :].any()
    if isinstance(arch, ConvArch):  # what precedes the boundary in the student has no part in it
        assert all(
            p.grad is None for name, p in net.shared.named_parameters() if ".stem." in name or "stages.0" in name
        )
    else:
        assert dict(net.shared.named_parameters())["body.tokens.weight"].grad is None


def test_branches_need_a_boundary_and_texts_their_real_tokens() -> None:
    net = supernet("text")
    _, features, real = teacher_features("text")
    for boundary in (-1, 2):
        with pytest.raises(ValueError, match="boundary"):
            net.branch(net.archs[0], boundary, features[0], real)
    with pytest.raises(ValueError, match="real"):
        net.branch(net.archs[0], 0, features[0])
    with pytest.raises(ValueError, match="boundary 0 of 0"):
        Supernet(net.archs, TOKENS, HEAD, seed=0).branch(net.archs[0], 0, features[0], real)


@pytest.mark.parametrize(
    "arch", ["conv-w16-d1-k3", "conv-w8-d3-k3", "conv-w4-d1-k7", "convi-w4-d1-k3"], ids=["width", "depth", "k", "kind"]
)
def test_what_is_no_part_of_the_shared_network_is_refused(arch: str) -> None:
    net = supernet("conv")
    for use in (lambda a: net.path(a, inputs("conv")), net.standalone, lambda a: net.recalibrate(a, [inputs("conv")])):
        with pytest.raises(ValueError, match=r"no part of conv-w8-d2-k5"):
            use(parse_arch(arch))


def test_a_part_of_the_shared_network_need_not_be_in_the_pool() -> None:
    net, arch = (
        Supernet([parse_arch("conv-w12-d1-k3")], IMAGES, HEAD, seed=0).eval().double(),
        parse_arch("conv-w8-d1-k3"),
    )
    x = inputs("conv")
    torch.testing.assert_close(net.path(arch, x).head, by_hand(net, arch, "conv")(x).head, rtol=0, atol=1e-6)


def test_mixed_kinds_an_empty_pool_and_a_teacher_of_another_family_are_refused() -> None:
    conv, inverted, text = (parse_arch(word) for word in ("conv-w8-d1-k3", "convi-w8-d1-k3", "text-w16-d1-h2"))
    for archs in ([], [conv, inverted]):
        with pytest.raises(ValueError, match="one kind"):
            Supernet(archs, IMAGES, HEAD, seed=0)
    with pytest.raises(ValueError, match="cannot follow"):
        Supernet([conv], IMAGES, HEAD, teacher=text, seed=0)


@pytest.mark.parametrize("kind", ["conv", "convi", "textc"])
def test_recalibrated_statistics_are_the_cumulative_ones_of_a_fresh_batch_norm(kind: str) -> None:
    net = supernet(kind).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    batches = [inputs(kind, count, seed) for seed, count in enumerate((4, 7, 3))]
    for arch in net.archs:
        fresh = by_hand(net, arch, kind).train()
        for module in fresh.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        for batch in batches:
            fresh(batch)
        net.recalibrate(arch, iter(batches))
        after = net.state_dict()
        for name, buffer in statistics(fresh).items():
            torch.testing.assert_close(cut(after[f"shared.{name}"], buffer), buffer, rtol=1e-9, atol=1e-12)
        alone = net.standalone(arch)
        x = inputs(kind, seed=9)
        torch.testing.assert_close(alone(x).head, fresh.eval()(x).head, rtol=1e-9, atol=1e-12)
        # nothing outside the path moved, and no weight
        inside = statistics(fresh)
        for name, tensor in after.items():
            difference = tensor - before[name]
            if (short := name.removeprefix("shared.")) in inside:
                cut(difference, inside[short]).zero_()
            assert not difference.any(), name
        net.load_state_dict(before)
    assert not net.training


def test_statistics_are_checked_against_plain_numpy_for_the_first_layer() -> None:
    net, arch = supernet("conv").eval(), parse_arch("conv-w4-d1-k3")
    batches = [inputs("conv", 4, seed) for seed in range(3)]
    net.recalibrate(arch, batches)
    body = net.shared.body
    assert isinstance(body, ConvNet)
    convolution, norm = body.get_submodule("stem.0.0"), body.get_submodule("stem.0.1")
    assert isinstance(norm, nn.BatchNorm2d)
    seen = [convolution(body.normalize(batch))[:, :4] for batch in batches]
    flat = [value.detach().transpose(0, 1).flatten(1).numpy() for value in seen]
    mean = sum(value.mean(1) for value in flat) / 3
    variance = sum(value.var(1, ddof=1) for value in flat) / 3
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean[:4], torch.from_numpy(mean))
    torch.testing.assert_close(norm.running_var[:4], torch.from_numpy(variance))


def test_recalibration_without_batches_or_that_fails_half_way_changes_nothing() -> None:
    net = supernet("conv")
    before = fingerprint(net)
    with pytest.raises(ValueError, match="at least one batch"):
        net.recalibrate(net.archs[0], [])

    def broken() -> Iterator[Tensor]:
        yield inputs("conv")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk"):
        net.recalibrate(net.archs[0], broken())
    assert fingerprint(net) == before
    assert net.training


def test_a_transformer_has_no_statistics_and_reads_no_batch() -> None:
    net = supernet("text")
    before = fingerprint(net)

    def unread() -> Iterator[Tensor]:
        yield pytest.fail("a batch was read")

    net.recalibrate(net.archs[0], unread())
    assert fingerprint(net) == before


def activations(net: Supernet, call: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass, apart from the weights themselves."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in net.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


@pytest.mark.parametrize("kind", SPECS)
def test_only_the_activations_of_one_path_exist(kind: str) -> None:
    words = {
        "conv": ("conv-w4-d1-k3", "conv-w64-d2-k3"),
        "convi": ("convi-w4-d1-k3", "convi-w64-d2-k3"),
        "text": ("text-w16-d1-h2", "text-w256-d2-h2"),
        "textc": ("textc-w16-d1-k3", "textc-w256-d2-k3"),
    }[kind]
    small, large = (parse_arch(word) for word in words)
    net, x = Supernet([small, large], SPECS[kind], HEAD, seed=0), inputs(kind, 16)
    outputs: list[object] = []
    modest = activations(net, lambda: outputs.append(net.path(small, x)))
    full = activations(net, lambda: outputs.append(net.path(large, x)))
    assert modest * 10 < full
    # no more than a network that has only this member
    net_alone = Supernet([small], SPECS[kind], HEAD, seed=0)
    assert modest == activations(net_alone, lambda: outputs.append(net_alone.path(small, x)))


def test_elastic_adapters_number_the_boundaries_and_are_sliced_to_the_students_stage() -> None:
    net = Supernet(pool("conv"), IMAGES, HEAD, teacher=parse_arch("conv-w20-d1-k3"), seed=0)
    assert net.boundaries == stage_boundaries(parse_arch("conv-w20-d1-k3"), IMAGES) == 2
    shapes = [adapter.state_dict()["0.weight"].shape for adapter in net.adapters]
    assert shapes == [(8, 20, 1, 1), (16, 40, 1, 1)]
    assert Supernet(pool("conv"), IMAGES, HEAD, seed=0).boundaries == 0
    one_block = Supernet(pool("text"), TOKENS, HEAD, teacher=parse_arch("text-w40-d1-h2"), seed=0)
    assert (one_block.boundaries, len(one_block.adapters)) == (0, 0)


def test_it_runs_in_mixed_precision() -> None:
    net, x = Supernet(pool("conv"), IMAGES, HEAD, seed=0), inputs("conv")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net.path(net.archs[0], x)
    assert output.head.dtype == torch.bfloat16
    output.head.float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())
