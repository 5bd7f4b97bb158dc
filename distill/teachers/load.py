"""From the `[teacher]` table to a frozen teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.data.dataset import Dataset
from distill.teachers.section import TeacherSection
from distill.teachers.teacher import Teacher
from profiles.errors import EdgestillError
from profiles.progress import Progress, Silent


def load_teacher(
    section: TeacherSection,
    dataset: Dataset,
    *,
    base: Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    allow_code: bool = False,
    progress: Progress | None = None,
) -> Teacher:
    """A teacher of kind array, transformers, onnx or torch: in eval mode, without gradients.

    (A teacher of kind "train" is trained by the loop, which is above this layer, and wrapped in a ModuleTeacher.)

    Args:
        section: the recipe's `[teacher]`.
        dataset: what it will look at.
        base: the recipe's folder, for relative paths.
        seed: of a torch factory's random initialisation, as far as no weights replace it.
        device: where it runs.
        allow_code: the user allowed importing code that the recipe names.
        progress: told what was loaded, and for which class a single logit is taken.

    Raises:
        InputError: anything in the section or its files that does not fit the data; see the teachers' classes.
    """
    device = torch.device(device)
    teacher: Teacher
    # each import is here because it is heavy, or needed for its kind alone
    if section.kind == "array":
        from distill.teachers.from_array import ArrayTeacher

        teacher = ArrayTeacher(section, dataset, base)
    elif section.kind == "transformers":
        from distill.teachers.from_transformers import TransformersTeacher

        teacher = TransformersTeacher(section, dataset, base=base, device=device)
    elif section.kind == "onnx":
        from distill.teachers.from_onnx import OnnxTeacher

        teacher = OnnxTeacher(section, dataset, base=base, device=device)
    elif section.kind == "torch":
        from distill.teachers.from_torch import TorchTeacher

        teacher = TorchTeacher(section, dataset, base=base, seed=seed, device=device, allow_code=allow_code)
    else:
        raise EdgestillError(f'a teacher of kind "{section.kind}" has nothing to load', where="teacher.kind")
    teacher.assert_frozen()
    gives = []
    if teacher.embedding_dim is not None:
        gives.append(f"embeddings of {teacher.embedding_dim} dimensions")
    if teacher.single_logit:
        gives.append(f'one logit: taken for class "{dataset.classes[1]}"')
    elif teacher.num_logits is not None:
        gives.append(f"{teacher.num_logits} logits")
    (progress or Silent()).note(f"teacher ({section.kind}): {' and '.join(gives)}")
    return teacher
