"""The main job: `python -m msgrpo_lab.train`. Compose, check, assemble, fit.

python -m msgrpo_lab.train -m sampler=uniform,abs_adv env=snake,frozenlake
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from msgrpo_lab.config import check_command_line, conf_dir
from msgrpo_lab.config.mistakes import one_line

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


def train(config: DictConfig) -> float:
    """One training run from a checked configuration.

    Returns:
        The last evaluation's sampled return on the held-out seeds (what Hydra's optimising sweepers maximise).
    """
    # Heavy imports wait until the command line has been found right.
    import torch

    from msgrpo_lab.assemble import build_lab, component
    from msgrpo_lab.callbacks.adapter import AdapterKeeper
    from msgrpo_lab.heap import keep_freed_memory

    _quieten()
    keep_freed_memory()
    choices = HydraConfig.get().runtime.choices
    folder = Path(HydraConfig.get().runtime.output_dir)
    torch.use_deterministic_algorithms(True)
    # It would also fill every new tensor with NaN before its first use, which nothing here relies on.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    tracking = component(config.logger)
    logger = tracking.start(config)
    status = "FAILED"
    try:
        try:
            lab = build_lab(config)
        except (ValueError, OSError, InstantiationException) as error:
            # What only the model itself can tell: a damaged file, LoRA targets it does not have.
            status, message = "FAILED", one_line(str(innermost(error)))
            print(f"msgrpo_lab: {message}", file=sys.stderr)
            raise _CannotStart from error
        evaluation = component(config.evaluation, scenario=choices["env"])
        keeper = AdapterKeeper(folder=folder, evaluation=evaluation)
        named = [component(node) for node in (config.callbacks or {}).values() if node is not None]
        trainer = component(
            config.trainer, logger=logger, callbacks=[*named, evaluation, keeper], default_root_dir=str(folder)
        )
        trainer.fit(lab.module, datamodule=lab.data)
        status = "FINISHED"
    except _CannotStart:
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into an exit with code 1.
        status = "KILLED"
        log.warning("interrupted: the run is marked KILLED; what was trained so far is in %s", folder)
        raise SystemExit(INTERRUPTED) from stop
    finally:
        tracking.finish(status)
    return float(evaluation.latest_return)


def innermost(error: BaseException) -> BaseException:
    """The error that Hydra's instantiation errors were raised from."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


class _CannotStart(SystemExit):
    """A job ends before its first rollout, with exit code 1; the reason has been printed in one line."""

    def __init__(self) -> None:
        super().__init__(1)


def _quieten() -> None:
    """Leaves out what the libraries say that no user of the lab can act on."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*does not have many workers.*",
        r".*module\(s\) in eval mode.*",
        r".*is_gradient_checkpointing.*",
    ):
        warnings.filterwarnings("ignore", message=message)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def _job(config: DictConfig) -> float:
    return train(config)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: mistakes on the command line are told in one line each, with exit code 2, before anything runs."""
    if arguments is not None:
        sys.argv = [sys.argv[0], *arguments]
    check_command_line(sys.argv[1:], "train")
    return _job()


if __name__ == "__main__":
    main()
