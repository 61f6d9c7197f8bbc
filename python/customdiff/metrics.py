"""What is measured of pictures: alignment in CLIP and DINO space, and KID and FID against real pictures.

Alignments are as Custom Diffusion measures them (section 4, appendix C): mean cosines, a prompt's modifier
tokens taken out of it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .base import without_bars
from .concept import without_words

BATCH = 32
SUBSET = 1000  # pictures of a subset of KID, where there are so many
CLIP_SCORE = 2.5  # CLIPScore is so many times the cosine, or 0 (Hessel et al. 2021)


class Clip:
    """A CLIP pair that scores pictures against pictures and prompts.

    Args:
        folder: a saved ``transformers.CLIPModel`` with its tokenizer and image processor.
        device: where it computes.

    Raises ValueError if the folder holds none.
    """

    def __init__(self, folder: str, device: Any = "cpu"):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.name = _model_name("clip", folder, ("clip",))
        with without_bars():
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)

    def image_embeddings(self, images: Iterable[Image.Image]) -> Tensor:
        """(n, d) embeddings of n pictures, of any length: what KID and FID are computed over."""

        def embed(batch: list[Image.Image]) -> Tensor:
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            return _tensor(self.model.get_image_features(pixel_values=pixels.to(self.model.device)))

        return _in_batches(embed, images)

    def image_features(self, images: Iterable[Image.Image]) -> Tensor:
        """(n, d) unit vectors of n pictures."""
        return F.normalize(self.image_embeddings(images), dim=-1)

    def text_features(self, prompts: Iterable[str]) -> Tensor:
        """(n, d) unit vectors of n prompts."""

        def embed(batch: list[str]) -> Tensor:
            tokens = self.tokenizer(batch, padding="max_length", truncation=True, return_tensors="pt")
            tokens = tokens.to(self.model.device)
            return _tensor(self.model.get_text_features(tokens.input_ids, tokens.attention_mask))

        return F.normalize(_in_batches(embed, prompts), dim=-1)

    def image_alignment(self, samples: Iterable[Image.Image], pictures: Iterable[Image.Image]) -> float:
        """Mean cosine between every sample and every one of the concept's pictures."""
        return float(alignment(self.image_features(samples), self.image_features(pictures)).mean())

    def text_alignment(
        self, samples: Sequence[Image.Image], prompts: Sequence[str], modifier_tokens: Iterable[str] = ()
    ) -> float:
        """Mean cosine between each sample and its own prompt, the modifier tokens taken out of it."""
        if len(samples) != len(prompts):
            raise ValueError(f"prompts must be one a sample: got {len(prompts)} for {len(samples)} samples")
        words = list(modifier_tokens)
        texts = self.text_features(without_words(prompt, words) for prompt in prompts)
        return float((self.image_features(samples) * texts).sum(-1).mean())


class Dino:
    """A DINO or DINOv2 model, whose class token compares pictures (DreamBooth's second image alignment).

    Args:
        folder: a saved ``transformers.ViTModel`` or ``Dinov2Model`` with its image processor.
        device: where it computes.

    Raises ValueError if the folder holds none.
    """

    def __init__(self, folder: str, device: Any = "cpu"):
        from transformers import AutoImageProcessor, AutoModel

        self.name = _model_name("dino", folder, ("vit", "dino"))
        with without_bars():
            self.model = AutoModel.from_pretrained(folder, local_files_only=True).float().eval().to(device)
        self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    def image_features(self, images: Iterable[Image.Image]) -> Tensor:
        """(n, d) unit vectors of n pictures."""

        def embed(batch: list[Image.Image]) -> Tensor:
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            return self.model(pixel_values=pixels.to(self.model.device)).last_hidden_state[:, 0]

        return F.normalize(_in_batches(embed, images), dim=-1)


def alignment(samples: Tensor, pictures: Tensor) -> Tensor:
    """(n,) the mean cosine of each sample with all pictures, of their unit vectors (n, d) and (m, d)."""
    return samples @ pictures.mean(0)


def kid(samples: Tensor, reference: Tensor, subset_size: int = SUBSET) -> tuple[float, float]:
    """Kernel inception distance of embeddings (n, d) and (m, d): mean and deviation over 100 random subsets,
    or over all pictures where both sides have `subset_size` at most and equally many.

    The unbiased squared maximum mean discrepancy with the kernel (x·y/d + 1)³ (Bińkowski et al. 2018), by
    torchmetrics in float64; the subsets are the same on every call. Needs two pictures on each side.
    """
    size = min(len(samples), len(reference), subset_size)
    if size < 2:
        raise ValueError(f"KID needs two pictures on each side, got {len(samples)} and {len(reference)}")
    kernel_distance, _ = torchmetrics_classes()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(0)  # the subsets are drawn from it
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all", UserWarning)
        subsets = 1 if size == len(samples) == len(reference) else 100
        metric = kernel_distance(torch.nn.Identity(), subsets=subsets, subset_size=size)
        metric.update(reference.double().cpu(), real=True)
        metric.update(samples.double().cpu(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def fid(samples: Tensor, reference: Tensor) -> float:
    """Fréchet inception distance of embeddings (n, d) and (m, d), by torchmetrics in float64.

    Biased upwards by few pictures; warns where a side has not even d + 1. Needs two on each side.
    """
    size, width = min(len(samples), len(reference)), samples.shape[1]
    if size < 2:
        raise ValueError(f"FID needs two pictures on each side, got {len(samples)} and {len(reference)}")
    if size <= width:
        warnings.warn(f"FID of {size} pictures in {width} dimensions says little; trust KID", stacklevel=2)
    features = torch.nn.Identity()
    features.num_features = width
    _, frechet_distance = torchmetrics_classes()
    metric = frechet_distance(features)
    metric.update(reference.double().cpu(), real=True)
    metric.update(samples.double().cpu(), real=False)
    return float(metric.compute())


def torchmetrics_classes() -> tuple[Any, Any]:
    """KernelInceptionDistance and FrechetInceptionDistance; ModuleNotFoundError says how to get them."""
    try:  # from their own modules: the package names them only where torch-fidelity is installed
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'KID and FID need torchmetrics: pip install "customdiff_kernels[evaluation]"', name="torchmetrics"
        ) from error
    return KernelInceptionDistance, FrechetInceptionDistance


@torch.no_grad()
def _in_batches(embed: Callable[[list], Tensor], items: Iterable[Any]) -> Tensor:
    """`embed` of all items, BATCH at a time, on the CPU: a generator's pictures are never all in memory."""
    features = [embed(batch).cpu() for batch in _batches(iter(items))]
    if not features:
        raise ValueError("nothing to score: got an empty list")
    return torch.cat(features)


def _batches(items: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(islice(items, BATCH)):
        yield batch


def _model_name(argument: str, folder: str, types: tuple[str, ...]) -> str:
    """The last two parts of the folder's path, once it is known to hold a model of one of the types."""
    config = Path(folder) / "config.json"
    kind = json.loads(config.read_text()).get("model_type", "") if config.is_file() else None
    if kind is None or not kind.startswith(types):
        held = "it has no config.json" if kind is None else f"its config.json says {kind!r}"
        raise ValueError(
            f"{argument} {str(folder)!r} holds no saved {' or '.join(types)} model of transformers: {held}"
        )
    return "/".join(config.resolve().parts[-3:-1])


def _tensor(output: Any) -> Tensor:
    # transformers 4 returns the projected features themselves, 5 an output that holds them
    return output if isinstance(output, Tensor) else output.pooler_output
