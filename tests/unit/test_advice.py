"""The first rollout's warnings, on what was measured of runs that learnt and of runs that collapsed."""

from __future__ import annotations

import pytest

from msgrpo_lab.callbacks.advice import FirstRolloutAdvice

LEARNT = {
    "train/action_entropy": 0.627,
    "train/valid_action_rate": 0.996,
    "train/zero_std_groups": 0.203,
    "train/cut_answers": 0.004,
}
"""First rollout of the default job."""


@pytest.mark.parametrize(
    "metrics",
    [LEARNT, {**LEARNT, "train/action_entropy": 1.2, "train/valid_action_rate": 0.933, "train/zero_std_groups": 0.0}],
    ids=["words", "thoughts"],
)
def test_runs_that_learnt_are_not_warned_of(metrics: dict[str, float]) -> None:
    assert FirstRolloutAdvice().advise(metrics) == []


@pytest.mark.parametrize(
    ("metric", "value", "key"),
    [
        (
            "train/action_entropy",
            0.41,
            "rollout.sampling.temperature=1.5",
        ),  # temperature 1, whole vocabulary: collapsed
        ("train/valid_action_rate", 0.08, "prompt.examples"),
        ("train/zero_std_groups", 0.9, "rollout.group_size"),
        ("train/cut_answers", 0.5, "rollout.sampling.max_new_tokens"),
    ],
)
def test_each_sign_is_one_line_with_the_key_to_set(metric: str, value: float, key: str) -> None:
    (line,) = FirstRolloutAdvice().advise({**LEARNT, metric: value})
    assert line.startswith(f"{metric}={value:.3g} ")
    assert key in line
    assert "\n" not in line


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^callbacks\.advice\.max_cut_answers=2: must be in \[0, 1\]"):
        FirstRolloutAdvice(max_cut_answers=2)
