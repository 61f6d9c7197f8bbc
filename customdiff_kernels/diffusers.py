"""Cross-attention processors for a diffusers UNet: the only file that knows diffusers.

``patch_unet`` puts one on every cross-attention of a ``UNet2DConditionModel`` (SD 1.x, 2.x, SDXL, or
smaller). Weights, parameter names and ``state_dict`` stay as they are, so any trainer or pipeline goes on
working; what changes is which code runs between ``to_q`` and ``to_out``. Keys and values that were computed
before the call, once a prompt for all layers and steps, are handed over as ``cross_attention_kwargs={"kv":
{module name: (key, value)}}``.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .cross_attention.api import cross_attention
from .kv_projection.api import kv_cross_attention, kv_project
from .layout import LayoutBias

# What stands on a cross-attention and computes plain softmax attention, so that ours may take its place.
_REPLACEABLE = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
)
# The same with trainable projections of their own, which ours go on using.
_CUSTOM_DIFFUSION = (
    "CustomDiffusionAttnProcessor",
    "CustomDiffusionAttnProcessor2_0",
    "CustomDiffusionXFormersAttnProcessor",
)


class CrossAttnProcessor:
    """Softmax cross-attention through ``kv_cross_attention`` (W_q and W_out plain and frozen) or
    ``cross_attention``.

    Called by diffusers' ``Attention`` with hidden (B,N,C) or (B,C,H,W) and the text (B,S,E); returns hidden's
    shape. ``attention_mask``: additive or boolean, (B,S), (B,1|N,S) or (B·heads,1|N,S). ``kv``: the keys and
    values, each (B,S,inner), of every module by name; the module's own ``to_k``/``to_v`` are not called then.
    ``bias``: a LayoutBias or a dense (B,H,N,S)-broadcastable tensor, or a mapping of these by number of image
    tokens N. ``scale`` is what LoRA layers read elsewhere; it does not touch the scores. Scores and softmax
    are float32 inside whatever the dtype, so ``upcast_attention`` and ``upcast_softmax`` ask for nothing
    more. ``attention``, where it is set, takes the place of the fused operators, which never build the
    probabilities: called as ``cross_attention`` is, with (B,H,N,D) and (B,H,S,D), it can look at them.
    """

    attention: Callable[..., Tensor] | None = None

    def __init__(self, name: str, previous: object):
        self.name, self.previous = name, previous

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        kv: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        bias: LayoutBias | Tensor | Mapping[int, LayoutBias | Tensor] | None = None,
    ) -> Tensor:
        residual, hidden = hidden_states, hidden_states
        if attn.spatial_norm is not None:
            hidden = attn.spatial_norm(hidden, temb)
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden = attn.group_norm(hidden.transpose(1, 2)).transpose(1, 2)

        key, value = self._key_value(attn, hidden, encoder_hidden_states, kv)
        total_bias = _total_bias(attention_mask, bias, hidden.shape[0], hidden.shape[1], attn.heads)
        to_q, to_out, dropout = self._query_out(attn)
        hidden = dropout(_attend(attn, hidden, key, value, to_q, to_out, total_bias, self.attention))

        if residual.ndim == 4:
            hidden = hidden.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            hidden = hidden + residual
        return hidden if attn.rescale_output_factor == 1 else hidden / attn.rescale_output_factor

    def _key_value(self, attn, hidden, context, kv):
        if kv is not None:
            if self.name not in kv:
                raise ValueError(
                    f"kv has no entry for {self.name!r}; it has {sorted(kv)[:3]} ... ({len(kv)}): "
                    "pass KVStack.views(...) of this UNet"
                )
            key, value = kv[self.name]
        else:
            if context is None:
                context = hidden
            elif attn.norm_cross is not None:
                context = attn.norm_encoder_hidden_states(context)
            key, value = self._project(attn, context)
        if torch.is_autocast_enabled(hidden.device.type):
            return key, value  # the operators cast all three
        return key.to(hidden.dtype), value.to(hidden.dtype)

    def _project(self, attn, context):
        return attn.to_k(context), attn.to_v(context)

    def _query_out(self, attn):
        return attn.to_q, attn.to_out[0], attn.to_out[1]


class _CustomDiffusion(CrossAttnProcessor):
    """Mixed into diffusers' own Custom Diffusion classes: their ``to_*_custom_diffusion``, our arithmetic."""

    def __reduce__(self):
        return _new_kernel, (type(self.previous),), vars(self)  # the class is made as needed, and has no name

    def _project(self, attn, context):
        # the start token is frozen: neither the weights nor the text get a gradient from it
        if not self.train_kv:
            key, value = super()._project(attn, context)
            return tuple(torch.cat([x[:, :1].detach(), x[:, 1:]], dim=1) for x in (key, value))
        weights = self.to_k_custom_diffusion.weight, self.to_v_custom_diffusion.weight
        return tuple(kv_project(context, weight, frozen_tokens=1) for weight in weights)

    def _query_out(self, attn):
        if not self.train_q_out:
            return super()._query_out(attn)
        return self.to_q_custom_diffusion, *self.to_out_custom_diffusion


