"""Times one iteration of the lab beside other trainers: `python benchmarks/peers.py --only ours,handwritten`.

What each peer does, and in what it differs: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run by path: Python put benchmarks/ itself on the path, not the folder that holds it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import trl_peer
from benchmarks.cells import ENVS, FAST, MODELS, POLICIES, BenchmarkCase, configuration, unit_cell
from benchmarks.handwritten import HandWritten
from benchmarks.measure import measure, untouched
from benchmarks.peer_job import PeerJob, PeerResult, samples_of
from benchmarks.ratios import Ratio, paired_ratio
from benchmarks.report import machine
from benchmarks.run import WARM_UP_SEED
from msgrpo_lab.config import ConfigError
from msgrpo_lab.training.assemble import Lab, build_lab
from msgrpo_lab.training.heap import keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "ours"
PEERS = (OURS, "handwritten", "trl", "trl-tuned")
WARM_UP_PROMPTS = 16

Iterate = Callable[[int, int], PeerResult]
"""One iteration, given seed and repetition."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", type=_peers, default=PEERS, help=f"comma-separated, of {','.join(PEERS)}")
    made.add_argument("--env", choices=ENVS, default="frozenlake")
    made.add_argument("--model", choices=MODELS, default="smollm2_135m")
    made.add_argument("--policy", choices=POLICIES, default="untrained")
    made.add_argument("--compact", action="store_true", help="the compact view instead of the paper's")
    made.add_argument("--groups", type=int, default=8)
    made.add_argument("--group-size", type=int, default=8)
    made.add_argument("--repetitions", type=int, default=3)
    made.add_argument("--budget-s", type=float, default=3600.0, help="seconds after which no repetition begins")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--accelerator", default="auto")
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--name", default="peers", help="of the JSON file that is written")
    return made


