"""Students: elastic families, and a user's own networks. Names are resolved on first use, so sections import fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.students.arch import ConvArch, TextArch, default_arch, family_for, parse_arch, teacher_arch
    from distill.students.pool import family_pool, parse_pool, restrict, student_pool
    from distill.students.section import torch_word
    from distill.students.student import Student, build_student, load_student, save_student
    from distill.students.supernet import Supernet

_HOMES = {
    "ConvArch": "arch",
    "Student": "student",
    "Supernet": "supernet",
    "TextArch": "arch",
    "build_student": "student",
    "default_arch": "arch",
    "family_for": "arch",
    "family_pool": "pool",
    "load_student": "student",
    "parse_arch": "arch",
    "parse_pool": "pool",
    "restrict": "pool",
    "save_student": "student",
    "student_pool": "pool",
    "teacher_arch": "arch",
    "torch_word": "section",
}
__all__ = [
    "ConvArch",
    "Student",
    "Supernet",
    "TextArch",
    "build_student",
    "default_arch",
    "family_for",
    "family_pool",
    "load_student",
    "parse_arch",
    "parse_pool",
    "restrict",
    "save_student",
    "student_pool",
    "teacher_arch",
    "torch_word",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
