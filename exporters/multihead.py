"""nn.MultiheadAttention, traced with the batch in front.

torch computes it with positions in front, batch and heads merged into one dimension. While tracing, each such module
computes the same from the same parameters as [N, heads, positions, d], which the passes know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["batch_first_attention"]


@contextlib.contextmanager
def batch_first_attention(model: torch.nn.Module) -> Iterator[None]:
    """While active, the nn.MultiheadAttention modules of ``model`` compute with the batch in front. An instance
    attribute hides the class's forward method. Modules with ``add_bias_kv``, ``add_zero_attn``, ``kdim`` or ``vdim``
    stay as they are."""
    import torch
    from torch.nn.modules import transformer

    patched, detect = [], transformer._detect_is_causal_mask
    # Whether a mask is causal is a hint that needs its values, which a trace does not have.
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    for module in model.modules():
        if type(module) is not torch.nn.MultiheadAttention or not module._qkv_same_embed_dim:
            continue
        if module.bias_k is None and not module.add_zero_attn:
            module.forward = _forward_of(module)  # type: ignore[method-assign]
            patched.append(module)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        for module in patched:
            del module.forward


def _forward_of(module: torch.nn.MultiheadAttention) -> Any:
    import torch

    functional = torch.nn.functional

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if query.dim() != 3:
            own = type(module).forward
            return own(
                module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        projected = _project(module, query, key, value)
        if not module.batch_first:
            projected = [x.transpose(0, 1) for x in projected]
        heads, d = module.num_heads, module.head_dim
        q, k, v = (x.unflatten(2, (heads, d)).transpose(1, 2) for x in projected)
        mask = _merged(attn_mask, key_padding_mask, heads)
        ratio = module.dropout if module.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, mask, ratio).transpose(1, 2).flatten(2)
        y = functional.linear(y, module.out_proj.weight, module.out_proj.bias)
        weights = None
        if need_weights:  # the trace drops it if nobody uses it
            scores = q @ k.transpose(2, 3) * d**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            weights = scores.softmax(-1).mean(1) if average_attn_weights else scores.softmax(-1)
        return y if module.batch_first else y.transpose(0, 1), weights

    return forward


def _project(
    module: torch.nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> list[torch.Tensor]:
    """Q, K and V before they are cut into heads. The three weights are one parameter, and parameters are not cut by the
    training graph: where the operands differ, each is multiplied by all of it."""
    import torch

    def projected(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)

    if query is key and key is value:
        return list(projected(query).chunk(3, -1))
    width, keys = module.embed_dim, projected(key)
    values = keys if key is value else projected(value)
    return [projected(query)[..., :width], keys[..., width : 2 * width], values[..., 2 * width :]]


def _merged(attn_mask: torch.Tensor | None, padding: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """Both masks as scaled_dot_product_attention takes one: True, or what is added, where a query looks at a key."""
    import torch

    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, heads)) if attn_mask.dim() == 3 else attn_mask[None, None])
    if padding is not None:
        masks.append(padding[:, None, None, :])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~hidden
    added = [torch.zeros(m.shape).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m for m in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]
