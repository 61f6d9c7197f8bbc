"""LayoutBias: Cones 2's layout guidance (equation 7) as a label a pixel and a row of token biases a label."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks

Box = tuple[float, float, float, float]


class LayoutBias:
    """``bias[b, i, j] = scale · table[b, labels[b, i], j]``, added to the scores of every head; never built.

    Args:
        labels: (B or 1, N) integers in 0 … regions−1, one a pixel, rows first; kept as int32.
        table: (B or 1, regions, S) floating: what each text token's score receives in each region; −inf hides
            the token there at every scale, 0 included. May need a gradient.
        scale: number or 0-dim tensor, Cones 2's η(t), e.g. ``weight * math.log1p(sigma**2) *
            ck.score_std(q, k)``. The bias is added after the attention's own scale; the published code adds
            it before D^(−1/2), so multiply by that here to reproduce it. May need a gradient.

    Raises:
        TypeError, ValueError: naming the argument. Labels are checked against the table, on a GPU only with
            CK_DEBUG=1 in the environment, since that waits for it; unchecked, a stray label gets the bias of
            some region or none, and nothing is read out of bounds.
    """

    def __init__(self, labels: Tensor, table: Tensor, scale: float | Tensor = 1.0):
        _checks.is_tensor("labels", labels)
        _checks.is_tensor("table", table)
        _checks.rank("labels", labels, "B|1,N")
        _checks.rank("table", table, "B|1,regions,S")
        _checks.floating("table", table)
        _checks.same_device("table", table, "labels", labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
            raise TypeError(f"labels must be integers, got {str(labels.dtype).removeprefix('torch.')}")
        if labels.shape[0] != table.shape[0] and 1 not in (labels.shape[0], table.shape[0]):
            raise ValueError(
                f"labels and table must agree in batch, got {labels.shape[0]} and {table.shape[0]}"
            )
        if not torch.compiler.is_compiling():
            _checks.label_values(labels, table)
        self.labels = labels.to(torch.int32).contiguous()
        self.table = table
        self.scale = _scale(scale, table)

    def with_scale(self, scale: float | Tensor) -> LayoutBias:
        """The same layout with another scale, e.g. each denoising step's; tensors are shared, not copied."""
        other = object.__new__(LayoutBias)
        other.labels, other.table, other.scale = self.labels, self.table, _scale(scale, self.table)
        return other

    def to(self, device: torch.device | str) -> LayoutBias:
        """The same layout on another device."""
        other = object.__new__(LayoutBias)
        other.labels, other.table = self.labels.to(device), self.table.to(device)
        other.scale = self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale
        return other

    def dense(self) -> Tensor:
        """The whole bias (B|1, 1, N, S) in the table's dtype: for checks and pictures only."""
        batch = max(self.labels.shape[0], self.table.shape[0])
        table = self.scaled_table(self.table.dtype).expand(batch, -1, -1)
        rows = self.labels.long().expand(batch, -1).unsqueeze(-1).expand(-1, -1, table.shape[-1])
        return table.gather(1, rows).unsqueeze(1)

    def scaled_table(self, dtype: torch.dtype) -> Tensor:
        """``scale · table`` in ``dtype``: what the operators take."""
        table = self.table.to(dtype)
        if isinstance(self.scale, Tensor) or self.scale != 1.0:
            hidden = table == -torch.inf  # −inf · 0 would be NaN, in the bias and in the scale's gradient
            table = (table.masked_fill(hidden, 0) * self.scale).masked_fill(hidden, -torch.inf)
        return table.to(dtype).contiguous()

    def __repr__(self) -> str:
        batch = max(self.labels.shape[0], self.table.shape[0])
        regions, s = self.table.shape[1:]
        return f"LayoutBias(batch={batch}, N={self.labels.shape[1]}, regions={regions}, S={s})"

    @classmethod
    def from_boxes(
        cls,
        boxes: Mapping[str, Box],
        tokens: Mapping[str, Sequence[int]],
        size: tuple[int, int],
        n_tokens: int,
        positive: float | Mapping[str, float],
        negative: float,
        *,
        outside: float | None = None,
        scale: float | Tensor = 1.0,
    ) -> LayoutBias:
        """A layout from one box a subject, at one attention level; call it again for every other ``size``.

        Args:
            boxes: ``{subject: (x0, y0, x1, y1)}`` as fractions of the picture, 0 … 1, x to the right and y
                down. Boxes may overlap. A pixel belongs to a box that covers at least half of the pixel's
                area; a box too small for that gets the pixels that it covers most of.
            tokens: ``{subject: [positions]}`` of the subject's words in the prompt, 0 … ``n_tokens``−1 (0 is
                the start token). A position may serve several subjects and then counts as inside in the
                region of each.
            size: (h, w) of the attention level; N = h·w.
            n_tokens: S, the length of the context.
            positive: γ⁺, the bias of a subject's tokens inside its own region; or ``{subject: γ⁺}``, where a
                position of several subjects gets the largest of those whose regions hold the pixel.
            negative: γ⁻, the bias of the subjects' tokens outside their regions.
            outside: the bias of the subjects' tokens at pixels in no region at all; default ``negative``. The
                paper writes 0 there, the published code γ⁻. γ⁻ is the default because the published figures
                come from the code, and because with 0 a subject is free to grow in the background, which is
                no other's region.

        Returns:
            LayoutBias with labels (1, N) int32 and table (1, regions, S) float32, a region being a
            combination of subjects that occurs. On the CPU: ``.to(device)`` moves it.

        Raises:
            TypeError, ValueError: naming the subject whose box, tokens or strength are wrong.
        """
        shares = _shares("boxes", boxes, size, _box_share)
        return cls._from_shares("boxes", shares, tokens, n_tokens, positive, negative, outside, scale)

    @classmethod
    def from_masks(
        cls,
        masks: Mapping[str, Tensor],
        tokens: Mapping[str, Sequence[int]],
        size: tuple[int, int],
        n_tokens: int,
        positive: float | Mapping[str, float],
        negative: float,
        *,
        outside: float | None = None,
        scale: float | Tensor = 1.0,
    ) -> LayoutBias:
        """A layout from one mask a subject: ``{subject: (height, width)}``, bool or 0 … 1, of any resolution.

        A mask is brought to ``size`` by area: a pixel belongs to a subject whose mask covers at least half of
        it. So the same masks serve every attention level. All else as :meth:`from_boxes`.
        """
        shares = _shares("masks", masks, size, _mask_share)
        return cls._from_shares("masks", shares, tokens, n_tokens, positive, negative, outside, scale)

    @classmethod
    def from_regions(
        cls,
        regions: Mapping[str, Box | Tensor],
        tokens: Mapping[str, Sequence[int]],
        size: tuple[int, int],
        n_tokens: int,
        positive: float | Mapping[str, float],
        negative: float,
        *,
        outside: float | None = None,
        scale: float | Tensor = 1.0,
    ) -> LayoutBias:
        """A layout from a box or a mask a subject: :meth:`from_boxes` and :meth:`from_masks` in one."""
        shares = _shares("regions", regions, size, _region_share)
        return cls._from_shares("regions", shares, tokens, n_tokens, positive, negative, outside, scale)

    @classmethod
    def stack(cls, layouts: Sequence[LayoutBias | None]) -> LayoutBias:
        """One layout for a batch from one a row, or None for a row without (e.g. the unconditional half).

        All must agree in N and S and be on one device; scales are folded into the tables.
        """
        present = [layout for layout in layouts if layout is not None]
        if not present:
            raise ValueError("layouts must hold at least one LayoutBias, got none")
        first = present[0]
        n, s = first.labels.shape[1], first.table.shape[2]
        regions = max(layout.table.shape[1] for layout in present)
        labels = first.labels.new_zeros(len(layouts), n)
        rows = []
        for i, layout in enumerate(layouts):
            if layout is None:
                rows.append(first.table.new_zeros(1, regions, s))
                continue
            if layout.labels.shape != (1, n) or layout.table.shape[::2] != (1, s):
                raise ValueError(
                    f"layouts[{i}] must have batch 1, N={n} and S={s} as the first, got {layout}"
                )
            _checks.same_device(f"layouts[{i}]", layout.table, "the first", first.table)
            labels[i] = layout.labels[0]
            table = layout.scaled_table(first.table.dtype)
            rows.append(torch.nn.functional.pad(table, (0, 0, 0, regions - table.shape[1])))
        return cls(labels, torch.cat(rows))

    @classmethod
    def _from_shares(
        cls,
        what: str,
        shares: Mapping[str, Tensor],
        tokens: Mapping[str, Sequence[int]],
        n_tokens: int,
        positive: float | Mapping[str, float],
        negative: float,
        outside: float | None,
        scale: float | Tensor,
    ) -> LayoutBias:
        """``shares``: {subject: (h,w) covered share of each pixel}. Half a pixel decides; never a blend."""
        _check_tokens(what, shares, tokens, n_tokens)
        strengths = _strengths(what, shares, positive)
        inside = torch.stack([_region(share) for share in shares.values()], -1).flatten(0, 1)  # (N, subjects)
        combinations, labels = inside.unique(dim=0, return_inverse=True)  # (regions, subjects), (N,)
        table = torch.zeros(len(combinations), n_tokens)
        nowhere = ~combinations.any(1)
        touched = sorted({j for name in shares for j in tokens[name]})
        for j in touched:
            own = torch.tensor([j in tokens[name] for name in shares])
            holding = combinations & own
            strongest = strengths.where(holding, -torch.inf).amax(1)
            table[:, j] = strongest.where(holding.any(1), float(negative))
            if outside is not None:
                table[nowhere, j] = float(outside)
        return cls(labels.view(1, -1), table.unsqueeze(0), scale)


