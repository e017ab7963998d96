"""Drawing tokens where the logits are: one distribution a distinct text, one draw an episode.

A draw inverts the cumulative distribution at the episode's uniform number. The distribution is cut into blocks: the
block is found among the cumulated block masses, the token among the cumulated masses inside it. Only the blocks are
summed for every text, only one block for every draw. Cumulating is a product with a triangular matrix, which unlike
`cumsum` has a deterministic implementation on CUDA.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int

BLOCK = 512
"""Tokens of a block."""


def draw_grouped(
    logprobs: Float[torch.Tensor, "D V"],
    text_of: Int[np.ndarray, " N"],
    uniforms: Float[np.ndarray, " N"],
    greedy: bool,
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """One token a draw, and its log-probability (nats). The result is the only thing copied to the host.

    Args:
        logprobs: distribution of each distinct text's next token; −inf where a token is never drawn.
        text_of: which text each draw continues.
        uniforms: in [0, 1), one a draw.
        greedy: take the mode (the first of equals) instead of drawing.
    """
    text = torch.from_numpy(text_of).to(logprobs.device)
    if greedy:
        token = logprobs.argmax(dim=-1)[text]
    else:
        uniform = torch.from_numpy(uniforms).to(logprobs.device)
        token = _invert(logprobs, text, uniform)
    drawn = torch.stack((token.double(), logprobs[text, token].double())).cpu().numpy()
    return drawn[0].astype(np.int64), drawn[1].astype(np.float32)


def _invert(
    logprobs: Float[torch.Tensor, "D V"], text: Int[torch.Tensor, " N"], uniform: Float[torch.Tensor, " N"]
) -> Int[torch.Tensor, " N"]:
    blocks = -(-logprobs.shape[1] // BLOCK)
    mass, missing = logprobs.exp(), blocks * BLOCK - logprobs.shape[1]
    if missing:
        mass = torch.nn.functional.pad(mass, (0, missing))
    mass_DBK = mass.view(len(mass), blocks, BLOCK)
    block_mass = mass_DBK.sum(dim=-1, dtype=torch.float64)[text]
    block_reached = _cumulate(block_mass)
    # The total may fall short of 1 by rounding: scale the draw.
    wanted = uniform * block_reached[:, -1]
    block = _first_beyond(block_reached, block_mass, wanted)
    before = (block_reached - block_mass).gather(1, block[:, None]).squeeze(1)
    inner_mass = mass_DBK[text, block].double()
    inner = _first_beyond(_cumulate(inner_mass), inner_mass, wanted - before)
    return block * BLOCK + inner


def _cumulate(mass: Float[torch.Tensor, "N K"]) -> Float[torch.Tensor, "N K"]:
    ones = torch.ones(mass.shape[1], mass.shape[1], dtype=mass.dtype, device=mass.device)
    return mass @ ones.triu()


def _first_beyond(
    reached: Float[torch.Tensor, "N K"], mass: Float[torch.Tensor, "N K"], wanted: Float[torch.Tensor, " N"]
) -> Int[torch.Tensor, " N"]:
    """First entry with mass whose cumulated mass exceeds `wanted`; the last one with mass if rounding leaves none."""
    possible = mass > 0
    beyond = possible & (reached > wanted[:, None])
    last = mass.shape[1] - 1 - possible.flip(1).int().argmax(dim=1)
    return torch.where(beyond.any(dim=1), beyond.int().argmax(dim=1), last)
