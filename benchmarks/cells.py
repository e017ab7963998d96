"""What is measured: a cell is one job, and a variant is one way of computing it. Both are configuration overrides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from msgrpo_lab.config import conf_dir, validate
from msgrpo_lab.training.assemble import Lab, build_lab

Policy = Literal["untrained", "legal", "legal_text"]
"""`untrained`: free generation as the base model does it. `legal`: decoding constrained to the legal words.
`legal_text`: free generation, but every text names a legal action (see `legal_text.py`)."""
POLICIES: tuple[Policy, ...] = ("untrained", "legal", "legal_text")
ENVS = ("frozenlake", "snake")
MODELS = ("smollm2_135m", "tiny")
GROUP_SIZES = (8, 32, 128)
NAIVE, FAST = "naive", "fast"
VARIANTS: dict[str, tuple[str, ...]] = {
    NAIVE: ("engine=naive", "update.sharing=none"),
    FAST: ("engine=hf", "update.sharing=tree"),
}
"""The two ways through the same job: nothing shared, and each distinct piece of work once."""
NAIVE_EPISODES = 64
"""Episodes that the naive path of SmolLM2 is given at most (at least one group): more would take an hour a cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkCase:
    """One job: its configuration, and how many groups each variant plays."""

    name: str
    env: str
    model: str
    policy: Policy
    group_size: int
    groups: int
    """Groups of the fast path, and of the job."""
    naive_groups: int
    """Groups of the naive path; fewer than `groups` where the whole job would take too long; 0 leaves it out."""
    overrides: tuple[str, ...]
    """Of the job itself, without its size and its variant."""
    draw_all: bool = True
    """Whether every episode is trained on, whatever the sampler's own number."""

    def groups_of(self, variant: str) -> int:
        """Groups that a variant plays."""
        return self.naive_groups if variant == NAIVE else self.groups

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that are measured."""
        return (NAIVE, FAST) if self.naive_groups else (FAST,)

    @property
    def reduced(self) -> bool:
        """Whether the naive path plays fewer groups than the fast one."""
        return 0 < self.naive_groups < self.groups


def unit_cell(
    env: str,
    model: str,
    policy: Policy,
    *,
    groups: int = 8,
    group_size: int = 8,
    naive_groups: int | None = None,
    horizon: int = 8,
    max_new_tokens: int = 8,
) -> BenchmarkCase:
    """The unit of measurement: `paper` observation, short answers, one optimiser step over every step of the rollout.

    Args:
        env: environment configuration.
        model: model configuration.
        policy: how its answers become actions.
        groups: groups of the job.
        group_size: episodes of a group.
        naive_groups: groups of the naive path; by default as many as `NAIVE_EPISODES` hold for a real model, and all
            for `tiny`.
        horizon: turns of an episode.
        max_new_tokens: tokens of an answer at most.
    """
    if naive_groups is None:
        naive_groups = groups if model == "tiny" else min(groups, max(1, NAIVE_EPISODES // group_size))
    overrides = [
        f"env={env}",
        f"model={model}",
        "sampler=uniform",
        f"env.horizon={horizon}",
        "env.observation=paper",
        "rollout.sampling.temperature=1",
        "rollout.sampling.top_k=null",
        f"rollout.sampling.max_new_tokens={max_new_tokens}",
        f"rollout.sampling.constrain={'true' if policy == 'legal' else 'false'}",
        "update.passes=1",
        "update.minibatches=1",
    ]
    if policy == "legal_text":
        overrides.append("prompt.parser._target_=benchmarks.legal_text.EveryTextParser")
    return BenchmarkCase(
        name=f"{env}/{model}/{policy}/{groups}x{group_size}",
        env=env,
        model=model,
        policy=policy,
        group_size=group_size,
        groups=groups,
        naive_groups=naive_groups,
        overrides=tuple(overrides),
    )


def default_job(prompt: str = "action_only") -> BenchmarkCase:
    """The job that runs when nothing is asked for, free words on Frozen Lake, or the same with another prompt.

    Only the fast path is measured: the rollouts of the job are too large for the naive one.
    """
    groups = {"action_only": 64, "think_action": 32}[prompt]
    return BenchmarkCase(
        name=f"frozenlake/smollm2_135m/{prompt}/{groups}x16",
        env="frozenlake",
        model="smollm2_135m",
        policy="untrained",
        group_size=16,
        groups=groups,
        naive_groups=0,
        overrides=("env=frozenlake", "model=smollm2_135m", f"prompt={prompt}"),
        draw_all=False,
    )


def configuration(cell: BenchmarkCase, variant: str, seed: int = 0) -> DictConfig:
    """The checked configuration of a cell in a variant.

    Raises:
        ConfigError: the configuration is not sound, with one line for every mistake.
    """
    groups = cell.groups_of(variant)
    size = [f"seed={seed}", f"rollout.num_groups={groups}", f"rollout.group_size={cell.group_size}"]
    if cell.draw_all:
        size.append(f"sampler.num_episodes={groups * cell.group_size}")
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        config = compose("train", [*cell.overrides, *size, *VARIANTS[variant]])
    validate(config)
    return config


def make_lab(cell: BenchmarkCase, variant: str, seed: int = 0) -> Lab:
    """The lab of a cell in a variant, by the project's own assembly."""
    return build_lab(configuration(cell, variant, seed))
