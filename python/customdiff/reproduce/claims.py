"""The claims of the paper, and the bars of this repository, each held or not by the figures measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .figures import Difference, Figures

Verdict = tuple[bool, str, "bool | None"]  # held; the figure in words; whether it is clear of the noise
Check = Callable[[Figures], "Verdict | None"]


@dataclass(frozen=True)
class Claim:
    """`check` returns None where what it compares was not measured."""

    claim: str
    source: str
    check: Check


def evaluate(figures: Figures) -> list[dict[str, Any]]:
    """{claim, source, held, figure, clear} of every claim; ``held`` is None where it was not measured.

    ``clear``: whether the difference is larger than twice its standard error; None for a bar.
    """
    found = []
    for claim in CLAIMS:
        held, figure, clear = claim.check(figures) or (None, "", None)
        found.append(
            {"claim": claim.claim, "source": claim.source, "held": held, "figure": figure, "clear": clear}
        )
    return found


def higher(metric: str, a: str, b: str, group: str = "single") -> Check:
    """`a` scores higher than `b`."""
    return _compare(metric, a, b, group, lambda found: found.mean > 0)


def lower(metric: str, a: str, b: str, group: str = "single") -> Check:
    """`a` scores lower than `b`."""
    return _compare(metric, a, b, group, lambda found: found.mean < 0)


def not_below(metric: str, a: str, b: str, share: float, group: str = "single") -> Check:
    """`a` scores at most a `share` of `b` lower than `b`."""
    return _compare(metric, a, b, group, lambda found: found.mean >= -share * abs(found.b), bar=True)


def alike(metric: str, a: str, b: str, share: float, group: str = "single") -> Check:
    """`a` differs from `b` by at most a `share` of it."""
    return _compare(metric, a, b, group, lambda found: abs(found.mean) <= share * abs(found.b), bar=True)


def _compare(
    metric: str, a: str, b: str, group: str, holds: Callable[[Difference], bool], bar: bool = False
) -> Check:
    def check(figures: Figures) -> Verdict | None:
        found = figures.difference(group, metric, a, b)
        if found is None:
            return None
        return holds(found), _difference(found), None if bar else found.clear

    return check


def nearer(metric: str, a: str, b: str, to: str, group: str = "single") -> Check:
    """`a` differs less from `to` than `b` does."""

    def check(figures: Figures) -> Verdict | None:
        first, second = (figures.difference(group, metric, name, to) for name in (a, b))
        if first is None or second is None:
            return None
        figure = f"{_number(first.mean, 3)} against {_number(second.mean, 3)}"
        return abs(first.mean) < abs(second.mean), figure, None

    return check


def at_least(metric: str, method: str, bar: float, group: str = "single") -> Check:
    """The mean of `metric`, a share, is `bar` or more."""

    def check(figures: Figures) -> Verdict | None:
        mean = figures.mean(group, method, metric)
        return None if mean is None else (mean >= bar, f"{mean:.0%}".replace("-", "−"), None)

    return check


def times(metric: str, a: str, b: str, bar: float, group: str = "single") -> Check:
    """`metric` of `a` is `bar` times that of `b` or more."""

    def check(figures: Figures) -> Verdict | None:
        first, second = figures.mean(group, a, metric), figures.mean(group, b, metric)
        if first is None or not second:
            return None
        sides = " against ".join(_number(side, _digits(first, second)) for side in (first, second))
        figure = f"{first / second:.2f}×: {sides}"
        return first / second >= bar, figure, None

    return check


def _difference(found: Difference) -> str:
    parts = [found.mean, *([] if found.error is None else [found.error]), found.a, found.b]
    digits = _digits(found.a, found.b)
    mean, *error, a, b = (_number(part, digits) for part in parts)
    signed = mean if found.mean < 0 else f"+{mean}"
    return f"{' ± '.join([signed, *error])} ({a} against {b})"


def _digits(*values: float) -> int:
    """Decimals that tell the values apart."""
    largest = max(map(abs, values))
    return 0 if largest >= 1000 else 1 if largest >= 10 else 3


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".replace("-", "−")


TI, DB, ALL, OURS = "textual-inversion", "dreambooth", "fine-tune-all", "ours"
JOINT, MERGED, SEQUENTIAL = "joint", "merged", "sequential"
KID, UNRELATED = "kid_validation", "kid_unrelated"
RESIZED, NO_REG, GENERATED, NORMAL, FIXED = (
    "resized",
    "no-regularization",
    "generated",
    "normal",
    "fixed",
)
SINGLE, MULTI, TABLE3, TABLE4, TABLE5 = "table 1, single", "table 1, multi", "table 3", "table 4", "table 5"
COST, FIGURE13, BAR = "section 4.1", "figure 13", "bar of this repository"
M = "multi"

CLAIMS = (
    Claim("Ours follows the text better than Textual Inversion", SINGLE, higher("text", OURS, TI)),
    Claim("Ours follows the text better than DreamBooth", SINGLE, higher("text", OURS, DB)),
    Claim("Ours follows the text as fine-tune all does (to 1%)", SINGLE, not_below("text", OURS, ALL, 0.01)),
    Claim("Textual Inversion has a higher image alignment than ours", SINGLE, higher("image", TI, OURS)),
    Claim("Ours has a higher image alignment than fine-tune all", SINGLE, higher("image", OURS, ALL)),
    Claim("Ours has DreamBooth's image alignment (to 1%)", SINGLE, not_below("image", OURS, DB, 0.01)),
    Claim("Ours has a lower KID than DreamBooth", SINGLE, lower(KID, OURS, DB)),
    Claim("Ours has a lower KID than the base", SINGLE, lower(KID, OURS, "base")),
    Claim("DreamBooth has a higher KID than the base", SINGLE, higher(KID, DB, "base")),
    Claim("Fine-tune all has a lower KID than ours", SINGLE, lower(KID, ALL, OURS)),
    Claim("Ours trains faster than fine-tune all", COST, lower("seconds", OURS, ALL)),
    Claim("Ours trains faster than DreamBooth", COST, lower("seconds", OURS, DB)),
    Claim("Ours trains faster than Textual Inversion", COST, lower("seconds", OURS, TI)),
    Claim("Ours needs less memory to train than fine-tune all", COST, lower("peak_memory", OURS, ALL)),
    Claim("Ours stores less than DreamBooth", COST, lower("bytes", OURS, DB)),
    Claim("Joint follows the text better than sequential", MULTI, higher("text", JOINT, SEQUENTIAL, M)),
    Claim("Merged follows the text better than sequential", MULTI, higher("text", MERGED, SEQUENTIAL, M)),
    Claim("Joint follows the text better than Textual Inversion", MULTI, higher("text", JOINT, TI, M)),
    Claim("Merged follows the text better than Textual Inversion", MULTI, higher("text", MERGED, TI, M)),
    Claim("Joint has a higher image alignment than sequential", MULTI, higher("image", JOINT, SEQUENTIAL, M)),
    Claim("Joint has a higher image alignment than merged", MULTI, higher("image", JOINT, MERGED, M)),
    Claim("Joint has a higher image alignment than Textual Inversion", MULTI, higher("image", JOINT, TI, M)),
    Claim(
        "Sequential forgets its first concept, joint less", "table 7", higher("image1", JOINT, SEQUENTIAL, M)
    ),
    Claim(
        "Sequential has its second concept better than joint",
        "table 7",
        higher("image2", SEQUENTIAL, JOINT, M),
    ),
    Claim("Merging is faster than joint training", "section 3.2", lower("seconds", MERGED, JOINT, M)),
    Claim("No augmentation lowers image alignment", TABLE3, lower("image", OURS, RESIZED)),
    Claim("No augmentation raises text alignment", TABLE3, higher("text", OURS, RESIZED)),
    Claim("No regularization lowers image alignment", TABLE3, lower("image", NO_REG, OURS)),
    Claim("No regularization raises KID", TABLE3, higher(KID, NO_REG, OURS)),
    Claim("Generated regularization raises KID", TABLE3, higher(KID, GENERATED, OURS)),
    Claim(
        "Generated regularization keeps image alignment (to 1%)",
        TABLE3,
        alike("image", GENERATED, OURS, 0.01),
    ),
    Claim("V* not optimised: image alignment is lower", TABLE4, lower("image", FIXED, OURS)),
    Claim("V* not optimised: text alignment is higher", TABLE4, higher("text", FIXED, OURS)),
    Claim("V* from a normal draw: image alignment is lower", TABLE4, lower("image", NORMAL, OURS)),
    Claim("V* from a normal draw: text alignment is higher", TABLE4, higher("text", NORMAL, OURS)),
    Claim(
        "On unrelated captions ours is nearer to real pictures than DreamBooth",
        TABLE5,
        lower(UNRELATED, OURS, DB),
    ),
    Claim(
        "On unrelated captions ours stays nearer to the base than DreamBooth",
        TABLE5,
        nearer(UNRELATED, OURS, DB, "base"),
    ),
    Claim(
        "Top 60% of the singular values keep image alignment (to 1%)",
        FIGURE13,
        alike("image", "top 60%", OURS, 0.01),
    ),
    Claim("Top 60% of the singular values are 5 times smaller", FIGURE13, times("bytes", OURS, "top 60%", 5)),
    Claim("Image alignment falls from top 60% to top 10%", FIGURE13, lower("image", "top 10%", "top 60%")),
    Claim("Image alignment falls from top 10% to rank 1", FIGURE13, lower("image", "rank 1", "top 10%")),
    Claim("Image alignment falls from rank 1 to rank 0", FIGURE13, lower("image", "rank 0", "rank 1")),
    Claim("Rank 0 follows the text better than all of it", FIGURE13, higher("text", "rank 0", OURS)),
    Claim(
        "Ours closes at least half of the gap from the base to true pictures", BAR, at_least("gap", OURS, 0.5)
    ),
    Claim("Ours keeps the base's text alignment (to 5%)", BAR, alike("text", OURS, "base", 0.05)),
    Claim("Ours has a lower KID with regularization than without", BAR, lower(KID, OURS, NO_REG)),
    Claim("Merged shows both concepts in 60% of pictures", BAR, at_least("seen", MERGED, 0.6, M)),
    Claim("Joint shows both concepts in 60% of pictures", BAR, at_least("seen", JOINT, 0.6, M)),
    Claim(
        "Joint with Cut-Mix shows both concepts in 60% of pictures",
        BAR,
        at_least("seen", "joint-cutmix", 0.6, M),
    ),
    Claim(
        "5× compression loses at most 3% of image alignment",
        BAR,
        not_below("image", "5× smaller", OURS, 0.03),
    ),
    Claim(
        "A step of fine-tune all takes 1.5 times as long as one of ours",
        BAR,
        times("seconds", ALL, OURS, 1.5, "timing"),
    ),
    Claim("Fine-tune all stores 20 times as much as ours", BAR, times("bytes", ALL, OURS, 20)),
    Claim(
        "Fine-tune all stores 20 times as much as ours at 5× compression",
        BAR,
        times("bytes", ALL, "5× smaller", 20),
    ),
)