def _peers(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := [peer for peer in chosen if peer not in PEERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: no such peer; the peers are {', '.join(PEERS)}")
    return chosen


def job_cell(arguments: argparse.Namespace) -> BenchmarkCase:
    """The cell that a command line describes."""
    cell = unit_cell(
        arguments.env, arguments.model, arguments.policy, groups=arguments.groups, group_size=arguments.group_size
    )
    if not arguments.compact:
        return cell
    overrides = tuple(o.replace("env.observation=paper", "env.observation=compact") for o in cell.overrides)
    return BenchmarkCase(**{**asdict(cell), "name": f"{cell.name}/compact", "overrides": overrides})


def ours(lab: Lab, accelerator: str) -> Iterate:
    """The lab's fast path, warmed up by one whole iteration: the first one of a run waits for its memory."""
    measure(lab, variant=FAST, repetition=-1, seed=WARM_UP_SEED, accelerator=accelerator)

    def iterate(seed: int, repetition: int) -> PeerResult:
        made = measure(lab, variant=FAST, repetition=repetition + 1, seed=seed, accelerator=accelerator)
        return PeerResult(
            peer=OURS,
            repetition=repetition,
            env_steps=made.env_steps,
            rollout_s=made.rollout_s,
            update_s=made.total_s - made.rollout_s,
            total_s=made.total_s,
            generated_tokens=made.generated_tokens,
            loss=None,
        )

    return iterate


def handwritten(job: PeerJob) -> Iterate:
    """The plain loop, warmed up."""
    loop = HandWritten(job)
    with untouched(loop.model):
        loop.iterate(WARM_UP_SEED, -1, groups=1, group_size=2)

    def iterate(seed: int, repetition: int) -> PeerResult:
        with untouched(loop.model):
            return loop.iterate(seed, repetition, groups=job.groups, group_size=job.group_size)

    return iterate


def trl(job: PeerJob, lab: Lab, *, tuned: bool) -> Iterate:
    """TRL, on the (prompt, step) list of the lab's rollout with the same seed; warmed up."""
    trl_peer.iterate(job, samples_of(lab, 0)[:WARM_UP_PROMPTS], tuned=tuned, seed=WARM_UP_SEED, repetition=-1)

    def iterate(seed: int, repetition: int) -> PeerResult:
        return trl_peer.iterate(job, samples_of(lab, seed), tuned=tuned, seed=seed, repetition=repetition)

    return iterate


def run(arguments: argparse.Namespace) -> list[PeerResult]:
    """Measures the chosen peers, all of them once a repetition, in an order drawn anew each time."""
    if any(peer.startswith("trl") for peer in arguments.only):
        trl_peer.check_installed()
    config = configuration(job_cell(arguments), FAST, arguments.seed)
    lab = build_lab(config)
    job = PeerJob.of(lab, config)
    makers: dict[str, Callable[[], Iterate]] = {
        OURS: lambda: ours(lab, arguments.accelerator),
        "handwritten": lambda: handwritten(job),
        "trl": lambda: trl(job, lab, tuned=False),
        "trl-tuned": lambda: trl(job, lab, tuned=True),
    }
    iterate = {peer: makers[peer]() for peer in arguments.only}
    rng = np.random.default_rng(np.random.SeedSequence(arguments.seed))
    found: list[PeerResult] = []
    started = time.perf_counter()
    for repetition in range(arguments.repetitions):
        if repetition and time.perf_counter() - started > arguments.budget_s:
            print(f"{repetition} of {arguments.repetitions} repetitions: the time was used up", file=sys.stderr)
            break
        for peer in rng.permutation(arguments.only).tolist():
            made = iterate[peer](arguments.seed + repetition, repetition)
            found.append(made)
            print(
                f"{peer} #{repetition}: {made.total_s:.2f} s, {made.env_steps_per_s:.2f} env-steps/s", file=sys.stderr
            )
    return found


def ratio_to(results: Sequence[PeerResult], peer: str) -> Ratio | None:
    """Our env-steps a second over a peer's, pair by pair; None where one of the two was not measured."""
    rate = {(r.peer, r.repetition): r.env_steps_per_s for r in results}
    pairs = sorted(n for name, n in rate if name == peer and (OURS, n) in rate)
    return paired_ratio([rate[OURS, n] for n in pairs], [rate[peer, n] for n in pairs]) if pairs else None


def table(results: Sequence[PeerResult], arguments: argparse.Namespace) -> str:
    """A line a peer: rate (median and ends), our ratio to it, remarks."""
    lines = []
    for peer in arguments.only:
        made = [result for result in results if result.peer == peer]
        rates = [result.env_steps_per_s for result in made]
        line = (
            f"{peer:12} {np.median(rates):8.2f} env-steps/s [{min(rates):.2f}, {max(rates):.2f}] in {len(made)} "
            f"repetitions, {np.median([result.env_steps for result in made]):.0f} steps each"
        )
        ratio = ratio_to(results, peer) if peer != OURS else None
        if ratio is not None:
            line += f"; ours/{peer} {ratio} ({ratio.spread})"
        lines.append(line + (f"; {made[0].remark}" if made[0].remark else ""))
    size = f"{arguments.groups}x{arguments.group_size}"
    lines.append(
        f"Measured at {size} episodes. The peers' work is proportional to the steps, so their rates hold for other "
        "sizes (within what larger batches give); ours grows with the episodes: equal prompts are computed once."
    )
    return "\n".join(lines)


def as_json(results: Sequence[PeerResult], arguments: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Everything that was measured."""
    ratios = {peer: ratio_to(results, peer) for peer in arguments.only if peer != OURS}
    return {
        "command": list(command),
        "machine": machine(),
        "cell": asdict(job_cell(arguments)),
        "results": [{**asdict(result), "env_steps_per_s": result.env_steps_per_s} for result in results],
        "ours_over": {peer: None if ratio is None else asdict(ratio) for peer, ratio in ratios.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON. Returns the exit code."""
    arguments = parser().parse_args(argv)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    keep_freed_memory()  # as training does; whatever is measured beside the lab has it too
    try:
        results = run(arguments)
    except ConfigError as error:
        for line in error.mistakes:
            print(f"benchmark: {line}", file=sys.stderr)
        return 2
    except trl_peer.MissingPeerError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name}.json"
    command = ["benchmarks/peers.py", *(sys.argv[1:] if argv is None else argv)]
    path.write_text(json.dumps(as_json(results, arguments, command), indent=1) + "\n")
    print(table(results, arguments))
    print("Written:", path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
