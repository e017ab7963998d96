"""Times the writing of thoughts beside a vLLM server and plain `generate`: `python benchmarks/thoughts.py`.

The untrained policy plays one rollout of `prompt=think_action` on Frozen Lake with `engine=hf`. Each arm then answers
the prompts of that rollout again, a turn at a time, with the same decoding rule. Only this is timed; no game is played.

- **hf**: the lab's engine.
- **vllm**: a turn is one request with token ids to `/v1/completions`.
- **generate**: the plain loop's `model.generate` (`handwritten.py`), a turn is one left-padded batch. It takes minutes,
  so by default it answers the first turn only; the other arms are reported on that turn as well.

The arms are not equal in this:

- `hf` reads each distinct prompt and each distinct beginning of an answer once, and the prefix of all prompts once. It
  forgets them before each measurement, as after an update. vLLM has its prefix cache (if the server has it on), but not
  across measurements: each has a `cache_salt` of its own. `generate` shares nothing.
- `hf` computes in bfloat16 and with the adapter, as training does; `generate` in bfloat16 with the adapter off. What
  the server computes in is its own matter: start it with `--dtype bfloat16` and the base model.
- vLLM's time holds HTTP, JSON and scheduling; an update would have to be loaded by the server, which is not measured.
- Every arm draws its own answers, so numbers of sampled tokens differ a little; rates are tokens a second.
- The server should have the same cores as this process; each of the two waits while the other one works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import torch
from jaxtyping import Int

if __package__ in (None, ""):  # run by path: Python put benchmarks/ itself on the path, not the folder that holds it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cells import FAST, BenchmarkCase, configuration, default_job
from benchmarks.handwritten import HandWritten
from benchmarks.peer_job import PeerJob
from benchmarks.peers import RESULTS
from benchmarks.ratios import paired_ratio
from benchmarks.report import machine
from msgrpo_lab.config import ConfigError
from msgrpo_lab.training.assemble import Lab, build_lab
from msgrpo_lab.training.heap import keep_freed_memory
from msgrpo_lab.types import RolloutBatch

OURS, VLLM, PLAIN = "hf", "vllm", "generate"
REQUEST_S = 3600.0

Prompts = list[Int[np.ndarray, " P"]]
"""What the live episodes of one turn read."""
Answer = Callable[[Prompts], int]
"""Answers the prompts of a turn; returns how many tokens were sampled."""
Begin = Callable[[int], Answer]
"""Begins a measurement with nothing remembered of an earlier one, given the seed of its draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One turn, answered by one arm."""

    arm: str
    repetition: int
    """From 0; the one that warmed up is -1."""
    turn: int
    tokens: int
    """Sampled ones."""
    seconds: float
    """Of the first turn with what the arm does before it."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--server", default="http://127.0.0.1:8123", help="address of a vLLM with the base model")
    made.add_argument("--groups", type=int, default=8)
    made.add_argument("--group-size", type=int, default=16)
    made.add_argument("--plain-turns", type=int, default=1, help="turns that plain generate answers; 0 leaves it out")
    made.add_argument("--repetitions", type=int, default=2)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--name", default="thoughts", help="of the JSON file that is written")
    return made


def job_cell(arguments: argparse.Namespace) -> BenchmarkCase:
    """The default job of thoughts in bfloat16, at the size that is asked for."""
    job = default_job("think_action")
    size = f"{arguments.groups}x{arguments.group_size}"
    return replace(
        job,
        name=f"{job.name.rpartition('/')[0]}/{size}",
        groups=arguments.groups,
        group_size=arguments.group_size,
        overrides=(*job.overrides, "model.precision=bfloat16"),
        draw_all=True,  # nothing is trained; a small rollout must not be refused for the recipe's number of episodes
    )


def turns_of(rollout: RolloutBatch) -> list[Prompts]:
    """The prompts of each turn, in the order of the episodes that were alive."""
    return [
        [episode.turns[turn].completion.prompt_ids for episode in rollout.episodes if turn < episode.length]
        for turn in range(int(rollout.num_turns.max()))
    ]


def ours(lab: Lab) -> Begin:
    """The lab's own engine."""
    data = lab.data

    def begin(seed: int) -> Answer:
        data.engine.sync(lab.policy, 0)
        rng = np.random.default_rng(seed)

        def answer(prompts: Prompts) -> int:
            made = data.engine.generate(prompts, data.sampling, rng.spawn(len(prompts)))
            return sum(len(completion.token_ids) for completion in made)

        return answer

    return begin


def served(client: openai.OpenAI, model: str, lab: Lab) -> Begin:
    """A model behind a vLLM server, with every field of the decoding rule in every request."""
    sampling = lab.data.sampling
    more: dict[str, Any] = {
        "top_k": sampling.top_k or 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": sorted(lab.policy.end_token_ids),
    }

    def begin(seed: int) -> Answer:
        salt = {"cache_salt": f"{time.time_ns()}-{seed}"}

        def answer(prompts: Prompts) -> int:
            made = client.completions.create(
                model=model,
                prompt=[prompt.tolist() for prompt in prompts],
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p or 1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                stop=list(sampling.stop) or None,
                extra_body={**more, **salt},
            )
            if made.usage is None or len(made.choices) != len(prompts):
                raise openai.OpenAIError(f"{len(made.choices)} answers to {len(prompts)} prompts, usage {made.usage}")
            return made.usage.completion_tokens

        return answer

    return begin


