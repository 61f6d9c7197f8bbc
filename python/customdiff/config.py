"""What a training run depends on: frozen dataclasses, from which options.py makes command line and YAML."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

PAPER_LEARNING_RATE = 8e-5  # Custom Diffusion, section 3.2: 1e-5 times a batch of 8
PAPER_STEPS = 250  # for one concept; appendix D: 500 for several
# The embedded base is small: its matrices have to move further, and a row of 128 numbers further still.
EMBEDDED_LEARNING_RATE, EMBEDDED_EMBEDDING_RATE = 1e-3, 1.5e-2
WHOLE_UNET = 0.1  # appendix D: all of the UNet learns at a tenth of the rate of keys and values
# Cones 2, appendix A; the text encoder of the embedded base has to move further
RESIDUAL_LEARNING_RATE, EMBEDDED_RESIDUAL_RATE, RESIDUAL_STEPS = 1e-6, 1e-3, 3000
REFINING_RATE = 5e-2  # of a residual itself, whose numbers are about 1
PRESERVATION_WEIGHT = 1e-3  # the paper names none

RARE, NORMAL, CATEGORY = "<rare>", "<normal>", "<category>"  # of initializer_token; no words of a vocabulary
GENERATED = "generated"  # of regularization
TEMPLATES = "templates"  # of captions
# fields that mean nothing to the other method, and are refused there
OF_CUSTOM_DIFFUSION = (
    "concepts style cutmix initializer_token regularization regularization_prompt start_from weights "
    "train_modifier_token prior_weight caption_dropout generated_count generated_steps rare_captions"
).split()
OF_CONES2 = "captions caption_count caption_batch preservation preservation_weight refine_steps".split()


class Stopped(RuntimeError):
    """The run was told to stop (SIGTERM, or Ctrl-C once), and wrote a checkpoint from which it can go on."""


def option(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ConceptConfig:
    """One concept to learn: its pictures and the words for it.

    Raises:
        ValueError: if there are no pictures or no words, the modifier token is no word, or a prompt lacks it.
    """

    images: str | None = option(None, help="folder with the concept's pictures (PNG or JPEG, any size)")
    prompts: tuple[str, ...] = option(
        (),
        help="one or more prompts for these pictures, each with the modifier token (default: "
        '"photo of a <new1> dog", of the category; of a style "painting in the style of <new1> art")',
    )
    captioned: bool = option(
        False,
        help="each picture's own caption is its prompt, in the place of prompts: from a .txt beside it, "
        "captions.csv or captions.jsonl; it names the category, before which the modifier token is put where "
        "the caption lacks it",
    )
    category: str | None = option(None, help='what the concept is one of: "dog"; of a style: "art"')
    style: bool = option(
        False, help="the pictures share a style, not a subject: other prompts, no size words"
    )
    modifier_token: str | None = option(
        "<new1>",
        help='the word that comes to mean the concept, V* in the paper; "none" teaches a category by its '
        "own name",
    )
    initializer_token: str = option(
        RARE,
        help=f'what V* starts from: "{RARE}", a rare token by the paper\'s rule; "{NORMAL}", a draw with '
        f'mean and deviation of all embeddings; "{CATEGORY}"; or a word that is one token',
    )
    regularization: str | None = option(
        None,
        help="folder of real pictures of the category, captioned (.txt beside each, or captions.csv/.jsonl), "
        f'as customdiff retrieve makes one; or "{GENERATED}", by the base itself',
    )
    regularization_prompt: str | None = option(
        None,
        help="of pictures without a caption there, and of generated ones (default: the first prompt without "
        "its modifier token)",
    )

    def __post_init__(self) -> None:
        from .concept import mentions, without_words  # here: torch is not needed to describe the options

        word = None if self.modifier_token in (None, "none") else self.modifier_token
        if word is not None and word.split() != [word]:
            raise ValueError(f"modifier_token must be one word, as '<new1>', got {self.modifier_token!r}")
        if word in (RARE, NORMAL, CATEGORY):
            raise ValueError(f"modifier_token {word!r} has a meaning as initializer_token; name another word")
        prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        if not prompts and self.category is not None:
            named = " ".join(filter(None, (word, self.category)))
            prompts = (f"painting in the style of {named}" if self.style else f"photo of a {named}",)
        if not prompts:
            raise ValueError(
                f'prompts is empty, and so is category; give either: "photo of a {word or ""} dog", or "dog"'
            )
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("prompts has an empty one; leave it out")
            if word is not None and not mentions(prompt, [word]):
                raise ValueError(
                    f"prompt {prompt!r} has no modifier token {word!r} as a word of its own; "
                    f'write "photo of a {word} dog", or name another modifier_token ("none" for a category)'
                )
        if self.initializer_token == CATEGORY and not self.category:
            raise ValueError(f"initializer_token {CATEGORY!r} needs a category")
        if not self.images:
            raise ValueError("images is missing: the folder with the concept's pictures")
        about = self.regularization_prompt or without_words(prompts[0], [word] if word else [])
        resolved = {"modifier_token": word, "prompts": prompts, "regularization_prompt": about}
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """ "<new1> dog", or what of it there is."""
        return " ".join(filter(None, (self.modifier_token, self.category)))


@dataclass(frozen=True)
class TrainConfig(ConceptConfig):
    """What one training run depends on; equal configurations give equal bits.

    One concept is described by the fields of ``ConceptConfig``, several by ``concepts`` in their place.

    Raises:
        ValueError: if a number is out of range, two concepts share a modifier token, or as ``ConceptConfig``.
    """

    method: Literal["custom-diffusion", "cones2"] = option(
        "custom-diffusion",
        help="cones2 learns a residual of the category's word, by a copy of the text encoder; it has no "
        "modifier token and no regularization pictures",
    )
    concepts: tuple[ConceptConfig, ...] = option(
        (), help="JSON list of several concepts to learn jointly, as the published concept_list.json"
    )
    output: str = option("concept.safetensors", help="the concept file to write")
    base: str | None = option(
        None, help="folder of a Stable Diffusion 1.x, 2.x or XL pipeline (default: the embedded one)"
    )
    start_from: str | None = option(
        None, help="concept file to go on from: sequential training; its words and its change stay"
    )
    weights: Literal["kv", "cross-attention", "unet", "none"] = option(
        "kv",
        help="of the UNet, that train: keys and values, also queries and output of cross-attention, all, or "
        "none (Textual Inversion)",
    )
    train_modifier_token: bool = option(True, help="whether V* is optimized, or stays what it starts from")
    prior_weight: float = option(
        1.0,
        help="weight of the loss on the regularization pictures; the published code's mean over the mixed "
        "batch is the same to AdamW",
    )
    caption_dropout: float = option(
        0.1, help="share of regularization captions left empty, so that guidance keeps its unconditional side"
    )
    generated_count: int = option(200, help="regularization pictures that are generated where asked for")
    generated_steps: int = option(50, help="denoising steps of each of these")
    captions: str | None = option(
        None,
        help="cones2: captions with the category's word, over which all other tokens are preserved and the "
        f'residual is averaged: a file (.txt, .csv, .jsonl), or "{TEMPLATES}", the 27 of the published code '
        "(default: generated)",
    )
    caption_count: int = option(1000, help="cones2: captions that are generated; the paper has 1000")
    caption_batch: int = option(32, help="cones2: captions a step, of all processes together")
    preservation: Literal["captions", "prompt"] = option(
        "captions",
        help="cones2: keep the other tokens by squared distances over the captions, as the paper; or of the "
        "training prompt alone by distances, a tenth for what comes after the word, as the published code",
    )
    preservation_weight: float | None = option(
        None,
        help=f"cones2: λ, of the loss that keeps the other tokens (default: {PRESERVATION_WEIGHT:g})",
    )
    refine_steps: int = option(
        0,
        help="cones2: of the steps, the last ones, in which the residual itself is learned, from the mean "
        "that the text encoder's steps gave; the paper has none",
    )
    steps: int | None = option(
        None,
        help=f"optimizer steps (default: {PAPER_STEPS} for one concept, twice that for several; cones2: "
        f"{RESIDUAL_STEPS})",
    )
    batch_size: int = option(
        4, help="concept pictures a step, of all processes together, and as many regularization pictures"
    )
    accumulation: int = option(
        1, help="passes that a process takes a step's pictures in: less memory, the same result"
    )
    learning_rate: float | None = option(
        None,
        help=f"of AdamW on the UNet's weights (default: the paper's {PAPER_LEARNING_RATE:g}, for the "
        f"embedded base {EMBEDDED_LEARNING_RATE:g}; a tenth of it where all weights train; cones2: "
        f"{RESIDUAL_LEARNING_RATE:g} and {EMBEDDED_RESIDUAL_RATE:g}, on the text encoder's)",
    )
    embedding_learning_rate: float | None = option(
        None,
        help=f"of AdamW on V* or, for cones2, the residual while it is refined (default there "
        f"{REFINING_RATE:g}; else: as for K/V, which is the paper's way; for the embedded base "
        f"{EMBEDDED_EMBEDDING_RATE:g})",
    )
    cooldown: float = option(0.0, help="share of the steps, the last ones, in which the rate falls to zero")
    weight_decay: float = option(1e-2, help="of AdamW, on what trains; no other embedding is a parameter")
    optimizer: Literal["adamw", "adamw8bit"] = option("adamw", help="adamw8bit is that of bitsandbytes")
    min_snr_gamma: float | None = option(None, help="weigh the loss by min(SNR, gamma); 5 is usual")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", help="what is learned stays float32")
    gradient_checkpointing: bool = option(False, help="less memory, a third more time")
    copies: int = option(
        8, help="augmented copies of each picture of each kind whose latents are kept and drawn from"
    )
    crop: Literal["centre", "squash"] = option("centre", help="how a picture is made square")
    flip: bool = option(False, help="mirror half of the copies")
    shift: float = option(0.05, help="move a concept picture at random by up to this share of its side")
    resize: float = option(
        0.0, help="share of concept pictures shown smaller or larger, with size words in the prompt"
    )
    resize_from: float = option(0.4, help="the smallest size they are shown at, as a share of the side")
    size_words: Literal["after", "before"] = option(
        "after", help='where the words of size stand: after the prompt, or before one that begins "photo of"'
    )
    cutmix: float = option(
        0.0,
        help="of several concepts, the share of pictures that show two side by side, with a prompt of both: "
        "so both are learned for one picture (after SVDiff's Cut-Mix)",
    )
    resolution: int | None = option(None, help="side of the training pictures (default: the base's own)")
    rare_captions: str | None = option(
        None, help=f'captions (.txt, .csv, .jsonl) in which "{RARE}" counts words (default: known rare words)'
    )
    seed: int = option(0, help="of every random draw")
    device: str | None = option(None, help="torch device (default: cuda where there is one, else cpu)")
    checkpoint_every: int = option(0, help="keep a resumable checkpoint every so many steps; 0: none")
    keep_every: int = option(0, help="keep the concept so far every so many steps, as NAME-000100; 0: none")
    validation_prompts: tuple[str, ...] = option((), help="prompts to draw while training")
    validation_every: int = option(50, help="steps between these drawings")
    log_with: Literal["tensorboard", "wandb"] | None = option(
        None, help="where loss, rates and drawings are logged, through accelerate"
    )
    resume: bool = option(False, help="go on from the checkpoint beside --output, where there is one")
    overwrite: bool = option(False, help="replace --output if it exists")

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", tuple(self.concepts))
        self._check_choices()
        self._check_method()
        own = dataclasses.fields(ConceptConfig)
        if not self.concepts:
            super().__post_init__()
            if self.residual:
                object.__setattr__(self, "regularization_prompt", None)
        elif given := [field.name for field in own if getattr(self, field.name) != field.default]:
            raise ValueError(f"concepts is given, and {', '.join(given)} too; put all into concepts")
        words = [concept.modifier_token for concept in self.subjects if concept.modifier_token]
        if len(set(words)) < len(words):
            raise ValueError(f"concepts must have modifier tokens of their own, got {', '.join(words)}")
        if isinstance(self.validation_prompts, str):
            object.__setattr__(self, "validation_prompts", (self.validation_prompts,))
        if self.steps is None:
            steps = RESIDUAL_STEPS if self.residual else PAPER_STEPS * min(2, len(self.subjects))
            object.__setattr__(self, "steps", steps)
        if self.weights == "none" and not (words and self.train_modifier_token):
            raise ValueError(
                "weights='none' trains V* alone, and there is no V* to train: nothing would learn"
            )
        self._check_numbers()

    def _check_method(self) -> None:
        """Refuses fields of the other method; resolves those that cones2 has other defaults for."""
        of_other = OF_CUSTOM_DIFFUSION if self.residual else OF_CONES2
        defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
        if given := [name for name in of_other if getattr(self, name) != defaults[name]]:
            raise ValueError(f"method {self.method!r} has no use for {', '.join(given)}; leave it out")
        if not self.residual:
            return
        if self.modifier_token not in (defaults["modifier_token"], None, "none"):
            raise ValueError(
                f"method 'cones2' learns a residual of the category's word and has no modifier token, got "
                f"{self.modifier_token!r}; leave modifier_token out"
            )
        if not (self.category or "").strip():
            raise ValueError("method 'cones2' needs a category: the subject's word in a prompt, as 'dog'")
        object.__setattr__(self, "modifier_token", None)
        object.__setattr__(self, "category", " ".join(self.category.split()))
        object.__setattr__(self, "prompts", self.prompts or (f"a photo of a {self.category}",))
        if self.preservation_weight is None:
            object.__setattr__(self, "preservation_weight", PRESERVATION_WEIGHT)

    def _check_choices(self) -> None:
        for name, hint in typing.get_type_hints(TrainConfig).items():
            parts = (hint, *typing.get_args(hint))
            choices = [c for p in parts if typing.get_origin(p) is Literal for c in typing.get_args(p)]
            value = getattr(self, name)
            if choices and value not in choices and not (value is None and type(None) in parts):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

    def _check_numbers(self) -> None:
        at_least = {
            1: "steps batch_size accumulation copies generated_count generated_steps validation_every "
            "caption_count caption_batch",
            0: "checkpoint_every keep_every seed prior_weight weight_decay shift refine_steps",
        }
        for low, names in at_least.items():
            for name in names.split():
                if not getattr(self, name) >= low:
                    raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.preservation_weight is not None and not self.preservation_weight >= 0:
            raise ValueError(f"preservation_weight must be at least 0, got {self.preservation_weight}")
        for name in ("learning_rate", "embedding_learning_rate", "min_snr_gamma", "resolution"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("cooldown", "caption_dropout", "resize", "cutmix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share, 0 to 1, got {getattr(self, name)}")
        if self.cutmix and len(self.subjects) < 2:
            raise ValueError("cutmix shows two concepts side by side; give several concepts, or leave it out")
        if self.cutmix and not all(subject.name and not subject.style for subject in self.subjects):
            raise ValueError("cutmix names both concepts: give each a category, and leave styles out")
        if self.shift > 0.5:
            raise ValueError(f"shift must be at most 0.5 of the picture's side, got {self.shift}")
        if not 0 < self.resize_from <= 1:
            raise ValueError(f"resize_from must be above 0 and at most 1, got {self.resize_from}")
        if self.refine_steps > self.steps:
            raise ValueError(f"refine_steps must be at most steps={self.steps}, got {self.refine_steps}")
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation must be at most batch_size, got {self.accumulation} for {self.batch_size}"
            )

    @property
    def residual(self) -> bool:
        """Whether what is learned is a residual, by Cones 2."""
        return self.method == "cones2"

    @property
    def subjects(self) -> tuple[ConceptConfig, ...]:
        """The concepts to learn: `concepts`, or the one that the fields themselves describe."""
        return self.concepts or (self,)

    def rates(self, step: int, embedded: bool) -> tuple[float, float]:
        """The learning rates of the weights and of V*, or the residual, at a step, counted from 0: constant,
        then linear to zero.

        `embedded`: whether the base is the embedded one, for the defaults.
        """
        weight, row = self.learning_rate, self.embedding_learning_rate
        if weight is None and self.residual:
            weight = EMBEDDED_RESIDUAL_RATE if embedded else RESIDUAL_LEARNING_RATE
        if row is None and self.residual:
            row = REFINING_RATE
        if row is None:
            row = EMBEDDED_EMBEDDING_RATE if embedded else weight or PAPER_LEARNING_RATE
        if weight is None:
            weight = EMBEDDED_LEARNING_RATE if embedded else PAPER_LEARNING_RATE
            weight *= WHOLE_UNET if self.weights == "unet" else 1
        last = self.cooldown * self.steps
        share = min(1.0, (self.steps - step) / last) if last else 1.0
        return share * weight, share * row

    def mathematics(self) -> dict[str, Any]:
        """The fields that the result depends on: what a checkpoint must agree with to be resumed."""
        control = {"output", "checkpoint_every", "keep_every", "resume", "overwrite", "log_with"}
        control |= {"validation_prompts", "validation_every", "accumulation", "gradient_checkpointing"}
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in control}
