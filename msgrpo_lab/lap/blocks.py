"""Blocks of tokens that read one another, and what is kept of them: what `decoder.py` computes, as records.

A *block* is R rows of W tokens. Beside itself, each of its rows reads other tokens: one row that all share (the rules),
or a row of its own choosing (the prompt a completion belongs to), of an earlier block of the same pass or of one kept
from an earlier pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Memory:
    """Keys and values of a block's tokens in every layer, for later passes under the same weights."""

    keys: tuple[Float[Tensor, "R G W D"], ...]
    values: tuple[Float[Tensor, "R G W D"], ...]

    @property
    def num_tokens(self) -> int:
        """Token places held, padding included."""
        return self.keys[0].shape[0] * self.keys[0].shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What a block's rows see beside themselves; all of it lies before them."""

    source: int | Memory
    """An earlier block of the pass, by number, or what was kept of an earlier pass."""
    rows: Int[Tensor, " R"] | None = None
    """The source's row that each row reads; None: its only row, or row by row."""
    mask: Bool[Tensor, "R W'"] | Bool[Tensor, "R W W'"] | None = None
    """The tokens of the source's row that are seen, by a whole row or by each token of it; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows of tokens, padded on the right."""

    token_ids: Int[Tensor, "R W"]
    positions: Int[Tensor, "R W"]
    own_mask: Bool[Tensor, "R W W"] | None = None
    """Which tokens of its own row each token sees (itself among them); None: those before it."""
    reads: tuple[Read, ...] = ()


def width_of(source: int | Memory, shapes: Sequence[torch.Size]) -> int:
    """Tokens in a row of what is read."""
    return shapes[source][1] if isinstance(source, int) else source.keys[0].shape[2]


def bias_of(block: Block, read_widths: Sequence[int], dtype: torch.dtype) -> Float[Tensor, "R|1 W M"]:
    """0 where a token is seen and −inf where it is not: what is read, then the row's own tokens."""
    width = block.token_ids.shape[1]
    device = block.token_ids.device
    own = block.own_mask
    if own is None:
        own = torch.ones(1, width, width, dtype=torch.bool, device=device).tril()
    masks = [
        torch.ones(1, 1, read_width, dtype=torch.bool, device=device)
        if read.mask is None
        else (read.mask[:, None] if read.mask.ndim == 2 else read.mask)
        for read, read_width in zip(block.reads, read_widths, strict=True)
    ]
    leading = max(len(mask) for mask in (*masks, own))
    seen = torch.cat([mask.expand(leading, width, -1) for mask in (*masks, own)], dim=2)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
