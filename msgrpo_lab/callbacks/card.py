"""The experiment card of a sweep: `card.md`, an artifact of its parent run, made when the sweep ends.

It reads MLflow alone, so it can be made again at any time:

    python -m msgrpo_lab.callbacks.card <sweep id, or latest>
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgrpo_lab.callbacks.card_sections import render
from msgrpo_lab.callbacks.store import check_reachable, database_path, mlflow_module
from msgrpo_lab.callbacks.sweep_record import read_sweep
from msgrpo_lab.config.paths import project_root
from msgrpo_lab.messages import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

CARD = "card.md"
LATEST = "latest"


def keep_card(tracking_uri: str, sweep: str) -> None:
    """Write the card of a sweep that has ended to its parent run; a card that cannot be made is a warning."""
    mlflow = mlflow_module()
    try:
        client = mlflow.MlflowClient(tracking_uri)
        client.log_text(sweep, render(read_sweep(client, sweep)), CARD)
    # RuntimeError: a program that is ending starts no threads, which remote artifact stores work with
    except (mlflow.exceptions.MlflowException, OSError, ValueError, RuntimeError) as error:
        log.warning(
            "sweep %s has no card (%s): make it with python -m msgrpo_lab.callbacks.card %s",
            sweep,
            one_line(str(error)),
            sweep,
        )


def _newest(client: MlflowClient, experiment: str) -> str:
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"experiment={experiment}: no such experiment; give the --experiment that was swept in")
    sweeps = client.search_runs(
        [found.experiment_id], "tags.`msgrpo.kind` = 'sweep'", max_results=1, order_by=["attributes.start_time DESC"]
    )
    if not sweeps:
        raise ValueError(f"sweep={LATEST}: experiment '{experiment}' has no sweep; make one with `make sweep`")
    return str(sweeps[0].info.run_id)


def _client(tracking_uri: str) -> MlflowClient:
    check_reachable(tracking_uri)
    path = database_path(tracking_uri)
    if path is not None and not path.is_file():
        raise ValueError(f"tracking-uri={tracking_uri}: no database is there; give the one the sweep was logged to")
    client: MlflowClient = mlflow_module().MlflowClient(tracking_uri)
    return client


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="msgrpo_lab.callbacks.card", description="Make a sweep's experiment card.")
    parser.add_argument("sweep", nargs="?", default=LATEST, help="parent run id (default: the newest sweep)")
    parser.add_argument(
        "--tracking-uri",
        default=f"sqlite:///{project_root() / 'outputs' / 'mlflow.db'}",
        help="MLflow address (%(default)s)",
    )
    parser.add_argument("--experiment", default="msgrpo", help="where to look for the newest sweep (%(default)s)")
    parser.add_argument(
        "--output", type=Path, help=f"write the card to this file, instead of to the parent run as {CARD}"
    )
    arguments = parser.parse_args(argv)
    mlflow = mlflow_module()
    try:
        client = _client(arguments.tracking_uri)
        sweep = _newest(client, arguments.experiment) if arguments.sweep == LATEST else arguments.sweep
        text = render(read_sweep(client, sweep))
        if arguments.output is None:
            client.log_text(sweep, text, CARD)
            print(f"{CARD} of sweep {sweep} in {arguments.tracking_uri}")
        else:
            arguments.output.write_text(text, encoding="utf-8")
            print(arguments.output)
    except (mlflow.exceptions.MlflowException, OSError, ValueError) as error:
        print(f"msgrpo_lab: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
