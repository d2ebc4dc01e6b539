"""Dropout masks as docs/plan-format.md defines them, and PyTorch with these masks instead of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32-10 (Salmon et al., SC 2011) of counters [n, 4]; words [n, 4], uint32."""
    x = counter.astype(np.uint64)
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * x[:, 0], np.uint64(0xCD9E8D57) * x[:, 2]
        x = np.stack(
            [
                (b >> np.uint64(32)) ^ x[:, 1] ^ np.uint64(k0),
                b & low,
                (a >> np.uint64(32)) ^ x[:, 3] ^ np.uint64(k1),
                a & low,
            ],
            1,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x.astype(np.uint32)


def mask(seed: int, stream: int, update: int, samples: range, elements: int, ratio: float) -> np.ndarray:
    """True where an element is kept, [samples, elements]."""
    each = (elements + 3) // 4
    counters = np.empty((len(samples) * each, 4), np.uint64)
    counters[:, 0], counters[:, 1] = update & 0xFFFFFFFF, update >> 32
    counters[:, 2], counters[:, 3] = np.repeat(np.array(samples), each), np.tile(np.arange(each), len(samples))
    words = philox(counters, (seed & 0xFFFFFFFF, (seed >> 32) ^ stream)).reshape(len(samples), -1)[:, :elements]
    return words >= ratio * 2.0**32


class SameMasks:
    """Dropout in torch with the masks of update `update`; the n-th call of a forward is stream n."""

    def __init__(self, seed: int, update: int) -> None:
        self.seed, self.update, self.stream = seed, update, 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Functional dropout, nn.Dropout modules and scaled_dot_product_attention take these masks."""
        self.stream = 0
        with (
            mock.patch.object(nn.functional, "dropout", self.dropout),
            mock.patch.object(nn.functional, "scaled_dot_product_attention", self.attention),
        ):
            yield

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        ratio, elements = float(np.float32(p)), x[0].numel()
        kept = mask(self.seed, self.stream, self.update, range(len(x)), elements, ratio)
        self.stream += 1
        return x * torch.from_numpy(kept).reshape(x.shape) / (1 - ratio)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """scaled_dot_product_attention as torch documents it."""
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * (scale or q.shape[-1] ** -0.5)
        if is_causal:
            attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
        return self.dropout(scores.softmax(-1).nan_to_num(0), dropout_p) @ v
