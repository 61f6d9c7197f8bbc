"""A change on a live UNet that can be taken off again: ``applied``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from types import TracebackType
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..stack import KVStack, key_value_parameters
from .api import Delta, as_deltas, reconstruct
from .delta import LowRankDelta

_on: WeakKeyDictionary[nn.Module, list[AppliedDelta]] = WeakKeyDictionary()  # on each UNet, the latest last


class AppliedDelta:
    """Changes that are on a UNet until ``remove()`` or the end of a ``with`` block; ``applied`` makes it.

    names: the weights that are changed.
    """

    def __init__(self, unet: nn.Module, originals: KVStack):
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
    """Add changes to the keys and values of a live UNet, to be taken off again without a trace.

    Either ``with ck.applied(unet, [cat, style], [1.0, 0.6]):`` or ``on = ck.applied(unet, cat)`` and later
    ``on.remove()``. The weights are then what they were, bit for bit: the changed segments are kept for that,
    and no others.

    unet: a module whose keys and values ``KVStack.from_unet`` knows. Keys and values that were computed from
        it before are not computed again.
    deltas, scales: as for ``reconstruct``, on the UNet's device; of all of its segments or some.

    Nested changes add up and come off last to first. Raises ValueError for segments that the UNet does not
    have, and where there is nothing to apply; an error leaves the UNet as it was.
    """
    unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wraps
    parameters = key_value_parameters(unet)
    deltas = as_deltas(deltas)
    changed: set[str] = set()
    for index, delta in enumerate(deltas):
        names = delta.factors if isinstance(delta, LowRankDelta) else delta
        if unknown := [name for name in names if name not in parameters]:
            raise ValueError(f"deltas[{index}] has segments that the UNet does not have: {unknown[:3]}")
        changed.update(n for n in names if not isinstance(delta, LowRankDelta) or delta.rank(n))
    if not changed:
        raise ValueError("deltas change nothing: every segment has rank 0, or there is none")
    originals = KVStack.from_mapping({n: p.detach() for n, p in parameters.items() if n in changed})
    with torch.no_grad():
        weights = reconstruct(originals, [_only(delta, changed) for delta in deltas], scales)
    _write(unet, weights)
    on = AppliedDelta(unet, originals)
    _on.setdefault(unet, []).append(on)
    return on


def _only(delta: Delta, names: Collection[str]) -> Delta:
    """The delta of these segments alone: the others are in no stack here."""
    if not isinstance(delta, LowRankDelta):
        return delta
    pairs = {name: pair for name, pair in delta.factors.items() if name in names}
    return LowRankDelta.from_factors(pairs) if pairs else {}


def _write(unet: nn.Module, weights: KVStack) -> None:
    parameters = key_value_parameters(unet)
    for name, values in weights.items():
        if name not in parameters or parameters[name].shape != values.shape:
            raise ValueError(f"the UNet has no {name} of shape {tuple(values.shape)} any more")
    with torch.no_grad():
        for name, values in weights.items():
            parameters[name].copy_(values)
