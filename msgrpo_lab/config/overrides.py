"""Rules for overrides as they are typed, and for the folders and launchers of Hydra's own node."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from msgrpo_lab.config.paths import why_unwritable
from msgrpo_lab.messages import Mistake, closest_first, did_you_mean, one_line

LATER_KEYS = frozenset({"ckpt_path", "resume"})
"""Keys that the main job reads and a configuration need not hold, so that they may be added with +."""
OPTIONAL_GROUPS = frozenset({"experiment", "debug", "local"})
"""Groups that may be taken out with ~."""


def check_overrides(
    overrides: Sequence[Override], keys: Collection[str], groups: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Overrides that Hydra takes and no job can use: a key added that nothing reads, a section taken out.

    Args:
        overrides: as they were typed.
        keys: top-level keys of the configuration without them.
        groups: groups of configuration files.

    Yields:
        The override as it was typed, and its line.
    """
    known = {*keys, *groups, *LATER_KEYS, "hydra"}
    for override in overrides:
        top = (override.package or override.key_or_group).partition(".")[0]
        typed = str(override.input_line)
        if override.is_delete() and override.key_or_group in known - OPTIONAL_GROUPS:
            yield typed, f"{typed}: the job needs it; leave {typed} out, and set {top}=… for another value"
        elif not override.is_delete() and top.partition("/")[0] not in known and top not in known:
            near = f"{did_you_mean(top, known)}the nearest keys are: {', '.join(closest_first(top, known)[:8])}"
            yield typed, f"{typed.lstrip('+')}: no such key; {near}"


def check_hydra(config: DictConfig, sweeping: bool) -> Iterator[Mistake]:
    """Mistakes in Hydra's own node that would be met after the check: the job's folder, and the number of jobs at once.

    Args:
        config: a composed configuration, with the node.
        sweeping: whether the jobs of a sweep are run.
    """
    hydra = config.hydra
    if hydra.get("output_subdir") is not None:
        yield from _check_folder(config, "sweep" if sweeping else "run")
    if hydra.launcher.get("n_jobs", 1) == 0:
        yield Mistake("hydra.launcher.n_jobs", 0, "there must be a job at a time", "give 2, or -1 for all cores")


def _check_folder(config: DictConfig, node: str) -> Iterator[Mistake]:
    key = f"hydra.{node}.dir"
    try:
        folder = str(config.hydra[node].dir)
        outputs = OmegaConf.select(config, "paths.outputs")
    except OmegaConfBaseException as error:
        raw = str(config.hydra[node]._get_node("dir"))
        if "${paths." not in raw:  # those are told by themselves
            yield Mistake(key, raw, f"cannot be resolved ({one_line(str(error))})", "give a folder")
        return
    if not folder.strip():
        yield Mistake(key, folder, "must not be empty", "give a folder, or leave the key out")
    elif outputs and Path(folder).is_relative_to(str(outputs)):
        return  # and so is this one
    elif (reason := why_unwritable(Path(folder))) is not None:
        yield Mistake(key, folder, f"cannot be written ({reason})", "give a folder you may write to")
