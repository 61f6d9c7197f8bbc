"""Stage 2: a small CLIP pair for the metrics, trained contrastively."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from . import common, data, tokenizer

HELD_OUT = range(9000, 9001)
MEAN, STD = (0.55, 0.55, 0.55), (0.27, 0.27, 0.27)


def make_tokenizer() -> CLIPTokenizer:
    folder = data.CACHE / "tokenizer"
    tokenizer.write(folder)
    return CLIPTokenizer.from_pretrained(str(folder))


def text_config(vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def build(vocabulary: int) -> CLIPModel:
    torch.manual_seed(2)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    text = text_config(vocabulary)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )
    for name, parameter in model.named_parameters():  # CLIP's initial sizes are made for wide models
        if name.endswith(
            (
                "q_proj.weight",
                "k_proj.weight",
                "v_proj.weight",
                "fc1.weight",
                "fc2.weight",
                "out_proj.weight",
                "visual_projection.weight",
                "text_projection.weight",
            )
        ):
            torch.nn.init.xavier_uniform_(parameter, gain=0.7)
    return model


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 → normalised (B, 3, 64, 64), as the saved image processor does."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _most_said(captions: np.ndarray) -> list[str]:
    """The longest of each picture's captions: the one that names most of its attributes."""
    return [max(row, key=lambda c: len(c.split())) for row in captions.tolist()]


@torch.no_grad()
def retrieval(
    model: CLIPModel, images: np.ndarray, captions: np.ndarray, ids: CLIPTokenizer, group: int = 50
) -> float:
    """Share of pictures whose own caption wins among ``group`` different captions."""
    model.eval()
    texts = _most_said(captions)
    hits = total = 0
    for start in range(0, len(texts) - group + 1, group):
        part = slice(start, start + group)
        out = model(input_ids=tokenizer.encode(ids, texts[part]), pixel_values=to_pixels(images[part]))
        best = out.logits_per_image.argmax(1).tolist()
        hits += sum(texts[part][b] == texts[part][k] for k, b in enumerate(best))
        total += group
    model.train()
    return hits / total


def train(finish_at: str, chunks: int, batch: int = 96) -> None:
    images, captions = data.load(range(chunks), "images", "captions")
    held_images, held_captions = data.load(HELD_OUT, "images", "captions")
    ids = make_tokenizer()
    model = build(len(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    step = 0
    if (state := common.load("clip.pt")) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    tokens = tokenizer.encode(ids, [c for row in captions.tolist() for c in row]).view(*captions.shape, -1)
    longest = torch.tensor([max(range(len(r)), key=lambda k: len(r[k].split())) for r in captions.tolist()])
    schedule = common.Schedule(1.2e-3, finish_at, warmup=100)
    rng = np.random.default_rng((2, step))
    while schedule.progress < 1:
        picks = rng.integers(len(images), size=batch)
        which = torch.where(
            torch.rand(batch) < 0.7, longest[picks], torch.randint(0, captions.shape[1], (batch,))
        )
        text = tokens[torch.from_numpy(picks), which]
        out = model(input_ids=text, pixel_values=to_pixels(images[picks]))
        same = (text[:, None] == text[None]).all(-1) & ~torch.eye(batch, dtype=torch.bool)
        logits = out.logits_per_image.masked_fill(same, -1e4)
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6)
        step += 1
        if step % 50 == 0:
            common.log("clip", step=step, loss=loss.item())
        if step % 200 == 0:
            common.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "clip.pt"
            )
    common.log("clip", step=step, retrieval=retrieval(model, held_images[:500], held_captions[:500], ids))
    common.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "clip.pt")


def trained() -> tuple[CLIPModel, CLIPTokenizer]:
    ids = make_tokenizer()
    model = build(len(ids))
    state = common.load("clip.pt")
    if state is None:
        raise FileNotFoundError("the CLIP pair has not been trained: run `python -m tinysd.train clip` first")
    model.load_state_dict(state["model"])
    return model.eval().requires_grad_(False), ids


def export(folder: str | Path) -> None:
    model, ids = trained()
    model.half().save_pretrained(folder)
    ids.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=list(MEAN),
        image_std=list(STD),
        resample=3,
    ).save_pretrained(folder)
