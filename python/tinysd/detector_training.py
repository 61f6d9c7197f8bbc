"""Stage 4: the detector, from label maps, and what it scores on held-out renderings."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from . import common, data, detector, world

HELD_OUT = 9001  # the seed of the held-out scenes


def held_out_scenes(n: int) -> tuple[list[world.Scene], list[np.ndarray]]:
    rng = np.random.default_rng(HELD_OUT)
    scenes = [world.random_scene(rng) for _ in range(n)]
    return scenes, [world.render(s)[0] for s in scenes]


def accuracy(found: detector.Detector, n: int = 300) -> dict[str, float]:
    """On held-out renderings: categories from left to right, colour words, and backgrounds."""
    scenes, images = held_out_scenes(n)
    detected, places = found.detect(images), found.backgrounds(images)
    categories, colours = [], []
    for scene, subjects in zip(scenes, detected, strict=True):
        truth = [p.subject for p in scene.placed]
        right = [f.category for f in subjects] == [s.category for s in truth]
        categories.append(right)
        if right:
            colours += [
                f.colour == world.colour_name(s.primary)
                for f, s in zip(subjects, truth, strict=True)
                if world.colour_name(s.primary)
            ]
    return {
        "categories": float(np.mean(categories)),
        "colours": float(np.mean(colours)),
        "backgrounds": float(np.mean([p == s.background for p, s in zip(places, scenes, strict=True)])),
    }


def train(finish_at: str, chunks: int, batch: int = 32, rate: float = 2e-3) -> None:
    images, labels, backgrounds = data.load(range(chunks), "images", "labels", "backgrounds")
    torch.manual_seed(6)
    net, step = detector.Net(), 0
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    if (state := common.load("detector.pt")) is not None:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    schedule = common.Schedule(rate, finish_at, warmup=50, decay=0.6)
    rng = np.random.default_rng((6, step))
    while schedule.progress < 1:
        picks = rng.integers(len(images), size=batch)
        x = torch.from_numpy(images[picks]).permute(0, 3, 1, 2).float() / 255
        x = (
            F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear") if step % 3 == 0 else x
        )  # soft samples
        x = (x + rng.uniform(0, 0.06) * torch.randn_like(x)).clamp(0, 1)
        categories, background = net(x)
        loss = F.cross_entropy(categories, torch.from_numpy(labels[picks]).long()) + 0.1 * F.cross_entropy(
            background, torch.from_numpy(backgrounds[picks]).long()
        )
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            common.log("detector", step=step, loss=loss.item())
    common.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "detector.pt")
    common.log("detector", step=step, **accuracy(detector.Detector(net)))


def export() -> None:
    state = common.load("detector.pt")
    if state is None:
        raise FileNotFoundError(
            "the detector has not been trained: run `python -m tinysd.train detector` first"
        )
    save_file({k: v.half().contiguous() for k, v in state["model"].items()}, detector.WEIGHTS)
