"""``KVStack``: every ``to_k`` and ``to_v`` row of a UNet's cross-attention as one matrix ``weight`` (R,E).

The text is the same for every layer, so all layers' keys and values are one product ``kv = context @
weight.T`` (B,S,R) of which each layer takes its columns. A concept is another such matrix for the same frozen
UNet.

Order of the rows: the UNet's own ``named_parameters`` order of its cross-attention modules, each layer's
``to_k`` rows before its ``to_v`` rows.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks

_PARAMETER = re.compile(r"(?P<module>(?:.+\.)?attn2)\.to_(?P<part>[kv])\.(?P<leaf>weight|bias)")


class Segment(NamedTuple):
    """Rows ``start`` to ``stop`` of a stack, under the UNet's name for the parameter that they are."""

    name: str
    start: int
    stop: int


class KVStack(Mapping[str, Tensor]):
    """All key and value projections as one matrix, and a mapping {parameter name: its rows, a view}.

    weight: (R,E), any floating dtype; kept as it is (an ``nn.Parameter`` stays one), never copied.
    segments: (name, start, stop) in order, without gaps, from row 0 to row R.

    Raises TypeError or ValueError where the weight is not a floating matrix or the segments do not tile its
    rows.
    """

    __slots__ = ("weight", "segments", "_index")
    __eq__ = object.__eq__  # by identity: comparing tensors elementwise has no truth value
    __hash__ = object.__hash__

    def __init__(self, weight: Tensor, segments: Iterable[tuple[str, int, int]]):
        _checks.is_tensor("weight", weight)
        _checks.floating("weight", weight)
        _checks.rank("weight", weight, "R,E")
        self.weight = weight
        self.segments = tile(segments, weight.shape[0])
        self._index = {segment.name: segment for segment in self.segments}

    @classmethod
    def from_unet(cls, unet: nn.Module) -> KVStack:
        """Copy the cross-attention keys and values (``*.attn2.to_k.weight``, ``*.attn2.to_v.weight``) of
        ``unet``.

        Known by the parameters' names alone: SD 1.x, SD 2.1, SDXL, or any module that names its own so.
        Raises ValueError where there are none, where a layer lacks one of the two or has biases, and where
        layers differ in text width (then they cannot share one context).
        """
        return cls.from_mapping({name: p.detach() for name, p in key_value_parameters(unet).items()})

    @classmethod
    def from_mapping(cls, weights: Mapping[str, Tensor]) -> KVStack:
        """Stack {name: (rows,E)} in the mapping's order; copies. Raises ValueError where widths E differ."""
        check_matrices("weights", weights)
        segments, start = [], 0
        for name, matrix in weights.items():
            segments.append(Segment(name, start, start + matrix.shape[0]))
            start += matrix.shape[0]
        return cls(torch.cat(list(weights.values())), segments)

    def load_into(self, unet: nn.Module) -> list[str]:
        """Write the rows into the parameters of ``unet`` (cast to their dtype and device); returns the names
        written.

        Everything is checked before anything is written. Raises ValueError where names or shapes do not
        agree.
        """
        parameters = key_value_parameters(unet)
        unknown, missing = (
            sorted(self._index.keys() - parameters.keys()),
            sorted(parameters.keys() - self._index.keys()),
        )
        if unknown or missing:
            raise ValueError(
                f"the stack is not this UNet's: {len(unknown)} segments unknown to the UNet {unknown[:3]}, "
                f"{len(missing)} of its parameters missing from the stack {missing[:3]}"
            )
        for name, parameter in parameters.items():
            if parameter.shape != self[name].shape:
                raise ValueError(
                    f"{name} is {tuple(self[name].shape)} here and {tuple(parameter.shape)} in the UNet"
                )
        with torch.no_grad():
            for segment in self.segments:
                parameters[segment.name].copy_(self[segment.name])
        return [segment.name for segment in self.segments]

    def views(self, kv: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """{attention module: (key, value)}, views (B,S,inner) of the stacked projection ``kv`` (B,S,R)."""
        rows = self.weight.shape[0]
        if kv.shape[-1] != rows:
            raise ValueError(f"kv must have R={rows} as its last dimension, got shape {tuple(kv.shape)}")
        pairs: dict[str, dict[str, Tensor]] = {}
        # one split: slices would each add a gradient of kv's whole size in the backward pass
        columns = kv.split([stop - start for _, start, stop in self.segments], -1)
        for segment, part_kv in zip(self.segments, columns, strict=True):
            module, _, part = segment.name.removesuffix(".weight").rpartition(".")
            pairs.setdefault(module, {})[part] = part_kv
        incomplete = [module for module, pair in pairs.items() if pair.keys() != {"to_k", "to_v"}]
        if incomplete:
            raise ValueError(
                f"views needs to_k and to_v of every module, got only one of them of {incomplete[:3]}"
            )
        return {module: (pair["to_k"], pair["to_v"]) for module, pair in pairs.items()}

    def to(self, *args: Any, **kwargs: Any) -> KVStack:
        """The stack with its weight cast or moved as by ``Tensor.to``."""
        return KVStack(self.weight.to(*args, **kwargs), self.segments)

    def clone(self) -> KVStack:
        """A detached copy with its own memory."""
        return KVStack(self.weight.detach().clone(), self.segments)

    def __sub__(self, other: KVStack) -> KVStack:
        """The change from ``other`` to this stack, in float32 at least: what ``compress`` and ``save_delta``
        take.
        """
        if not isinstance(other, KVStack):
            return NotImplemented
        check_same_segments("the subtracted stack", other, "this one", self)
        dtype = _checks.sum_dtype(torch.promote_types(self.weight.dtype, other.weight.dtype))
        return KVStack(self.weight.to(dtype) - other.weight.to(dtype), self.segments)

    def hash(self) -> str:
        """sha256 (hex) of the names, shapes and values, by which a delta file knows its base.

        Of the values rounded to float16, so that loads of one model in float32 and in float16 agree (bfloat16
        has fewer bits: its hash differs). Independent of device, row order and layout in memory.
        """
        digest = hashlib.sha256()
        weight = self.weight.detach().to("cpu", torch.float16).contiguous()  # one transfer for all segments
        for name, start, stop in sorted(self.segments):
            values = weight[start:stop]
            digest.update(f"{name}{tuple(values.shape)}".encode())
            if values.numel():
                digest.update((ctypes.c_char * values.nbytes).from_address(values.data_ptr()))
        return digest.hexdigest()

    def __getitem__(self, name: str) -> Tensor:
        segment = self._index[name]
        return self.weight[segment.start : segment.stop]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self.segments)

    def __repr__(self) -> str:
        rows, width = self.weight.shape
        return (
            f"KVStack(R={rows}, E={width}, {len(self)} segments, {self.weight.dtype}, {self.weight.device})"
        )


