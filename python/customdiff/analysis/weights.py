"""``customdiff analyse weights``: which layers training changes most (Custom Diffusion, figure 3)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..commands.common import add_base, existing
from .report import add_report, begin, save, show, tabulated

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..concept import Concept

SUMMARY = "Rate of weight change of every layer, and its mean by type of layer (figure 3)."
EXAMPLES = """A layer's rate is |change| / |weights|, of all its parameters together. The paper's figure is
of a concept for which the whole UNet was trained; where keys and values alone were, all other rates are 0.

examples:
  customdiff analyse weights dog.safetensors --output dog_weights/
"""
TYPES = ("cross-attention", "self-attention", "other")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concept", metavar="FILE", help="the concept file")
    add_report(parser)
    add_base(parser)


def run(options: argparse.Namespace) -> None:
    from ..base import load_base
    from ..concept import Concept

    stem, figure = begin(options)
    concept = Concept.load(existing(options.concept))
    found = weight_changes(load_base(options.base, options.device).unet, concept)
    data = {"concept": options.concept, **found}
    plot(figure, data)
    save(stem, data, tabulated(data["layers"]), figure)
    show(options, data, tabulated(data["types"]))


def weight_changes(unet: nn.Module, concept: Concept) -> dict[str, Any]:
    """The rate of weight change of the layers of ``unet``, the base of ``concept``; see ``layer_changes``.

    Raises ck.BaseMismatchError if the concept is of another base.
    """
    import customdiff_kernels as ck

    concept = concept.of(unet)
    delta = concept.delta.dense() if isinstance(concept.delta, ck.LowRankDelta) else concept.delta
    return layer_changes(dict(unet.named_parameters()), {**delta, **concept.others})


def layer_changes(parameters: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Any]:
    """The rate of weight change ‖θ' - θ‖/‖θ‖ of every layer l (Custom Diffusion, section 3.2).

    A layer is a module's own parameters, weight and bias together; norms are Frobenius norms in float64.

    Args:
        parameters: θ, all parameters of a UNet by name.
        changes: θ' - θ by the same names; what is missing did not change.

    Returns what JSON can hold: "layers", a row each (layer, type, parameters, norm, change, rate), and
    "types", a row for each of TYPES (type, layers, changed: how many of them did, parameters, share of all
    parameters, mean_rate: over all layers of the type). A rate is None where the norm is 0, and is then in no
    mean.

    Raises ValueError if a change is of no parameter, or of another shape.
    """
    for name, change in changes.items():
        if name not in parameters:
            raise ValueError(f"changes has {name!r}, which is no parameter of the UNet")
        if change.shape != parameters[name].shape:
            raise ValueError(
                f"changes[{name!r}] is {tuple(change.shape)}, the UNet's {tuple(parameters[name].shape)}"
            )
    layers: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        module = name.rpartition(".")[0]
        row = layers.setdefault(
            module, {"layer": module, "type": layer_type(module), "parameters": 0, "norm": 0.0, "change": 0.0}
        )
        row["parameters"] += parameter.numel()
        row["norm"] = math.hypot(row["norm"], _norm(parameter))
        if name in changes:
            row["change"] = math.hypot(row["change"], _norm(changes[name]))
    for row in layers.values():
        row["rate"] = row["change"] / row["norm"] if row["norm"] else None
    total = sum(row["parameters"] for row in layers.values())
    types = []
    for kind in TYPES:
        rows = [row for row in layers.values() if row["type"] == kind]
        rates = [row["rate"] for row in rows if row["rate"] is not None]
        count = sum(row["parameters"] for row in rows)
        types.append(
            {
                "type": kind,
                "layers": len(rows),
                "changed": sum(row["change"] > 0 for row in rows),
                "parameters": count,
                "share": count / total,
                "mean_rate": math.fsum(rates) / len(rates) if rates else None,
            }
        )
    return {"layers": list(layers.values()), "types": types}


def layer_type(module: str) -> str:
    """One of TYPES, by the module's name in diffusers: attn2 reads the text, other attention the picture."""
    parts = set(module.split("."))
    if "attn2" in parts:
        return TYPES[0]
    return TYPES[1] if parts & {"attn1", "to_q", "to_k", "to_v", "to_out"} else TYPES[2]


def plot(figure: Any, data: dict[str, Any]) -> None:
    """Draws ``layer_changes``' answer: a bar for the mean of each type, a dot for each layer, in the UNet's
    order.
    """
    from ..plotting import COLOURS

    axes = figure.subplots()
    for i, (row, colour) in enumerate(zip(data["types"], COLOURS, strict=True)):
        rates = [layer["rate"] for layer in data["layers"] if layer["type"] == row["type"]]
        places = [i + 0.7 * ((j + 0.5) / len(rates) - 0.5) for j in range(len(rates))]
        shown = [(x, rate) for x, rate in zip(places, rates, strict=True) if rate is not None]
        axes.bar(i, row["mean_rate"] or 0.0, width=0.8, color=colour, alpha=0.4)
        axes.scatter([x for x, _ in shown], [rate for _, rate in shown], s=8, color=colour)
    labels = [f"{row['type']}\n{row['share']:.1%} of parameters" for row in data["types"]]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("rate of change ‖θ' − θ‖ / ‖θ‖\n(bar: mean; dot: layer)")


def _norm(values: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64))