def patch_unet(unet: nn.Module, *, self_attention: bool = False) -> list[str]:
    """Run a diffusers UNet's cross-attention through this library; returns the names of its modules.

    A frozen UNet (K/V-only training, or no gradient at all) takes ``kv_cross_attention``, which saves hidden,
    keys and values only; a module whose ``to_q`` or ``to_out`` trains or is wrapped (LoRA) takes
    ``cross_attention`` between them. Where diffusers' ``CustomDiffusionAttnProcessor`` stands, the new one is
    an instance of that same class and holds the same parameters. Calling it twice changes nothing.
    ``unpatch_unet`` undoes.

    self_attention: whether self-attention goes through ``cross_attention`` too, where one of diffusers' plain
        processors stands. On a CPU that is faster than ``scaled_dot_product_attention``, most of all its
        backward in bfloat16; on a GPU PyTorch's flash attention is made for so many keys.

    Raises ValueError if there is no cross-attention to patch, or if a processor stands there that does more
    than softmax attention (an IP-Adapter's, say), which ours would silently drop; nothing is changed then.
    """
    cross = _cross_attentions(unet)
    ours = {name: processor_for(name, attn) for name, attn in cross.items()}
    if not ours:
        raise ValueError(
            f"unet: found no text cross-attention (a diffusers Attention called attn2) "
            f"in {type(unet).__name__}; pass a UNet2DConditionModel, such as pipeline.unet"
        )
    modules = attentions(unet)
    for name, attn in modules.items():
        if name not in cross and self_attention and _is_plain_self_attention(attn):
            ours[name] = processor_for(name, attn)
        if name in ours:
            attn.set_processor(ours[name])
        if name not in cross and _drop_our_arguments not in attn._forward_pre_hooks.values():
            attn.register_forward_pre_hook(_drop_our_arguments, with_kwargs=True)
    return [name for name in modules if name in ours]


def unpatch_unet(unet: nn.Module) -> list[str]:
    """Put back the very processors that stood before ``patch_unet``; returns the names of their modules."""
    restored = []
    for name, attn in attentions(unet).items():
        for key, hook in list(attn._forward_pre_hooks.items()):
            if hook is _drop_our_arguments:
                del attn._forward_pre_hooks[key]
                attn._forward_pre_hooks_with_kwargs.pop(key, None)
        if isinstance(attn.processor, CrossAttnProcessor):
            attn.set_processor(attn.processor.previous)
            restored.append(name)
    return restored


@contextmanager
def patched(unet: nn.Module, *, self_attention: bool = False) -> Iterator[list[str]]:
    """``patch_unet`` for the length of a ``with`` block; a UNet that was patched before stays so after."""
    before = {n for n, attn in attentions(unet).items() if isinstance(attn.processor, CrossAttnProcessor)}
    try:
        yield patch_unet(unet, self_attention=self_attention)
    finally:
        if not before:
            unpatch_unet(unet)
        for name, attn in attentions(unet).items():
            if name not in before and isinstance(attn.processor, CrossAttnProcessor):
                attn.set_processor(attn.processor.previous)


