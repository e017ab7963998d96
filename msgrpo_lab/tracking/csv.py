"""Tracking as files in the run's folder, for debugging: no database, no parent runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.config.components import resolve
from msgrpo_lab.tracking.run import Status

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


@dataclass(frozen=True, kw_only=True)
class CSVTracking:
    """Metrics as a CSV file under `folder`, None being the run's, for debugging: no database, no parent runs."""

    folder: str | None = None

    def start(self, cfg: DictConfig, run_id: str | None = None) -> Logger:  # noqa: ARG002  a file knows no runs
        """A logger that writes `folder/csv/metrics.csv`; the resolved configuration is written to `folder`.

        A run that is continued there writes `folder/csv_2/metrics.csv` and so on: Lightning would empty the first.
        """
        from lightning.pytorch.loggers import CSVLogger

        folder = Path(HydraConfig.get().runtime.output_dir if self.folder is None else self.folder)
        earlier = len(list(folder.glob("csv*/metrics.csv")))
        version = f"csv_{earlier + 1}" if earlier else "csv"
        # Written at every step, so that a kill loses none.
        logger = CSVLogger(save_dir=folder, name="", version=version, flush_logs_every_n_steps=1)
        folder.mkdir(parents=True, exist_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.create(resolve(cfg)))
        (folder / "resolved.yaml").write_text(text, encoding="utf-8")
        return logger

    def finish(self, status: Status) -> None:
        """Nothing is open."""

    def opened_in(self, folder: Path) -> None:
        """Nothing stays open."""

    def folder_of(self, run_id: str) -> Path:
        """Files know no runs.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"ckpt_path=run:{run_id}: logger=csv knows no runs; give the folder of a checkpoint instead")

    def start_sweep(self, command: Sequence[str], swept: Sequence[str]) -> None:
        """There are no parent runs."""

    def continue_sweep(self, parent_run_id: str) -> None:
        """There are no parent runs."""

    def finish_sweep(self, parent_run_id: str, status: Status) -> None:
        """There are no parent runs."""
