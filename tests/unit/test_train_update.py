"""One run of two small layers through Lightning: what an update does, and what it must not depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lab_made import Memory, fit, gradient_of, small_lab

from msgrpo_lab.loss import LossStats
from msgrpo_lab.seeding import Stream, episode_generators, generator
from msgrpo_lab.training.assemble import Lab
from msgrpo_lab.types import RolloutBatch, TrainBatch

FREE = ("rollout.sampling.constrain=false", "rollout.sampling.max_new_tokens=3")


def parameters(lab: Lab) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in lab.policy.trainable_parameters()])


def whole_gradient(lab: Lab, batch: TrainBatch, token_budget: int) -> tuple[LossStats, torch.Tensor]:
    """Loss and gradient of the batch taken in passes of so many tokens, without a trainer."""
    lab.module.token_budget = token_budget
    lab.module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    lab.policy.zero_grad()
    stats, _, _ = lab.module.accumulate_gradient(batch)
    return stats, gradient_of(lab.policy)


VARIANTS = {
    "sequence": (),
    "token": ("loss.reduction=token",),
    "dr_grpo": ("loss.reduction=dr_grpo", "loss.constant=8"),
    "kl": ("loss.beta=0.1",),
    "no-entropy": ("loss.entropy=0",),
    "free": FREE,
    "free-top-k": (*FREE, "rollout.sampling.top_k=3", "rollout.sampling.temperature=1.5"),
    "lora": ("model.lora_rank=4", "loss.beta=0.1"),
    "snake": ("env=snake",),
    "reward-to-go": ("credit=reward_to_go",),
    "aaw-with-weights": ("sampler=abs_adv", "sampler.importance_weights=true", "sampler.floor=0.1"),
}


@pytest.fixture(scope="module", params=VARIANTS)
def collected(request: pytest.FixtureRequest) -> Iterator[tuple[Lab, TrainBatch]]:
    """A lab that has already moved a little, and a batch collected before it did: ratios and clips are at work."""
    lab = small_lab(*VARIANTS[request.param])
    (batch,) = lab.data.batches(epoch=0, version=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lab.policy.trainable_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    yield lab, batch
    lab.data.engine.close()


def test_loss_and_gradient_do_not_depend_on_the_split(collected: tuple[Lab, TrainBatch]) -> None:
    lab, batch = collected
    whole, expected = whole_gradient(lab, batch, 10**9)
    assert float(expected.norm()) > 0
    for token_budget in (1, 300, 1000):  # a row a pass, a few, many
        stats, found = whole_gradient(lab, batch, token_budget)
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
        for name, value in stats._asdict().items():
            assert float(value) == pytest.approx(float(getattr(whole, name)), rel=1e-5, abs=1e-6), name


def test_loss_and_gradient_do_not_depend_on_the_order_of_the_samples(collected: tuple[Lab, TrainBatch]) -> None:
    lab, batch = collected
    whole, expected = whole_gradient(lab, batch, 10**9)
    order = torch.randperm(len(batch.input_ids), generator=torch.Generator().manual_seed(1))
    stats, found = whole_gradient(lab, batch.select(order), 10**9)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    assert float(stats.loss) == pytest.approx(float(whole.loss), rel=1e-5, abs=1e-6)


def test_padding_on_the_right_changes_nothing(collected: tuple[Lab, TrainBatch]) -> None:
    lab, batch = collected
    whole, expected = whole_gradient(lab, batch, 10**9)

    def wider(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(rows, (0, 5))

    padded = replace(
        batch,
        input_ids=wider(batch.input_ids),
        attention_mask=wider(batch.attention_mask),
        completion_mask=wider(batch.completion_mask),
        old_logprobs=wider(batch.old_logprobs),
        ref_logprobs=None if batch.ref_logprobs is None else wider(batch.ref_logprobs),
    )
    stats, found = whole_gradient(lab, padded, 10**9)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    assert float(stats.loss) == pytest.approx(float(whole.loss), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_the_first_pass_the_policy_is_the_one_that_sampled(variant: str) -> None:
    lab = small_lab(*VARIANTS[variant])
    before = parameters(lab)
    (metrics,) = fit(lab, epochs=1).training()
    assert metrics["train/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["train/logprob_gap"] < 1e-5
    assert metrics["train/kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["train/clip_frac"] == 0.0
    assert metrics["train/grad_norm"] > 0
    assert not torch.equal(parameters(lab), before)
    assert all(math.isfinite(value) for name, value in metrics.items() if name != "train/action_entropy")


@pytest.mark.parametrize("adapter", [(), ("model.lora_rank=4",)])
def test_kl_grows_once_the_policy_has_moved(adapter: tuple[str, ...]) -> None:
    rows = fit(small_lab("loss.beta=0.1", "update.passes=3", "optim.lr=0.01", *adapter), epochs=1).training()
    kl = [row["train/kl"] for row in rows]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert min(kl[1:]) > 1e-5
    assert [abs(row["train/ratio_mean"] - 1) > 1e-6 for row in rows] == [False, True, True]


def test_without_kl_no_reference_is_computed() -> None:
    lab = small_lab("loss.beta=0")
    (batch,) = lab.data.batches(epoch=0, version=0)
    assert batch.ref_logprobs is None
    with pytest.raises(RuntimeError, match="keep_reference"), lab.policy.as_reference():
        pass


@pytest.mark.parametrize(("passes", "minibatches"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)])
def test_passes_and_minibatches_are_optimiser_steps(passes: int, minibatches: int) -> None:
    lab = small_lab(f"update.passes={passes}", f"update.minibatches={minibatches}")
    memory = fit(lab, epochs=2)
    assert lab.data.updates_per_epoch == passes * minibatches
    assert lab.module.trainer.global_step == 2 * passes * minibatches
    assert len(memory.training()) == 2 * passes * minibatches
    assert lab.module.total_updates == 2 * passes * minibatches
    optimizer: Any = lab.module.optimizers()
    steps = {int(state["step"]) for state in optimizer.optimizer.state.values()}
    assert steps == {2 * passes * minibatches}


def test_metrics_of_a_rollout_come_with_its_first_update_only() -> None:
    rows = fit(small_lab("update.passes=2", "update.minibatches=2"), epochs=2).training()
    assert ["train/return_mean" in row for row in rows] == [True, False, False, False] * 2


def test_an_epoch_collects_one_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = small_lab("update.passes=2")
    asked: list[tuple[int, int]] = []
    collect = lab.data.collect

    def noted(epoch: int, version: int) -> RolloutBatch:
        asked.append((epoch, version))
        return collect(epoch, version)

    monkeypatch.setattr(lab.data, "collect", noted)
    fit(lab, epochs=3)
    assert asked == [(0, 0), (1, 2), (2, 4)]


def test_each_epoch_plays_other_games_by_the_moved_policy() -> None:
    lab = small_lab("optim.lr=0.01")
    first = lab.data.collect(0, 0)
    again = lab.data.collect(0, 0)
    second = lab.data.collect(1, 1)
    assert [e.seed for e in first.episodes] == [e.seed for e in again.episodes]
    assert {e.seed for e in first.episodes}.isdisjoint(e.seed for e in second.episodes)
    assert {turn.completion.policy_version for e in second.episodes for turn in e.turns} == {1}


def test_the_last_rollout_of_a_run_is_by_its_last_policy_but_one_update() -> None:
    lab = small_lab()
    fit(lab, epochs=3)
    assert lab.data.rollout is not None
    assert {turn.completion.policy_version for e in lab.data.rollout.episodes for turn in e.turns} == {2}


@pytest.mark.parametrize("token_budget", [1, 200, 1000])
def test_a_run_in_micro_batches_is_the_same_run(token_budget: int) -> None:
    settings = ("update.passes=2", "optim.warmup_updates=0", "loss.beta=0.1")
    whole = fit(small_lab(*settings), epochs=2).training()
    split = fit(small_lab(*settings, f"update.token_budget={token_budget}"), epochs=2).training()
    for one, other in zip(whole, split, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/kl", "train/ratio_mean", "train/token_entropy"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("limit", [0.01, 1e9, None])
def test_the_gradient_is_clipped_to_its_limit(limit: float | None) -> None:
    """The logged norm is the one before clipping; what the optimiser got shows in its first moment, (1 − β₁) g."""
    lab = small_lab(f"update.max_grad_norm={'null' if limit is None else limit}")
    (row,) = fit(lab, epochs=1).training()
    optimizer: Any = lab.module.optimizers()
    moments = [state["exp_avg"].flatten() for state in optimizer.optimizer.state.values()]
    used = float(torch.cat(moments).norm()) / (1 - 0.9)
    assert row["train/grad_norm"] > 0.02
    assert used == pytest.approx(0.01 if limit == 0.01 else row["train/grad_norm"], rel=1e-3)


SETTINGS = {"constrained": ("sampler=abs_adv", "env=frozenlake_slippery"), "free": FREE, "lora": ("model.lora_rank=4",)}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_same_seed_gives_the_same_bits_and_another_does_not(kind: str) -> None:
    def run(seed: int) -> tuple[Memory, torch.Tensor]:
        torch.manual_seed(1000 + len(ran))  # the global generator must play no part
        lab = small_lab(*SETTINGS[kind], f"seed={seed}")
        ran.append(seed)
        return fit(lab, epochs=2), parameters(lab)

    ran: list[int] = []
    (first, first_end), (second, second_end), (other, other_end) = run(0), run(0), run(1)
    assert str(first.training()) == str(second.training())
    assert torch.equal(first_end, second_end)
    assert str(first.training()) != str(other.training())
    assert not torch.equal(first_end, other_end)


def test_nothing_of_training_draws_from_the_global_generator() -> None:
    torch.manual_seed(1)
    lab = small_lab("sampler=abs_adv", "update.minibatches=2")
    before = torch.random.get_rng_state()
    list(lab.data.batches(epoch=0, version=0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_environment_steps_and_episodes_add_up() -> None:
    lab = small_lab()
    memory = fit(lab, epochs=3)
    turns = memory.series("train/turns")
    assert memory.series("train/env_steps") == [sum(turns[: n + 1]) for n in range(3)]
    assert memory.series("train/episodes") == [16.0, 32.0, 48.0]
    assert memory.series("train/drawn_episodes") == [8.0] * 3


def test_learning_rate_is_the_schedules() -> None:
    lab = small_lab("optim.lr=0.01", "optim.warmup_updates=1", "optim.schedule=linear", "optim.final_fraction=0.5",
                    "trainer.max_epochs=4")  # fmt: skip
    memory = fit(lab, epochs=4)
    assert memory.series("train/lr") == pytest.approx([0.005, 0.01, 0.0075, 0.005])


def test_an_update_raises_the_objective_it_was_made_for() -> None:
    lab = small_lab("loss.entropy=0", "optim.lr=0.001", "optim.warmup_updates=0")
    (batch,) = lab.data.batches(epoch=0, version=0)
    before, gradient = whole_gradient(lab, batch, 10**9)
    with torch.no_grad():
        place = 0
        for parameter in lab.policy.trainable_parameters():
            step = gradient[place : place + parameter.numel()].reshape(parameter.shape).float()
            parameter.sub_(1e-3 * step)
            place += parameter.numel()
    after, _ = whole_gradient(lab, batch, 10**9)
    assert float(after.loss) < float(before.loss)
    assert float(before.loss - after.loss) == pytest.approx(1e-3 * float(gradient.norm()) ** 2, rel=0.2)


def test_reference_log_probabilities_are_of_the_first_policy_in_any_split() -> None:
    lab = small_lab("loss.beta=0.1")
    (batch,) = lab.data.batches(epoch=0, version=0)
    assert batch.ref_logprobs is not None
    torch.testing.assert_close(batch.ref_logprobs, batch.old_logprobs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for parameter in lab.policy.trainable_parameters():
            parameter.mul_(1.5)
    lab.data.token_budget = 60
    torch.testing.assert_close(lab.data.reference_logprobs(batch), batch.ref_logprobs, atol=1e-5, rtol=1e-5)


def test_an_engine_that_does_not_sample_the_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^engine=ScriptedEngine: its answers are not the policy's") as caught:
        small_lab("engine=scripted")
    assert len(str(caught.value).splitlines()) == 1


def test_data_without_a_trainer_says_so() -> None:
    with pytest.raises(RuntimeError, match="not attached to a trainer"):
        next(iter(small_lab().data.train_dataloader()))


def test_observers_of_the_data_see_the_rollouts() -> None:
    class Notes:
        def __init__(self) -> None:
            self.turns: list[int] = []

        def on_turn(self, turn: int, horizon: int, live: int) -> None:
            self.turns.append(turn)

    lab, notes = small_lab(), Notes()
    lab.data.observers.append(notes)
    fit(lab, epochs=2)
    assert notes.turns.count(0) == 2


def test_an_updates_gradient_is_its_own() -> None:
    """At a learning rate that moves nothing, each pass over a batch has the same gradient; none adds to the last."""
    rows = fit(small_lab("update.passes=3", "optim.lr=1e-12"), epochs=1).training()
    norms = [row["train/grad_norm"] for row in rows]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_every_draw_is_of_the_runs_seed_and_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def noted(*of: Any) -> np.random.Generator:
        asked.append(of)
        return generator(*of)

    of_episodes: list[tuple[int, str, int, int]] = []

    def noted_each(seed: int, stream: Stream, epoch: int, count: int) -> list[np.random.Generator]:
        of_episodes.append((seed, stream, epoch, count))
        return episode_generators(seed, stream, epoch, count)

    monkeypatch.setattr("msgrpo_lab.training.data.generator", noted)
    monkeypatch.setattr("msgrpo_lab.training.data.episode_generators", noted_each)
    lab = small_lab("seed=7", "update.minibatches=2")
    list(lab.data.batches(epoch=3, version=6))
    assert sorted(asked) == [(7, stream, 3) for stream in ("data_order", "env_seeds", "members", "sampler")]
    assert of_episodes == [(7, "engine", 3, 16)]
