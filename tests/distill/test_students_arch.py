"""Architectures print as one word, and the word is all that is needed to get them back."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distill.data import InputSpec
from distill.students import ConvArch, TextArch, default_arch, family_for, parse_arch, teacher_arch, torch_word
from distill.students.arch import stage_count, stem_stride
from distill.students.section import StudentSection
from distill.teachers.section import TeacherSection
from profiles.errors import InputError

conv = st.builds(
    ConvArch,
    width=st.sampled_from(ConvArch.widths),
    depth=st.sampled_from(ConvArch.depths),
    kernel=st.sampled_from(ConvArch.kernels),
    inverted=st.booleans(),
)
transformer = st.integers(1, 16).flatmap(
    lambda heads: st.builds(
        TextArch,
        width=st.sampled_from([w for w in TextArch.widths if w % heads == 0]),
        depth=st.sampled_from(TextArch.depths),
        heads=st.just(heads),
    )
)
text_conv = st.builds(
    TextArch,
    width=st.sampled_from(TextArch.widths),
    depth=st.sampled_from(TextArch.depths),
    kernel=st.sampled_from(TextArch.kernels),
)


def image_spec(side: int, channels: int = 3) -> InputSpec:
    return InputSpec("image", (channels, side, side), (0.5,) * channels, (0.2,) * channels)


@given(st.one_of(conv, transformer, text_conv))
def test_the_word_of_an_architecture_parses_back_to_it(arch: ConvArch | TextArch) -> None:
    assert parse_arch(str(arch)) == arch
    assert len(str(arch).split()) == 1


@given(st.text(max_size=30))
def test_any_text_is_a_word_of_an_architecture_or_refused_with_an_explanation(text: str) -> None:
    try:
        explained = bool(str(parse_arch(text)) == text)
    except InputError as refused:
        explained = bool(refused.fix)
    assert explained


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("conv-w24-d2-k4", "kernel 3 is the nearest"),
        ("conv-w24-d99-k3", "depth 8 is the nearest"),
        ("conv-w4000-d2-k3", "width 512 is the nearest"),
        ("conv-w024-d2-k3", "such as conv-w24-d2-k3"),
        ("conv-w24-d2-h3", "such as conv-w24-d2-k3"),
        ("text-w64-d2-k5", "such as text-w64-d2-h4"),
        ("text-w64-d2-h5", "text-w64-d2-h4"),
        ("text-w64-d2-h0", "heads 1 is the nearest"),
        ("textc-w64-d2-k0", "kernel 3 is the nearest"),
        ("resnet18", "conv-w24-d2-k3"),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest_right_value(word: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_arch(word, where="student.arch")
    assert says in str(caught.value)
    assert caught.value.where == "student.arch"


@pytest.mark.parametrize("side", [8, 28, 32, 64, 96, 160, 224, 512])
def test_defaults_parse_and_grow_with_the_size_class(side: int) -> None:
    spec = image_spec(side)
    words = [default_arch("conv", size, spec) for size in ("small", "medium", "large")]
    assert len({*words, teacher_arch("conv", spec)}) == 4
    assert all(isinstance(parse_arch(word), ConvArch) for word in words)
    widths = [parse_arch(word).width for word in (*words, teacher_arch("conv", spec))]
    assert widths == sorted(widths)


def test_larger_images_are_halved_more_often() -> None:
    assert [(stem_stride(image_spec(s)), stage_count(image_spec(s))) for s in (28, 32, 64, 224)] == [
        (2, 3),
        (2, 3),
        (2, 4),
        (4, 4),
    ]


def test_a_family_for_another_kind_of_input_is_refused() -> None:
    with pytest.raises(InputError, match="reads texts"):
        default_arch("text", "small", image_spec(28))
    with pytest.raises(InputError, match="reads images"):
        teacher_arch("conv", InputSpec("tokens", (16,), vocabulary=50))


def test_without_a_family_the_input_decides() -> None:
    tokens = InputSpec("tokens", (16,), vocabulary=50)
    assert StudentSection().family is None
    assert (family_for(image_spec(28)), family_for(tokens)) == ("conv", "text")
    for spec in (image_spec(28), tokens):
        family = family_for(spec)
        assert default_arch(None, "medium", spec) == default_arch(family, "medium", spec)
        assert teacher_arch(None, spec) == teacher_arch(family, spec)


def test_the_word_of_a_torch_student_is_safe_as_a_folder_name() -> None:
    assert torch_word(StudentSection(kind="torch", factory="package.module:Nets.small")) == "torch-Nets_small"
    assert torch_word(StudentSection(kind="torch", factory="module:../up")) == "torch-_up"


def test_section_keys_of_another_kind_are_refused_and_stored_recipes_load_again() -> None:
    with pytest.raises(ValidationError, match='"factory" belongs to a student of kind "torch"'):
        StudentSection(factory="a:b")
    with pytest.raises(ValidationError, match='"family" belongs to a student of kind "family"'):
        StudentSection(kind="torch", factory="a:b", family="conv")
    with pytest.raises(ValidationError, match='needs "factory"'):
        StudentSection(kind="torch")
    with pytest.raises(ValidationError, match='"model" does not belong to a teacher of kind "onnx"'):
        TeacherSection(kind="onnx", file="a.onnx", output="logits", model="bert")
    with pytest.raises(ValidationError, match="embeddings or logits"):
        TeacherSection(kind="array")
    with pytest.raises(ValidationError, match="mean has 3 values, std has 1"):
        StudentSection(kind="torch", factory="a:b", mean=(0.5, 0.5, 0.5), std=(0.5,))
    for section in (StudentSection(kind="torch", factory="a:b"), StudentSection(arch="conv-w16-d1-k3")):
        assert StudentSection(**section.model_dump()) == section
    teacher = TeacherSection(kind="onnx", file="a.onnx", output="logits")
    assert TeacherSection(**teacher.model_dump()) == teacher


def test_sections_import_without_torch() -> None:
    code = (
        "import sys, distill.students.section, distill.teachers.section\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