def bias_arguments(
    bias: Tensor | LayoutBias | None, query: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dense bias with 4 dimensions, labels, table with the scale folded in) for the operators."""
    if bias is None:
        return None, None, None
    if isinstance(bias, LayoutBias):
        return None, bias.labels, bias.scaled_table(_checks.sum_dtype(query.dtype))
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a torch.Tensor, a LayoutBias or None, got {type(bias).__name__}")
    if bias.dtype is torch.bool:
        raise TypeError(
            "bias is added to the scores and must be floating, got bool; use 0 and -inf, e.g. torch.where"
        )
    if bias.dim() > 4:
        raise ValueError(f"bias must be broadcastable to (B,H,N,S), got {tuple(bias.shape)}")
    return (bias if bias.dim() == 4 else bias[(None,) * (4 - bias.dim())]), None, None


def _scale(scale: float | Tensor, table: Tensor) -> float | Tensor:
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale must be a number or a 0-dim tensor, got shape {tuple(scale.shape)}")
        if scale.device.type != "cpu":  # a number on the CPU goes with every table
            _checks.same_device("scale", scale, "table", table)
        return scale.reshape(())
    _checks.number("scale", scale)
    return float(scale)


def _size(size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2 or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"size must be (h, w) in pixels of the attention level, got {size!r}")
    return size[0], size[1]


def _shares(
    what: str,
    regions: Mapping[str, Any],
    size: tuple[int, int],
    share: Callable[[str, Any, tuple[int, int]], Tensor],
) -> dict[str, Tensor]:
    """{subject: (h,w) covered share of each pixel}."""
    size = _size(size)
    if not isinstance(regions, Mapping):
        raise TypeError(f"{what} must map each subject to its own, got {type(regions).__name__}")
    return {name: share(f"{what}[{name!r}]", region, size) for name, region in regions.items()}


def _region_share(argument: str, region: Box | Tensor, size: tuple[int, int]) -> Tensor:
    if isinstance(region, Tensor):
        return _mask_share(argument, region, size)
    return _box_share(argument, region, size)


def _box_share(argument: str, box: Box, size: tuple[int, int]) -> Tensor:
    if not isinstance(box, Sequence) or len(box) != 4:
        raise ValueError(f"{argument} must be (x0, y0, x1, y1), got {box!r}")
    x0, y0, x1, y1 = (float(x) for x in box)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"{argument} must satisfy 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got {box!r}")
    rows, columns = _overlap([y0], [y1], size[0]), _overlap([x0], [x1], size[1])
    return rows @ columns.T  # (h,1) @ (1,w)


def _mask_share(argument: str, mask: Tensor, size: tuple[int, int]) -> Tensor:
    _checks.is_tensor(argument, mask)
    _checks.rank(argument, mask, "height,width")
    area = mask.detach().to("cpu", torch.float64)
    if not area.numel() or not (area.min() >= 0 and 0 < area.max() <= 1):
        raise ValueError(
            f"{argument} must be bool or 0 … 1, not empty; got {tuple(mask.shape)} {mask.dtype}"
            + (f", values {area.min():g} … {area.max():g}" if area.numel() else "")
        )
    rows, columns = (_overlap(*_cells(n), out) for n, out in zip(area.shape, size, strict=True))
    return rows @ area @ columns.T


def _strengths(what: str, shares: Mapping[str, Tensor], positive: float | Mapping[str, float]) -> Tensor:
    """(subjects,) γ⁺ of each."""
    given = positive if isinstance(positive, Mapping) else dict.fromkeys(shares, positive)
    if set(given) != set(shares):
        raise ValueError(
            f"{what} and positive must name the same subjects, got {sorted(shares)} and {sorted(given)}"
        )
    for name, strength in given.items():
        _checks.number(f"positive of {name!r}", strength)
        if math.isnan(strength):
            raise ValueError(f"positive of {name!r} must be a number, got {strength}")
    return torch.tensor([float(given[name]) for name in shares])


def _check_tokens(
    what: str, shares: Mapping[str, Tensor], tokens: Mapping[str, Sequence[int]], n_tokens: int
) -> None:
    if not shares:
        raise ValueError(f"{what} must name at least one subject, got none")
    if set(tokens) != set(shares):
        raise ValueError(
            f"{what} and tokens must name the same subjects, got {sorted(shares)} and {sorted(tokens)}"
        )
    for name, positions in tokens.items():
        if not positions or any(not isinstance(j, int) or not 0 <= j < n_tokens for j in positions):
            raise ValueError(
                f"tokens[{name!r}] must be positions in 0 … {n_tokens - 1} (n_tokens), got {positions!r}"
            )


def _cells(n: int) -> tuple[list[float], list[float]]:
    return [i / n for i in range(n)], [(i + 1) / n for i in range(n)]


def _overlap(starts: list[float], stops: list[float], n: int) -> Tensor:
    """(n, intervals): the share of each of n equal cells of 0 … 1 that each interval covers."""
    low, high = (torch.tensor(edge, dtype=torch.float64).unsqueeze(1) for edge in _cells(n))
    first, last = (torch.tensor(edge, dtype=torch.float64) for edge in (starts, stops))
    return (torch.minimum(high, last) - torch.maximum(low, first)).clamp_min(0) * n


def _region(share: Tensor) -> Tensor:
    """Half covered or, where no pixel is, covered most. The slack absorbs the rounding of 1/3 and such."""
    return share >= min(0.5, float(share.max())) * (1 - 1e-9)
