"""What a plan counts: by hand on small cases, and against what a run really does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lab_made import SMALL_RUN, composed, fit, small_lab, small_policy, train_batch

from msgrpo_lab.config import conf_dir
from msgrpo_lab.decoder.plan import plan_forward
from msgrpo_lab.lap.build import OutlinedModel, build_policy
from msgrpo_lab.lap.policy import update_work
from msgrpo_lab.lap.prompt import PromptBuilder
from msgrpo_lab.lap.sources import RandomLlama
from msgrpo_lab.planner.cost import MemoryEstimate, ModelSize, estimate, saved_per_token, size_of, update_flops
from msgrpo_lab.planner.report import outline
from msgrpo_lab.planner.workload import EstimatedTokenizer, Workload, _pass, answer_length, distinct_tokens, measure
from msgrpo_lab.training.assemble import component
from msgrpo_lab.types import Sampling


def arrays(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row) for row in rows]


def test_distinct_tokens_counts_every_beginning_once() -> None:
    assert distinct_tokens(arrays([1, 2, 3])) == 3
    assert distinct_tokens(arrays([1, 2, 3], [1, 2, 4], [1, 2, 3])) == 4
    assert distinct_tokens(arrays([1, 2], [1, 2, 4], [7])) == 4
    assert distinct_tokens([]) == 0


def workload(*overrides: str, answer_tokens: int | None = None) -> tuple[ModelSize, Workload]:
    config = composed(*SMALL_RUN, *overrides)
    outlined = outline(config)
    size = size_of(outlined)
    return size, measure(config, outlined.tokenizer, size.vocabulary, answer_tokens)


def test_the_work_of_a_run_is_what_a_run_does() -> None:
    """On the first epoch of an untrained policy, which plays at random."""
    numbers = ("rollout.num_groups=32", "rollout.group_size=8", "sampler.num_episodes=128")
    _, work = workload(*numbers)
    lab = small_lab(*numbers)
    batches = list(lab.data.batches(epoch=0, version=0))
    plans = lab.policy.plan(batches[0], lab.module.trie, lab.module.token_budget)
    play, metrics = work.rollout, lab.data.metrics
    assert play.episodes == len(lab.data.rollout.episodes) == 256
    assert play.turns == pytest.approx(metrics["train/turns"], rel=0.1)
    assert play.read_tokens == pytest.approx(metrics["perf/rollout_computed_tokens"], rel=0.1)
    assert work.trained_tokens == pytest.approx(batches[0].num_tokens, rel=0.15)
    assert sum(part.tokens for part in work.passes) == pytest.approx(sum(plan.num_tokens for plan in plans), rel=0.15)
    assert len(work.passes) == len(plans) == 1


def test_a_job_counts_its_updates_and_evaluations() -> None:
    _, work = workload("trainer.max_epochs=10", "evaluation.every=4", "update.minibatches=2", "update.passes=3")
    assert (work.rollouts, work.updates, work.evaluations) == (10, 60, 4)  # evaluated at 0, 4, 8, 10
    _, work = workload("trainer.max_epochs=8", "evaluation.every=4")
    assert (work.rollouts, work.updates, work.evaluations) == (8, 8, 3)


def test_free_answers_have_the_length_that_is_given() -> None:
    free = ("rollout.sampling.constrain=false", "rollout.sampling.max_new_tokens=21")
    _, work = workload(*free)
    assert work.rollout.answer_tokens == 11 * work.rollout.turns, "half of what is allowed, rounded up"
    assert work.rollout.steps == 11 * work.horizon
    _, work = workload(*free, answer_tokens=7)
    assert work.rollout.answer_tokens == 7 * work.rollout.turns
    assert work.rollout.branch_tokens == pytest.approx(6 * work.rollout.turns, rel=0.1), "the last token is never read"
    assert work.trained_tokens == 7 * work.samples
    assert answer_length(composed(*SMALL_RUN, *free), 1000) == 21, "no answer is longer than is allowed"


def test_top_k_makes_answers_to_a_prompt_begin_alike() -> None:
    free = ("rollout.sampling.constrain=false", "rollout.sampling.max_new_tokens=21")
    _, one = workload(*free, "rollout.sampling.top_k=1", answer_tokens=4)
    _, few = workload(*free, "rollout.sampling.top_k=3", answer_tokens=4)
    _, all_tokens = workload(*free, "rollout.sampling.top_k=null", answer_tokens=4)
    assert one.rollout.branch_tokens % 3 == 0, "three tokens are read behind each distinct prompt"
    assert one.rollout.branch_tokens < few.rollout.branch_tokens < all_tokens.rollout.branch_tokens


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_operations_are_those_that_an_update_counts(rank: int | None, top_k: int | None) -> None:
    policy = small_policy(lora_rank=rank)
    size = size_of(OutlinedModel(policy.model, policy.tokenizer, torch.float32, False))
    batch = train_batch([([7, 8, 9], [10, 11]), ([7, 8, 12], [5]), ([7, 8, 9], [13])])
    (plan,) = plan_forward(batch, None, 4096)
    _, work = workload("rollout.sampling.constrain=false", f"rollout.sampling.top_k={top_k or 'null'}")
    assert update_flops(size, work, _pass(plan)) == update_work(policy, plan, None, Sampling(top_k=top_k)).flops


def kept_by_autograd(rank: int | None) -> tuple[float, float]:
    """Bytes that the decoder's passes really save of a batch, and the planner's count of them."""
    source = RandomLlama(hidden_size=256, intermediate_size=768, num_layers=2, num_heads=4)
    policy = build_policy(source=source, precision="float32", lora_rank=rank)
    size = size_of(OutlinedModel(policy.model, policy.tokenizer, torch.float32, False))
    rng = np.random.default_rng(0)
    texts = [([5] * 40 + rng.integers(7, 90, 30).tolist(), [10]) for _ in range(48)]
    (plan,) = plan_forward(train_batch(texts), None, 65536)
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.decoder().plan_hidden(plan)
    found = sum(count for place, count in kept.items() if place not in weights)
    assert hidden.requires_grad
    part = _pass(plan)
    return found, size.layers * saved_per_token(size, part) * part.padded_tokens * size.item


@pytest.mark.parametrize("rank", [None, 4])
def test_activations_are_what_autograd_keeps(rank: int | None) -> None:
    found, counted = kept_by_autograd(rank)
    assert counted == pytest.approx(found, rel=0.08)


def memory(*overrides: str, place: str = "cpu") -> MemoryEstimate:
    size, work = workload(*overrides)
    return estimate(size, work, place=place, tracked=True, token_budget=8192, memory_tokens=16384)  # type: ignore[arg-type]


def test_memory_is_the_sum_of_its_parts_and_follows_the_configuration() -> None:
    plain = memory()
    parts = [getattr(plain, name) for name in plain.__dataclass_fields__]
    assert plain.peak == sum(parts)
    assert plain.gradients == plain.weights, "all weights are trained, in float32"
    assert plain.optimizer == 2 * plain.weights
    assert memory("loss.beta=0.1").weights == 2 * plain.weights, "a frozen copy is the reference"
    adapted = memory("model.lora_rank=4", "loss.beta=0.1")
    assert adapted.weights == plain.weights, "the adapter is switched off instead"
    assert 0 < adapted.gradients == adapted.adapter < plain.gradients
    on_gpu = memory(place="gpu")
    assert on_gpu.process == on_gpu.episodes == 0
    more = memory("rollout.num_groups=64", "sampler.num_episodes=200")
    assert more.activations > plain.activations
    assert more.episodes > plain.episodes


def test_an_estimated_tokenizer_stands_where_a_tokenizer_would() -> None:
    tokenizer = EstimatedTokenizer()
    assert len(tokenizer.encode(" Go left, 12 steps.\n")) == 9  # Go, left, comma, space, 1, 2, steps, stop, line end
    prompt = PromptBuilder(component(composed().prompt), tokenizer)
    first, again, other = (prompt.render("Avoid holes.", text, ("Left", "Up")) for text in ("a b", "a b", "a c"))
    assert first is again
    assert len(first) == len(other)
    assert (first != other).sum() == 1
    assert len(set(prompt.choices(("Left", "Up")))) == 2


def test_fit_still_trains_beside_a_plan() -> None:
    """Planning leaves no trace in what is built afterwards."""
    workload()
    assert len(fit(small_lab(), epochs=1).training()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("view", ["compact", "paper"])
@pytest.mark.parametrize("prompt", ["action_only", "think_plan_action"])
def test_estimated_tokens_are_within_a_tenth_of_a_real_tokenizers(prompt: str, view: str) -> None:
    real = outline(composed("model=smollm2_135m")).tokenizer
    for scenario in sorted(path.stem for path in (conf_dir() / "env").glob("*.yaml")):
        config = composed(f"prompt={prompt}", f"env={scenario}", f"env.observation={view}")
        game = component(config.env)
        counts = np.zeros(2)
        for seed in range(4):
            observation, _ = game.reset(seed=seed)
            for place, tokenizer in enumerate((real, EstimatedTokenizer())):
                builder = PromptBuilder(component(config.prompt), tokenizer)
                counts[place] += len(builder.render(game.rules, observation, game.legal_actions))
        assert counts[1] == pytest.approx(counts[0], rel=0.1)
