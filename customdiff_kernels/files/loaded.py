"""What a file holds, and putting it into a UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..low_rank import LowRankDelta, reconstruct
from ..stack import KVStack
from . import names


class DeltaFileError(ValueError):
    """A file that is not a whole delta which this version can read."""


class BaseMismatchError(ValueError):
    """The delta was made for other base weights than those it is applied to."""


@dataclass
class LoadedDelta:
    """What a file holds: a change of the weights (``delta``) or whole weights (``weights``), never both.

    delta: a ``LowRankDelta``, or {segment name: (rows,E)} for a full change; {} where there is none.
    modifier_tokens: {word: embedding (E,)}; a tuple of embeddings where there are several text encoders.
    metadata: what ``save_delta`` was given, and format_version and library_version.
    weights: {segment name: (rows,E)}, the changed weights themselves, as the published full formats hold
        them; {} where the file holds a change. ``relative_to(base)`` makes a change of them.
    format: the layout that the file was found to have (docs/formats.md).
    left_out: names of what the file holds and was not read (``kv_only``).
    others: {parameter name of the UNet: its change}, of parameters beside keys and values, as of the whole
        cross-attention; beside ``weights`` the whole parameters.
    """

    delta: LowRankDelta | dict[str, Tensor]
    modifier_tokens: dict[str, Tensor | tuple[Tensor, ...]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    format: str = "customdiff"
    left_out: tuple[str, ...] = ()
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``"weights"``, ``"delta"``, or ``"tokens"`` for embeddings alone."""
        return "weights" if self.weights else "delta" if self.delta or self.others else "tokens"

    def relative_to(self, base: KVStack | nn.Module) -> LoadedDelta:
        """The same with its whole weights as a change of ``base``, in float32 at least; itself if it holds
        none. ``others`` need the UNet itself as the base.

        Raises ValueError where names or shapes are not the base's, BaseMismatchError where it records another
        base.
        """
        if not self.weights:
            return self
        stack, parameters = split_base(base)
        check_base(stack, self.metadata)
        _check_segments(stack, self.weights)
        check_others(parameters, self.others)
        return replace(
            self,
            delta={name: _difference(weight, stack[name]) for name, weight in self.weights.items()},
            weights={},
            others={name: _difference(weight, parameters[name]) for name, weight in self.others.items()},
            metadata={**self.metadata, "base_hash": stack.hash()},
        )

    def weights_on(self, base: KVStack) -> dict[str, Tensor]:
        """Every key and value weight of ``base`` with this change, {name: (rows,E)}; whole weights to the
        bit, the rest in float32 at least.

        Raises as ``relative_to``.
        """
        check_base(base, self.metadata)
        if not self.weights:
            delta = self.delta
            if isinstance(delta, LowRankDelta):
                delta = delta.to(base.weight.device)
            else:
                delta = {name: change.to(base.weight.device) for name, change in delta.items()}
            with torch.no_grad():
                return dict(reconstruct(base.to(_checks.sum_dtype(base.weight.dtype)), delta).items())
        _check_segments(base, self.weights)
        dtype = next(iter(self.weights.values())).dtype
        if self.weights.keys() != base.keys():
            dtype = torch.promote_types(dtype, base.weight.dtype)
        return {name: self.weights.get(name, weight).to(dtype) for name, weight in base.items()}


def apply_delta(
    unet: nn.Module, loaded: LoadedDelta, *, scale: float = 1.0, force: bool = False
) -> list[str]:
    """Put what ``load_delta`` read into ``unet``: a change is added, whole weights replace, ``others``
    included; returns the names of the weights that it changed.

    ``scale`` weighs the change (whole weights: their difference from the UNet's). A change must record the
    base that it was made for; whole weights need not, and then only names and shapes are checked.
    Raises BaseMismatchError where the UNet's key/value weights are not those that the file was made for
    (another model, or another delta on it), unless ``force``; ValueError for weights that the UNet does not
    have, and where there is nothing to apply. Everything is checked before anything is written.
    """
    if not isinstance(loaded, LoadedDelta):
        raise TypeError(f"loaded must be what load_delta returns, got {type(loaded).__name__}")
    base, parameters = split_base(unet)
    if loaded.kind == "tokens":
        words = f", only the modifier tokens {', '.join(loaded.modifier_tokens)}" * bool(
            loaded.modifier_tokens
        )
        raise ValueError(f"loaded holds no weights to apply{words}")
    if not force:
        if not loaded.weights and loaded.metadata.get("base_hash") is None:
            raise BaseMismatchError(
                "the delta does not record the base that it was made for: force=True applies it anyway"
            )
        check_base(base, loaded.metadata, "force=True applies it anyway")
    check_others(parameters, loaded.others)
    if loaded.weights:
        merged = _replaced(base, loaded.weights, scale)
        changed = [name for name in loaded.weights if not torch.equal(merged[name], base[name])]
    else:
        delta, device = loaded.delta, base.weight.device
        if isinstance(delta, LowRankDelta):
            delta = delta.to(device)
            changed = [segment.name for segment in delta.segments if delta.rank(segment.name)]
        else:
            delta = {name: change.to(device) for name, change in delta.items()}
            changed = [name for name, change in delta.items() if bool(change.any())]
        with torch.no_grad():
            merged = reconstruct(base, delta, scale)
    for name, value in loaded.others.items():
        parameter = parameters[name]
        if not torch.equal(value.to(parameter), parameter) if loaded.weights else bool(value.any()):
            changed.append(name)
    if not changed or scale == 0:
        why = "the UNet has these weights already" if loaded.weights else "every change is zero"
        raise ValueError(f"the delta changes nothing: {why}" if scale else "scale=0 changes nothing")
    merged.load_into(unet)
    for name, value in loaded.others.items():
        parameters[name].copy_(moved(parameters[name], value, scale, whole=bool(loaded.weights)))
    return changed