def processor_for(name: str, attn: Any) -> CrossAttnProcessor:
    """One of ours to stand on ``attn``, a module called ``name``: that which is there, or a new one.

    Raises ValueError if what stands there does more than softmax attention.
    """
    previous = attn.processor
    if isinstance(previous, CrossAttnProcessor):
        return previous
    if type(previous).__name__ in _CUSTOM_DIFFUSION:
        return _take_over(name, previous)
    if type(previous).__name__ in _REPLACEABLE:
        return CrossAttnProcessor(name, previous)
    raise ValueError(
        f"unet: {name} has the processor {type(previous).__name__}, which does more than softmax "
        "attention; remove it first (unload its adapter, or call unet.set_default_attn_processor())"
    )


def attentions(unet: nn.Module) -> dict[str, Any]:
    """Every ``Attention`` of a diffusers UNet, by its module's name."""
    if not isinstance(unet, nn.Module):
        raise TypeError(
            f"unet must be a UNet2DConditionModel, not {type(unet).__name__} (a pipeline has it as .unet)"
        )
    from diffusers.models.attention_processor import Attention

    unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wraps: names as KVStack has them
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def _cross_attentions(unet: nn.Module) -> dict[str, Any]:
    """The modules whose K/V a Custom Diffusion delta changes: ``attn2`` of every transformer block."""
    return {
        name: attn
        for name, attn in attentions(unet).items()
        if name.rpartition(".")[2] == "attn2" and attn.is_cross_attention and attn.added_kv_proj_dim is None
    }


def _is_plain_self_attention(attn: Any) -> bool:
    processor = attn.processor
    known = isinstance(processor, CrossAttnProcessor) or type(processor).__name__ in _REPLACEABLE
    return known and not attn.is_cross_attention and attn.added_kv_proj_dim is None


def _drop_our_arguments(attn: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    # diffusers hands cross_attention_kwargs to self-attention too, which would warn about them at every call
    return args, {k: v for k, v in kwargs.items() if k not in ("kv", "bias")}


@lru_cache
def _kernel_class(cls: Any) -> type:
    return type(f"Kernel{cls.__name__}", (_CustomDiffusion, cls), {"__doc__": _CustomDiffusion.__doc__})


def _new_kernel(cls: Any) -> Any:
    kernel: Any = _kernel_class(cls)
    return kernel.__new__(kernel)


def _take_over(name: str, previous: Any) -> Any:
    processor = copy.copy(previous)  # shallow: parameters and modules stay shared
    processor.__class__ = _kernel_class(previous.__class__)
    vars(processor).update(name=name, previous=previous)  # nn.Module.__setattr__ would register a submodule
    return processor


def _attend(attn, hidden, key, value, to_q, to_out, bias, attention):
    normed = attn.norm_q is not None or attn.norm_k is not None
    # the block saves the query of many tokens beside few keys; self-attention has as many keys, and would
    # only compute its query twice
    fits = attn.is_cross_attention and attention is None and not normed
    if fits and _is_frozen(to_q) and _is_frozen(to_out) and to_q.bias is None:
        frozen = [None if w is None else w.detach() for w in (to_q.weight, to_out.weight, to_out.bias)]
        heads, scale = attn.heads, attn.scale
        return kv_cross_attention(
            hidden.contiguous(), key, value, *frozen, heads=heads, bias=bias, scale=scale
        )

    query, key, value = (
        x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (to_q(hidden), key, value)
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    out = (attention or cross_attention)(query, key, value, bias=bias, scale=attn.scale)
    return to_out(out.transpose(1, 2).flatten(2))


def _is_frozen(linear: Any) -> bool:
    """Whether its weight may stand for the call: a plain Linear (no LoRA, no hook) that needs no gradient.

    A weight of another class (quantised, sharded) only its own Linear can multiply with.
    """
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    if type(linear.weight) not in (nn.Parameter, Tensor):
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
        return False
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in linear.parameters(recurse=False)))


def _total_bias(mask, bias, batch: int, n_image: int, heads: int):
    if isinstance(bias, Mapping):
        if n_image not in bias:
            raise ValueError(f"bias has no entry for {n_image} image tokens; it has {sorted(bias)}")
        bias = bias[n_image]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
    if mask.ndim == 2:
        mask = mask.unsqueeze(1)
    mask = mask.unflatten(0, (batch, heads)) if mask.shape[0] == batch * heads != batch else mask.unsqueeze(1)
    if bias is None:
        return mask
    return mask + (bias if isinstance(bias, Tensor) else bias.dense())
