"""Small policies, episodes and batches for the tests from prompt to update, and a plain reference for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from msgrpo_lab.config import conf_dir
from msgrpo_lab.lap.build import build_policy
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.sources import RandomLlama
from msgrpo_lab.training.assemble import Lab, build_lab
from msgrpo_lab.types import Completion, Episode, ParsedAction, RolloutBatch, Sampling, TrainBatch, Turn

SMALL = ("model.source.hidden_size=32", "model.source.intermediate_size=64", "model.source.num_layers=2")
SMALL_RUN = (
    "model=tiny",
    *SMALL,
    "debug=fast",
    "trainer.accelerator=cpu",
    "update.passes=1",
    "update.minibatches=1",
    "evaluation.reference_simulations=4",
)


def training_presets() -> list[str]:
    """Every preset of the main job as an override."""
    return _presets(evaluating=False)


def evaluation_presets() -> list[str]:
    """Every preset of `msgrpo_lab.evaluate` as an override: those that say which policies they are about."""
    return _presets(evaluating=True)


def _presets(evaluating: bool) -> list[str]:
    folder = conf_dir() / "experiment"
    files = [
        path for path in sorted(folder.rglob("*.yaml")) if ("policy" in yaml.safe_load(path.read_text())) == evaluating
    ]
    return [f"experiment={path.relative_to(folder).with_suffix('').as_posix()}" for path in files]


def small_policy(*, init_seed: int = 0, lora_rank: int | None = None, sharpness: float = 8.0) -> LanguagePolicy:
    """Two small layers whose weights are `sharpness` times larger than usual, so that what is read matters."""
    source = RandomLlama(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, init_seed=init_seed)
    policy = build_policy(source=source, precision="float32", lora_rank=lora_rank)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.ndim == 2 and "lora" not in name:
                parameter.mul_(sharpness)
    return policy


def move(policy: LanguagePolicy, *, seed: int = 0, scale: float = 0.05) -> None:
    """Moves every trainable parameter at random, as an update would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def completion(
    prompt: Sequence[int] = (7, 8, 9),
    tokens: Sequence[int] = (5,),
    logprobs: Sequence[float] | None = None,
    text: str = "Left",
) -> Completion:
    return Completion(
        prompt_ids=ids(*prompt),
        token_ids=ids(*tokens),
        logprobs=np.array([-0.5] * len(tokens) if logprobs is None else logprobs, dtype=np.float32),
        text=text,
        finish_reason="stop",
        policy_version=0,
    )


def turn(*, reward: float = 0.0, game_reward: float = 0.0, action: int | None = 0, **of_completion: Any) -> Turn:
    parsed = ParsedAction(
        action=action, span=None if action is None else (0, 4), error="none" if action is None else None
    )
    return Turn(
        observation="here",
        state_key=0,
        completion=completion(**of_completion),
        parsed=parsed,
        executed_action=0 if action is None else action,
        reward=reward,
        game_reward=game_reward,
    )


def rollout(*episodes: tuple[int, bool, Sequence[Turn]]) -> RolloutBatch:
    """A rollout of (group, success, turns) episodes."""
    return RolloutBatch(
        episodes=tuple(
            Episode(group_id=g, seed=g, turns=tuple(turns), terminated=True, truncated=False, success=success)
            for g, success, turns in episodes
        ),
        group_index=np.array([group for group, _, _ in episodes]),
    )


def train_batch(samples: Sequence[tuple[Sequence[int], Sequence[int]]], **fields: Any) -> TrainBatch:
    """One training row a (prompt, completion) sample, each an episode of one turn unless `fields` say otherwise."""
    count, width = len(samples), max(len(prompt) + len(answer) for prompt, answer in samples)
    input_ids = torch.zeros(count, width, dtype=torch.long)
    read, written = torch.zeros(count, width, dtype=torch.bool), torch.zeros(count, width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(samples):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor([*prompt, *answer])
        read[row, :end] = True
        written[row, len(prompt) : end] = True
    made: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": read,
        "completion_mask": written,
        "old_logprobs": torch.zeros(count, width),
        "ref_logprobs": None,
        "advantage": torch.ones(count),
        "weight": torch.ones(count),
        "num_turns": torch.ones(count, dtype=torch.long),
        "episode": torch.arange(count),
        "turn": torch.zeros(count, dtype=torch.long),
        "num_episodes": count,
        "num_tokens": int(written.sum()),
    }
    return TrainBatch(**{**made, **fields})


