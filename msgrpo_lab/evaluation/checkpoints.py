"""A run's checkpoint as a policy: the weights between two epochs, under the configuration that is kept with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgrpo_lab.evaluation.contender import Origin
from msgrpo_lab.evaluation.training import check_training_config
from msgrpo_lab.evaluation.weights import folder_digest

if TYPE_CHECKING:
    from msgrpo_lab.lap.policy import LanguagePolicy

STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been found sound."""

    folder: Path
    digest: str
    config: Mapping[str, Any]
    """The run's configuration."""
    choices: Mapping[str, str]
    """The option chosen of each group."""

    @property
    def origin(self) -> Origin:
        """The run that it is of."""
        return Origin(
            trained_on=str(self.choices.get("env", "")),
            seed=str(self.config.get("seed", "")),
            **{key: str(self.choices.get(key, "")) for key in ("model", "sampler", "credit")},
        )

    def model_node(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """The run's own."""
        return node

    def put_into(self, policy: LanguagePolicy) -> None:
        """Gives the policy the weights. Raises `ValueError` if they are of another model; one line."""
        from msgrpo_lab.checkpoint.state import load_policy_weights

        load_policy_weights(self.folder, policy)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """What a folder holds; None if it is no checkpoint.

    Raises:
        ValueError: it is one, and damaged, or of a configuration that cannot be used; one line.
    """
    if not (folder / STATE).is_file():
        return None
    from msgrpo_lab.checkpoint.format import read_state

    state = read_state(folder)
    config = check_training_config(state.get("config"), str(folder / STATE))
    return Checkpoint(
        folder=folder, digest=folder_digest(folder), config=config, choices=dict(state.get("choices") or {})
    )
