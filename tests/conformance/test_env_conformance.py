"""Every scenario under conf/env keeps the text-game contract, whatever game it is; a new file is picked up unasked."""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium.utils.env_checker import check_env

from msgrpo_lab.tsmg.base import CHARSET, TextGame

CONF = Path(__file__).parents[2] / "conf" / "env"
SCENARIOS = sorted(path.stem for path in CONF.glob("*.yaml"))
PAPER_SCENARIOS = {
    "frozenlake",
    "frozenlake_slippery",
    "frozenlake_big",
    "snake",
    "snake_20",
    "snake_poison",
    "snake_poison_banana",
}
SEEDS = range(12)

Make = Callable[..., TextGame]


def _settings(scenario: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{scenario}.yaml").read_text())


@pytest.fixture(params=SCENARIOS)
def scenario(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(scenario: str) -> Make:
    settings = _settings(scenario)
    module, name = settings.pop("_target_").rsplit(".", 1)
    game_class = getattr(importlib.import_module(module), name)
    return lambda **changes: game_class(**{**settings, **changes})


@pytest.fixture(params=["compact", "relative", "paper"])
def observation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _play(game: TextGame, actions: list[int | None], **reset: Any) -> list[tuple[Any, ...]]:
    record: list[tuple[Any, ...]] = [game.reset(**reset)]
    for action in actions:
        record.append(game.step(action))
        if record[-1][2] or record[-1][3]:
            break
    return record


def _random_actions(game: TextGame, seed: int, illegal: float = 0.0) -> list[int | None]:
    rng = np.random.default_rng(seed)
    return [None if rng.random() < illegal else int(rng.integers(len(game.legal_actions))) for _ in range(game.horizon)]


def test_the_papers_seven_scenarios_are_there() -> None:
    assert set(SCENARIOS) >= PAPER_SCENARIOS


def test_file_names_every_argument_and_marks_its_source(scenario: str) -> None:
    settings = _settings(scenario)
    module, name = settings.pop("_target_").rsplit(".", 1)
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert set(settings) == set(parameters)
    for line in (CONF / f"{scenario}.yaml").read_text().splitlines():
        if not line.startswith(("#", "_target_")):
            assert line.rstrip().endswith(("[P]", "[A]", "[D]")), line


def test_gymnasium_accepts_it(make: Make, observation: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not have a spec.*|.*not having a spec.*")
        check_env(make(observation=observation), skip_render_check=True)


def test_same_seed_same_episode(make: Make, observation: str) -> None:
    for seed in SEEDS:
        first, second = make(observation=observation), make(observation=observation)
        actions = _random_actions(first, seed, illegal=0.2)
        record = _play(first, actions, seed=seed)
        assert record == _play(second, actions, seed=seed)
        assert record == _play(first, actions, seed=seed), "a used game must not differ from a fresh one"


def test_members_share_the_initial_state(make: Make) -> None:
    game = make()
    for seed in SEEDS:
        texts, keys = set(), set()
        for member in range(8):
            texts.add(game.reset(seed=seed, options={"member": member})[0])
            keys.add(game.state_key())
        assert len(texts) == len(keys) == 1


def test_member_zero_is_the_default(make: Make) -> None:
    game = make()
    actions = _random_actions(game, 0, illegal=0.5)
    assert _play(game, actions, seed=5) == _play(game, actions, seed=5, options={"member": 0})


def test_members_draw_their_chance_apart(make: Make) -> None:
    game = make(fallback_action="random", shaping=0.0)
    drawn = []
    for member in range(8):
        game.reset(seed=3, options={"member": member})
        drawn.append(tuple(game.dynamics.integers(1000, size=8)))
    assert len(set(drawn)) == 8


def test_seeds_give_different_initial_states(make: Make) -> None:
    game = make()
    keys = set()
    for seed in range(30):
        game.reset(seed=seed)
        keys.add(game.state_key())
    assert len(keys) > 10


def test_reset_without_a_seed_follows_from_the_last_seed(make: Make) -> None:
    game = make()
    game.reset(seed=11)
    first = [game.reset()[1]["seed"] for _ in range(3)]
    game.reset(seed=11)
    assert [game.reset()[1]["seed"] for _ in range(3)] == first
    assert len(set(first)) == 3


@pytest.mark.parametrize("shape", ["{}", " {}\n", "\t{} ", "{}\n\n"])
def test_every_legal_word_maps_back_to_its_action(make: Make, shape: str) -> None:
    game = make()
    for index, word in enumerate(game.legal_actions):
        for variant in (word, word.lower(), word.upper(), word.swapcase()):
            assert game.text_to_action(shape.format(variant)) == index


@pytest.mark.parametrize("text", ["", " ", "sideways", "{} {}", "{}.", "-{}", "None", "{}s", "random", "{}\n{}"])
def test_other_text_is_illegal(make: Make, text: str) -> None:
    game = make()
    for word in game.legal_actions:
        assert game.text_to_action(text.format(word, word)) is None


def test_every_legal_action_is_a_word_of_its_own(make: Make) -> None:
    """What the parsers look for: one word of letters, digits and underscores, whatever its case."""
    words = make().legal_actions
    assert len(words) >= 2
    assert all(re.fullmatch(r"\w+", word) for word in words)
    assert len({word.lower() for word in words}) == len(words)


def test_texts_use_declared_characters_and_fit(make: Make, observation: str) -> None:
    game = make(observation=observation)
    assert set(game.rules) <= set(CHARSET)
    for seed in SEEDS:
        for record in _play(game, _random_actions(game, seed), seed=seed):
            assert record[0] in game.observation_space
            assert set(record[0]) <= set(CHARSET)


def test_observation_is_the_rendered_state(make: Make, observation: str) -> None:
    game = make(observation=observation)
    assert game.reset(seed=1)[0] == game.render_text()
    assert game.step(0)[0] == game.render_text()


def test_rules_do_not_depend_on_the_state(make: Make, observation: str) -> None:
    game = make(observation=observation)
    rules = game.rules
    for seed in SEEDS:
        _play(game, _random_actions(game, seed), seed=seed)
        assert game.rules == rules


def test_paper_rules_say_what_every_action_means(make: Make) -> None:
    game = make(observation="paper")
    for word in game.legal_actions:
        assert f"- {word}: " in game.rules
    assert f"{game.horizon} moves" in game.rules


def test_compact_text_is_shorter_than_the_complete_one(make: Make) -> None:
    compact, paper = make(observation="compact"), make(observation="paper")
    for seed in SEEDS:
        (short, _), (long, _) = compact.reset(seed=seed), paper.reset(seed=seed)
        assert len(compact.rules + short) < len(paper.rules + long)


def test_compact_text_of_a_game_of_moves_has_one_cell_a_line(make: Make) -> None:
    game = make(observation="compact")
    if set(game.legal_actions) != {"Left", "Right", "Up", "Down"}:
        pytest.skip("its actions are not the four moves on a grid")
    for seed in SEEDS:
        lines = game.reset(seed=seed)[0].splitlines()
        assert len(lines) == 1 + len(game.legal_actions)
        assert {line.split(":")[0] for line in lines[1:]} == set(game.legal_actions)


def test_snapshot_replays_the_same_future(make: Make) -> None:
    game = make()
    for seed in SEEDS:
        actions = _random_actions(game, seed, illegal=0.3)
        game.reset(seed=seed)
        _, _, terminated, truncated, _ = game.step(actions[0])
        if terminated or truncated:
            continue
        snapshot = pickle.loads(pickle.dumps(game.snapshot()))
        key, steps, text, potential = game.state_key(), game.steps, game.render_text(), game.potential()
        futures = []
        for runner in (game, game, make()):
            if runner is not game:
                runner.reset(seed=999)
            runner.restore(snapshot)
            assert (runner.state_key(), runner.steps, runner.render_text()) == (key, steps, text)
            assert runner.potential() == potential
            future: list[Any] = []
            for action in actions[1:]:
                future.append(runner.step(action))
                if future[-1][2] or future[-1][3]:
                    break
            future.append(runner.reset())
            futures.append(future)
        assert futures[0] == futures[1] == futures[2]


def test_snapshot_is_not_touched_by_what_follows(make: Make) -> None:
    game = make()
    game.reset(seed=2)
    game.step(None)
    snapshot = game.snapshot()
    before = pickle.dumps(snapshot)
    _play(game, [None] * game.horizon, seed=2)
    assert pickle.dumps(snapshot) == before


def test_snapshot_of_other_settings_is_refused(make: Make) -> None:
    game, other = make(), make(horizon=97)
    game.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(ValueError, match="same arguments"):
        other.restore(game.snapshot())


@pytest.mark.parametrize("shaping", [0.0, 0.1, 3.0])
def test_shaping_telescopes(make: Make, shaping: float) -> None:
    """Σ reward − Σ game reward + penalties = shaping·(Φ_T − Φ_0), with Φ_T = 0 in a terminal state."""
    game = make(shaping=shaping, shaping_gamma=1.0, invalid_penalty=0.25)
    for seed in SEEDS:
        game.reset(seed=seed)
        first = game.potential()
        total = 0.0
        for action in _random_actions(game, seed, illegal=0.3):
            _, reward, terminated, truncated, info = game.step(action)
            total += reward - info["game_reward"] + 0.25 * info["invalid"]
            assert info["invalid"] == (action is None)
            if terminated or truncated:
                break
        last = 0.0 if terminated else game.potential()
        assert total == pytest.approx(shaping * (last - first), abs=1e-12)


def test_shaping_is_discounted_by_its_gamma(make: Make) -> None:
    for seed in SEEDS:
        game = make(shaping=2.0, shaping_gamma=0.5)
        game.reset(seed=seed)
        before = game.potential()
        _, reward, terminated, _, info = game.step(0)
        after = 0.0 if terminated else game.potential()
        assert reward - info["game_reward"] == pytest.approx(2.0 * (0.5 * after - before))


def test_potential_is_in_range_and_zero_at_the_end(make: Make) -> None:
    game = make()
    endings = 0
    for seed in range(40):
        game.reset(seed=seed)
        for action in _random_actions(game, seed):
            assert 0.0 <= game.potential() <= 1.0
            _, _, terminated, truncated, _ = game.step(action)
            if terminated:
                endings += 1
                assert game.potential() == 0.0
            if terminated or truncated:
                break
    assert endings > 0


def test_shaping_leaves_the_games_own_reward_alone(make: Make) -> None:
    for seed in SEEDS:
        plain, shaped = make(shaping=0.0), make(shaping=1.0)
        actions = _random_actions(plain, seed)
        rewards = [[step[4]["game_reward"] for step in _play(game, actions, seed=seed)[1:]] for game in (plain, shaped)]
        assert rewards[0] == rewards[1]
        assert rewards[0] == [step[1] for step in _play(plain, actions, seed=seed)[1:]]


def test_episode_is_truncated_at_the_horizon_and_not_before(make: Make) -> None:
    cut = 0
    for seed in range(40):
        game = make(horizon=3)
        for turn, (_, _, terminated, truncated, _) in enumerate(
            _play(game, _random_actions(game, seed), seed=seed)[1:], start=1
        ):
            assert game.steps <= 3
            assert truncated == (turn == 3 and not terminated)
            cut += truncated
    assert cut > 0


def test_step_after_the_end_needs_a_reset(make: Make) -> None:
    game = make(horizon=1)
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"reset\(\)"):
        game.step(0)
    game.reset(seed=0)
    game.step(0)
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"reset\(\)"):
        game.step(0)
    game.reset(seed=0)
    assert game.steps == 0
    game.step(0)


def test_action_out_of_range_is_refused_and_costs_no_turn(make: Make) -> None:
    game = make()
    game.reset(seed=0)
    for action in (-1, len(game.legal_actions), 99):
        with pytest.raises(ValueError, match=f"action={action}"):
            game.step(action)
    assert game.steps == 0


def test_illegal_text_plays_the_named_fallback_and_pays_the_penalty(make: Make) -> None:
    for index, word in enumerate(make().legal_actions):
        game = make(fallback_action=word, invalid_penalty=0.75)
        game.reset(seed=4)
        observation, reward, terminated, truncated, info = game.step(None)
        assert info["executed_action"] == index
        assert info["invalid"] is True
        game.reset(seed=4)
        played = game.step(index)
        assert (observation, terminated, truncated) == (played[0], played[2], played[3])
        assert reward == pytest.approx(played[1] - 0.75)
        assert played[4]["invalid"] is False


def test_random_fallback_is_drawn_by_the_game(make: Make) -> None:
    game = make(fallback_action="random")
    drawn = set()
    for member in range(60):
        game.reset(seed=4, options={"member": member})
        drawn.add(game.step(None)[4]["executed_action"])
    assert drawn == set(range(len(game.legal_actions)))


@pytest.mark.parametrize("view", ["relative", "paper"])
def test_state_key_is_hashable_and_agrees_with_the_complete_views(make: Make, view: str) -> None:
    """Equal keys ⇔ equal texts, in play. (After the end there are no texts to compare.)"""
    game = make(observation=view, shaping=0.0)
    text_of: dict[Any, str] = {}
    for seed in range(8):
        for member in range(4):
            game.reset(seed=seed, options={"member": member})
            for action in _random_actions(game, member):
                assert text_of.setdefault(game.state_key(), game.render_text()) == game.render_text()
                _, _, terminated, truncated, _ = game.step(action)
                if terminated or truncated:
                    break
    assert len(set(text_of.values())) == len(text_of)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("horizon", 0),
        ("horizon", 2.5),
        ("horizon", True),
        ("horizon", "8"),
        ("observation", "pixels"),
        ("invalid_penalty", -1.0),
        ("invalid_penalty", float("inf")),
        ("fallback_action", "no such action"),
        ("fallback_action", None),
        ("shaping", -0.1),
        ("shaping", float("nan")),
        ("shaping", "much"),
        ("shaping_gamma", 1.5),
        ("shaping_gamma", -0.5),
        ("size", 1),
        ("size", 1000),
        ("size", 4.0),
    ],
)
def test_mistaken_argument_is_told_in_one_line(make: Make, scenario: str, key: str, value: Any) -> None:
    if key not in _settings(scenario):
        pytest.skip(f"the game has no {key}")
    with pytest.raises(ValueError, match=f"env.{key}=") as caught:
        make(**{key: value})
    message = str(caught.value)
    assert "\n" not in message
    assert repr(value) in message
    assert "must be" in message


def test_unknown_argument_is_refused(make: Make) -> None:
    with pytest.raises(TypeError, match="horizn"):
        make(horizn=3)


@pytest.mark.parametrize("options", [{"membr": 1}, {"member": -1}])
def test_mistaken_reset_option_is_told(make: Make, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"options\.memb"):
        make().reset(seed=0, options=options)


def test_class_docstring_has_gymnasiums_headings(make: Make) -> None:
    text = inspect.getdoc(type(make())) or ""
    positions = [
        text.find(f"## {heading}")
        for heading in (
            "Description",
            "Action Space",
            "Observation Space",
            "Rewards",
            "Episode End",
            "Arguments",
            "Version History",
        )
    ]
    assert -1 not in positions
    assert positions == sorted(positions)


def test_no_game_touches_the_global_generator(make: Make) -> None:
    before = np.random.get_state()  # noqa: NPY002  it is what must not change
    game = make()
    _play(game, _random_actions(game, 0, illegal=0.5), seed=0)
    after = np.random.get_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert np.array_equal(before[1], after[1])
    assert before[2:] == after[2:]
