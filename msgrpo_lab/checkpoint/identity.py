"""Is this the same run? What of a configuration decides what a run computes, and where two differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgrpo_lab.checkpoint.errors import CheckpointError
from msgrpo_lab.messages import one_line, show

FREE = (
    "callbacks",  # they look on, and may be added to a run or relaxed
    "checkpoint",
    "ckpt_path",
    "logger",
    "model.source.cache",
    "paths",
    "resume",
    "trainer.accelerator",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_",
    "trainer.log_every_n_steps",
)
"""Beginnings of the keys that a run may be continued with another value of."""
SHOWN = 5
"""Keys that a refusal names."""
_ABSENT = object()


def check_same_run(then: Mapping[str, Any], now: Mapping[str, Any], source: str) -> None:
    """Refuses to go on with a run under another configuration.

    The number of epochs is part of what a run is, because its learning rate falls over them; under
    `optim.schedule=constant` it may change.

    Args:
        then: the run's configuration, as plain values.
        now: the one that it is to go on with.
        source: what is refused, as in `resume=auto` or `ckpt_path=…`.

    Raises:
        CheckpointError: one line that names the keys.
    """
    differing = list(differences(then, now))
    if not differing:
        return
    named = ", ".join(f"{key} ({show(old)} then, {show(new)} now)" for key, old, new in differing[:SHOWN])
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    remedy = "give the values of then, or leave this out and start another run"
    if any(key == "trainer.max_epochs" for key, _, _ in differing):
        remedy += "; the learning rate falls over trainer.max_epochs unless optim.schedule=constant"
    raise CheckpointError(one_line(f"{source}: it is of another configuration: {named}{more}; {remedy}"))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The keys that matter and differ, with both values; None stands for an absent one."""
    old, new = dict(_leaves(then)), dict(_leaves(now))
    constant = old.get("optim.schedule") == new.get("optim.schedule") == "constant"
    for key in sorted(old.keys() | new.keys()):
        if key.startswith(FREE) or (key == "trainer.max_epochs" and constant):
            continue
        if old.get(key, _ABSENT) != new.get(key, _ABSENT):
            yield key, old.get(key), new.get(key)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, list(tree) if isinstance(tree, tuple) else tree
