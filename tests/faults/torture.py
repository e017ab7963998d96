"""Kills real training processes, resumes them, and compares what they leave with runs that nobody disturbed.

    python tests/faults/torture.py --kills 100

Every kill is a SIGKILL: a third as soon as a checkpoint is seen being written, a third at a random moment after one, a
third in the first seconds of a process. After each, every checkpoint that lies there must be readable. When a run has
had its kills it is let finish, and then every metric but the measured times, the kept policies and the last checkpoint
must be those of the undisturbed run, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from commands import finished, start
from mlflow import MlflowClient
from mlflow.entities import ViewType

from msgrpo_lab.runs.checkpoint import (
    BEST,
    FOLDER,
    OPTIMIZER,
    TEMPORARY,
    WEIGHTS,
    CheckpointError,
    checkpoints,
    read_checkpoint,
)

GAMES = ("frozenlake", "snake")
SMALLEST = (
    "model=tiny",
    "model.source.hidden_size=32",
    "model.source.intermediate_size=64",
    "model.source.num_layers=2",
    "debug=fast",
    "trainer.accelerator=cpu",
    "update.minibatches=2",
    "evaluation.every=2",
    "evaluation.reference_simulations=4",
    "logger.log_system_metrics=false",
    "optim.lr=0.01",
)
EPOCHS = 16
KILLS_A_RUN = 10
TIMES = ("perf/", "system/", "train/wall_s")
"""How the metrics begin that measure time."""
Points = dict[tuple[str, int], list[float]]


@dataclass
class Tally:
    """What was done to the runs of one game, and what came of it."""

    game: str
    runs: int = 0
    kills: int = 0
    in_write: int = 0
    """Kills while a checkpoint was being written: its temporary folder was left."""
    before_first: int = 0
    """Kills before the first checkpoint of the process's run."""
    unreadable: int = 0
    points: int = 0
    doubled: int = 0
    differing: list[str] = field(default_factory=list)

    def row(self) -> str:
        """A row of the table in docs/reliability.md."""
        cells = (self.game, self.runs, self.kills, self.in_write, self.before_first, self.unreadable)
        return "| " + " | ".join(map(str, (*cells, self.points, self.doubled, len(self.differing)))) + " |"


COLUMNS = (
    "game",
    "runs",
    "kills",
    "in a checkpoint's write",
    "before the first checkpoint",
    "unreadable checkpoints",
    "metric points compared",
    "doubled",
    "differing",
)


def command(game: str, seed: int, epochs: int, outputs: Path, folder: Path) -> list[str]:
    """The command of a run."""
    size = (f"env={game}", f"seed={seed}", f"trainer.max_epochs={epochs}")
    return [*SMALLEST, *size, f"paths.outputs={outputs}", f"hydra.run.dir={folder}", "resume=auto"]


def metrics(outputs: Path, folder: Path) -> Points:
    """Every value of every metric of the one tracked run of a folder, measured times left out."""
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("msgrpo")
    assert experiment is not None
    query = f"tags.`msgrpo.folder` = '{folder}'"
    runs = client.search_runs([experiment.experiment_id], query, run_view_type=ViewType.ALL)
    assert len(runs) == 1, f"{folder}: {len(runs)} tracked runs instead of one"
    assert runs[0].info.status == "FINISHED", runs[0].info.status
    points: Points = {}
    for name in runs[0].data.metrics:
        if not name.startswith(TIMES):
            for point in client.get_metric_history(runs[0].info.run_id, name):
                points.setdefault((name, point.step), []).append(point.value)
    return points


