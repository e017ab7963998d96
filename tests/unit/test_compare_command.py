"""`python -m msgrpo_lab.compare`: every rule under every sampler, and one line for every mistake."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from fidelity_made import Played, play

from msgrpo_lab import compare as command
from msgrpo_lab.config import ConfigError, conf_dir
from msgrpo_lab.config.choices import options_of
from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.exact import Exact
from msgrpo_lab.fidelity.meter import CREDIT_SCORES, DRAWN_SCORES
from msgrpo_lab.fidelity.rollout_file import GameSettings, save_rollout
from msgrpo_lab.fidelity.settings import read_settings
from msgrpo_lab.fidelity.table import (
    OVER_BASE_CREDIT,
    OVER_BASE_SAMPLER,
    as_csv,
    as_markdown,
    compare,
    draw_comparison,
    paper_style,
    render_estimate,
    save_figure,
)
from msgrpo_lab.sampler.abs_advantage import AbsAdvantage
from msgrpo_lab.sampler.uniform import Uniform

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def played() -> Played:
    return play(groups=16, group_size=4)


@pytest.fixture
def file(tmp_path: Path, played: Played, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved rollout, in a folder that everything else is written under as well."""
    monkeypatch.setenv("MSGRPO_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rollout.parquet"
    save_rollout(path, played.saved)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


# What it says -------------------------------------------------------------------------------------------------------


def test_every_configured_rule_under_every_configured_sampler(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new file of conf/credit or conf/sampler is in the table unasked."""
    command.main([f"rollouts={file}", "logger=null", "draws=2", "resamples=8"])
    folder = file.parent / "outputs" / "compare"
    assert {path.name for path in folder.iterdir()} == {"table.md", "table.csv"} | {
        f"fidelity.{kind}" for kind in ("pdf", "svg", "png")
    }
    rows = rows_of(folder / "table.csv")
    cells = {(row["credit"], row["sampler"]) for row in rows}
    assert cells == {(rule, sampler) for rule in options_of("credit") for sampler in ["", *options_of("sampler")]}
    by_cell = {(row["credit"], row["sampler"]): row for row in rows}
    exact = by_cell["exact", "abs_adv"]
    assert (exact["spearman"], exact["wrong_sign"], exact["sampled_cosine"]) == ("1", "0", "1")
    assert float(by_cell["rloo", "uniform"]["ess"]) == 1.0
    for row in rows:
        assert float(row["gradient_cosine_low"]) <= float(row["gradient_cosine"]) <= float(row["gradient_cosine_high"])
        assert (row["over_uniform"] == "") == (row["sampler"] in ("", "uniform"))
        assert (row["over_episode_return"] == "") == (row["credit"] == "episode_return")
    text = (folder / "table.md").read_text()
    assert text.startswith("# Credit fidelity: frozenlake_slippery, update 7\n\n64 episodes, 16 groups, ")
    assert "over 2 draws of 32 episodes" in text
    assert text.count("\n| ") == len(rows) + 2, "a line a cell, and two headings"
    said = capsys.readouterr().out
    assert f"wrote {folder}" in said
    assert "exact            1.000 [1.000, 1.000]" in said
    assert not (file.parent / "outputs" / "mlflow.db").exists()


def test_same_seed_same_bytes_other_seed_other_draws(file: Path) -> None:
    contents = []
    for seed in (0, 0, 1):
        command.main(
            [f"rollouts={file}", "credit=rloo", "sampler=pods", "logger=null", "draws=2", "resamples=8", f"seed={seed}"]
        )
        folder = file.parent / "outputs" / "compare"
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert contents[0]["table.csv"] != contents[2]["table.csv"]


def test_names_settings_and_numbers_are_taken_from_the_command_line(file: Path, played: Played) -> None:
    arguments = [f"rollouts={file}", "credit=[rloo,gigpo]", "credit.gigpo.gamma=0.5", "sampler=abs_adv,uniform"]
    arguments += [
        "sampler.abs_adv.alpha=2",
        "num_episodes=10",
        "reduction=sequence",
        "output=here/there",
        "logger=null",
    ]
    settings = read_settings(arguments)
    assert list(settings.rules) == ["rloo", "gigpo"]
    assert settings.rules["gigpo"].gamma == 0.5  # type: ignore[attr-defined]
    samplers = settings.make_samplers(10)
    assert samplers["abs_adv"] == AbsAdvantage(num_episodes=10, alpha=2)
    assert samplers["uniform"] == Uniform(num_episodes=10)
    assert settings.reduction == "sequence"
    assert settings.output == file.parent / "here" / "there"
    command.main(arguments)
    text = (file.parent / "here" / "there" / "table.md").read_text()
    assert "draws of 10 episodes" in text
    assert "by `sequence`" in text


def test_without_samplers_and_without_output(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([f"rollouts={file}", "credit=exact", "sampler=null", "output=null"])
    assert (
        capsys.readouterr()
        .out.splitlines()[0]
        .startswith("Credit fidelity: frozenlake_slippery, update 7: 64 episodes")
    )
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing is written"


def test_the_files_become_artifacts_of_a_run_of_their_own(file: Path) -> None:
    """Not a job: figures of training runs must not meet it."""
    command.main([f"rollouts={file}", "credit=exact,rloo", "sampler=uniform", "draws=2", "resamples=8"])
    uri = f"sqlite:///{file.parent}/outputs/mlflow.db"
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("msgrpo").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["msgrpo.kind"] == "compare"
    assert run.data.params["rollouts"] == str(file)
    assert run.data.metrics["credit/exact/spearman"] == pytest.approx(1.0)
    names = {Path(artifact.path).name for artifact in client.list_artifacts(run.info.run_id, "compare")}
    assert names == {"table.md", "table.csv", "fidelity.pdf", "fidelity.svg", "fidelity.png"}


def test_differences_are_those_of_the_cells(played: Played) -> None:
    found = compare(
        played.batch,
        played.truth,
        {"exact": Exact(), "episode_return": EpisodeReturn()},
        {"uniform": Uniform(num_episodes=20), "abs_adv": AbsAdvantage(num_episodes=20)},
        num_episodes=20,
        draws=4,
        resamples=40,
        rng=np.random.default_rng(0),
    )
    cosine = {(cell.credit, cell.sampler): cell.scores["gradient_cosine"].estimate().value for cell in found.cells}
    for cell in found.cells:
        expected = {}
        if cell.credit != "episode_return":
            expected[OVER_BASE_CREDIT] = cosine["episode_return", cell.sampler]
        if cell.sampler == "abs_adv":
            expected[OVER_BASE_SAMPLER] = cosine[cell.credit, "uniform"]
        assert set(cell.scores) - {*CREDIT_SCORES, *DRAWN_SCORES} == set(expected)
        for name, base in expected.items():
            own = cosine[cell.credit, cell.sampler]
            assert cell.scores[name].estimate().value == pytest.approx(own - base)
    assert (found.episodes, found.groups, found.num_episodes, found.exact_policy) == (64, 16, 20, True)
    with pytest.raises(KeyError, match="credit=rloo, sampler=None"):
        found.of("rloo")


def test_one_group_has_numbers_and_no_intervals(played: Played) -> None:
    batch = replace(
        played.batch,
        episodes=played.batch.episodes[:4],
        group_index=played.batch.group_index[:4],
        exact_adv=played.truth.advantages(played.batch)[:4, : played.batch.num_turns[:4].max()],
    )
    found = compare(
        batch,
        played.truth,
        {"exact": Exact(), "episode_return": EpisodeReturn()},
        {"uniform": Uniform(num_episodes=2)},
        num_episodes=2,
        draws=2,
        resamples=4,
        rng=np.random.default_rng(0),
    )
    assert render_estimate(found.of("exact").scores["spearman"].estimate()) == "1.000"
    assert "| exact | 1.000 | " in as_markdown(found, "One group")
    assert as_csv(found).splitlines()[1].startswith("exact,,1,,,1,,,")
    with paper_style():
        draw_comparison(found, "One group")


def test_a_figure_without_samplers(played: Played, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = compare(played.batch, played.truth, {"exact": Exact()}, {}, num_episodes=20, resamples=8, rng=rng)
    with paper_style():
        figure = draw_comparison(found, "Rules alone")
        assert len(figure.axes) == 4
        paths = save_figure(figure, tmp_path, "fidelity")
    assert [path.suffix for path in paths] == [".pdf", ".svg", ".png"]
    assert all(path.stat().st_size > 1000 for path in paths)


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "rollouts=???: a value is missing; give a saved rollout, for example rollouts=outputs/runs/"),
        (["rollouts=none.parquet"], "rollouts=none.parquet: there is no such file; give a file"),
        (["credit=rlo"], "credit=rlo: no such option; did you mean 'rloo'? there are: rloo, "),
        (["credit=null"], "credit=null: no rule is named; give all, or names of conf/credit"),
        (["sampler=uniform,unform"], "sampler=unform: no such option; did you mean 'uniform'?"),
        (["credit.gigpo.gama=1"], "credit.gigpo.gama=1: GiGPO has no such key; did you mean 'gamma'?"),
        (["credit.gigpo.gamma=2"], "credit.gigpo.gamma=2"),
        (["credit.gigpo.gamma=x"], "credit.gigpo.gamma=x: must be a number, not str; give a number"),
        (["credit=rloo", "credit.gigpo.gamma=1"], "credit.gigpo.gamma=1: gigpo is not among the chosen"),
        (["sampler.uniform.num_episodes=3"], "sampler.uniform.num_episodes=3: all samplers draw the same number"),
        (["num_episodes=65"], "num_episodes=65: {file} holds 64; give at most 64"),
        (["num_episodes=0"], "num_episodes=0: must be a whole number at least 1 or null; give for example"),
        (["draws=1"], "draws=1: must be a whole number at least 2; give for example draws=8"),
        (["resamples=many"], "resamples=many: must be a whole number at least 4"),
        (["reduction=mean"], "reduction=mean: must be one of sum, sequence; give for example reduction=sum"),
        (["seed=-1"], "seed=-1: must be a whole number in [0, 9"),
        (["output="], "output=: must not be empty; give a folder, or null to write nothing"),
        (["output=rollout.parquet"], "output=rollout.parquet: {file} is no folder"),
        (["logger=csv"], "logger=csv: no such option; there are: "),
        (["logger=mlflow", "logger.tracking_uri=here"], "logger.tracking_uri=here: the address is a folder"),
        (["logger=mlflow", "logger.tracking_url=here"], "logger.tracking_url=here: MLflowTracking has no such key"),
        (["logger.experiment=x"], "logger.experiment=x: there is no logger (logger=null); leave one of them out"),
        (["samplers=all"], "samplers=all: no such key; did you mean 'sampler'? the keys are: sampler, "),
        (["draws.more=1"], "draws.more=1: no such key"),
        (["-m"], "command line: '-m' is no key=value; --help lists the keys"),
        (["credit=[a"], "credit=[a: cannot be read; put quotes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments if not arguments or "rollouts=none.parquet" in arguments else [f"rollouts={file}", *arguments]
    with pytest.raises(SystemExit) as stopped:
        command.main(["logger=null", *given])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"msgrpo_lab: {said.format(file=file)}")
    assert printed.out == ""
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing is left behind"


def test_every_mistake_is_told(file: Path) -> None:
    with pytest.raises(ConfigError) as told:
        read_settings([f"rollouts={file}", "credit=rlo", "draws=0", "foo=1", "sampler=nosuch", "credit.rloo.delta=1"])
    assert [line.partition("=")[0] for line in told.value.mistakes] == [
        "foo",
        "draws",
        "credit",
        "credit.rloo.delta",
        "sampler",
    ]


def test_a_game_without_an_oracle_is_told_in_one_line(
    file: Path, played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    save_rollout(file, replace(played.saved, scenario=GameSettings(game="Snake", settings={})))
    with pytest.raises(SystemExit) as stopped:
        command.main([f"rollouts={file}", "logger=null"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"msgrpo_lab: rollouts={file}: game Snake has no oracle to hold credit against; save a rollout"
    )


def test_a_full_disk_is_told_in_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "_write", full)
    with pytest.raises(SystemExit) as stopped:
        command.main([f"rollouts={file}", "credit=rloo", "sampler=null", "logger=null", "output=x"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"msgrpo_lab: output={file.parent}/x: cannot be written (No space left")


def test_help_says_what_the_keys_are(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--help"])
    said = capsys.readouterr().out
    assert said.strip() == (conf_dir() / "compare.yaml").read_text().strip()


def test_the_real_command(file: Path) -> None:
    arguments = [f"rollouts={file}", "credit=rloo,exact", "sampler=uniform", "draws=2", "resamples=8", "logger=null"]
    done = subprocess.run(
        [sys.executable, "-m", "msgrpo_lab.compare", *arguments],
        cwd=file.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(rows_of(file.parent / "outputs" / "compare" / "table.csv")) == 4
