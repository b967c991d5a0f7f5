"""Attention to documents the plain way, with a dense mask, and random cases to compare by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def dense_attention(rows: Rows, lengths: Sequence[int], scale: float | None = None) -> torch.Tensor:
    """Return causal attention inside documents that lie one after the other, (T, H, D)."""
    tokens = torch.arange(sum(lengths))
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen_TT = (document_T[:, None] == document_T) & (tokens[:, None] >= tokens)
    query, key, value = (part.transpose(0, 1)[None] for part in rows)
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen_TT, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@dataclass(frozen=True)
class Case:
    """Documents, the ranks of each, and the size of the heads."""

    lengths: tuple[int, ...]
    teams: tuple[tuple[int, ...], ...]
    heads: int
    key_heads: int
    width: int

    def rows(self, dtype: torch.dtype, seed: int = 0) -> tuple[Rows, torch.Tensor]:
        """Return queries, keys and values of all documents, and a gradient for the output."""
        generator = torch.Generator().manual_seed(seed)

        def drawn(heads: int) -> torch.Tensor:
            shape = (sum(self.lengths), heads, self.width)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        rows = drawn(self.heads), drawn(self.key_heads), drawn(self.key_heads)
        return rows, drawn(self.heads)

    def begins(self) -> list[int]:
        """Return where each document begins."""
        return [0, *np.cumsum(self.lengths)[:-1].tolist()]


def random_case(seed: int, ranks: int) -> Case:
    """Return up to ten documents of 1 to 40 tokens over `ranks`, some of them shared."""
    generator = np.random.default_rng(seed)
    many = int(generator.integers(1, 11))
    lengths = tuple(generator.integers(1, 41, many).tolist())
    teams = []
    for _ in range(many):
        width = int(generator.choice([size for size in (1, 2, 4) if size <= ranks]))
        first = int(generator.integers(0, ranks // width)) * width
        teams.append(tuple(range(first, first + width)))
    key_heads = int(generator.choice([1, 2, 4]))
    heads = key_heads * int(generator.choice([1, 2] if key_heads == 4 else [4]))
    return Case(lengths, tuple(teams), heads, key_heads, int(generator.choice([4, 8, 12])))
