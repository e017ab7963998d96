"""Random batches for the tests of losses, every loss with every reduction, and each loss written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from msgrpo_lab.loss import CISPOLoss, GSPOLoss, MSGRPOLoss, ReinforceLoss
from msgrpo_lab.types import TrainBatch

REDUCTIONS = ("sequence", "token", "dr_grpo")
SHARED = {"constant": 5.0, "beta": 0.1, "entropy": 0.03}
METHODS = {
    "ms_grpo": MSGRPOLoss,
    # Wider than GSPO's own range, so that random batches lie on both sides of it.
    "gspo": lambda **arguments: GSPOLoss(**({"eps_low": 0.1, "eps_high": 0.15} | arguments)),
    "cispo": lambda **arguments: CISPOLoss(**({"eps_low": 0.3, "eps_high": 0.2} | arguments)),
    "reinforce": ReinforceLoss,
}
LOSSES = {
    f"{method}-{reduction}": make(reduction=reduction, **SHARED)
    for method, make in METHODS.items()
    for reduction in REDUCTIONS
}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def random_batch(seed, dtype=torch.float64):
    """Log-probabilities, entropies and a batch of 3 to 6 episodes of 1 to 4 turns of 0 to 5 tokens, prompts before."""
    rng = np.random.default_rng(seed)
    turns = rng.integers(1, 5, size=rng.integers(3, 7))
    episode = np.repeat(np.arange(turns.size), turns)
    prompt, length = rng.integers(1, 4, size=episode.size), rng.integers(0, 6, size=episode.size)
    column = np.arange(8)
    mask = torch.tensor((column >= prompt[:, None]) & (column < (prompt + length)[:, None]))
    old = torch.tensor(-rng.exponential(size=mask.shape), dtype=dtype)
    batch = TrainBatch(
        input_ids=torch.tensor(rng.integers(0, 50, size=mask.shape)),
        attention_mask=torch.tensor(column < (prompt + length)[:, None]),
        completion_mask=mask,
        old_logprobs=old.masked_fill(~mask, 0.0),
        ref_logprobs=(old + 0.3 * torch.tensor(rng.normal(size=mask.shape), dtype=dtype)).masked_fill(~mask, 0.0),
        advantage=torch.tensor(rng.normal(size=turns.size), dtype=dtype)[episode],
        weight=torch.tensor(rng.uniform(0.3, 2.0, size=turns.size), dtype=dtype)[episode],
        num_turns=torch.tensor(turns[episode]),
        episode=torch.tensor(episode),
        turn=torch.tensor(np.concatenate([np.arange(t) for t in turns])),
        num_episodes=int(turns.size),
        num_tokens=max(1, int(mask.sum())),
    )
    logp = old + 0.3 * torch.tensor(rng.normal(size=mask.shape), dtype=dtype)
    entropy = torch.tensor(rng.uniform(0.0, 2.0, size=mask.shape), dtype=dtype)
    return logp, entropy, batch


def evaluate(loss, logp, entropy, batch):
    """Statistics as floats, and the gradients in log-probabilities and entropies."""
    logp, entropy = logp.detach().clone().requires_grad_(), entropy.detach().clone().requires_grad_()
    stats = loss(logp, entropy, batch)
    stats.loss.backward()
    return torch.stack([value.detach() for value in stats]), logp.grad, entropy.grad


def by_the_formula(logp, entropy, batch, loss):
    """Loss and gradient in `logp` of any configured loss, written out sample by sample and token by token."""
    total, gradient = 0.0, torch.zeros_like(logp)
    for s in range(logp.shape[0]):
        tokens = torch.nonzero(batch.completion_mask[s]).flatten().tolist()
        share = batch.weight[s].item() * _share(loss, batch, s, len(tokens))
        adv = batch.advantage[s].item()
        ratios = [math.exp(logp[s, k] - batch.old_logprobs[s, k]) for k in tokens]
        for place, k in enumerate(tokens):
            term, slope = _term(loss, ratios, place, adv, logp[s, k].item())
            ref = math.exp(batch.ref_logprobs[s, k] - logp[s, k])
            total += share * (term - loss.beta * (ref - math.log(ref) - 1) + loss.entropy * entropy[s, k].item())
            gradient[s, k] -= share * (slope - loss.beta * (1 - ref))
    return -total, gradient


def _share(loss, batch, s, length):
    match loss.reduction:
        case "sequence":
            return 1 / max(length, 1) / batch.num_turns[s].item() / batch.num_episodes
        case "token":
            return 1 / batch.num_tokens
        case _:
            return 1 / (batch.num_episodes * loss.constant)


def _term(loss, ratios, place, adv, logp):
    """A token's term and its derivative in the token's log-probability."""
    if isinstance(loss, ReinforceLoss):
        return adv * logp, adv
    low, high = 1 - loss.eps_low, 1 + loss.eps_high
    if isinstance(loss, CISPOLoss):
        weight = min(max(ratios[place], low), high)
        return weight * adv * logp, weight * adv
    # GSPO: all |y| tokens hold the term of the sequence, and each has a slope of s/|y| in any one log-probability.
    ratio = math.prod(ratios) ** (1 / len(ratios)) if isinstance(loss, GSPOLoss) else ratios[place]
    term = min(ratio * adv, min(max(ratio, low), high) * adv)
    kept = (adv > 0 and ratio <= high) or (adv < 0 and ratio >= low)
    return term, ratio * adv if kept else 0.0