def plain(job: PeerJob) -> Begin:
    """`model.generate`, the adapter off."""
    loop = HandWritten(job)
    without_adapter = getattr(loop.model, "disable_adapter", contextlib.nullcontext)

    def begin(seed: int) -> Answer:
        rng = np.random.default_rng(seed)

        def answer(prompts: Prompts) -> int:
            with without_adapter(), torch.random.fork_rng():
                torch.manual_seed(int(rng.integers(2**31)))  # `generate` draws from torch's own generator
                return sum(map(len, loop.generate(prompts)))

        return answer

    return begin


def measure(arm: str, begin: Begin, turns: Sequence[Prompts], *, seed: int, repetition: int) -> list[Timed]:
    """Answers the turns one after the other."""
    found, started = [], time.perf_counter()
    answer = begin(seed)
    for turn, prompts in enumerate(turns):
        tokens, ended = answer(prompts), time.perf_counter()
        found.append(Timed(arm=arm, repetition=repetition, turn=turn, tokens=tokens, seconds=ended - started))
        started = ended
    return found


def run(arguments: argparse.Namespace) -> tuple[list[Prompts], list[Timed]]:
    """The prompts of each turn, and every arm's answers to them: once to warm up, then once a repetition.

    The order of the arms within a repetition is drawn anew each time.
    """
    config = configuration(job_cell(arguments), FAST, arguments.seed)
    client = openai.OpenAI(
        base_url=f"{arguments.server.rstrip('/')}/v1", api_key="none", max_retries=0, timeout=REQUEST_S
    )
    model = next(iter(client.models.list())).id  # asked first: without a server nothing is computed
    lab = build_lab(config)
    turns = turns_of(lab.data.collect(epoch=0, version=0))
    arms = {OURS: ours(lab), VLLM: served(client, model, lab)}
    if arguments.plain_turns:
        arms[PLAIN] = plain(PeerJob.of(lab, config))
    rng = np.random.default_rng(np.random.SeedSequence(arguments.seed))
    found: list[Timed] = []
    for repetition in range(-1, arguments.repetitions):
        for arm in rng.permutation(list(arms)).tolist():
            asked = turns[: arguments.plain_turns] if arm == PLAIN else turns
            made = measure(arm, arms[arm], asked, seed=arguments.seed + repetition + 1, repetition=repetition)
            found += made
            said = f"{sum(t.tokens for t in made)} tokens in {sum(t.seconds for t in made):.2f} s"
            print(f"{arm} {'warm-up' if repetition < 0 else f'#{repetition}'}: {said}", file=sys.stderr)
    return turns, found


def rows(turns: Sequence[Prompts], timed: Sequence[Timed]) -> list[dict[str, Any]]:
    """A row an arm over all turns, then a row an arm over as many first turns as plain `generate` answered."""
    few = len({t.turn for t in timed if t.arm == PLAIN})
    made = []
    for count, arms in ((len(turns), (OURS, VLLM)), (few, (OURS, VLLM, PLAIN))):
        if count == 0:
            continue
        totals = {arm: _totals(timed, arm, count) for arm in arms}
        rates = {arm: [tokens / seconds for tokens, seconds in total] for arm, total in totals.items()}
        prompts = [prompt.tobytes() for of_turn in turns[:count] for prompt in of_turn]
        for arm in arms:
            made.append(
                {
                    "arm": arm,
                    "turns": count,
                    "prompts": len(prompts),
                    "distinct": len(set(prompts)),
                    "tokens": [tokens for tokens, _ in totals[arm]],
                    "seconds": [seconds for _, seconds in totals[arm]],
                    "tokens_per_s": rates[arm],
                    "over_vllm": asdict(paired_ratio(rates[arm], rates[VLLM])),
                }
            )
    return made


def _totals(timed: Sequence[Timed], arm: str, turns: int) -> list[tuple[int, float]]:
    """Tokens and seconds of an arm's first turns, one pair a repetition."""
    mine = [t for t in timed if t.arm == arm and t.turn < turns and t.repetition >= 0]
    by_repetition = [[t for t in mine if t.repetition == r] for r in sorted({t.repetition for t in mine})]
    return [(sum(t.tokens for t in part), sum(t.seconds for t in part)) for part in by_repetition]


def table(made: Sequence[dict[str, Any]]) -> str:
    """The rows as text; tokens, seconds and rates one number a repetition, ratios with their smallest and largest."""
    lines = ["| arm | turns | prompts | distinct | sampled tokens | seconds | tokens/s | over vllm |", "|---" * 8 + "|"]
    for row in made:
        tokens, seconds, rates = (
            ", ".join(f"{value:,.{digits}f}" for value in row[key])
            for key, digits in (("tokens", 0), ("seconds", 1), ("tokens_per_s", 0))
        )
        ratio = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["over_vllm"])
        first = [row["arm"], row["turns"], row["prompts"], row["distinct"]]
        lines.append(f"| {' | '.join(map(str, first))} | {tokens} | {seconds} | {rates} | {ratio} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON. Returns the exit code."""
    arguments = parser().parse_args(argv)
    keep_freed_memory()  # as training does; plain `generate` has it too
    try:
        turns, timed = run(arguments)
    except ConfigError as error:
        for line in error.mistakes:
            print(f"benchmark: {line}", file=sys.stderr)
        return 2
    except openai.OpenAIError as error:
        problem = f"--server {arguments.server}: no answer ({' '.join(str(error).split())})"
        print(f"benchmark: {problem}; start `vllm serve` on the base model, or give its address", file=sys.stderr)
        return 2
    made = rows(turns, timed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name}.json"
    data = {
        "command": ["benchmarks/thoughts.py", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "cell": asdict(job_cell(arguments)),
        "rows": made,
        "turns": [asdict(t) for t in timed],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(table(made))
    print("Written:", path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
