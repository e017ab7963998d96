"""`validate`: components against their signatures, sections against schemas, keys against each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from omegaconf import OmegaConf

from msgrpo_lab.config import ConfigError, validate
from msgrpo_lab.config.components import check_component, parameters_of

if TYPE_CHECKING:
    from nowhere import Nothing

HERE = __name__


class Stub:
    """Has the methods by which components of every group are told, and none of them does anything."""

    def nothing(self) -> None: ...

    reset = step = render_text = text_to_action = generate = sync = close = start = finish = __call__ = nothing


@dataclass(frozen=True, kw_only=True)
class Game(Stub):
    """A light component."""

    horizon: int = 8
    slip: float = 0.0
    view: Literal["compact", "paper"] = "compact"
    words: Sequence[str] = ("Left",)
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"env.horizon={self.horizon}: must be at least 1;\n  give for example 8")


class Sampler(Stub):
    """Needs a number, and keeps a name that only type checkers know."""

    def __init__(self, num_episodes: int, replace: bool = False, note: Nothing | None = None) -> None:
        if num_episodes == 13:
            raise ValueError("thirteen is refused")
        self.num_episodes = num_episodes


class Store(Stub):
    """Asks the outside world, and counts how often it was closed."""

    closed = 0

    def __init__(self, address: str = "here") -> None:
        self.address = address

    def check(self) -> None:
        if self.address == "nowhere":
            raise ValueError(f"logger.address={self.address}: nothing answers; give here")

    def close(self) -> None:
        type(self).closed += 1


class Optimiser:
    """As torch's: the first parameter comes from the program."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999)) -> None: ...


def open_ended(**options: Any) -> dict[str, Any]:
    """Takes anything."""
    return options


def node(name: str, **values: Any) -> dict[str, Any]:
    return {"_target_": f"{HERE}.{name}", **values}


def mistakes_in(**config: Any) -> tuple[str, ...]:
    try:
        validate(OmegaConf.create(config))
    except ConfigError as error:
        mistakes, text = error.mistakes, str(error)
    else:
        return ()
    assert text.splitlines() == list(mistakes), "one line a mistake"
    return mistakes


def only(mistakes: tuple[str, ...]) -> str:
    assert len(mistakes) == 1, mistakes
    return mistakes[0]


SOUND: dict[str, Any] = {
    "seed": 0,
    "env": node("Game"),
    "sampler": node("Sampler", num_episodes=8),
    "rollout": {
        "num_groups": 4,
        "group_size": 4,
        "sampling": {"temperature": 1.0, "top_k": None, "top_p": None, "max_new_tokens": 8, "constrain": True},
    },
    "update": {"passes": 1, "minibatches": 2, "token_budget": 100, "max_grad_norm": 1.0},
    "trainer": {"accelerator": "cpu", "max_epochs": 3},
    "model": {"path": None},
}


def changed(dotted: str, value: Any) -> dict[str, Any]:
    config = OmegaConf.create(SOUND)
    OmegaConf.update(config, dotted, value, force_add=True)
    return dict(config)


def test_a_sound_configuration_passes() -> None:
    assert mistakes_in(**SOUND) == ()


