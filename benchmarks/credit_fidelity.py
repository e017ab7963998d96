"""Which credit rule follows the exact policy gradient, and when: `python benchmarks/credit_fidelity.py`.

Trains `model=tiny` on deterministic and on slippery ice with several group sizes, keeps a rollout from before training
and one from late in it, and holds every credit rule against the exact answer on each (`msgrpo_lab.compare`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
ENVS = ("frozenlake", "frozenlake_slippery")
GROUP_SIZES = (4, 16, 64)
EPISODES = 2048
SAMPLERS = "uniform,abs_adv"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--updates", type=int, default=150, help="updates before the late rollout")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "credit_fidelity")
    return made


def job(module: str, *arguments: str) -> None:
    """Runs one of the project's commands; its failure ends this one."""
    subprocess.run([sys.executable, "-m", f"msgrpo_lab.{module}", *arguments], cwd=ROOT, check=True)


def rollouts(env: str, group_size: int, updates: int, seed: int, folder: Path) -> dict[str, Path]:
    """An early and a late rollout of one training run."""
    job(
        "train",
        "model=tiny",
        f"env={env}",
        f"seed={seed}",
        f"rollout.group_size={group_size}",
        f"rollout.num_groups={EPISODES // group_size}",
        f"sampler.num_episodes={EPISODES // 4}",
        f"trainer.max_epochs={updates + 1}",
        f"evaluation.every={updates + 1}",
        f"callbacks.rollouts.every={updates}",
        f"callbacks.rollouts.folder={folder}",
        "callbacks.rollouts.keep_in_mlflow=false",
        "logger=csv",
    )
    return {"before": folder / "update_000000.parquet", "late": folder / f"update_{updates:06d}.parquet"}


def main(argv: list[str] | None = None) -> int:
    """Measures all cells and writes `table.csv` with a row a cell, credit rule and sampler."""
    arguments = parser().parse_args(argv)
    out: Path = arguments.out.resolve()
    tables = []
    for env in ENVS:
        for group_size in GROUP_SIZES:
            folder = out / f"{env}_{group_size}"
            for when, path in rollouts(env, group_size, arguments.updates, arguments.seed, folder).items():
                into = folder / when
                job("compare", f"rollouts={path}", "credit=all", f"sampler={SAMPLERS}", f"output={into}", "logger=null")
                table = pd.read_csv(into / "table.csv")
                table.insert(0, "when", when)
                table.insert(0, "group_size", group_size)
                table.insert(0, "env", env)
                tables.append(table)
    whole = pd.concat(tables)
    whole.to_csv(out / "table.csv", index=False)
    print(markdown(whole, "gradient_cosine"))
    print(markdown(whole, "over_episode_return"))
    print(f"Written: {out / 'table.csv'}")
    return 0


def markdown(whole: pd.DataFrame, score: str) -> str:
    """A score of every credit rule on all episodes, a column a cell, with its 95 % interval."""
    rows = whole[whole["sampler"].isna()]
    cells = list(dict.fromkeys(zip(rows["env"], rows["when"], rows["group_size"], strict=True)))
    lines = [
        f"| {score} | " + " | ".join(f"{env}, {when}, {size}" for env, when, size in cells) + " |",
        "|---" * (len(cells) + 1) + "|",
    ]
    for credit, of_credit in rows.groupby("credit"):
        found = []
        for env, when, size in cells:
            chosen = (of_credit["env"] == env) & (of_credit["when"] == when) & (of_credit["group_size"] == size)
            (row,) = of_credit[chosen].to_dict("records")
            low, high = row[f"{score}_low"], row[f"{score}_high"]
            found.append("" if pd.isna(row[score]) else f"{row[score]:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {credit} | " + " | ".join(found) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
