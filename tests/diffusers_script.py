"""Diffusers' own Custom Diffusion training script: looked for, never kept here, and run as it is.

    python tests/diffusers_script.py SCRIPT [ITS ARGUMENTS]

runs it. Where torchvision is not installed, which has no wheel for every build of torch, the few transforms
that the script takes from it are stood in for.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import urllib.request
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

import tinysd
from tinysd import world

VARIABLE = "CUSTOMDIFF_DIFFUSERS_SCRIPT"
COMMIT = "c56add8081be60b7e8794e011f1790d0e37aeced"  # of github.com/huggingface/diffusers
PATH = "examples/custom_diffusion/train_custom_diffusion.py"
SHA256 = "b9e4a85acdeefe7a3fc54cfbe86692c7e7ff6ee8e489c823ea75cd62b026db8b"
BEFORE = "    unet.set_attn_processor(custom_diffusion_attn_procs)\n"
LINE = "    import customdiff_kernels as ck; print('patched', len(ck.patch_unet(unet)))\n"
MISSING = f"no {PATH}: set {VARIABLE} to it, or clone huggingface/diffusers beside this repository"


def find(folder: Path) -> Path | None:
    """The script: what the environment variable names, else COMMIT's, put into `folder`; None without one."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    source = _from_a_clone() or _from_github()
    if source is None:
        return None
    if hashlib.sha256(source).hexdigest() != SHA256:
        raise ValueError(f"{PATH} of commit {COMMIT} is not the file that it was")
    path = folder / Path(PATH).name
    path.write_bytes(source)
    return path


def _from_a_clone() -> bytes | None:
    for above in Path(__file__).resolve().parents:
        if (above / "diffusers").is_dir():
            command = ["git", "-C", str(above / "diffusers"), "show", f"{COMMIT}:{PATH}"]
            if not (shown := subprocess.run(command, capture_output=True)).returncode:
                return shown.stdout
    return None


def _from_github() -> bytes | None:
    url = f"https://raw.githubusercontent.com/huggingface/diffusers/{COMMIT}/{PATH}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read()
    except OSError:  # no network
        return None


def with_our_line(script: Path, path: Path) -> Path:
    """A copy of the script at `path` that calls ``patch_unet``, and is the same else."""
    source = script.read_text()
    assert source.count(BEFORE) == 1
    path.write_text(source.replace(BEFORE, BEFORE + LINE))
    return path


def write_pictures(root: Path, concept: int = 6, regularization: int = 12) -> None:
    """Of the embedded base's world: a concept's pictures, and captioned ones for the script and for us."""
    for folder in ("concept", "captioned", "regularization/images"):
        (root / folder).mkdir(parents=True)
    for i, (picture, _) in enumerate(world.concept_pictures("teal_dog", concept, 0)):
        picture.save(root / "concept" / f"{i}.png")
    rng, paths, captions = np.random.default_rng(0), [], []
    for i in range(regularization):
        scene, caption = world.sample(rng)
        path = root / "captioned" / f"{i}.png"
        Image.fromarray(world.render(scene)[0]).save(path)
        path.with_suffix(".txt").write_text(caption)
        shutil.copy(path, root / "regularization" / "images")
        paths.append(str(path))
        captions.append(caption)
    (root / "regularization" / "images.txt").write_text("\n".join(paths))
    (root / "regularization" / "caption.txt").write_text("\n".join(captions))


def options(root: Path, output: Path) -> list[str]:
    """Those of the script's README, for `write_pictures`' pictures and the embedded base; of two equal ones
    the last holds.
    """
    count = len(list((root / "regularization" / "images").iterdir()))
    return [
        f"--pretrained_model_name_or_path={tinysd.path()}",
        f"--instance_data_dir={root / 'concept'}",
        f"--output_dir={output}",
        f"--class_data_dir={root / 'regularization'}",
        *("--with_prior_preservation", "--real_prior", "--prior_loss_weight=1.0"),
        *("--class_prompt=dog", f"--num_class_images={count}"),
        "--instance_prompt=photo of a <new1> dog",
        f"--resolution={world.SIZE}",
        "--train_batch_size=2",
        "--learning_rate=1e-5",
        "--lr_warmup_steps=0",
        "--max_train_steps=250",
        *("--scale_lr", "--hflip", "--modifier_token=<new1>"),
    ]


class InterpolationMode(enum.Enum):
    BILINEAR = Image.Resampling.BILINEAR


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomHorizontalFlip:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < self.p else image


class Resize:
    """The shorter side to `size`."""

    def __init__(self, size, interpolation):
        self.size, self.interpolation = size, interpolation

    def __call__(self, image):
        sides = [int(self.size * side / min(image.size)) for side in image.size]
        return image.resize(sides, self.interpolation.value)


class RandomCrop:
    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        left, top = (int(torch.randint(side - self.size + 1, (1,))) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))

    def __call__(self, image):
        return (image - self.mean) / self.std


def stand_in_for_torchvision() -> None:
    """Makes ``from torchvision import transforms`` work, where it would not."""
    if importlib.util.find_spec("torchvision"):
        return
    from diffusers.utils import is_torchvision_available as of_diffusers
    from transformers.utils import is_torchvision_available as of_transformers

    assert not of_diffusers() and not of_transformers()  # both remember it, and go without
    package = ModuleType("torchvision")
    package.__spec__ = ModuleSpec("torchvision", None)
    package.transforms = sys.modules[__name__]
    sys.modules["torchvision"] = package


def load(path: Path) -> ModuleType:
    """The script as a module; its ``main(parse_args([...]))`` runs it."""
    stand_in_for_torchvision()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    stand_in_for_torchvision()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
