"""Lengths and nats of thoughts and actions, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from lab_made import rollout, turn

from msgrpo_lab.lap.prompt import ActionTagParser
from msgrpo_lab.rollout.thoughts import thought_metrics
from msgrpo_lab.types import Turn

ACTIONS = ("Left", "Down", "Right", "Up")
PIECES = {1: "<think>", 2: "down", 3: " is ice", 4: "</think><action>", 5: "up", 6: "</action>", 7: "left"}


def written(*tokens: int, nats: float = 0.5) -> Turn:
    text = "".join(PIECES[token] for token in tokens)
    made = turn(tokens=tokens, logprobs=[-nats * n for n in range(len(tokens))], text=text)
    return replace(made, parsed=ActionTagParser()(text, ACTIONS))


def test_by_hand() -> None:
    meant = written(1, 2, 3, 4, 2, 6)
    unmeant = written(1, 2, 3, 4, 7, 6, nats=1.0)
    found = thought_metrics(rollout((0, True, [meant, unmeant])), ACTIONS, PIECES.__getitem__)
    assert found == {
        "thought_tokens": 4.0,
        "thought_token_entropy": pytest.approx((0.75 + 1.5) / 2),
        "action_token_entropy": pytest.approx((2.0 + 4.0) / 2),
        "thought_names_action": 0.5,
        "distinct_thoughts": 0.5,
    }


def test_answers_without_a_thought_say_nothing() -> None:
    word = turn(tokens=(2,), text="down")
    assert thought_metrics(rollout((0, True, [word])), ACTIONS, PIECES.__getitem__) == {}
    assert np.isfinite(word.completion.logprobs).all()
