"""Schemas of the sections that are plain values rather than components, registered so that composition checks them too.

`train_schema` may stand first in a defaults list: Hydra then refuses a wrong type while it composes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, make_dataclass
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.config.components import Range
from msgrpo_lab.config.paths import project_root

SCHEMA_NAME = "train_schema"


@dataclass(frozen=True)
class SamplingConfig:
    """How training completions are drawn (`rollout.sampling`)."""

    temperature: Annotated[float, Range(1e-4)] = 1.5
    """Divides the logits. [A] 1.5 in the author's example script, 1.25 in the run scripts."""
    top_k: Annotated[int, Range(1)] | None = 3
    """Most likely tokens kept; null keeps all. [A] 3 in the author's example script, all in the run scripts."""
    top_p: Annotated[float, Range(0, 1, above=True)] | None = None
    """Nucleus probability; null keeps all."""
    max_new_tokens: Annotated[int, Range(1)] = 4
    """Completion tokens at most. [A] 200 and 256 in the author's scripts."""
    constrain: bool = False
    """Decoding is constrained to the legal action words."""


@dataclass(frozen=True)
class RolloutConfig:
    """The episodes of one epoch (`rollout`)."""

    num_groups: Annotated[int, Range(1)] = 128
    """Groups, each with its own initial state."""
    group_size: Annotated[int, Range(2)] = 16
    """Episodes of a group. [A] 16. One alone has no advantage relative to its group."""
    truth_completions: Annotated[int, Range(2)] = 64
    """Completions a text to estimate action probabilities from, where an oracle is asked and decoding is free."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class UpdateConfig:
    """What is done with one rollout (`update`)."""

    passes: Annotated[int, Range(1)] = 1
    """Times the drawn episodes are gone through."""
    minibatches: Annotated[int, Range(1)] = 1
    """Optimiser steps a pass; the episodes are split evenly."""
    token_budget: Annotated[int, Range(1)] = 4096
    """Padded tokens of a forward at most; bounds memory and does not change the result."""
    sharing: Literal["tree", "none"] = "tree"
    """`tree` computes each distinct piece of a batch once, `none` every sample by itself; the result is the same."""
    action_entropy: Annotated[float, Range(0, 1e6)] = 0.0
    """Coefficient of the bonus on the entropy of actions, in units of the advantage a nat; 0 gives none."""
    max_grad_norm: Annotated[float, Range(0, above=True)] | None = 1.0
    """Gradient norm is clipped to this; null does not clip."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run (`checkpoint`)."""

    every: Annotated[int, Range(1)] = 1
    """Epochs between two checkpoints on disk; whatever it is, a run that is told to end loses no whole epoch."""
    keep_last: Annotated[int, Range(1)] = 2
    """The newest checkpoints that are kept, beside the one of the best evaluation."""


@dataclass(frozen=True)
class PathsConfig:
    """Folders (`paths`)."""

    root: str = "${project_root:}"
    outputs: str = "${paths.root}/outputs"
    """Runs, sweeps, figures, and the tracking database."""
    cache: str = "~/.cache/msgrpo_lab"
    """Where dequantised base models are kept."""


SECTIONS: dict[str, type] = {
    "rollout": RolloutConfig,
    "update": UpdateConfig,
    "checkpoint": CheckpointConfig,
    "paths": PathsConfig,
}
"""Top-level keys that a dataclass describes."""
VALUES: dict[str, object] = {
    "seed": Annotated[int, Range(0)],
    "examples": Mapping[str, Any],
    "std_floor": Annotated[float, Range(0)],
    "resume": Literal["auto"] | None,
    "ckpt_path": str | None,
}
"""Top-level keys that are one value."""
EXAMPLES: dict[str, object] = {"seed": 0, "examples": {}, "std_floor": 0.0, "resume": "auto", "ckpt_path": None}
"""A value that each of them may have."""


def expected_at(key: str) -> tuple[Any, Any] | None:
    """The annotation and the default of a dotted key of the plain sections; None for any other key."""
    if key in VALUES:
        return VALUES[key], EXAMPLES[key]
    head, *rest = key.split(".")
    schema: Any = SECTIONS.get(head)
    for name in rest[:-1]:
        schema = get_type_hints(schema).get(name) if is_dataclass(schema) else None
    hints = get_type_hints(schema, include_extras=True) if is_dataclass(schema) and rest else {}
    return (hints[rest[-1]], getattr(schema, rest[-1], None)) if rest and rest[-1] in hints else None


def _without_literals(schema: type) -> type:
    """The same dataclass with text where one of some texts is meant, which OmegaConf does not know; checked later."""
    texts = [name for name, hint in get_type_hints(schema).items() if get_origin(hint) is Literal]
    plain = [(name, str, field(default=getattr(schema, name))) for name in texts]
    return make_dataclass(schema.__name__, plain, bases=(schema,), frozen=True) if plain else schema


def _writable(schema: type) -> DictConfig:
    """A schema node that YAML can be merged into: frozen dataclasses make read-only nodes."""
    node: DictConfig = OmegaConf.structured(_without_literals(schema))

    pending = [node]
    while pending:
        config = pending.pop()
        OmegaConf.set_readonly(config, None)
        pending += [child for key in config if isinstance(child := config._get_node(key), DictConfig)]
    return node


def register() -> None:
    """Put the schemas into Hydra's ConfigStore and the resolver `project_root` into OmegaConf."""
    OmegaConf.register_new_resolver("project_root", lambda: str(project_root()), replace=True)
    schema: dict[str, Any] = {
        "seed": 0,
        "examples": {},
        "std_floor": 0.0,
        "resume": None,
        "ckpt_path": None,
        **{name: _writable(section) for name, section in SECTIONS.items()},
    }
    ConfigStore.instance().store(name=SCHEMA_NAME, node=schema, provider="msgrpo_lab")
