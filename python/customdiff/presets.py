"""Named settings: the paper's, the two published implementations', and the methods they are compared with.

Sources: Custom Diffusion, section 3.2 and appendix D; the CompVis and the diffusers script that were
published with it. A batch is counted over all GPUs together, as ``TrainConfig.batch_size`` is.
"""

from __future__ import annotations

from typing import Any

from .config import TEMPLATES

_PAPER = {
    "learning_rate": 8e-5,
    "batch_size": 8,
    "resize": 1.0,
    "resize_from": 0.4,
    "size_words": "after",
    "caption_dropout": 0.0,
    "shift": 0.0,
}
# name -> (what it is, its settings, its steps for one concept and for several)
PRESETS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "paper": ("Custom Diffusion as its paper describes it", _PAPER, (250, 500)),
    "compvis": (
        "its CompVis implementation: resized to a third, size words first",
        {**_PAPER, "batch_size": 4, "resize_from": 1 / 3, "size_words": "before", "flip": True},
        (250, 500),
    ),
    "diffusers": (
        "its diffusers script: pictures squashed to a square",
        {**_PAPER, "batch_size": 4, "resize_from": 1 / 3, "size_words": "before", "crop": "squash"},
        (250, 500),
    ),
    "faces": ("the paper's slower rate for people", {**_PAPER, "learning_rate": 5e-6}, (750, 750)),
    "fine-tune-all": (
        "the paper's baseline: every weight of the UNet",
        {**_PAPER, "weights": "unet", "learning_rate": 8e-6},
        (500, 1000),
    ),
    "dreambooth": (
        "DreamBooth as the paper ran it: every weight, a rare word for V*, generated regularization",
        {
            "weights": "unet",
            "train_modifier_token": False,
            "learning_rate": 1e-6,
            "batch_size": 8,
            "regularization": "generated",
            "caption_dropout": 0.0,
            "shift": 0.0,
        },
        (2500, 3000),
    ),
    "cones2-paper": (
        "Cones 2 as its paper describes it",
        {
            "method": "cones2",
            "learning_rate": 1e-6,
            "batch_size": 1,
            "caption_batch": 1,
            "shift": 0.0,
        },
        (3000, 3000),
    ),
    "cones2-embedded": (
        "Cones 2 for the embedded base, the residual itself refined; caption the pictures (--captioned)",
        {
            "method": "cones2",
            "batch_size": 6,
            "cooldown": 0.3,
            "weight_decay": 0.1,
            "shift": 0.0,
            "refine_steps": 450,
        },
        (550, 550),
    ),
    "cones2-code": (
        "its published code: preservation over the training prompt alone, the mean over 27 templates; there "
        'the prompt is the word alone: "dog"',
        {
            "method": "cones2",
            "learning_rate": 5e-6,
            "batch_size": 1,
            "shift": 0.0,
            "preservation": "prompt",
            "preservation_weight": 1e-2,
            "captions": TEMPLATES,
        },
        (4000, 4000),
    ),
    "textual-inversion": (
        "Textual Inversion as the paper ran it: V* alone, from the category's word; there its prompts do "
        'without the category: "photo of a <new1>"',
        {
            "weights": "none",
            "initializer_token": "<category>",
            "embedding_learning_rate": 0.04,
            "batch_size": 8,
            "caption_dropout": 0.0,
            "shift": 0.0,
        },
        (5000, 5000),
    ),
}


def preset(name: str, several: bool = False) -> dict[str, Any]:
    """The settings of a preset, for one concept or `several`; raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    _, settings, steps = PRESETS[name]
    return {**settings, "steps": steps[several]}
