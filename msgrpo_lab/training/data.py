"""The data module: an epoch is one rollout by the current policy, its credit, the drawn episodes and their batches."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from msgrpo_lab.credit.action_entropy import action_surprise
from msgrpo_lab.credit.base import CreditAssigner, needs_oracle
from msgrpo_lab.decoder.plan import Sharing
from msgrpo_lab.engines.base import RolloutEngine
from msgrpo_lab.engines.hf.constrained import choice_trie
from msgrpo_lab.fidelity.action_probs import table_maker
from msgrpo_lab.fidelity.truth import LakeTruth, lake_truth
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.rollout.collect import Collector, RolloutObserver, action_entropy, rollout_metrics, top_action_share
from msgrpo_lab.rollout.map_split import Maps, MapSplit, prompt_digests
from msgrpo_lab.rollout.thoughts import thought_metrics
from msgrpo_lab.sampler.base import EpisodeSampler, Refilling, diagnose, merge_rollouts, with_outcomes
from msgrpo_lab.seeding import FIRST_HELD_OUT_SEED, episode_generators, generator, refill_seed
from msgrpo_lab.training.collate import collate, split_episodes
from msgrpo_lab.types import Credit, RolloutBatch, Sampling, TrainBatch


class RolloutDataModule(L.LightningDataModule):
    """Collects a rollout each epoch and yields its training batches.

    Args:
        policy: the policy being trained; the rollout is by its current parameters.
        collector: plays the episodes.
        engine: completes the prompts; must sample from the policy itself.
        credit: assigns advantages.
        sampler: draws the training episodes.
        sampling: the decoding rule.
        num_groups: groups of a rollout, each from an initial state of its own.
        group_size: episodes of a group.
        passes: times every drawn episode is trained on, against the log-probabilities it was sampled with.
        minibatches: optimiser steps a pass.
        token_budget: padded tokens of one forward pass, for reference log-probabilities.
        needs_reference: whether batches carry the reference policy's log-probabilities.
        seed: the run's seed.
        sharing: what samples share in a forward pass for reference log-probabilities; see `LAPModule`.
        truth_completions: completions a text that the policy's action probabilities are estimated from, where the
            oracle is asked and decoding is free.
        action_entropy: coefficient of the bonus on the entropy of actions, in units of the advantage a nat; 0: none.
        maps: whether some maps are kept out of training; see `MapSplit`.
    """

    def __init__(
        self,
        *,
        policy: LanguagePolicy,
        collector: Collector,
        engine: RolloutEngine,
        credit: CreditAssigner,
        sampler: EpisodeSampler,
        sampling: Sampling,
        num_groups: int,
        group_size: int,
        passes: int,
        minibatches: int,
        token_budget: int,
        needs_reference: bool,
        seed: int,
        sharing: Sharing = "tree",
        truth_completions: int = 64,
        action_entropy: float = 0.0,
        maps: Maps = "all",
    ) -> None:
        super().__init__()
        if not engine.samples_policy:
            raise ValueError(
                f"engine={type(engine).__name__}: its answers are not the policy's and cannot train it; use engine=hf"
            )
        self.policy = policy
        self.collector = collector
        self.engine = engine
        self.credit = credit
        self.sampler = sampler
        self.sampling = sampling
        self.num_groups = num_groups
        self.group_size = group_size
        self.passes = passes
        self.minibatches = minibatches
        self.token_budget = token_budget
        self.needs_reference = needs_reference
        self.seed = seed
        self.sharing: Sharing = sharing
        self.truth_completions = truth_completions
        self.action_entropy = action_entropy
        self.map_split = MapSplit(collector.make_game) if maps == "unseen" else None
        self.prompts_met: set[bytes] = set()
        """Digests of the prompts that training has read so far; kept only where maps are split."""
        self.observers: list[RolloutObserver] = []
        self.truth_askers: list[Callable[[int], bool]] = []
        """Each says of an epoch whether it wants `truth`; where the credit rule needs an oracle it is always there."""
        self.rollout: RolloutBatch | None = None
        """The rollout of the current epoch, refills included; with `exact_adv` where there is a `truth`."""
        self.truth: LakeTruth | None = None
        """Exact values of the policy that sampled the current rollout; None where nobody has asked for them."""
        self.metrics: dict[str, float] = {}
        """What the current epoch's rollout, credit and sampler say of themselves."""
        self.env_steps = 0
        self.episodes = 0
        self._engine_metrics: dict[str, float] = {}
        """Summed over the epoch's rollout and its refills."""
        self._truth_s = 0.0

    @property
    def updates_per_epoch(self) -> int:
        """Optimiser steps an epoch."""
        return self.passes * self.minibatches

    def state_dict(self) -> dict[str, Any]:
        """What has been counted so far."""
        counted: dict[str, Any] = {"env_steps": self.env_steps, "episodes": self.episodes}
        if self.map_split is not None:
            counted["prompts_met"] = base64.b64encode(b"".join(sorted(self.prompts_met))).decode("ascii")
        return counted

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting where a checkpoint left off."""
        self.env_steps, self.episodes = int(state_dict["env_steps"]), int(state_dict["episodes"])
        met = base64.b64decode(state_dict.get("prompts_met", ""))
        self.prompts_met = {met[place : place + 8] for place in range(0, len(met), 8)}

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """One rollout an iteration, collected in this process when iteration starts."""
        return DataLoader(_Epoch(self), batch_size=None, num_workers=0)

    def collect(self, epoch: int, version: int) -> RolloutBatch:
        """The rollout of an epoch, by the policy after `version` updates."""
        return self._play(epoch, version, seed=self.seed, num_groups=self.num_groups)

    def refill(self, epoch: int, version: int, number: int, wanted: int) -> RolloutBatch:
        """Refill `number` ≥ 1 of an epoch: whole groups for `wanted` episodes, at most as many as in a rollout."""
        groups = min(self.num_groups, math.ceil(wanted / self.group_size))
        return self._play(epoch, version, seed=refill_seed(self.seed, epoch, number), num_groups=groups)

    def _play(self, epoch: int, version: int, *, seed: int, num_groups: int) -> RolloutBatch:
        """`num_groups` groups by the policy after `version` updates; all draws are of `seed` and the epoch."""
        seed_rng = generator(seed, "env_seeds", epoch)
        if self.map_split is None:
            env_seeds = seed_rng.integers(FIRST_HELD_OUT_SEED, size=num_groups)
        else:
            env_seeds = self.map_split.training_seeds(seed_rng, num_groups)
        members = generator(seed, "members", epoch).integers(2**31, size=num_groups * self.group_size)
        self.engine.sync(self.policy, version)
        rollout = self.collector.collect(
            seeds=env_seeds.tolist(),
            group_size=self.group_size,
            members=members.tolist(),
            engine=self.engine,
            sampling=self.sampling,
            rngs=episode_generators(seed, "engine", epoch, len(members)),
            observers=self.observers,
        )
        for name, value in self.engine.metrics().items():
            self._engine_metrics[name] = self._engine_metrics.get(name, 0.0) + value
        return rollout

    def with_truth(self, rollout: RolloutBatch, epoch: int) -> RolloutBatch:
        """The rollout with the oracle's advantages, if this epoch wants them; `truth` is then what they were read from.

        The policy must be the one that sampled, and the engine synced with it.

        Raises:
            ValueError: the game has no oracle.
        """
        self.truth = None
        if not needs_oracle(self.credit) and not any(wants(epoch) for wants in self.truth_askers):
            return rollout
        started = time.perf_counter()
        game = self.collector.example_game
        table_of = table_maker(
            policy=self.policy,
            engine=self.engine,
            prompt=self.collector.prompt,
            game=game,
            sampling=self.sampling,
            completions=self.truth_completions,
            rng=generator(self.seed, "truth", epoch),
            token_budget=self.token_budget,
        )
        self.truth = lake_truth(rollout, game=game, table_of=table_of)
        rollout = replace(rollout, exact_adv=self.truth.advantages(rollout))
        self._truth_s += time.perf_counter() - started
        return rollout

    def assign(self, rollout: RolloutBatch) -> Credit:
        """The credit of a rollout, with what samplers need beside it."""
        return with_outcomes(rollout, self.credit(rollout))

    def _thought_metrics(self, rollout: RolloutBatch) -> dict[str, float]:
        """What answers that think say of their thoughts; nothing where the answer is one of some words."""
        if self.sampling.choices is not None:
            return {}
        decode = partial(self.policy.tokenizer.decode, skip_special_tokens=True)
        return thought_metrics(rollout, self.collector.example_game.legal_actions, lambda token: decode([token]))

    def _with_exploration(self, rollout: RolloutBatch, credit: Credit) -> Credit:
        """The credit that is trained on: with the bonus on the entropy of actions, which no sampler sees."""
        if self.action_entropy == 0.0:
            return credit
        bonus_ET = np.where(credit.turn_mask, self.action_entropy * action_surprise(rollout), 0.0)
        return replace(credit, turn_adv=credit.turn_adv + bonus_ET)

    def pool(self, epoch: int, version: int) -> tuple[RolloutBatch, int]:
        """The episodes to draw from: the epoch's rollout, and as many refills as the sampler asks for."""
        rollout, refills = self.with_truth(self.collect(epoch, version), epoch), 0
        while isinstance(self.sampler, Refilling):
            wanted = self.sampler.episodes_wanted(
                self.assign(rollout), rollout.group_index, self.sampler.num_episodes, refills
            )
            if wanted <= 0:
                break
            refills += 1
            rollout = merge_rollouts(rollout, self.refill(epoch, version, refills, wanted))
            rollout = self.with_truth(rollout, epoch)
        return rollout, refills

    def batches(self, epoch: int, version: int) -> Iterator[TrainBatch]:
        """Collects, credits, draws, and yields one batch an optimiser step."""
        started, self._truth_s, self._engine_metrics = time.perf_counter(), 0.0, {}
        rollout, refills = self.pool(epoch, version)
        collected = time.perf_counter()
        credit = self.assign(rollout)
        selection = self.sampler(
            credit, rollout.group_index, self.sampler.num_episodes, generator(self.seed, "sampler", epoch)
        )
        credited = time.perf_counter()
        batch = collate(rollout, self._with_exploration(rollout, credit), selection)
        if self.needs_reference:
            batch = replace(batch, ref_logprobs=self.reference_logprobs(batch))
        turns = int(rollout.num_turns.sum())
        tokens = sum(len(turn.completion.token_ids) for episode in rollout.episodes for turn in episode.turns)
        self.rollout = rollout
        if self.map_split is not None:
            self.prompts_met |= prompt_digests(rollout)
        self.env_steps += turns
        self.episodes += len(rollout.episodes)
        rollout_s = collected - started - self._truth_s
        self.metrics = {
            **{f"train/{name}": value for name, value in rollout_metrics(rollout).items()},
            "train/action_entropy": action_entropy(rollout, constrained=self.sampling.choices is not None),
            "train/top_action_share": top_action_share(rollout),
            **{f"train/{name}": value for name, value in self._thought_metrics(rollout).items()},
            "train/turns": float(turns),
            "train/env_steps": float(self.env_steps),
            "train/episodes": float(self.episodes),
            "train/drawn_episodes": float(len(selection.index)),
            "train/refills": float(refills),
            **diagnose(credit, selection),
            **{f"perf/{name}": value for name, value in self._engine_metrics.items()},
            "perf/rollout_s": rollout_s,
            "perf/truth_s": self._truth_s,
            "perf/credit_s": credited - collected,
            "perf/collate_s": time.perf_counter() - credited,
            "perf/rollout_env_steps_per_s": turns / rollout_s,
            "perf/rollout_tokens_per_s": tokens / rollout_s,
        }
        order = generator(self.seed, "data_order", epoch)
        for _ in range(self.passes):
            yield from split_episodes(batch, self.minibatches, order)

    @torch.no_grad()
    def reference_logprobs(self, batch: TrainBatch) -> torch.Tensor:
        """log π_ref of every completion token, [S, L]: the policy before training, under the same decoding rule."""
        trie = None if self.sampling.choices is None else choice_trie(self.sampling.choices)
        logprobs = torch.zeros_like(batch.old_logprobs)
        with self.policy.as_reference() as reference:
            for plan in reference.plan(batch, trie, self.token_budget, self.sharing):
                stats = reference.token_stats(plan, trie, self.sampling)
                logprobs[torch.from_numpy(plan.samples)] = stats.logprobs.float().cpu()
        return logprobs

    def teardown(self, stage: str) -> None:  # noqa: ARG002  Lightning's signature
        """Lets the engine go."""
        self.engine.close()


class _Epoch(IterableDataset[TrainBatch]):
    """Iterating it once collects one rollout, fresh or resumed."""

    def __init__(self, data: RolloutDataModule) -> None:
        self.data = data

    def __iter__(self) -> Iterator[TrainBatch]:
        trainer = self.data.trainer
        if trainer is None:
            raise RuntimeError("the rollout data module is not attached to a trainer")
        yield from self.data.batches(epoch=trainer.current_epoch, version=trainer.global_step)
