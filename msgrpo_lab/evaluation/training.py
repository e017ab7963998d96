"""The configuration that a policy was trained under, as a run or a checkpoint keeps it: how it reads and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgrpo_lab.config.components import components
from msgrpo_lab.evaluation.models import PolicySpec

SECTIONS = frozenset({"env", "model", "prompt", "rollout", "evaluation"})
PACKAGE = "msgrpo_lab."


def check_training_config(tree: Any, where: str) -> dict[str, Any]:
    """`tree` as the configuration of a training run.

    What is found in a store or a folder may be another's. The components it names will be called, so they may be
    nothing but the lab's own.

    Args:
        tree: plain values.
        where: what holds them, for the message.

    Raises:
        ValueError: it is none, or names code outside of this package; one line.
    """
    if not isinstance(tree, Mapping) or not tree.keys() >= SECTIONS:
        raise ValueError(f"{where} is no configuration of a training run")
    config = {str(key): value for key, value in tree.items()}
    for group in ("model", "prompt"):
        for key, node in components(config[group], group):
            if not str(node["_target_"]).startswith(PACKAGE):
                problem = f"{where} names {key}._target_={node['_target_']}, which is not of {PACKAGE[:-1]}"
                raise ValueError(f"{problem}; evaluate its adapter folder, with model=… and prompt=… of your own")
    return config


def spec_of(config: Mapping[str, Any], *, engine: Mapping[str, Any], temperature: float | None) -> PolicySpec:
    """How the policy of a training run reads and answers.

    Args:
        config: as `check_training_config` returns it.
        engine: what runs it now.
        temperature: of sampled decoding; None: that of the run's own evaluation.
    """
    return PolicySpec(
        model=config["model"],
        prompt=config["prompt"],
        engine=engine,
        sampling=config["rollout"]["sampling"],
        temperature=float(config["evaluation"]["temperature"]) if temperature is None else temperature,
    )
