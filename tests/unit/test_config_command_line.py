"""`check_command_line`: every wrong command line is answered with lines that name the key, and exit code 2."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hydra.core.global_hydra import GlobalHydra

from msgrpo_lab.config import check_command_line, conf_dir

HERE = __name__
CONSTRUCTED: list[int] = []


class Stub:
    """Has the methods by which components of every group are told, and none of them does anything."""

    def nothing(self) -> None: ...

    reset = step = render_text = text_to_action = generate = sync = close = start = finish = __call__ = nothing


@dataclass(frozen=True, kw_only=True)
class Game(Stub):
    """A light component that remembers what it was constructed with."""

    horizon: int = 8
    view: Literal["compact", "paper"] = "compact"

    def __post_init__(self) -> None:
        CONSTRUCTED.append(self.horizon)
        if self.horizon < 1:
            raise ValueError(f"env.horizon={self.horizon}: must be at least 1; give for example 8")


@dataclass(frozen=True, kw_only=True)
class Sampler(Stub):
    """Another."""

    num_episodes: int
    alpha: float = 1.0
    replace: bool = False


FILES = {
    "train.yaml": """
        defaults: [train_schema, _self_, {env: lake}, {sampler: uniform}, {trainer: default},
                   {launcher: basic}, {experiment: null}, {debug: null}]
        seed: 0
        rollout: {num_groups: 4, group_size: 4}
        update: {minibatches: 1}
        paths: {root: /tmp/nowhere}
        """,
    "env/lake.yaml": f"{{_target_: {HERE}.Game, horizon: 8, view: compact}}",
    "env/snake.yaml": f"{{_target_: {HERE}.Game, horizon: 20, view: compact}}",
    "env/snake_20.yaml": f"{{_target_: {HERE}.Game, horizon: 20, view: paper}}",
    "env/broken.yaml": "{_target_: x, horizon: [1",
    "sampler/uniform.yaml": f"{{_target_: {HERE}.Sampler, num_episodes: 8}}",
    "sampler/abs_adv.yaml": f"{{_target_: {HERE}.Sampler, num_episodes: 8, alpha: 1.0}}",
    "sampler/missing.yaml": f"{{_target_: {HERE}.Sampler, num_episodes: '???'}}",
    "trainer/default.yaml": "{accelerator: cpu, max_epochs: 2, devices: 1, strategy: auto}",
    "launcher/basic.yaml": "# @package _global_\ndefaults: [override /hydra/launcher: basic]",
    "launcher/joblib.yaml": "# @package _global_\ndefaults: [override /hydra/launcher: joblib]",
    "experiment/short.yaml": "# @package _global_\ntrainer: {max_epochs: 1}",
    "experiment/wrong.yaml": "# @package _global_\ndefaults: [override /env: nowhere]",
    "experiment/swept.yaml": "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {env.horizon: '0,3'}}}",
    "experiment/set/seeds.yaml": """
        # @package _global_
        hydra: {sweeper: {params: {seed: "0,1", sampler: "uniform,abs_adv"}}}
        """,
    "debug/fast.yaml": "# @package _global_\nrollout: {num_groups: 2}\nsampler: {num_episodes: 4}",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small configuration tree."""
    for name, text in FILES.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip().splitlines()
        path.write_text("\n".join(line[8:] if line.startswith("        ") else line for line in lines) + "\n")
    CONSTRUCTED.clear()
    return tmp_path / "conf"


