"""`python -m msgrpo_lab.plan`: what it says of every preset, what it writes, and what it says of mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab_made import training_presets

from msgrpo_lab.config.command_line import sound_jobs
from msgrpo_lab.plan import main, read_request
from msgrpo_lab.planner.report import as_json, as_text, plan_cells

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("model=tiny", "debug=fast")


def planned(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    main([*arguments, f"output={tmp_path}/plan.json"])
    plan: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
    return plan


def test_the_papers_experiment_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(tmp_path, "experiment=paper/frozenlake")
    (cell,) = plan["cells"]
    assert plan["jobs"] == cell["jobs"] == 16, "2 samplers, 8 seeds"
    assert plan["command"] == "python -m msgrpo_lab.train -m experiment=paper/frozenlake"
    assert cell["model"]["parameters"] == 3_085_938_688
    work = cell["work"]
    assert work["updates"] == {"rollout": 2, "job": 1400, "all": 22400}
    assert work["episodes"] == {"rollout": 64, "job": 44800, "all": 716800}
    assert work["evaluation_episodes"]["job"] == 2 * 50 * 71, "at the start and every 10 of 700, sampled and greedy"
    assert work["generated_tokens"]["job"] == 100 * work["turns"]["job"]
    gpu = cell["memory"]["gpu"]
    assert gpu["weights"] == 2 * 3_085_938_688, "bfloat16"
    assert gpu["gradients"] == gpu["adapter"] == gpu["optimizer"] / 2 == 4 * cell["model"]["trained"]
    assert gpu["peak"] == sum(value for key, value in gpu.items() if key != "peak")
    assert set(cell["devices"]) == set(plan["hours"]) == {"H100", "H200", "A100-80G", "L40S", "RTX 4090", "2-core CPU"}
    for name, device in cell["devices"].items():
        low, high = device["hours"]
        assert 0 < low < high
        assert plan["hours"][name] == pytest.approx([16 * low, 16 * high])
        assert device["measured"] == (name == "2-core CPU")
        place = "cpu" if name == "2-core CPU" else "gpu"
        assert device["fits"] == (cell["memory"][place]["peak"] <= device["capacity"])
    printed = capsys.readouterr().out
    assert "16 jobs" in printed
    assert "ASSUMED (peaks of the data sheets; nothing of this program was measured on a GPU)" in printed


@pytest.mark.parametrize("preset", training_presets())
def test_every_preset_is_planned_on_the_meta_device(preset: str) -> None:
    cells = plan_cells(sound_jobs([preset], "train"), None)
    text = as_text(cells, preset)
    (cell,) = as_json(cells, preset)["cells"]
    assert cell["jobs"] == 1
    assert cell["work"]["turns"]["job"] > 0
    assert all(line in text for line in cells[0].assumptions)


def test_jobs_that_cost_the_same_are_planned_once(tmp_path: Path) -> None:
    plan = planned(tmp_path, *QUICK, "env=frozenlake,snake", "sampler=uniform,abs_adv", "seed=0,1,2")
    assert [(cell["label"], cell["jobs"]) for cell in plan["cells"]] == [
        ("tiny on frozenlake", 6),
        ("tiny on snake", 6),
    ]
    assert plan["jobs"] == 12
    low, high = plan["hours"]["H200"]
    assert low == pytest.approx(sum(6 * cell["devices"]["H200"]["hours"][0] for cell in plan["cells"]))
    assert low <= high


def test_nothing_but_the_output_is_written(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    planned(tmp_path, *QUICK, f"paths.outputs={outputs}")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["sampler=nosuch"], "sampler=nosuch: no such option"),
        (["output=/no/such/folder/plan.json"], "output=/no/such/folder/plan.json: there is no folder /no/such/folder"),
        (["output="], "output=: must not be empty"),
        (["answer_tokens=0"], "answer_tokens=0: must be a whole number at least 1"),
        (["answer_tokens=many"], "answer_tokens=many: must be a whole number at least 1"),
        (["rollout.group_size=1"], "rollout.group_size=1: must be "),
        (["model=qwen2_5_3b", "model.source.architecture=null"], "model.source.architecture=None: a plan needs it"),
        (["model=qwen2_5_3b", "model.source.architecture.model_type=nosuch"], "model.source.architecture={"),
        (["model=tiny", "model.lora_rank=4", "model.lora_targets=[nosuch]"], "model.lora_targets=[nosuch]: "),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], beginning: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, f"paths.outputs={tmp_path}/outputs"])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"msgrpo_lab: {beginning}")
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_its_own_keys_are_told_from_the_main_jobs() -> None:
    request = read_request(["-m", "seed=0,1", "answer_tokens=7", "output=plan.json"])
    assert request.overrides == ("seed=0,1",)
    assert request.answer_tokens == 7
    assert request.output == Path("plan.json").resolve()


def test_help_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "answer_tokens" in capsys.readouterr().out


def peaks(folder: Path, *choices: str) -> tuple[float, float]:
    """Peak memory of a real training process, MiB, as its own metric has it, and the planner's estimate."""
    overrides = [*choices, "logger=csv", f"paths.outputs={folder}"]
    done = subprocess.run(
        [sys.executable, "-m", "msgrpo_lab.train", *overrides], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (metrics,) = folder.rglob("metrics.csv")
    header, *rows = [line.split(",") for line in metrics.read_text().splitlines()]
    column = header.index("perf/peak_memory_mb")
    measured = max(float(row[column]) for row in rows if row[column])
    (cell,) = as_json(plan_cells(sound_jobs(overrides, "train"), None), "")["cells"]
    return measured, cell["memory"]["cpu"]["peak"] / 2**20


def test_the_memory_of_tiny_is_within_a_quarter_of_what_is_measured(tmp_path: Path) -> None:
    measured, estimated = peaks(tmp_path, "model=tiny", "trainer.max_epochs=3")
    assert estimated == pytest.approx(measured, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["free", "constrained"])
def test_the_memory_of_smollm2_is_within_a_quarter_of_what_is_measured(tmp_path: Path, sampling: str) -> None:
    measured, estimated = peaks(tmp_path, "model=smollm2_135m", f"sampling={sampling}", "trainer.max_epochs=8")
    assert estimated == pytest.approx(measured, rel=0.25)