@pytest.mark.parametrize(
    ("dotted", "value", "told"),
    [
        ("seed", -1, "seed=-1: must be a whole number at least 0"),
        ("seed", "zero", "seed=zero: must be a whole number"),
        ("seed", True, "seed=true: must be a whole number"),
        ("seed", None, "seed=null"),
        ("rollout.num_groups", 0, "rollout.num_groups=0: must be a whole number at least 1"),
        ("rollout.group_size", 1, "rollout.group_size=1: must be a whole number at least 2"),
        ("rollout.group_size", 4.5, "rollout.group_size=4.5"),
        ("rollout.groupsize", 4, "did you mean 'group_size'?"),
        ("rollout.sampling.temperature", 0, "rollout.sampling.temperature=0: must be a number at least 0.0001"),
        ("rollout.sampling.temperature", "hot", "rollout.sampling.temperature=hot"),
        ("rollout.sampling.top_k", 0, "rollout.sampling.top_k=0: must be a whole number at least 1 or null"),
        ("rollout.sampling.top_p", 0, "rollout.sampling.top_p=0: must be a number in (0, 1] or null"),
        ("rollout.sampling.top_p", 1.5, "rollout.sampling.top_p=1.5"),
        ("rollout.sampling.max_new_tokens", 0, "rollout.sampling.max_new_tokens=0"),
        ("rollout.sampling.constrain", "yes", "rollout.sampling.constrain=yes: must be true or false"),
        ("rollout.sampling", 3, "rollout.sampling=3: must be a section of keys"),
        ("update.passes", 0, "update.passes=0"),
        ("update.minibatches", 0, "update.minibatches=0"),
        ("update.minibatches", 9, "update.minibatches=9: there are only 8 episodes"),
        ("update.token_budget", 0, "update.token_budget=0"),
        ("update.max_grad_norm", 0, "update.max_grad_norm=0: must be a number greater than 0 or null"),
        ("sampler.num_episodes", 17, "sampler.num_episodes=17: the rollout collects only 4 groups of 4 = 16 episodes"),
        ("sampler.num_episodes", "many", "sampler.num_episodes=many: must be a whole number, not str"),
        ("sampler.num_episodes", "???", "sampler.num_episodes=???: a value is missing"),
        ("sampler.repalce", True, "sampler.repalce=true: Sampler has no such key; did you mean 'replace'?"),
        ("env.horizon", 0, "env.horizon=0: must be at least 1; give for example 8"),
        ("env.horizon", 8.5, "env.horizon=8.5: must be a whole number, not float"),
        ("env.horizon", True, "env.horizon=true: must be a whole number, not bool"),
        ("env.slip", "x", "env.slip=x: must be a number, not str; give a number, for example env.slip=0.0"),
        ("env.view", "papr", "env.view=papr: must be one of compact, paper"),
        ("env.words", "Left", "env.words=Left: must be a list, each item text"),
        ("env.folder", 3, "env.folder=3: must be a path or null"),
        ("env._target_", "msgrpo_lab.nosuch.Game", "env._target_=msgrpo_lab.nosuch.Game: cannot be imported"),
        ("env._target_", f"{HERE}.HERE", "which cannot be called"),
        ("env.horizon", "${nosuch.key}", "env.horizon=${nosuch.key}: cannot be resolved"),
        ("trainer.accelerator", "gpuu", "give one of: gpu, "),
        ("trainer.max_epochs", 0, "trainer.max_epochs=0: must be a whole number at least 1"),
        ("trainer.max_epochs", -1, "trainer.max_epochs=-1"),
        ("trainer.max_epochs", 1.5, "trainer.max_epochs=1.5"),
        ("model.path", "/no/such/model", "model.path=/no/such/model: there is nothing at /no/such/model"),
        ("model.path", __file__, f"model.path={__file__}"[:40]),
        ("model.path", str(Path(__file__).parent), "there is no config.json in"),
        ("model.path", "", "model.path=: there is nothing"),
        ("model.lora_rank", 0, "model.lora_rank=0: must be at least 1; null trains all weights"),
        ("model.lora_alpha", -1, "model.lora_alpha=-1: must be at least 1"),
        ("paths.outputs", "", "paths.outputs=: must not be empty"),
        ("seed", 2**63, f"seed={2**63}: must be at most {2**63 - 1}"),
        ("ckpt_path", "/no/such.ckpt", "ckpt_path=/no/such.ckpt: there is no checkpoint"),
    ],
)
def test_one_mistake_is_told_in_one_line(dotted: str, value: Any, told: str) -> None:
    line = only(mistakes_in(**changed(dotted, value)))
    assert told in line
    assert "; " in line, "a remedy follows"


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("seed", 0),
        ("rollout.sampling.temperature", 1),
        ("rollout.sampling.top_k", 3),
        ("rollout.sampling.top_p", 1),
        ("update.max_grad_norm", None),
        ("sampler.num_episodes", 16),
        ("env.slip", 1),
        ("env.words", ["Up", "Down"]),
        ("env.folder", "somewhere"),
        ("env.horizon", "${seed_of_horizon}"),
        ("trainer.accelerator", "cpu"),
        ("seed", 2**63 - 1),
        ("ckpt_path", __file__),
    ],
)
def test_values_at_the_edge_pass(dotted: str, value: Any) -> None:
    assert mistakes_in(**{**changed(dotted, value), "seed_of_horizon": 5}) == ()


def test_a_folder_that_holds_a_model_passes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert mistakes_in(**changed("model.path", str(tmp_path))) == ()