def refusals(tree: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """The lines that a refused command line prints, without their prefix."""
    with pytest.raises(SystemExit) as caught:
        check_command_line(argv, "train", config_dir=tree)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert all(line.startswith("msgrpo_lab: ") for line in lines)
    return [line.removeprefix("msgrpo_lab: ") for line in lines]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["sampler=abs_adv", "sampler.alpha=0"],
        ["experiment=short", "debug=fast"],
        ["-m", "sampler=uniform,abs_adv", "env=snake,lake"],
        ["--multirun", "seed=range(0,3)"],
        ["-m", "env=glob(snake*)"],
        ["-m", "env=choice(lake,snake)", "launcher=joblib"],
        ["-m", "trainer.devices=1"],
        ["--cfg", "job"],
        ["++env.view=paper"],
        ["hydra.run.dir=/tmp/x"],
    ],
)
def test_a_sound_command_line_passes(tree: Path, argv: list[str]) -> None:
    check_command_line(argv, "train", config_dir=tree)
    assert CONSTRUCTED, "the jobs were really composed and their components constructed"
    assert not GlobalHydra.instance().is_initialized(), "nothing is left for hydra.main to stumble over"


@pytest.mark.parametrize(
    "argv", [["--help"], ["--hydra-help"], ["--info"], ["-sc", "install=bash"], ["--help", "sampler=nosuch"]]
)
def test_requests_for_information_are_let_through(tree: Path, argv: list[str]) -> None:
    check_command_line(argv, "train", config_dir=tree)
    assert CONSTRUCTED == []


