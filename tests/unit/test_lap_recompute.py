"""Recomputing activations in the backward pass saves memory and changes no number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lab_made import fit, gradients, ids, small_lab, train_batch

from msgrpo_lab.decoder.plan import plan_forward
from msgrpo_lab.engines.hf.engine import HFEngine
from msgrpo_lab.lap.build import build_policy
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.sources import RandomLlama
from msgrpo_lab.seeding import episode_generators
from msgrpo_lab.types import Sampling

BEGINNING = list(range(20, 32))
BATCH = train_batch([([*BEGINNING, 7], [8, 9]), ([*BEGINNING, 9], [8]), ([*BEGINNING, 7], [9])])


def made(recompute: bool, rank: int | None = None, library: bool = False) -> LanguagePolicy:
    """A small policy; with `library` as if the block decoder did not know its model."""
    source = RandomLlama(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2)
    policy = build_policy(source=source, precision="float32", lora_rank=rank, gradient_checkpointing=recompute)
    if library:
        policy.blocks = None
    return policy


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_log_probabilities_and_gradients_are_the_same(rank: int | None, library: bool) -> None:
    found = []
    for recompute in (False, True):
        policy = made(recompute, rank, library)
        policy.train()
        (plan,) = policy.plan(BATCH, None, 8192)
        stats = policy.token_stats(plan, None, Sampling())
        found.append((stats.logprobs.detach(), gradients(policy, stats.logprobs.sum() + stats.entropy.sum())))
    (plain, plain_gradient), (spared, spared_gradient) = found
    torch.testing.assert_close(spared, plain, atol=1e-5, rtol=1e-5)
    assert float((spared_gradient - plain_gradient).norm()) <= 1e-5 * float(plain_gradient.norm())


@pytest.mark.parametrize(("recompute", "passes"), [(False, 0), (True, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("library", [False, True])
def test_layers_run_again_in_the_backward_pass(
    recompute: bool, passes: int, training: bool, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = made(recompute, library=library)
    policy.train(training)
    runs: list[int] = []
    if policy.blocks is None:
        for layer in policy.model.model.layers:
            layer.self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    else:
        run = policy.blocks._layer
        monkeypatch.setattr(policy.blocks, "_layer", lambda *given: runs.append(1) or run(*given))
    (plan,) = policy.plan(BATCH, None, 8192)
    total = policy.token_stats(plan, None, Sampling()).logprobs.sum()
    forward = len(runs)
    assert forward > 0
    total.backward()
    assert len(runs) - forward == passes
    assert not any(part.training for part in policy.model.modules()), "dropout and caches are as they were"


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_only_the_library_gives_the_tree_up_to_recompute(recompute: bool, library: bool) -> None:
    """Its recomputing layers keep no cache to branch behind; the block decoder needs none within a pass."""
    policy = made(recompute, library=library)
    (plan,) = policy.plan(BATCH, None, 8192)
    assert bool(plan.branches) == (not (library and recompute))
    with torch.no_grad():
        (plan,) = policy.plan(BATCH, None, 8192)
    assert plan.branches, "without gradients there is nothing to recompute"


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("rule", [Sampling(max_new_tokens=4), Sampling(choices=((11,), (12, 13)))])
def test_completions_are_the_same(rule: Sampling, library: bool) -> None:
    prompts = [ids(*BEGINNING, 7), ids(*BEGINNING, 9, 10)] * 4
    written = []
    for recompute in (False, True):
        policy, engine = made(recompute, library=library), HFEngine()
        policy.train()
        engine.sync(policy, 0)
        written.append(engine.generate(prompts, rule, episode_generators(0, "engine", 0, len(prompts))))
    for plain, spared in zip(*written, strict=True):
        assert plain.token_ids.tolist() == spared.token_ids.tolist()
        np.testing.assert_allclose(plain.logprobs, spared.logprobs, atol=1e-5)


def test_a_run_is_the_same() -> None:
    free = ("rollout.sampling.constrain=false", "rollout.sampling.max_new_tokens=4")
    plain, spared = (
        fit(small_lab(*free, f"model.gradient_checkpointing={recompute}")).training() for recompute in (False, True)
    )
    for one, other in zip(plain, spared, strict=True):
        assert other["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4, abs=1e-6)
        assert other["train/logprob_gap"] < 1e-5


def test_a_cache_is_refused_where_the_library_recomputes_activations() -> None:
    policy = made(True, library=True)
    (plan,) = plan_forward(BATCH, None, 8192)
    with pytest.raises(
        ValueError, match=r"^model\.gradient_checkpointing=true: recomputed layers keep no cache"
    ) as told:
        policy.token_stats(plan, None, Sampling())
    assert len(str(told.value).splitlines()) == 1
    with torch.no_grad():
        torch.testing.assert_close(
            policy.token_stats(plan, None, Sampling()).logprobs,
            policy.token_stats(plan_forward(BATCH, None, 8192, "none")[0], None, Sampling()).logprobs,
        )


def test_dropout_is_never_at_work() -> None:
    """Training mode would make log-probabilities differ from those that were sampled under."""
    policy = made(False)
    for layer in policy.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.train()
    (plan,) = policy.plan(BATCH, None, 8192)
    first, second = (policy.token_stats(plan, None, Sampling()).logprobs for _ in range(2))
    assert torch.equal(first, second)
