"""torchdistill's side of training_loop.py; runs in an environment of its own and imports nothing of edgestill.

Reads lines from standard input: each "round" trains one epoch over the images and answers with samples per second.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import torch

# torchvision is installed without its compiled operators' match: declaring them is enough, they are never called
operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import Dataset, RandomSampler  # noqa: E402
from torchdistill.core.distillation import get_distillation_box  # noqa: E402
from torchvision import transforms  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from resnet import resnet  # noqa: E402


class Images(Dataset):
    """The same images, with the augmentation of torchdistill's CIFAR recipes: pad-and-crop, flip, normalise."""

    def __init__(self, file: str) -> None:
        stored = np.load(file)
        self.images = stored["images"].transpose(0, 2, 3, 1)
        self.labels = stored["labels"]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[row])), int(self.labels[row])


def main(file: str, classes: int, batch_size: int, threads: int) -> None:
    """Builds teacher, student and distillation box once, then serves rounds."""
    logging.disable(logging.INFO)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data = Images(file)
    teacher, student = resnet(32, classes), resnet(8, classes)
    kd = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": 4.0,
            "alpha": 0.1,
        },
    }
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": batch_size, "num_workers": 0, "drop_last": True},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 0.001, "fused": True}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
        },
    }
    box = get_distillation_box(teacher, student, {"train": data}, config, torch.device("cpu"), None, False, 1)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() != "round":
            break
        box.pre_epoch_process(epoch=0)
        # torchdistill leaves the frozen teacher's mode to its caller; in train mode its BatchNorm would move
        box.teacher_model.eval()
        started, seen = time.perf_counter(), 0
        for images, labels, supplements in box.train_data_loader:
            loss = box.forward_process(images, labels, supplements)
            box.post_forward_process(loss=loss)
            seen += len(images)
        print(seen / (time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
