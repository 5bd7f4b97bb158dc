"""Students: elastic families, and a user's own networks. Names are resolved on first use, so sections import fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.students.arch import ConvArch, TextArch, default_arch, family_for, parse_arch, teacher_arch
    from distill.students.section import torch_word
    from distill.students.student import Student, build_student, load_student, save_student

_HOMES = {
    "ConvArch": "arch",
    "Student": "student",
    "TextArch": "arch",
    "build_student": "student",
    "default_arch": "arch",
    "family_for": "arch",
    "load_student": "student",
    "parse_arch": "arch",
    "save_student": "student",
    "teacher_arch": "arch",
    "torch_word": "section",
}
__all__ = [
    "ConvArch",
    "Student",
    "TextArch",
    "build_student",
    "default_arch",
    "family_for",
    "load_student",
    "parse_arch",
    "save_student",
    "teacher_arch",
    "torch_word",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
