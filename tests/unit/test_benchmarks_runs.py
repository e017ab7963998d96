"""The benchmarks end to end, on two small layers and 2 × 2 episodes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_made import SMALL, composed
from omegaconf import OmegaConf

from benchmarks import peers, report, throughput
from benchmarks.cells import FAST, NAIVE, BenchmarkCase, configuration, default_job, make_lab, unit_cell
from benchmarks.measure import measure, peak_memory_mb, reset_peak_memory
from benchmarks.peer_job import advantages
from benchmarks.run import CellResult, run_cell
from benchmarks.trl_peer import MissingPeerError, check_installed, filled_up


def small(cell: BenchmarkCase) -> BenchmarkCase:
    return replace(cell, overrides=(*cell.overrides, *SMALL))


def small_cell(policy: Any = "untrained", **sizes: Any) -> BenchmarkCase:
    return small(unit_cell("frozenlake", "tiny", policy, **{"groups": 2, "group_size": 2, **sizes}, horizon=3))


def made(cell: BenchmarkCase, repetitions: int = 2, budget_s: float = 600.0) -> CellResult:
    return run_cell(cell, repetitions=repetitions, budget_s=budget_s, rng=np.random.default_rng(0), accelerator="cpu")


@pytest.fixture(scope="module")
def result() -> CellResult:
    return made(small_cell())


def test_the_unit_is_what_it_says() -> None:
    config = configuration(unit_cell("frozenlake", "smollm2_135m", "untrained"), FAST)
    assert (config.rollout.num_groups, config.rollout.group_size, config.sampler.num_episodes) == (8, 8, 64)
    assert (config.env.horizon, config.env.observation) == (8, "paper")
    assert (config.rollout.sampling.constrain, config.rollout.sampling.max_new_tokens) == (False, 8)
    assert (config.model.lora_rank, config.model.lora_targets, config.model.precision) == (16, "all-linear", "auto")
    assert (config["update"].passes, config["update"].minibatches) == (1, 1)


def test_the_variants_differ_in_engine_and_sharing_only() -> None:
    naive, fast = (configuration(unit_cell("snake", "tiny", "untrained"), variant) for variant in (NAIVE, FAST))
    assert (naive["update"].sharing, fast["update"].sharing) == ("none", "tree")
    assert naive.engine != fast.engine
    left: list[Any] = [OmegaConf.to_container(config, resolve=False) for config in (naive, fast)]
    for tree in left:
        del tree["engine"], tree["update"]["sharing"]
    assert left[0] == left[1]


@pytest.mark.parametrize("prompt", ["action_only", "think_action"])
def test_the_default_job_is_the_configurations_own(prompt: str) -> None:
    cell = default_job(prompt)
    measured, own = configuration(cell, FAST), composed(f"prompt={prompt}")
    for section in ("rollout", "prompt", "sampler", "update", "env"):
        assert measured[section] == own[section]
    assert (measured.rollout.num_groups, measured.rollout.group_size) == (cell.groups, cell.group_size)
    assert cell.variants == (FAST,)


def test_naive_jobs_of_a_real_model_are_cut_and_say_so() -> None:
    cell = unit_cell("frozenlake", "smollm2_135m", "untrained", group_size=128)
    assert (cell.groups_of(FAST), cell.groups_of(NAIVE), cell.reduced) == (8, 1, True)
    assert unit_cell("frozenlake", "tiny", "untrained", group_size=128).groups_of(NAIVE) == 8


def test_pairs_are_measured_from_the_same_weights_and_seeds(result: CellResult) -> None:
    naive, fast = result.of(NAIVE), result.of(FAST)
    assert [m.seed for m in naive] == [m.seed for m in fast] == [0, 1]
    for one, other in zip(naive, fast, strict=True):
        assert (one.env_steps, one.generated_tokens) == (other.env_steps, other.generated_tokens)
        assert (one.distinct_rows, one.work) == (other.distinct_rows, other.work)
    assert fast[0].work != fast[1].work


def test_fast_computes_less_and_naive_everything(result: CellResult) -> None:
    naive, fast = result.of(NAIVE)[0], result.of(FAST)[0]
    assert fast.work.distinct_tokens <= fast.computed_tokens < naive.computed_tokens
    assert 0 < fast.distinct_row_ratio <= 1


def test_every_step_is_trained_on_and_times_are_parts_of_the_whole(result: CellResult) -> None:
    for measurement in result.measurements:
        assert measurement.samples == measurement.env_steps
        assert measurement.trained_tokens == measurement.generated_tokens
        assert 0 < measurement.total_s < measurement.stopwatch_s
        assert measurement.env_steps_per_s < min(measurement.rollout_steps_per_s, measurement.update_steps_per_s)


def test_a_measurement_leaves_the_policy_as_it_was() -> None:
    lab = make_lab(small_cell(), FAST)
    before = [parameter.detach().clone() for parameter in lab.policy.trainable_parameters()]
    first, second = (measure(lab, variant=FAST, repetition=r, seed=3, accelerator="cpu") for r in range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, lab.policy.trainable_parameters(), strict=True))
    assert (first.env_steps, first.work) == (second.env_steps, second.work)


def test_the_budget_cuts_repetitions_and_says_so() -> None:
    cut = made(small_cell(), repetitions=3, budget_s=0.0)
    assert cut.made == 1
    assert "1 of 3 repetitions" in "\n".join(cut.remarks())


def test_naive_at_fewer_groups_is_said_in_the_table() -> None:
    reduced = made(small_cell(naive_groups=1), repetitions=1)
    assert [m.groups for m in reduced.measurements if m.variant == NAIVE] == [1]
    assert "naive was measured at 1 of 2 groups" in report.table([reduced])


@pytest.mark.parametrize("policy", ["legal", "legal_text"])
def test_legal_policies_always_act_legally(policy: str) -> None:
    lab = make_lab(small_cell(policy), FAST)
    measure(lab, variant=FAST, repetition=0, seed=0, accelerator="cpu")
    assert lab.data.metrics["train/valid_action_rate"] == 1.0
    assert (lab.data.sampling.choices is None) == (policy == "legal_text")


def test_table_json_and_figure(result: CellResult, tmp_path: Path) -> None:
    data, picture = report.write([result], ["command"], tmp_path, "named")
    (cell,) = json.loads(data.read_text())["cells"]
    assert cell["ratio"]["pairs"] == cell["repetitions_made"] == 2
    assert len(cell["measurements"]) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = report.table([result])
    for name, _, _ in report.COLUMNS:
        assert name in text
    assert "fast/naive" in text


def test_utilisation_is_distinct_work_over_time_and_peak(result: CellResult) -> None:
    measurement = replace(result.of(FAST)[0], update_s=2.0)
    assert report.utilisation(measurement, 4.0) == pytest.approx(measurement.work.flops / 8.0)


def test_the_last_line_of_quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    cells = [small_cell(), replace(small_cell(), env="snake")]
    monkeypatch.setattr(throughput, "cells_of", lambda _: cells)
    assert throughput.main(["--quick", "--out", str(tmp_path), "--accelerator", "cpu", "--repetitions", "1"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("frozenlake fast/naive ")
    first, second = line.split("; ")
    assert float(first.removeprefix("frozenlake fast/naive ")) > 0 < float(second.removeprefix("snake fast/naive "))


def test_quick_is_both_games_with_the_real_model() -> None:
    cells = throughput.cells_of(throughput.parser().parse_args(["--quick"]))
    assert [(cell.env, cell.model, cell.groups_of(FAST), cell.group_size) for cell in cells] == [
        ("frozenlake", "smollm2_135m", 8, 8),
        ("snake", "smollm2_135m", 8, 8),
    ]


def test_peak_memory_is_of_one_measurement() -> None:
    if reset_peak_memory() is None:
        pytest.skip("this system cannot set its peak of memory back")
    held = np.ones(40_000_000)
    grown = peak_memory_mb()
    del held
    base = reset_peak_memory()
    assert base is not None
    assert 300 < grown - base < 340  # 320 MB


def small_peers(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    plain = peers.job_cell
    monkeypatch.setattr(peers, "job_cell", lambda parsed: small(plain(parsed)))
    sizes = ["--model", "tiny", "--groups", "2", "--group-size", "2", "--repetitions", "1", "--accelerator", "cpu"]
    return peers.main([*sizes, *arguments])


@pytest.mark.parametrize("policy", ["untrained", "legal", "legal_text"])
def test_the_hand_written_loop_makes_the_same_iteration(
    policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert small_peers(monkeypatch, "--only", "ours,handwritten", "--policy", policy, "--out", str(tmp_path)) == 0
    data = json.loads((tmp_path / "peers.json").read_text())
    ours, plain = sorted(data["results"], key=lambda made: made["peer"] != "ours")
    assert (ours["peer"], plain["peer"]) == ("ours", "handwritten")
    assert data["ours_over"]["handwritten"]["median"] == pytest.approx(
        ours["env_steps_per_s"] / plain["env_steps_per_s"]
    )
    assert 4 <= plain["env_steps"] <= 32
    assert plain["generated_tokens"] <= plain["env_steps"] * (8 if policy != "legal" else 1)


def test_an_unknown_peer_is_told(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--only", "ours,nobody"])
    assert "'nobody': no such peer; the peers are ours, handwritten, trl, trl-tuned" in capsys.readouterr().err


def test_trl_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingPeerError, match=r"pip install .*'\.\[peers\]'"):
        check_installed()
    assert peers.main(["--model", "tiny", "--only", "trl"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_batches_are_filled_up_with_the_first_samples() -> None:
    samples: Any = list(range(10))
    assert filled_up(samples, 8) == [*range(10), *range(6)]
    assert filled_up(samples, 5) == samples


def test_advantages_are_relative_to_the_group() -> None:
    assert advantages([1.0, 3.0, 5.0, 5.0], 2) == pytest.approx([-1.0, 1.0, 0.0, 0.0], abs=1e-5)