def tile(segments: Iterable[tuple[str, int, int]], rows: int | None = None) -> tuple[Segment, ...]:
    """``segments`` as a tuple; raises ValueError unless they follow one another from 0 (to ``rows``),
    uniquely named.
    """
    given = list(segments)
    for segment in given:
        if not isinstance(segment, Sequence) or len(segment) != 3:
            raise TypeError(f"segments must be (name, start, stop), got {segment!r}")
    found = tuple(Segment(*segment) for segment in given)
    end, names = 0, set()
    for segment in found:
        if segment.start != end or segment.stop < segment.start:
            raise ValueError(
                f"segments must follow one another without gaps: {segment} comes after row {end}"
            )
        if segment.name in names:
            raise ValueError(f"segments must have names of their own, got {segment.name!r} twice")
        end = segment.stop
        names.add(segment.name)
    if rows is not None and end != rows:
        raise ValueError(f"segments must cover the R={rows} rows of weight, got {end}")
    return found


def check_matrices(argument: str, matrices: Mapping[str, Tensor]) -> None:
    """A nonempty {name: floating (rows,E)} with one E, dtype and device."""
    if not isinstance(matrices, Mapping):
        raise TypeError(
            f"{argument} must be a KVStack or a mapping {{name: tensor}}, got {type(matrices).__name__}"
        )
    if not matrices:
        raise ValueError(f"{argument} must name at least one matrix, got none")
    first_name, first = next(iter(matrices.items()))
    for name, matrix in matrices.items():
        label = f"{argument}[{name!r}]"
        _checks.is_tensor(label, matrix)
        _checks.floating(label, matrix)
        _checks.rank(label, matrix, "rows,E")
        if matrix.shape[1] != first.shape[1]:
            raise ValueError(
                f"{argument} must share one text width E: {first_name} has {first.shape[1]}, "
                f"{name} has {matrix.shape[1]}"
            )
        if matrix.dtype is not first.dtype:
            raise TypeError(
                f"{argument} must share one dtype: {first_name} is {first.dtype}, {name} is {matrix.dtype}"
            )
        _checks.same_device(label, matrix, first_name, first)


def check_same_segments(argument: str, stack: KVStack, other_argument: str, other: KVStack) -> None:
    if stack.segments != other.segments or stack.weight.shape != other.weight.shape:
        raise ValueError(
            f"{argument} must have the segments of {other_argument}: {stack!r} differs from {other!r} "
            f"in {sorted(set(stack.segments) ^ set(other.segments))[:3] or 'text width'}"
        )


def as_stack(argument: str, weights: Mapping[str, Tensor], like: KVStack | None = None) -> KVStack:
    """``weights`` as a stack: itself where it is one, stacked (a copy) otherwise; with the segments of
    ``like``.
    """
    if isinstance(weights, KVStack):
        stack = weights
    else:
        check_matrices(argument, weights)
        order = weights if like is None else like
        unknown, missing = sorted(weights.keys() - order.keys()), sorted(order.keys() - weights.keys())
        if unknown or missing:
            raise ValueError(
                f"{argument} must name the segments of the base: unknown {unknown[:3]}, missing {missing[:3]}"
            )
        stack = KVStack.from_mapping({name: weights[name] for name in order})
    if like is not None:
        check_same_segments(argument, stack, "the base", like)
        _checks.same_device(argument, stack.weight, "the base", like.weight)
    return stack


def key_value_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The key and value weights by name, in stack order."""
    if not isinstance(unet, nn.Module):
        raise TypeError(f"unet must be a torch.nn.Module, got {type(unet).__name__}")
    unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wraps
    modules: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in unet.named_parameters():
        if match := _PARAMETER.fullmatch(name):
            if match["leaf"] == "bias":
                raise ValueError(
                    f"unet has a bias in its keys or values ({name}), which a stack of weights cannot hold"
                )
            modules.setdefault(match["module"], {})[match["part"]] = parameter
    if not modules:
        raise ValueError(
            f"unet ({type(unet).__name__}) has no parameter named *.attn2.to_k.weight or to_v.weight; "
            "an adapter that wraps them must be merged or unloaded first"
        )
    found = {}
    for module, parts in modules.items():
        for part in ("k", "v"):
            if part not in parts:
                raise ValueError(f"unet has only one of to_k.weight and to_v.weight in {module}")
            found[f"{module}.to_{part}.weight"] = parts[part]
    return found
