"""Every combination of choices composes, is sound, and trains: in this process, on two small layers."""

from __future__ import annotations

import itertools
import math

import pytest
from lab_made import SMALL, SMALL_RUN, composed, fit, small_lab, training_presets

from msgrpo_lab.callbacks.evaluation import HeldOutEvaluation
from msgrpo_lab.config import check_command_line, conf_dir
from msgrpo_lab.training.assemble import component

FREE = ("rollout.sampling.constrain=false", "rollout.sampling.max_new_tokens=6")
QUICK = ("model=tiny", "debug=fast")
FEW = ("rollout.num_groups=2", "rollout.group_size=2", "sampler.num_episodes=4", "env.horizon=6")


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def fitting(prompt: str) -> tuple[str, ...]:
    """What a prompt needs: answers in tags cannot be constrained to one word."""
    return FREE if prompt.startswith("think_") else ()


def turning(*groups: str, rows: int) -> list[tuple[str, ...]]:
    """Rows of one option a group, in which every option of every group stands, as far as there are rows."""
    return list(zip(*(itertools.islice(itertools.cycle(names(group)), rows) for group in groups), strict=True))


TOGETHER = ("credit", "sampler", "loss", "prompt")


@pytest.mark.parametrize(TOGETHER, turning(*TOGETHER, rows=2 * max(len(names(group)) for group in TOGETHER)))
def test_credit_sampler_loss_and_prompt_go_together_and_train(
    credit: str, sampler: str, loss: str, prompt: str
) -> None:
    choices = (f"credit={credit}", f"sampler={sampler}", f"loss={loss}", f"prompt={prompt}", *fitting(prompt))
    (row,) = fit(small_lab(*choices, "rollout.truth_completions=2"), epochs=1).training()
    assert math.isfinite(row["train/loss"])
    assert row["train/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert row["train/drawn_episodes"] == 8


@pytest.mark.parametrize("view", ["compact", "paper"])
@pytest.mark.parametrize("env", names("env"))
def test_every_scenario_trains_in_both_views(env: str, view: str) -> None:
    lab = small_lab(f"env={env}", f"env.observation={view}", *FEW)
    (row,) = fit(lab, epochs=1).training()
    assert row["train/valid_action_rate"] == 1.0
    assert row["train/grad_norm"] > 0
    assert 1 <= row["train/episode_length"] <= lab.data.collector.example_game.horizon


@pytest.mark.parametrize("env", ["frozenlake_slippery", "snake"])
def test_a_scenario_is_evaluated_under_its_own_name(env: str) -> None:
    evaluation = HeldOutEvaluation(episodes=2, every=1, reference_simulations=4, scenario=env)
    memory = fit(small_lab(f"env={env}"), epochs=1, callbacks=[evaluation])
    assert len(memory.series(f"eval/{env}/normalised_score")) == 2
    low, high = (memory.series(f"reference/{env}/{name}/return_mean") for name in ("random", "ignores_prompt"))
    assert len(low) == len(high) == 1


PAIRS = list(itertools.product(names("credit"), names("sampler")))


@pytest.mark.parametrize(
    ("credit", "sampler", "env", "loss"),
    [(*pair, *beside) for pair, beside in zip(PAIRS, turning("env", "loss", rows=len(PAIRS)), strict=True)],
)
def test_every_credit_rule_is_sound_with_every_sampler(credit: str, sampler: str, env: str, loss: str) -> None:
    """And with the scenarios and losses in turn; exact values are of Frozen Lake alone."""
    game = env if credit != "exact" or env.startswith("frozenlake") else "frozenlake"
    check_command_line([*QUICK, f"credit={credit}", f"sampler={sampler}", f"env={game}", f"loss={loss}"], "train")


@pytest.mark.parametrize("prompt", names("prompt"))
@pytest.mark.parametrize("env", names("env"))
def test_every_scenario_is_sound_with_every_prompt(env: str, prompt: str) -> None:
    check_command_line([*QUICK, f"env={env}", f"prompt={prompt}", *fitting(prompt)], "train")


@pytest.mark.parametrize("env", [name for name in names("env") if name.startswith("snake")])
def test_exact_credit_is_refused_where_there_is_no_oracle(env: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        check_command_line([*QUICK, f"env={env}", "credit=exact"], "train")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"msgrpo_lab: credit=exact: it reads exact values, and env={env} has no oracle; use ")


PRESETS = [*training_presets(), *(f"debug={name}" for name in names("debug"))]
UPDATES = 3


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound(preset: str) -> None:
    """As a run, and as the sweep that some of them bring."""
    check_command_line([preset], "train")
    check_command_line(["-m", preset, "seed=0"], "train")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_on_the_tiny_model(preset: str) -> None:
    """The preset's own regime, cut down in numbers only."""
    cut = (
        "rollout.num_groups=2",
        "rollout.group_size=4",
        "sampler.num_episodes=4",
        "rollout.sampling.max_new_tokens=6",
        "env.horizon=4",
    )
    lab = small_lab(preset, "model=tiny", *SMALL, "model.lora_rank=null", "model.precision=float32", *cut)
    epochs = math.ceil(UPDATES / lab.data.updates_per_epoch)
    rows = fit(lab, epochs=epochs).training()
    assert len(rows) == epochs * lab.data.updates_per_epoch >= UPDATES
    assert all(math.isfinite(row["train/loss"]) for row in rows)


@pytest.mark.parametrize("name", names("callbacks"))
def test_callbacks_of_the_configuration_run(name: str) -> None:
    config = composed(*SMALL_RUN, f"callbacks={name}")
    callbacks = [component(node) for node in config.callbacks.values()]
    memory = fit(small_lab(f"callbacks={name}"), epochs=2, callbacks=callbacks)
    assert len(memory.training()) == 2
