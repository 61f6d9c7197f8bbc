"""A change on a live UNet that can be taken off again: ``applied``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import TracebackType
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .. import _checks
from ..stack import KVStack, key_value_parameters
from .api import Delta, as_deltas, as_scales, reconstruct
from .delta import LowRankDelta

_on: WeakKeyDictionary[nn.Module, list[AppliedDelta]] = WeakKeyDictionary()  # on each UNet, the latest last


class AppliedDelta:
    """Changes that are on a UNet until ``remove()`` or the end of a ``with`` block; ``applied`` makes it.

    names: the weights that are changed.
    """

    def __init__(self, unet: nn.Module, originals: dict[str, Tensor]):
        self.names = tuple(originals)
        self._unet, self._originals = ref(unet), originals

    def remove(self) -> None:
        """Put back the weights that were there, bit for bit, in the dtype and on the device of the UNet by
        then. A second call does nothing.

        Raises RuntimeError where later changes are still on the UNet: they are to be removed first.
        """
        unet = self._unet()
        found = _on.get(unet, []) if unet is not None else []
        if unet is None or self not in found:
            return
        if found[-1] is not self:
            later = len(found) - 1 - found.index(self)
            raise RuntimeError(
                f"{later} later changes are still on this UNet: remove them first, last to first"
            )
        _write(unet, self._originals)
        found.pop()

    def __enter__(self) -> AppliedDelta:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def applied(
    unet: nn.Module,
    deltas: Delta | Iterable[Delta],
    scales: float | Sequence[float] | Tensor | None = None,
) -> AppliedDelta:
    """Add changes to the weights of a live UNet, to be taken off again without a trace.

    Either ``with ck.applied(unet, [cat, style], [1.0, 0.6]):`` or ``on = ck.applied(unet, cat)`` and later
    ``on.remove()``. The weights are then what they were, bit for bit: those that change are kept for that,
    and no others.

    unet: a module whose keys and values ``KVStack.from_unet`` knows. Keys and values that were computed from
        it before are not computed again.
    deltas, scales: as for ``reconstruct``, on the UNet's device; of all of its segments or some. A dense
        change may name any other parameter of the UNet too, as ``LoadedDelta.others`` does.

    Nested changes add up and come off last to first. Raises ValueError for names that the UNet does not have,
    and where there is nothing to apply; an error leaves the UNet as it was.
    """
    unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wraps
    keys_values = key_value_parameters(unet)
    parameters = keys_values | dict(unet.named_parameters())
    deltas = as_deltas(deltas)
    changed: set[str] = set()
    for index, delta in enumerate(deltas):
        names = delta.factors if isinstance(delta, LowRankDelta) else delta
        if unknown := [name for name in names if name not in parameters]:
            raise ValueError(f"deltas[{index}] has segments that the UNet does not have: {unknown[:3]}")
        changed.update(n for n in names if not isinstance(delta, LowRankDelta) or delta.rank(n))
    if not changed:
        raise ValueError("deltas change nothing: every segment has rank 0, or there is none")
    originals = {n: p.detach().clone() for n, p in parameters.items() if n in changed}
    with torch.no_grad():
        stacked = {name: weight for name, weight in originals.items() if name in keys_values}
        others = _others(originals.keys() - stacked.keys(), originals, deltas, scales)
        if stacked:
            stack = KVStack.from_mapping(stacked)
            others |= reconstruct(stack, [_only(delta, stacked) for delta in deltas], scales)
    _write(unet, others)
    on = AppliedDelta(unet, originals)
    _on.setdefault(unet, []).append(on)
    return on


def _only(delta: Delta, names: Collection[str]) -> Delta:
    """The delta of these segments alone: the others are in no stack here."""
    if not isinstance(delta, LowRankDelta):
        return {name: change for name, change in delta.items() if name in names}
    pairs = {name: pair for name, pair in delta.factors.items() if name in names}
    return LowRankDelta.from_factors(pairs) if pairs else {}


def _others(
    names: Iterable[str],
    originals: Mapping[str, Tensor],
    deltas: list[Delta],
    scales: float | Sequence[float] | Tensor | None,
) -> dict[str, Tensor]:
    """The parameters that are no keys or values, changed; summed in float32 at least."""
    found, factors = {}, as_scales(scales, len(deltas))
    for name in names:
        total = originals[name].to(_checks.sum_dtype(originals[name].dtype))
        for index, (delta, scale) in enumerate(zip(deltas, factors, strict=True)):
            if isinstance(delta, LowRankDelta) or name not in delta:
                continue
            label, change = f"deltas[{index}][{name!r}]", delta[name]
            _checks.is_tensor(label, change)
            _checks.shape(label, change, tuple(total.shape), "as in the UNet")
            _checks.same_device(label, change, "the UNet", total)
            total = total + (change if scale is None else change.to(total.dtype) * scale)
        found[name] = total
    return found


def _write(unet: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(unet.named_parameters())
    for name, values in weights.items():
        if name not in parameters or parameters[name].shape != values.shape:
            raise ValueError(f"the UNet has no {name} of shape {tuple(values.shape)} any more")
    with torch.no_grad():
        for name, values in weights.items():
            parameters[name].copy_(values)