@pytest.mark.parametrize(
    ("argv", "beginning", "part"),
    [
        (["sampler=nosuch"], "sampler=nosuch: no such option", "there are: "),
        (["sampler=absadv"], "sampler=absadv: no such option; did you mean 'abs_adv'?", "abs_adv, "),
        (["env=snak"], "env=snak: no such option; did you mean 'snake'?", "there are: snake, snake_20, "),
        (["hydra/launcher=jobli"], "hydra/launcher=jobli: no such option", "joblib"),
        (["experiment=shrt"], "experiment=shrt: no such option; did you mean 'short'?", "short"),
        (["experiment=wrong"], "env=nowhere: no such option (named in ", "lake"),
        (["sampler=null"], "sampler=null: a group takes the name of one option", "abs_adv"),
        (["sampler="], "sampler=: no such option", "uniform"),
        (["env=[lake,nowhere]"], "env=nowhere: no such option", "lake"),
        (["sampelr=uniform"], "sampelr=uniform: no such key; did you mean 'sampler'?", "sampler"),
        (["sampler.alpah=1"], "sampler.alpah=1: no such key", "num_episodes"),
        (["env.horzion=1"], "env.horzion=1: no such key; did you mean 'horizon'?", "the keys of env are: horizon, "),
        (["sampler=abs_adv", "sampler.alpah=1"], "sampler.alpah=1: no such key; did you mean 'alpha'?", "alpha"),
        (["rollout.groups=3"], "rollout.groups=3: no such key", "num_groups"),
        (["seed.x=3"], "seed.x=3: no such key", "seed"),
        (["hydra.nosuch=3"], "hydra.nosuch=3: no such key", "nearest"),
        (["+seed=3"], "+seed=3: the key is there already", "without +"),
        (["~nothing"], "~nothing: no such key", "nearest"),
        (["+env.foo=3"], "env.foo=3: Game has no such key", "horizon"),
        (["+rollout.foo=3"], "rollout.foo=3: no such key", "group_size"),
        (["seed"], "seed: has no value", "seed=…"),
        (["=3"], "=3: the key is missing", "key=value"),
        (["seed=[1"], "seed=[1: cannot be read", "quote"),
        (["seed=${foo"], "seed=${foo: cannot be read", "quote"),
        (["sampler=uniform,"], "sampler=uniform,: a value is missing", "sampler=value"),
        (["seed=1,2"], "seed=1,2: several values are a sweep; add -m", "seed=[1,2]"),
        (["seed=choice(1,2)"], "seed=choice(1,2): is a sweep; add -m", "-m"),
        (["--cfg", "job", "seed=1,2"], "seed=1,2: several values are a sweep", "-m"),
        (["seed=x"], "seed=x: ", "whole number"),
        (["rollout.num_groups=x"], "rollout.num_groups=x: must be a whole number at least 1", "num_groups=128"),
        (["rollout.num_groups=2.5"], "rollout.num_groups=2.5: must be a whole number", "num_groups=128"),
        (["rollout.num_groups=0"], "rollout.num_groups=0: must be a whole number at least 1", "give"),
        (["rollout=3"], "rollout=3: must be a section of keys", "rollout.num_groups=…"),
        (["env.horizon=0"], "env.horizon=0: must be at least 1", "8"),
        (["env.horizon=long"], "env.horizon=long: must be a whole number, not str", "env.horizon=8"),
        (["env.view=papr"], "env.view=papr: must be one of compact, paper", "paper"),
        (["seed=${nosuch}"], "seed=${nosuch}: cannot be resolved", "nosuch"),
        (["sampler=missing"], "sampler.num_episodes=???: a value is missing", "sampler.num_episodes=…"),
        (["env=broken"], "broken.yaml:", "not valid YAML"),
        (["sampler.num_episodes=99"], "sampler.num_episodes=99: the rollout collects only", "16"),
        (["trainer.accelerator=gpuu"], "trainer.accelerator=gpuu: ", "gpu"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0: ", "at least 1"),
        (["hydra.mode=FOO"], "hydra.mode=FOO: Invalid value 'FOO'", "MULTIRUN"),
        (["--nosuch"], "command line: unrecognized arguments: --nosuch", "--hydra-help"),
        (["--config-name", "foo"], "--config-name=foo: there is no foo.yaml", "leave it out"),
        (["--config-dir", "/no/such"], "--config-dir=/no/such: there is no such folder", "YAML"),
        (["--config-path", "/x"], "--config-path=/x: is fixed", "--config-dir"),
        (["--cfg", "job", "sampler=nosuch"], "sampler=nosuch: no such option", "uniform"),
        (["-m", "sampler=uniform,nosuch"], "sampler=nosuch: no such option", "uniform"),
        (["-m", "env.horizon=3,0,5"], "env.horizon=0: must be at least 1", "8"),
        (["-m", "seed=range(-1,2)"], "seed=-1: must be a whole number at least 0", "seed=0"),
        (["-m", "seed=interval(1,3)"], "command line: BasicSweeper does not support", "key=a,b"),
        (["-m", "trainer.devices=2"], "trainer.devices=2: training over several devices", "launcher=joblib"),
        (["trainer.devices=[0,1]"], "trainer.devices=[0,1]: training over several devices", "trainer.devices=1"),
        (["trainer.devices=4"], "trainer.devices=4: training over several devices", "trainer.devices=1"),
        (["trainer.devices=0"], "trainer.devices=0: there is nothing to train on", "trainer.devices=1"),
        (["trainer.strategy=ddp"], "trainer.strategy=ddp: training over several devices", "auto"),
        (["+trainer.num_nodes=2"], "trainer.num_nodes=2: training over several devices", "leave it out"),
        (["seed=0", "-m", "seed=0,1"], "command line: unrecognized arguments: seed=0,1", "-m and other options before"),
        (["experiment=swept"], "env.horizon=0: must be at least 1", "8"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(
    tree: Path, capsys: pytest.CaptureFixture[str], argv: list[str], beginning: str, part: str
) -> None:
    lines = refusals(tree, capsys, *argv)
    assert len(lines) == 1, lines
    assert lines[0].startswith(beginning)
    assert part in lines[0]


@pytest.mark.parametrize(
    ("argv", "jobs"),
    [
        (["experiment=set/seeds"], 1),
        (["-m", "experiment=set/seeds"], 4),
        (["-m", "experiment=set/seeds", "seed=3"], 2),
        (["-m", "experiment=set/seeds", "env=lake,snake", "seed=range(3)"], 12),
    ],
)
def test_a_preset_brings_its_sweep_and_the_command_line_has_the_last_word(
    tree: Path, argv: list[str], jobs: int
) -> None:
    check_command_line(argv, "train", config_dir=tree)
    assert len(CONSTRUCTED) == jobs


def test_presets_with_sweeps_of_their_own_are_not_swept_over(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refusals(tree, capsys, "-m", "experiment=short,set/seeds")
    assert line.startswith("experiment=set/seeds: it brings a sweep of its own (hydra.sweeper.params), which ")
    assert line.endswith("run it by itself, with -m")


def test_presets_in_folders_are_among_the_options(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refusals(tree, capsys, "experiment=seeds")
    assert line.startswith("experiment=seeds: no such option; did you mean 'set/seeds'?")


def test_every_faulty_override_is_told(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = refusals(tree, capsys, "sampler=nosuch", "env.horzion=3", "rollout.num_groups=x", "trainr.max_epochs=1")
    keys = [line.partition("=")[0] for line in lines]
    assert sorted(keys) == ["env.horzion", "rollout.num_groups", "sampler", "trainr.max_epochs"]


def test_what_is_composed_without_the_faulty_overrides_is_checked_as_well(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = refusals(tree, capsys, "env.horzion=3", "env.horizon=0", "seed=-1")
    assert sorted(line.partition(":")[0] for line in lines) == ["env.horizon=0", "env.horzion=3", "seed=-1"]
    lines = refusals(tree, capsys, "sampler=nosuch", "sampler.alpha=2", "env.horizon=0")
    assert "env.horizon=0" not in {line.partition(":")[0] for line in lines}, "which may be meant for the other option"


def test_unreadable_overrides_are_all_told(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(refusals(tree, capsys, "seed", "env", "sampler=[")) == 3


def test_every_job_of_a_sweep_is_checked(tree: Path) -> None:
    check_command_line(["-m", "env.horizon=3,4", "seed=1,2"], "train", config_dir=tree)
    assert sorted(CONSTRUCTED) == [3, 3, 4, 4]


def test_mistakes_of_a_sweep_are_told_once_each(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = refusals(tree, capsys, "-m", "env.horizon=0,-1", "seed=1,2,3")
    assert [line.partition(":")[0] for line in lines] == ["env.horizon=0", "env.horizon=-1"]


def test_a_wrong_hydra_callback_is_found(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refusals(tree, capsys, "+hydra.callbacks.tracking._target_=msgrpo_lab.nosuch.Parent")
    assert line.startswith("hydra.callbacks.tracking._target_=msgrpo_lab.nosuch.Parent: cannot be imported")


def test_an_added_configuration_folder_is_searched(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "more/env").mkdir(parents=True)
    (tmp_path / "more/env/mine.yaml").write_text(f"{{_target_: {HERE}.Game, horizon: 3, view: paper}}")
    check_command_line(["--config-dir", str(tmp_path / "more"), "env=mine"], "train", config_dir=tree)
    assert CONSTRUCTED == [3]


PROGRAM = """
import sys
from msgrpo_lab.config import check_command_line
try:
    check_command_line(sys.argv[1:], "train")
finally:
    print(*({"torch", "lightning", "transformers", "mlflow"} & set(sys.modules)))
"""


@pytest.mark.skipif(not (conf_dir() / "train.yaml").is_file(), reason="needs the project's own configuration")
@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["sampler=nosuch"], "sampler=nosuch"),
        (["-m", "sampler=uniform,nosuch", "env=snake"], "sampler=nosuch"),
        (["env=nosuch"], "env=nosuch"),
    ],
)
def test_the_real_configuration_answers_a_typo_at_once_from_any_folder(
    tmp_path: Path, argv: list[str], key: str
) -> None:
    start = time.monotonic()
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *argv],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    seconds = time.monotonic() - start
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"msgrpo_lab: {key}")
    assert done.stdout.strip() == "", "nothing heavy is imported to answer a typo"
    assert seconds < 20, "0.5 s on an idle machine"
    assert list(tmp_path.iterdir()) == [], "nothing half-made is left behind"
