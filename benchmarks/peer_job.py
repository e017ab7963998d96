"""The one iteration that every peer makes: the same game, prompts, model, seeds, episodes and optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from omegaconf import DictConfig

from msgrpo_lab.lap.prompt import PromptBuilder
from msgrpo_lab.lap.sources import Loaded
from msgrpo_lab.seeding import FIRST_HELD_OUT_SEED, generator
from msgrpo_lab.training.assemble import Lab, component
from msgrpo_lab.tsmg.base import TextGame


class Sample(NamedTuple):
    """One (prompt, step) of a rollout."""

    prompt_ids: Int[np.ndarray, " P"]
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerResult:
    """One iteration of one peer. Seconds; the model's loading is not in them."""

    peer: str
    repetition: int
    env_steps: int
    rollout_s: float | None
    """None where rollout and update cannot be told apart."""
    update_s: float | None
    total_s: float
    generated_tokens: int | None
    loss: float | None
    remark: str = ""

    @property
    def env_steps_per_s(self) -> float:
        """Environment steps a second, end to end."""
        return self.env_steps / self.total_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerJob:
    """What a peer is given: the configuration and plain objects made from it, none of the lab's engine or update."""

    config: DictConfig
    prompt: PromptBuilder
    make_game: Callable[[], TextGame]
    choices: tuple[tuple[int, ...], ...] | None
    """Token ids of the legal answers where decoding is constrained to them."""
    dtype: torch.dtype
    """Compute type: the lab's own."""

    @classmethod
    def of(cls, lab: Lab, config: DictConfig) -> PeerJob:
        """The job of a lab that was built from `config`."""
        return cls(
            config=config,
            prompt=lab.data.collector.prompt,
            make_game=lab.data.collector.make_game,
            choices=lab.data.sampling.choices,
            dtype=lab.policy.compute_dtype,
        )

    @property
    def groups(self) -> int:
        """Groups of the iteration."""
        return int(self.config.rollout.num_groups)

    @property
    def group_size(self) -> int:
        """Episodes of a group."""
        return int(self.config.rollout.group_size)

    @property
    def max_grad_norm(self) -> float:
        """The gradient's norm is clipped to this; infinite where it is not clipped."""
        limit = self.config["update"].max_grad_norm  # `config.update` is the mapping's own method
        return float("inf") if limit is None else float(limit)

    @property
    def max_new_tokens(self) -> int:
        """Tokens of an answer at most; those of the longest legal answer where decoding is constrained."""
        if self.choices is not None:
            return max(map(len, self.choices))
        return int(self.config.rollout.sampling.max_new_tokens)

    def load(self) -> Loaded:
        """The base model, fresh, and its tokenizer."""
        trains_all = self.config.model.lora_rank is None
        loaded: Loaded = component(self.config.model.source).load(torch.float32 if trains_all else self.dtype)
        return loaded

    def lora(self) -> Any:
        """The adapter's configuration; None where all weights are trained."""
        from peft import LoraConfig

        model = self.config.model
        if model.lora_rank is None:
            return None
        return LoraConfig(
            r=model.lora_rank,
            lora_alpha=model.lora_alpha,
            lora_dropout=0.0,
            target_modules=model.lora_targets,
            task_type="CAUSAL_LM",
        )

    def seeds(self, seed: int) -> tuple[list[int], list[int]]:
        """Environment seed of each group and chance stream of each episode: those of the lab's first epoch."""
        groups = generator(seed, "env_seeds", 0).integers(FIRST_HELD_OUT_SEED, size=self.groups)
        members = generator(seed, "members", 0).integers(2**31, size=self.groups * self.group_size)
        return groups.tolist(), members.tolist()


def samples_of(lab: Lab, seed: int) -> list[Sample]:
    """Every (prompt, step) of the lab's own rollout with this seed, for peers that cannot play the game themselves."""
    lab.data.seed = seed
    rollout = lab.data.collect(epoch=0, version=0)
    game, prompt = lab.data.collector.example_game, lab.data.collector.prompt
    return [
        Sample(turn.completion.prompt_ids, prompt.text(game.rules, turn.observation, game.legal_actions))
        for episode in rollout.episodes
        for turn in episode.turns
    ]


def advantages(returns: Sequence[float], group_size: int) -> list[float]:
    """Returns relative to their group: (R − mean) / (std + 1e-6)."""
    return_GE = np.array(returns).reshape(-1, group_size)
    centred_GE = return_GE - return_GE.mean(axis=1, keepdims=True)
    found: list[float] = (centred_GE / (return_GE.std(axis=1, keepdims=True) + 1e-6)).ravel().tolist()
    return found
