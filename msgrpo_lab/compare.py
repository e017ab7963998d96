"""Which credit rule, which sampler? `python -m msgrpo_lab.compare rollouts=<file> credit=all sampler=uniform,abs_adv`.

Reads a saved rollout, computes the exact values of the policy that played it, holds every rule under every sampler
against them, and writes the table as Markdown and CSV, a figure, and all of them as MLflow artifacts. Needs neither
model nor GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from msgrpo_lab.config import ConfigError
from msgrpo_lab.config.command_line import EXIT_CODE
from msgrpo_lab.fidelity.settings import CompareSettings, read_settings, usage

SHOWN = ("spearman", "sign_agreement", "wrong_sign", "gradient_cosine")
"""Scores that the terminal is told of; the files hold all."""


def run(settings: CompareSettings) -> None:
    """Measures, prints, writes and tracks.

    Raises:
        ConfigError: the file, a rule or a sampler cannot be used, or a result not be written; one line.
    """
    # What reads files and measures waits until the command line has been found right.
    from msgrpo_lab.fidelity.rollout_file import load_rollout
    from msgrpo_lab.fidelity.table import compare
    from msgrpo_lab.seeding import generator

    try:
        saved = load_rollout(settings.rollouts)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    episodes = len(saved.batch.episodes)
    wanted = max(1, episodes // 2) if settings.num_episodes is None else settings.num_episodes
    if wanted > episodes:
        raise ConfigError([f"num_episodes={wanted}: {settings.rollouts} holds {episodes}; give at most {episodes}"])
    try:
        truth = saved.truth()
        batch = replace(saved.batch, exact_adv=truth.advantages(saved.batch))
    except ValueError as error:
        raise ConfigError([f"rollouts={settings.rollouts}: {error}"]) from error
    samplers = settings.make_samplers(wanted)
    try:
        comparison = compare(
            batch,
            truth,
            settings.rules,
            samplers,
            num_episodes=wanted,
            draws=settings.draws,
            resamples=settings.resamples,
            reduction=settings.reduction,
            rng=generator(settings.seed, "reference"),
        )
    except ValueError as error:
        raise ConfigError([f"rollouts={settings.rollouts}: {error}"]) from error
    _report(comparison, settings, saved.origin)


def _report(comparison: Any, settings: CompareSettings, origin: Mapping[str, Any]) -> None:
    """Says and keeps what was found."""
    from msgrpo_lab.fidelity.table import render_estimate

    title = " ".join(["Credit fidelity:", *(str(origin[key]) for key in ("env", "model") if key in origin)])
    if "update" in origin:
        title += f", update {origin['update']}"
    width = max(len(name) for name in settings.rules) + 2
    print(f"{title}: {comparison.episodes} episodes, {comparison.groups} groups, {comparison.turns} turns")
    print(" " * (width + 2) + "  ".join(f"{name:<23}" for name in SHOWN).rstrip())
    for cell in comparison.cells:
        if cell.sampler is None:
            numbers = "  ".join(f"{render_estimate(cell.scores[name].estimate()):<23}" for name in SHOWN)
            print(f"  {cell.credit:<{width}}{numbers}".rstrip())
    if settings.output is None:
        return
    try:
        written = _write(comparison, settings.output, title)
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise ConfigError([f"output={settings.output}: {problem}; give a folder on a disk with room"]) from error
    print(f"wrote {settings.output}")
    if settings.logger is not None:
        _track(comparison, settings, origin, written)


def _write(comparison: Any, folder: Path, title: str) -> list[Path]:
    """The tables and the figure; returns the files."""
    from msgrpo_lab.fidelity.table import as_csv, as_markdown, draw_comparison, paper_style, save_figure
    from msgrpo_lab.files import written_whole

    folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for name, text in (("table.md", as_markdown(comparison, title)), ("table.csv", as_csv(comparison))):
        with written_whole(folder / name) as stream:
            stream.write(text.encode())
        tables.append(folder / name)
    with paper_style():
        return [*tables, *save_figure(draw_comparison(comparison, title), folder, "fidelity")]


def _track(comparison: Any, settings: CompareSettings, origin: Mapping[str, Any], files: Sequence[Path]) -> None:
    """A run of its own kind in the tracking store, with the files as its artifacts and the rules' scores as metrics."""
    import math

    from msgrpo_lab.tracking.database import mlflow_module, prepare_store
    from msgrpo_lab.tracking.run import finish_run, start_run

    assert settings.logger is not None
    mlflow = mlflow_module()
    try:
        experiment_id = prepare_store(settings.logger.tracking_uri, settings.logger.experiment)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    mlflow.set_tracking_uri(settings.logger.tracking_uri)
    mlflow.set_experiment(experiment_id=experiment_id)
    of_origin = {key: str(origin[key]) for key in ("env", "model", "seed") if key in origin}
    start_run(
        OmegaConf.create(dict(settings.plain)),
        parent_run_id=None,
        run_name=settings.logger.run_name or f"compare {settings.rollouts.stem}",
        tags={"msgrpo.kind": "compare", **of_origin},
        log_system_metrics=False,
    )
    status = "FAILED"
    try:
        values = {
            f"credit/{cell.credit}/{name}": score.estimate().value
            for cell in comparison.cells
            if cell.sampler is None
            for name, score in cell.scores.items()
        }
        mlflow.log_metrics({name: value for name, value in values.items() if math.isfinite(value)})
        for file in files:  # the folder may hold other things
            mlflow.log_artifact(str(file), "compare")
        status = "FINISHED"
    finally:
        finish_run(status)  # type: ignore[arg-type]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: mistakes on the command line are told in one line each, with exit code 2, before anything runs."""
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(given):
        print(usage())
        return
    try:
        run(read_settings(given))
    except ConfigError as error:
        _refuse(error)


def _refuse(error: ConfigError) -> NoReturn:
    for line in error.mistakes:
        print(f"msgrpo_lab: {line}", file=sys.stderr)
    raise SystemExit(EXIT_CODE)


if __name__ == "__main__":
    main()
