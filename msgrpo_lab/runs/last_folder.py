"""Which folder a command trained into last, so that the same command finds its run or its sweep again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from msgrpo_lab.files import write_durably

FOLDER = "commands"
"""Below `paths.outputs`: one small file a command, named by its digest."""
NOT_PART = ("resume", "ckpt_path", "hydra.run.dir", "hydra.sweep.dir", "hydra.mode")
"""Keys that say how or where to run, not what."""


def digest(overrides: Iterable[str], *, config_name: str, sweeping: bool) -> str:
    """A command's name: the same for the same overrides in the same order, `resume=` and folders left out.

    The order of the task's own overrides matters, because it numbers the jobs of a sweep.
    """
    kept = [text for text in overrides if text.partition("=")[0].lstrip("+~") not in NOT_PART]
    own = [text for text in kept if not text.startswith(("hydra.", "hydra/"))]
    of_hydra = sorted(text for text in kept if text.startswith(("hydra.", "hydra/")))
    parts = ["sweep" if sweeping else "run", config_name, *own, *of_hydra]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def digest_of_job(hydra_config: Any, *, sweeping: bool) -> str:
    """The digest of the command that Hydra runs; `hydra_config` is its own node."""
    overrides = [*hydra_config.overrides.task, *hydra_config.overrides.hydra]
    return digest(map(str, overrides), config_name=str(hydra_config.job.config_name), sweeping=sweeping)


def remember(outputs: Path, name: str, folder: Path, command: Sequence[str]) -> None:
    """Notes that the command `name` trains into `folder`."""
    place = outputs / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    content = {"command": list(command), "folder": str(folder.absolute())}
    write_durably(place / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())


def last_folder(outputs: Path, name: str) -> Path | None:
    """The folder that the command `name` trained into last, if it is still there."""
    try:
        folder = Path(json.loads((outputs / FOLDER / f"{name}.json").read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it only helps to find a run: without it the run begins anew
    return folder if folder.is_dir() else None


def remember_run(config: DictConfig, folder: Path) -> None:
    """Notes the folder of the single run that Hydra has just begun."""
    hydra_config = HydraConfig.get()
    name = digest_of_job(hydra_config, sweeping=False)
    remember(Path(config.paths.outputs), name, folder, list(hydra_config.overrides.task))
