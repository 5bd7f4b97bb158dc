"""From a frozen teacher to one that learns beside the student."""

from __future__ import annotations

import numpy as np
import torch

from distill.data.dataset import Dataset
from distill.teachers.teacher import ModuleTeacher, NetworkTeacher, Teacher, TeacherBatch
from profiles.errors import InputError

_WHAT = {"array": "only stored outputs", "onnx": "a finished graph whose weights are constants"}


def live_teacher(teacher: Teacher, layers: int | None, dataset: Dataset) -> NetworkTeacher:
    """An own copy of `teacher` that learns; see `NetworkTeacher.live`.

    Args:
        teacher: frozen, and stays so.
        layers: so many of a transformer's last layers learn; None: everything does.
        dataset: its first training samples show which parameters reach the logits.

    Raises:
        InputError: a teacher that is no torch network, that gives other logits than those of the classes, or that
            passes no gradient; `layers` that do not fit.
    """
    if not isinstance(teacher, NetworkTeacher):
        raise InputError(
            f'a teacher that learns must be a live network, and kind "{teacher.kind}" is {_WHAT[teacher.kind]}',
            where="teacher.kind",
            fix='kind = "train", "torch" or "transformers", or teacher.strategy = "frozen"',
        )
    live = teacher.live(layers)
    if live.num_logits != len(dataset.classes):
        raise InputError(
            f"the teacher gives {live.num_logits} logits, the data set has {len(dataset.classes)} classes",
            where="teacher.strategy",
            evidence="a teacher that learns is trained on the labels as well",
            fix='an objective that matches class logits (kd, dkd, dist, mse), or teacher.strategy = "frozen"',
        )
    if isinstance(live, ModuleTeacher):  # the others have looked at samples of their own
        rows = np.arange(min(2, len(dataset.train)))
        live.learn_only_for_logits(TeacherBatch(torch.from_numpy(dataset.train.inputs[rows]), "train", rows))
    return live