def kept(folder: Path) -> dict[str, str]:
    """Digests of what a run leaves: both policies, and the tensors of its last checkpoint."""
    newest = checkpoints(folder / FOLDER)[-1][1]
    tensors = [newest / name for name in (WEIGHTS, OPTIMIZER, BEST) if (newest / name).exists()]
    files = [*sorted((folder / "adapter").rglob("*.safetensors")), *tensors]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_somewhere(argv: list[str], folder: Path, log: Path, rng: random.Random, tally: Tally) -> bool:
    """Starts a run and kills it; False if it came to its end before.

    The moment is told by what the process has done, not by a clock that the machine's load would bend: after some new
    checkpoints, in the writing of the next one or a while later; or in its first seconds.
    """
    process = start(argv, log)
    before = latest_update(folder)
    kind, wanted, later_s = rng.choice(("writing", "between", "early")), rng.randint(0, 2), rng.uniform(0.0, 1.0)
    due = time.monotonic() + 4 * later_s if kind == "early" else math.inf
    new: set[int] = set()
    while process.is_alive() and time.monotonic() < due:
        if (update := latest_update(folder)) > before:
            new.add(update)
        if len(new) >= wanted and kind == "writing" and being_written(folder):
            break
        if len(new) > wanted and kind == "between":
            due = min(due, time.monotonic() + later_s)
        time.sleep(0.0002)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        return False
    tally.kills += 1
    tally.in_write += bool(being_written(folder))
    tally.before_first += not checkpoints(folder / FOLDER)
    for _, checkpoint in checkpoints(folder / FOLDER):
        try:
            read_checkpoint(checkpoint)
        except CheckpointError as error:
            tally.unreadable += 1
            tally.differing.append(str(error))
    return True


def latest_update(folder: Path) -> int:
    """The update of the newest checkpoint; -1 where there is none."""
    return max((update for update, _ in checkpoints(folder / FOLDER)), default=-1)


def being_written(folder: Path) -> list[str]:
    """Checkpoints under their temporary names."""
    try:
        names = os.listdir(folder / FOLDER)  # noqa: PTH208  asked thousands of times a second
        return [name for name in names if name.startswith(f"{TEMPORARY}update-")]
    except FileNotFoundError:
        return []


def torture(outputs: Path, seed: int, kills: int, epochs: int, rng: random.Random, tally: Tally) -> None:
    """One run with up to `kills` kills, held against an undisturbed one."""
    game = tally.game
    whole, broken = outputs / f"{game}-{seed}-whole", outputs / f"{game}-{seed}-broken"
    log = outputs / f"{game}-{seed}.log"
    code = finished(command(game, seed, epochs, outputs, whole), log)
    assert code == 0, f"the undisturbed run ended with {code}; see {log}"
    argv = command(game, seed, epochs, outputs, broken)
    for _ in range(kills):
        if not kill_somewhere(argv, broken, log, rng, tally):
            break
    code = finished(argv, log)
    assert code == 0, f"the resumed run ended with {code}; see {log}"
    tally.runs += 1
    expected, found = metrics(outputs, whole), metrics(outputs, broken)
    tally.points += len(expected)
    tally.doubled += sum(len(values) > 1 for values in found.values())
    wrong = [point for point in expected.keys() | found.keys() if expected.get(point) != found.get(point)]
    tally.differing += [f"{game}-{seed} {point}: {expected.get(point)} {found.get(point)}" for point in wrong]
    ours, theirs = kept(broken), kept(whole)
    files = sorted(ours.keys() | theirs.keys())
    tally.differing += [f"{game}-{seed} {name}" for name in files if ours.get(name) != theirs.get(name)]


def run(kills: int, outputs: Path, *, seed: int, epochs: int, games: tuple[str, ...]) -> list[Tally]:
    """At least `kills` kills, shared out over the games."""
    rng = random.Random(seed)
    tallies = [Tally(game) for game in games]
    share = math.ceil(kills / len(games))
    number = seed
    while waiting := [tally for tally in tallies if tally.kills < share]:
        tally = min(waiting, key=lambda tally: tally.kills)
        torture(outputs, number, min(KILLS_A_RUN, share - tally.kills), epochs, rng, tally)
        print(tally.row(), flush=True)
        number += 1
    return tallies


def main() -> int:
    """Prints the table; 1 if a run was not the same."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--games", nargs="+", choices=GAMES, default=GAMES)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="msgrpo-torture-") as folder:
        games = tuple(arguments.games)
        tallies = run(arguments.kills, Path(folder), seed=arguments.seed, epochs=arguments.epochs, games=games)
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for tally in tallies:
        print(tally.row())
    wrong = [line for tally in tallies for line in tally.differing]
    print(json.dumps({"seconds": round(time.monotonic() - began), "differing": wrong[:20]}))
    return 1 if wrong or any(tally.unreadable or tally.doubled for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
