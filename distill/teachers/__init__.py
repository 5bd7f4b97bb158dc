"""Teachers, frozen or live, and the cache of their outputs. Names resolve on first use: sections import fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.teachers.cache import SubclassCache, TeacherCache, build_cache, cache_parts, open_cache
    from distill.teachers.live import live_teacher
    from distill.teachers.load import load_teacher
    from distill.teachers.teacher import ModuleTeacher, NetworkTeacher, Teacher, TeacherBatch

_HOMES = {
    "ModuleTeacher": "teacher",
    "NetworkTeacher": "teacher",
    "SubclassCache": "cache",
    "Teacher": "teacher",
    "TeacherBatch": "teacher",
    "TeacherCache": "cache",
    "build_cache": "cache",
    "cache_parts": "cache",
    "live_teacher": "live",
    "load_teacher": "load",
    "open_cache": "cache",
}
__all__ = [
    "ModuleTeacher",
    "NetworkTeacher",
    "SubclassCache",
    "Teacher",
    "TeacherBatch",
    "TeacherCache",
    "build_cache",
    "cache_parts",
    "live_teacher",
    "load_teacher",
    "open_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