def plain_distribution(logits: torch.Tensor, rule: Sampling, written: tuple[int, ...] = ()) -> torch.Tensor:
    """Log-probabilities of the next token from raw logits [V], by the plainest code there is."""
    scaled = [float("-inf")] * len(logits)
    choices = rule.choices
    legal = (
        range(len(logits)) if choices is None else {c[len(written)] for c in choices if c[: len(written)] == written}
    )
    value = logits.double() / rule.temperature
    kept = sorted(legal, key=lambda token: -float(value[token].detach()))[: rule.top_k]
    if rule.top_p is not None:
        total, mass, nucleus = sum(math.exp(float(value[t].detach())) for t in kept), 0.0, []
        for token in kept:
            if mass < rule.top_p:
                nucleus.append(token)
            mass += math.exp(float(value[token].detach())) / total
        kept = nucleus
    index = torch.tensor(kept)
    logprobs = torch.tensor(scaled, dtype=torch.double)
    return logprobs.index_put((index,), torch.log_softmax(value[index], dim=0))


def plain_stats(policy: LanguagePolicy, batch: TrainBatch, rule: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """log π_θ and entropy of every completion token, [S, L]: one whole-model forward a sample, nothing shared."""
    logprobs, entropies = [], []
    for row in range(len(batch.input_ids)):
        tokens = batch.input_ids[row, : int(batch.attention_mask[row].sum())]
        logits = policy.model(input_ids=tokens[None]).logits[0]
        start = int(batch.completion_mask[row].int().argmax())
        logprob = [torch.zeros((), dtype=torch.double)] * batch.input_ids.shape[1]
        entropy = list(logprob)
        for column in range(start, len(tokens)):
            distribution = plain_distribution(logits[column - 1], rule, tuple(tokens[start:column].tolist()))
            logprob[column] = distribution[tokens[column]]
            finite = distribution[distribution > -torch.inf]
            entropy[column] = -(finite.exp() * finite).sum()
        logprobs.append(torch.stack(logprob))
        entropies.append(torch.stack(entropy))
    return torch.stack(logprobs), torch.stack(entropies)


def gradients(policy: LanguagePolicy, value: torch.Tensor) -> torch.Tensor:
    """Gradient of `value` with respect to all trainable parameters, as one vector."""
    policy.zero_grad()
    value.backward()
    return gradient_of(policy)


def gradient_of(policy: LanguagePolicy) -> torch.Tensor:
    """The gradient the trainable parameters hold, as one vector."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable_parameters()]
    return torch.cat([gradient.flatten() for gradient in found]).double()


def composed(*overrides: str) -> DictConfig:
    """The main job's configuration."""
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return compose("train", list(overrides))


def small_lab(*overrides: str) -> Lab:
    """A run of seconds: two small layers, 4 groups of 4 episodes, 8 of them drawn."""
    return build_lab(composed(*SMALL_RUN, *overrides))


class Memory(Logger):
    """Keeps what is logged, by update."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((int(step or 0), dict(metrics)))

    def series(self, name: str) -> list[float]:
        return [metrics[name] for _, metrics in self.rows if name in metrics]

    def training(self) -> list[dict[str, float]]:
        """The metrics of each update that do not measure time."""
        return [
            {n: v for n, v in metrics.items() if n.startswith(("train/", "sampler/")) and n != "train/wall_s"}
            for _, metrics in self.rows
            if "train/loss" in metrics
        ]


def fit(lab: Lab, *, epochs: int = 2, callbacks: Sequence[L.Callback] = (), folder: Path | None = None) -> Memory:
    """Trains in this process and returns what was logged."""
    memory = Memory()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=memory,
        callbacks=list(callbacks),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=None if folder is None else str(folder),
    )
    trainer.fit(lab.module, datamodule=lab.data)
    return memory


Make = Callable[..., Any]
