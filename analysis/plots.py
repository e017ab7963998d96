"""Draw a sweep's figures, its table and its card from MLflow alone: `python analysis/plots.py`, from any folder.

Each figure is written as PNG and PDF, with the numbers it shows as CSV beside them. Equal input gives equal bytes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

if __package__ in (None, ""):  # run by path: Python put analysis/ itself on the path, not the folder that holds it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import comparison_figures, figures, training_figures
from analysis.evaluations import MATCHING, NO_EVALUATIONS, as_references, load_evaluations
from analysis.figures import transfer_matrix
from analysis.sheet import paper_style
from analysis.style import Drawing
from analysis.table import write_table
from analysis.training_figures import efficiency
from msgrpo_lab.report.curves import join, label_methods
from msgrpo_lab.report.sweep import LATEST, NO_PARENT, TrackingError, copy_cards, keep_finished, load_metrics, load_runs

ROOT = Path(__file__).resolve().parents[1]
FIGURES: dict[str, Callable[[pd.DataFrame], Drawing | None]] = {
    "learning_curves": figures.learning_curves,
    "training_curves": figures.training_curves,
    "final_comparison": figures.final_comparison,
    "sampler_ablation": comparison_figures.sampler_ablation,
    "score_against_optimal": comparison_figures.score_against_optimal,
    "efficiency": efficiency,
    "credit_fidelity": training_figures.credit_fidelity,
    "entropies": training_figures.entropies,
    "diagnostics": training_figures.diagnostics,
}


class Remarks(logging.Handler):
    """Collects the warnings of a drawing, each once."""

    def __init__(self) -> None:
        """No remarks yet."""
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's message unless it was said before."""
        line = record.getMessage()
        if line not in self.lines:
            self.lines.append(line)


def save(name: str, drawing: Drawing, out: Path) -> list[Path]:
    """Write `<name>.png`, `.pdf` and `.csv` under `out`, without dates or versions in them; returns the paths."""
    paths = [out / f"{name}.{ending}" for ending in ("png", "pdf", "csv")]
    drawing.figure.savefig(paths[0], metadata={"Software": None})
    drawing.figure.savefig(paths[1], metadata={"Creator": None, "Producer": None, "CreationDate": None})
    drawing.data.to_csv(paths[2], index=False)
    return paths


def draw(
    tracking_uri: str, experiment: str, sweep: str, out: Path, evaluations: str = MATCHING
) -> tuple[list[Path], list[str]]:
    """Read a sweep and write every figure that it has numbers for, the table, and the sweep's card.

    Args:
        tracking_uri: MLflow tracking address.
        experiment: experiment name.
        sweep: "latest", "none" or parent run ids, as in `msgrpo_lab.report.sweep.load_runs`.
        out: folder to write into; made if it is not there.
        evaluations: which evaluation runs, as in `analysis.evaluations.load_evaluations`.

    Returns:
        The files written, and remarks on what was left out.

    Raises:
        TrackingError: nothing finished to draw; nothing has been written then.
    """
    remarks = Remarks()
    loggers = [logging.getLogger(name) for name in ("analysis", "msgrpo_lab.report")]
    for logger in loggers:
        logger.addHandler(remarks)
    try:
        runs = label_methods(keep_finished(load_runs(tracking_uri, experiment, sweep)))
        points = join(runs, load_metrics(tracking_uri, list(runs["run_id"])))
        if points.empty:
            raise TrackingError(f"sweep '{sweep}': its finished jobs hold no metrics to draw")
        scores = load_evaluations(tracking_uri, experiment, list(runs["run_id"]), evaluations)
        points = pd.concat([points, as_references(scores, points, set(runs["model"]))], ignore_index=True)
        out.mkdir(parents=True, exist_ok=True)
        paths: list[Path] = []
        with paper_style():
            drawings = ((name, function(points)) for name, function in FIGURES.items())
            for name, drawing in (*drawings, ("transfer_matrix", transfer_matrix(scores))):
                if drawing is not None:
                    paths += save(name, drawing, out)
        sweeps = [str(run_id) for run_id in runs["sweep"].unique() if run_id]
        paths += copy_cards(tracking_uri, sweeps, out)
        named = ", ".join(f"`{run_id}`" for run_id in sweeps)
        source = f"experiment `{experiment}`, " + (f"sweep {named}" if sweeps else "single runs")
        paths += write_table(points, source, remarks.lines, out)
    finally:
        for logger in loggers:
            logger.removeHandler(remarks)
    return paths, remarks.lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 with one line on stderr when there is nothing to draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--tracking-uri", default=f"sqlite:///{ROOT / 'outputs' / 'mlflow.db'}", help="MLflow address (%(default)s)"
    )
    parser.add_argument("--experiment", default="msgrpo", help="MLflow experiment (%(default)s)")
    parser.add_argument(
        "--sweep",
        default=LATEST,
        metavar="ID",
        help=f"parent run id, several with commas between; '{LATEST}': the newest finished sweep (default); "
        f"'{NO_PARENT}': the jobs that were run on their own",
    )
    parser.add_argument(
        "--evaluations",
        default=MATCHING,
        metavar="ID",
        help=f"evaluation runs: '{MATCHING}': of what the sweep trained, and what was evaluated beside it (default); "
        f"'{LATEST}': the newest evaluation; parent run ids with commas between; '{NO_EVALUATIONS}'",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs" / "figures", help="folder to write to (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        paths, remarks = draw(
            arguments.tracking_uri, arguments.experiment, arguments.sweep, arguments.out, arguments.evaluations
        )
    except TrackingError as error:
        print(f"plots.py: {error}", file=sys.stderr)
        return 2
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
