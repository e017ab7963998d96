"""Scenarios: whose view is read, and what may be set in them."""

from __future__ import annotations

from typing import Any

import pytest

from msgrpo_lab.config.choices import Found, options_of
from msgrpo_lab.evaluation.scenarios import Scenario, scenarios_of
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.snake import Snake


def scenario_of(name: str = "frozenlake", **changes: Any) -> Scenario:
    (scenario,) = scenarios_of([name], changes, Found())
    return scenario


@pytest.mark.parametrize(
    ("changes", "trained_with", "reads"),
    [
        ({}, None, "compact"),
        ({}, "paper", "paper"),
        ({"observation": "compact"}, "paper", "compact"),
        ({"observation": "paper"}, None, "paper"),
        ({"horizon": 3}, "paper", "paper"),
    ],
)
def test_a_policy_reads_the_view_it_was_trained_with_unless_one_is_given(
    changes: dict[str, Any], trained_with: str | None, reads: str
) -> None:
    scenario = scenario_of(**changes)
    game = scenario.maker(trained_with)()
    assert game.observation == reads
    assert {**scenario.settings, "observation": None} == {**scenario.seen_as(trained_with), "observation": None}
    assert game.horizon == changes.get("horizon", 8), "nothing but the view is taken over"


def test_all_are_the_files_of_their_folder() -> None:
    found = Found()
    scenarios = scenarios_of(["all"], {}, found)
    assert [scenario.name for scenario in scenarios] == options_of("env")
    assert found.lines == []
    assert {scenario.game_class for scenario in scenarios} == {FrozenLake, Snake}


def test_each_mistake_is_a_line_and_the_others_are_found() -> None:
    found = Found()
    scenarios = scenarios_of(["snake", "nosuch", "snake"], {}, found)
    assert [scenario.name for scenario in scenarios] == ["snake"], "each once"
    assert len(found.lines) == 1
    assert found.lines[0].startswith("scenario=nosuch: no such option; ")
    found = Found()
    assert scenarios_of(["frozenlake"], {"size": 1000}, found) == []
    assert found.lines[0].startswith("env.size=1000: ")