def test_an_adapter_to_go_on_from_is_there_and_of_the_shape_that_is_trained(tmp_path: Path) -> None:
    tree = changed("model.adapter", str(tmp_path))
    tree["model"] = {**tree["model"], "lora_rank": 8, "lora_alpha": 32, "lora_targets": ["q_proj"]}
    saved = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj"]}

    def told(**different: Any) -> tuple[str, ...]:
        (tmp_path / "adapter_config.json").write_text(json.dumps(saved | different), encoding="utf-8")
        return tuple(mistakes_in(**tree))

    assert told() == (
        f"model.adapter={tmp_path}: {tmp_path} has no adapter_model.safetensors; "
        "give a whole adapter folder; or leave the key out",
    )
    (tmp_path / "adapter_model.safetensors").touch()
    assert told() == ()
    (line,) = told(r=4)
    assert line.endswith("has lora_rank=4, and model.lora_rank is 8; set model.lora_rank=4, or leave model.adapter out")
    (line,) = told(target_modules=["v_proj", "q_proj"])
    assert "has lora_targets=" in line
    (line,) = told(r="many")
    assert "adapter_config.json is damaged (ValueError" in line
    tree["model"]["source"] = {"repo": "somebody/small-model"}
    lines = told(base_model_name_or_path="somebody/other-model")
    assert any("the adapter was trained on other-model, and the model is small-model" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_missing_gpu_is_told_before_anything_is_loaded(accelerator: str) -> None:
    if accelerator == "gpu" and torch.backends.mps.is_available():
        pytest.skip("there is a GPU of another make")
    line = only(mistakes_in(**changed("trainer.accelerator", accelerator)))
    assert line.startswith(f"trainer.accelerator={accelerator}: this machine has none")


def test_more_episodes_than_collected_can_be_drawn_with_replacement() -> None:
    config = changed("sampler.num_episodes", 100)
    assert len(mistakes_in(**config)) == 1
    config["sampler"]["replace"] = True
    assert mistakes_in(**config) == ()


def test_all_mistakes_are_collected() -> None:
    config = changed("seed", -1)
    config["env"]["horizon"] = "x"
    config["env"]["view"] = "y"
    config["trainer"]["accelerator"] = "z"
    found = mistakes_in(**config)
    assert [line.partition("=")[0] for line in found] == ["env.horizon", "env.view", "seed", "trainer.accelerator"]


def test_what_a_constructor_refuses_is_told_with_its_group() -> None:
    assert only(mistakes_in(**changed("sampler.num_episodes", 13))) == "sampler: thirteen is refused"


def test_a_group_with_a_mistake_is_not_constructed_as_well() -> None:
    assert len(mistakes_in(env=node("Game", horizon=0, view="x"))) == 1


@pytest.mark.parametrize("partial", [False, True])
def test_a_required_parameter_may_only_be_missing_from_a_partial_node(partial: bool) -> None:
    found = mistakes_in(optim=node("Optimiser", lr=1e-3, _partial_=partial))
    if partial:
        assert found == ()
    else:
        assert "optim.params=???: Optimiser needs this key" in only(found)


def test_a_parameter_that_the_program_supplies_is_not_missing() -> None:
    assert check_component("optim", node("Optimiser"), supplied=["params"]) == []
    assert len(check_component("optim", node("Optimiser"))) == 1


def test_positional_arguments_fill_parameters() -> None:
    assert check_component("optim", node("Optimiser", _args_=[[]])) == []


def test_a_target_that_takes_anything_knows_every_key() -> None:
    assert mistakes_in(thing=node("open_ended", whatever=3)) == ()


def test_components_inside_components_and_lists_are_checked() -> None:
    outer = node("open_ended", inner=node("Game", horizn=3), many=[node("Game", slip="x")])
    first, second = mistakes_in(thing=outer)
    assert first.startswith("thing.inner.horizn=3: ")
    assert second.startswith("thing.many.0.slip=x: ")


def test_a_component_stands_for_any_value() -> None:
    assert mistakes_in(thing=node("Optimiser", params=node("Game"), lr=node("open_ended"))) == ()


def test_an_unresolvable_annotation_does_not_hide_the_others() -> None:
    parameters = parameters_of(Sampler)
    assert parameters is not None
    assert set(parameters.annotations) == {"num_episodes", "replace"}


def test_the_outside_world_is_asked_and_the_component_closed() -> None:
    before = Store.closed
    assert "nothing answers" in only(mistakes_in(logger=node("Store", address="nowhere")))
    assert mistakes_in(logger=node("Store")) == ()
    assert Store.closed == before + 2


def test_values_that_only_a_running_job_knows_are_left_alone() -> None:
    OmegaConf.register_new_resolver("hydra", lambda _: _raise_unset(), replace=True)
    try:
        assert mistakes_in(env=node("Game", folder="${hydra:runtime.output_dir}", view="paper")) == ()
    finally:
        OmegaConf.clear_resolver("hydra")


def _raise_unset() -> str:
    raise ValueError("HydraConfig was not set")


@pytest.mark.parametrize(
    ("parser", "constrain", "refused"),
    [("ActionTagParser", True, True), ("ActionTagParser", False, False), ("FirstWordParser", True, False)],
)
def test_constrained_decoding_needs_a_prompt_for_one_word(parser: str, constrain: bool, refused: bool) -> None:
    prompt = {"parser": {"_target_": f"msgrpo_lab.lap.prompt.{parser}"}}
    found = mistakes_in(prompt=prompt, rollout={"sampling": {"constrain": constrain}})
    assert (len(found) == 1 and found[0].startswith("rollout.sampling.constrain=true: ")) is refused


class Replayer(Stub):
    """An engine whose answers are no policy's."""

    samples_policy = False


def test_training_refuses_an_engine_without_a_policy() -> None:
    assert "use engine=hf" in only(mistakes_in(engine=node("Replayer"), update={"passes": 1}))
    assert mistakes_in(engine=node("Replayer")) == (), "evaluation has no update section and may use it"


@pytest.mark.parametrize(("every", "constrain", "refused"), [(1, False, True), (None, False, False), (1, True, False)])
def test_gradients_in_parameter_space_need_constrained_decoding(every: Any, constrain: bool, refused: bool) -> None:
    meter = {"every": every, "parameter_space": True}
    found = mistakes_in(callbacks={"fidelity": meter}, rollout={"sampling": {"constrain": constrain}})
    assert (len(found) == 1 and found[0].startswith("callbacks.fidelity.parameter_space=true: ")) is refused
