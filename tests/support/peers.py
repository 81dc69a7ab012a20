"""Read and write label files as other projects' programs do, written after those
programs: FKD's utils_FKD.py and train_FKD.py, MEAL-V2's utils_FKD.py and FKD_train.py,
and ml-dr's reinforce.py and dr/transforms.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import RandomResizedCrop, functional

# Parts of an image's path that each program takes for the label file's path.
PARTS = {"fkd": 3, "meal_v2": 4}


def label_file(softlabel_path: Path, image: str, program: str) -> Path:
    """Return where a program looks for the labels of an image."""
    return softlabel_path / ("/".join(image.split("/")[-PARTS[program] :]).split(".")[0] + ".tar")


def recovered(label: torch.Tensor, label_type: str, classes: int) -> torch.Tensor:
    """Make dense labels float32 [n, classes] of a batch of stored labels, as
    Recover_soft_label of both programs does."""
    if label_type == "ori":
        return label
    if label_type == "hard":
        return torch.zeros(len(label), classes).scatter_(1, label.view(-1, 1), 1)
    if label_type == "smoothing":
        index, value = label[:, 0].to(dtype=int).view(-1, 1), label[:, 1].view(-1, 1)
        return ((1 - value) / (classes - 1)).repeat(1, classes).scatter_(1, index, value)
    index, value = label[:, 0].to(dtype=int), label[:, 1]
    if label_type == "marginal_renorm":
        dense = torch.zeros(len(label), classes).scatter_(1, index, value)
        return torch.nn.functional.normalize(dense, p=1.0, dim=1, eps=1e-12)
    kept = int(label_type.removeprefix("marginal_smoothing_k"))
    rest = (1 - value.sum(dim=1, keepdim=True)) / (classes - kept)
    return rest.repeat(1, classes).scatter_(1, index, value)


def fkd_sample(
    softlabel_path: Path, image: str, program: str, size: int
) -> tuple[list[Image.Image], torch.Tensor]:
    """Return all crops of an image, and their labels as the file holds them, as
    ImageFolder_FKD does with today's torch.load."""
    coords, flips, output = torch.load(label_file(softlabel_path, image, program))
    pictures = []
    with Image.open(image) as photo:
        for share, flip in zip(coords, flips, strict=True):
            top, left = share[0].item() * photo.height, share[1].item() * photo.width
            height, width = share[2].item() * photo.height, share[3].item() * photo.width
            cut = functional.resized_crop(photo, top, left, height, width, [size, size])
            pictures.append(functional.hflip(cut) if flip else cut)
    return pictures, output


CROPFLIP = {  # image_augmentation of configs/imagenet/reinforce/cropflip.yaml, smaller
    "uint8": {"enable": True},
    "random_resized_crop": {"enable": True, "size": 32},
    "random_horizontal_flip": {"enable": True, "p": 0.5},
    "to_tensor": {"enable": True},
    "normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}


def reinforce(
    root: Path,
    images: Path,
    *,
    classes: int = 3,
    compress: bool = True,
    mirrored: bool = True,
) -> dict[str, list[tuple[tuple, bool, torch.Tensor, np.ndarray]]]:
    """Write a label set as ml-dr's reinforce.py does: 3 crops an image, labels of the 2
    likeliest classes.

    Returns for each image (CLASS/NAME) its crops: box, flip, the teachers' pixels uint8
    [3, 32, 32] before they are normalised, and probabilities [classes].
    """
    root.mkdir(parents=True)
    dataset, told = ImageFolder(str(images), allow_empty=True), {}
    torch.manual_seed(0)
    for index, (path, _) in enumerate(dataset.samples):
        photo, _ = dataset[index]
        samples, seen = [], []
        for p in np.random.default_rng(index).dirichlet(np.ones(classes), 3):
            box = RandomResizedCrop.get_params(photo, (0.08, 1.0), (3 / 4, 4 / 3))
            x = functional.to_tensor(functional.resized_crop(photo, *box, [32, 32]))
            x = (x * 255).to(torch.uint8)
            flip = mirrored and torch.rand(1).item() < 0.5
            x = functional.hflip(x) if flip else x
            ids = np.argpartition(p, -2)[-2:]
            params = [tuple(box), flip] if mirrored else [tuple(box)]
            if not compress:
                params = {
                    "uint8": ((), ()),
                    "random_resized_crop": (tuple(box), (0, 0, 1, 1)),
                    "random_horizontal_flip": (flip, not flip),
                    "to_tensor": ((), ()),
                    "normalize": ((), ()),
                }
            samples.append({"params": params, "prob": (p[ids].tolist(), ids.tolist())})
            seen.append((tuple(box), flip, x, p))
        torch.save((index, samples), root / f"{index}.pth.tar", pickle_protocol=4)
        told["/".join(path.split("/")[-2:])] = seen
    config = {
        "dataset": "imagenet",
        "num_classes": classes,
        "seed": None,
        "teacher": {"timm_ensemble": True, "name": "ig_resnext101_32x8d,ig_resnext101_32x16d"},
        "reinforce": {
            "num_samples": 3,
            "topk": 2,
            "compress": compress,
            "joblib": False,
            "image_augmentation": {
                name: settings
                for name, settings in CROPFLIP.items()
                if mirrored or name != "random_horizontal_flip"
            },
        },
    }
    torch.save(config, root / "config.pth.tar")
    return told
