"""What a run learns: the stacked K/V weights, V*, and where asked for other weights of the UNet."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import customdiff_kernels as ck

from .concept import Concept, Row, base_metadata
from .config import TrainConfig
from .modifier import initial_rows

_QUERY_OUT = re.compile(r"attn2\.(to_q|to_out\.0)\.(weight|bias)$")


class Learned:
    """The parameters of a run over a frozen pipeline, in float32.

    base: the keys and values that the change is counted from.
    weight: (R,E), a parameter unless the run leaves keys and values alone.
    rows: {modifier token: an embedding for each text encoder}, parameters where V* trains.
    others: {name: parameter} of the UNet itself, which ``release`` puts back as they were.

    Raises ValueError for an initial word that the base does not know, a UNet in half precision of which more
    than keys and values train, and a ``start`` of another base or with a word of the run.
    """

    def __init__(self, config: TrainConfig, pipeline: Any, start: Concept | None = None):
        unet = pipeline.unet
        live = ck.KVStack.from_unet(unet)
        self.base, self._of_base = live.to(torch.float32).clone(), base_metadata(live)
        if config.weights in ("cross-attention", "unet") and unet.dtype != torch.float32:
            raise ValueError(
                f"weights={config.weights!r} trains the UNet's own weights, which are {unet.dtype}; load the "
                "base in float32 and give mixed_precision"
            )
        weight = self.base.weight.clone()
        self.rows: dict[str, tuple[Tensor, ...]] = {}
        if start is not None:
            start = start.of(unet if start.others else live)
            if taken := [
                s.modifier_token for s in config.subjects if s.modifier_token in start.modifier_tokens
            ]:
                raise ValueError(
                    f"start_from has the modifier token {taken[0]} already; name another for this run"
                )
            if start.delta:
                weight = ck.reconstruct(self.base, start.delta).weight
        self.weight = weight if config.weights == "none" else nn.Parameter(weight)
        self.kept: dict[str, Row] = dict(start.modifier_tokens) if start is not None else {}
        for word, rows in initial_rows(config, pipeline, taken=len(self.kept)).items():
            self.rows[word] = tuple(
                nn.Parameter(row, requires_grad=config.train_modifier_token) for row in rows
            )
        self._take_over(config.weights, unet, start)

    def _take_over(self, weights: str, unet: nn.Module, start: Concept | None) -> None:
        """Lets the chosen weights of the UNet train, from where ``start`` left them."""
        changes = start.others if start is not None else {}
        parameters = dict(unet.named_parameters())
        if unknown := sorted(changes.keys() - parameters.keys()):
            raise ValueError(f"start_from changes weights that this UNet does not have: {unknown[:3]}")
        chosen = {
            "unet": lambda name: name not in self.base,
            "cross-attention": lambda name: bool(_QUERY_OUT.search(name)),
        }.get(weights, lambda name: False)
        touched = {name: p for name, p in parameters.items() if chosen(name) or name in changes}
        self._originals = {name: parameter.detach().clone() for name, parameter in touched.items()}
        self._touched = touched
        self.others = {name: parameter for name, parameter in touched.items() if chosen(name)}
        self._stays = {name: change for name, change in changes.items() if not chosen(name)}
        with torch.no_grad():
            for name, change in changes.items():
                touched[name].add_(change.to(touched[name]))
        for parameter in self.others.values():
            parameter.requires_grad_(True)

    @cached_property
    def base_hash(self) -> str:
        """Of the keys and values that the run changes."""
        return self.base.hash()

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of an optimizer: what learns at the rate of weights, and at that of V*."""
        weights = [p for p in (self.weight, *self.others.values()) if p.requires_grad]
        rows = [row for rows in self.rows.values() for row in rows if row.requires_grad]
        return [{"params": weights, "of": "weights"}, {"params": rows, "of": "rows"}]

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups() for parameter in group["params"]]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        tensors = {"weight": self.weight, **self.others}
        tensors |= {
            f"row {i} of {word}": row for word, rows in self.rows.items() for i, row in enumerate(rows)
        }
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def concept(self, metadata: dict[str, Any], others: bool = True) -> Concept:
        """What was learned so far, on the CPU; without ``others`` keys, values and V* alone."""
        weight, base = self.weight.detach(), self.base
        delta = {}
        if not torch.equal(weight, base.weight):
            delta = {name: (weight[start:stop] - base[name]).cpu() for name, start, stop in base.segments}
        words: dict[str, Row] = dict(self.kept)
        for word, rows in self.rows.items():
            parts = tuple(row.detach().cpu().clone() for row in rows)
            words[word] = parts if len(parts) > 1 else parts[0]
        changes = {}
        if others:
            changes = {name: (p.detach() - self._originals[name]).cpu() for name, p in self.others.items()}
            changes |= self._stays  # not read off the UNet, which may be in half precision
        return Concept(delta, words, {**self._of_base, **metadata}, others=changes)

    @torch.no_grad()
    def release(self) -> None:
        """Puts the UNet's weights back, bit for bit."""
        for name, original in self._originals.items():
            self._touched[name].copy_(original)