def from_pairs(pairs: Mapping[str, tuple[Any, Any]]) -> LowRankDelta:
    """A stranger's factors {name: (u, v)} as a delta. Raises TypeError or ValueError for what is none."""
    for name, pair in pairs.items():
        for side, factor in zip("uv", pair, strict=True):
            _checks.is_tensor(f"{name} {side}", factor)
            _checks.rank(f"{name} {side}", factor, "rows,r" if side == "u" else "r,E")
    return LowRankDelta.from_factors(pairs)


def split_base(base: KVStack | nn.Module) -> tuple[KVStack, dict[str, Tensor]]:
    """The keys and values of ``base``, and of a UNet all parameters by name."""
    if isinstance(base, KVStack):
        return base, {}
    stack = KVStack.from_unet(base)
    unet = getattr(base, "_orig_mod", base)  # what torch.compile wraps
    return stack, {name: parameter.detach() for name, parameter in unet.named_parameters()}


def check_others(parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Raises ValueError where ``others`` are not of the UNet with these ``parameters``."""
    if others and not parameters:
        raise ValueError(
            f"it changes {len(others)} weights beside keys and values, first {next(iter(others))!r}: give "
            "the UNet itself as the base, and not its KVStack"
        )
    if unknown := sorted(others.keys() - parameters.keys()):
        raise ValueError(f"its others are not the UNet's, which has no {unknown[:3]}: another model")
    for name, value in others.items():
        _checks.shape(f"its others[{name!r}]", value, tuple(parameters[name].shape), "of the UNet's")


def check_other_names(others: Mapping[str, Tensor]) -> None:
    """{name: floating tensor}, and no name of a key or value weight."""
    if not isinstance(others, Mapping):
        raise TypeError(f"others must map parameter names to tensors, got {type(others).__name__}")
    for name, value in others.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"others must have parameter names as keys, got {name!r}")
        _checks.is_tensor(f"others[{name!r}]", value)
        _checks.floating(f"others[{name!r}]", value)
        if names.is_key_value(name):
            raise ValueError(f"others must leave keys and values to delta, got {name!r}")


def check_base(base: KVStack, metadata: Mapping[str, Any], remedy: str = "give the base recorded") -> None:
    """Raises BaseMismatchError where another base than ``base`` is recorded."""
    recorded, name = metadata.get("base_hash"), metadata.get("base_name", "its base")
    if recorded is not None and (found := base.hash()) != recorded:
        raise BaseMismatchError(
            f"the delta was made for {name} (key/value hash {recorded[:12]}…), this UNet has "
            f"{found[:12]}…: another model, a delta on it already, or bfloat16 weights "
            f"(load them as float16 or float32). {remedy}"
        )


def _check_segments(base: KVStack, weights: Mapping[str, Tensor]) -> None:
    if unknown := sorted(weights.keys() - base.keys()):
        raise ValueError(f"its weights are not the base's, which has no {unknown[:3]}: another model")
    for name, weight in weights.items():
        _checks.shape(f"its weights[{name!r}]", weight, tuple(base[name].shape), "of the base's")


def _replaced(base: KVStack, weights: Mapping[str, Tensor], scale: float) -> KVStack:
    _check_segments(base, weights)
    _checks.number("scale", scale)
    merged = base.clone()
    for name, weight in weights.items():
        merged[name].copy_(moved(base[name], weight, scale, whole=True))
    return merged


def moved(parameter: Tensor, value: Tensor, scale: float, *, whole: bool) -> Tensor:
    """``parameter`` with ``scale`` times a change, or as far on the way to a whole weight."""
    if whole and scale == 1:
        return value
    dtype = _checks.sum_dtype(torch.promote_types(value.dtype, parameter.dtype))
    start, value = parameter.to(dtype), value.to(parameter.device, dtype)
    return torch.lerp(start, value, float(scale)) if whole else start + scale * value


def _difference(weight: Tensor, base: Tensor) -> Tensor:
    """From ``base`` to ``weight``, in float32 at least."""
    dtype = _checks.sum_dtype(torch.promote_types(weight.dtype, base.dtype))
    return weight.to(base.device, dtype) - base.to(dtype)
