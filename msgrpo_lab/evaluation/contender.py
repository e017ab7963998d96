"""A policy under evaluation: what is known of it before it is loaded, and what it is when it plays.

This is the seam between *which* policies there are (players, models, adapters, runs, remote endpoints) and playing
them. A new kind of policy is a function that returns `Contender`s, called from `names.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from msgrpo_lab.engines.base import RolloutEngine
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.prompt import PromptBuilder
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Sampling

Decoding = Literal["sampled", "greedy"]
DECODINGS: tuple[Decoding, ...] = ("sampled", "greedy")
Kind = Literal["player", "base", "adapter", "checkpoint", "run", "remote"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A policy ready to play."""

    prompt: PromptBuilder
    """What it reads, and how its answers are read."""
    engine: RolloutEngine
    sampling: Callable[[TextGame], Sampling]
    """Its decoding rule in a game, at the evaluation's temperature; `greedy` is set by who plays it."""
    policy: LanguagePolicy | None = None
    """What the engine is synced with before every cell; None for an engine that has no local model."""

    def sync(self) -> None:
        """Drops all that the engine remembers, so that no cell's last bits depend on what was played before it."""
        if self.policy is not None:
            self.engine.sync(self.policy, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The training run that a policy comes from; empty where there is none."""

    trained_on: str = ""
    """Scenario of the training run."""
    model: str = ""
    """Base model."""
    sampler: str = ""
    credit: str = ""
    seed: str = ""
    source_run: str = ""
    """MLflow's id of the training run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A policy under evaluation, not yet loaded."""

    label: str
    """Its name in every result."""
    kind: Kind
    identity: Mapping[str, Any]
    """All that its answers depend on, as plain values: results are kept under its digest."""
    open: Callable[[], Opened]
    """Loads it. Raises `ConfigError` in one line if it cannot be had after all."""
    origin: Origin = field(default_factory=Origin)
    decodings: tuple[Decoding, ...] = ("sampled", "greedy")
    """The ways of decoding that make sense for it."""
    view: str | None = None
    """`observation` of the scenarios it was trained on; None: the scenario's own."""
    plays: Callable[[type[TextGame]], bool] = lambda _: True
    """Whether it can play a game of this class."""
    has_logprobs: bool = True
    """Whether its completions carry log-probabilities, from which entropies are estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """How a language policy reads and answers, as nodes and plain values of the configuration."""

    model: Mapping[str, Any]
    prompt: Mapping[str, Any]
    engine: Mapping[str, Any]
    sampling: Mapping[str, Any]
    """As `rollout.sampling`; its temperature is not used."""
    temperature: float
