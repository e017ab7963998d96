"""Maps kept out of training are the same ones for every run, and training never draws one of them."""

from __future__ import annotations

import numpy as np
import pytest

from msgrpo_lab.rollout.map_split import UNSEEN, MapSplit
from msgrpo_lab.seeding import FIRST_HELD_OUT_SEED
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.lake import random_map


def maps_of(seeds: list[int]) -> set[tuple[str, ...]]:
    return {random_map(4, 0.8, seed) for seed in seeds}


def test_training_and_unseen_maps_never_meet() -> None:
    split = MapSplit(FrozenLake)
    training = [int(s) for e in range(5) for s in split.training_seeds(np.random.default_rng(e), 200)]
    unseen = split.unseen_seeds(100)
    assert max(training) < FIRST_HELD_OUT_SEED <= min(unseen)
    assert not maps_of(training) & maps_of(unseen)
    assert unseen[:40] == MapSplit(FrozenLake).unseen_seeds(40)


def test_about_one_map_in_five_is_kept_out() -> None:
    split = MapSplit(FrozenLake)
    first_of = {random_map(4, 0.8, seed): seed for seed in range(3000)}
    share = np.mean([split.is_unseen(seed) for seed in first_of.values()])
    assert share == pytest.approx(1 / UNSEEN, abs=0.05)


def test_a_scenario_of_one_map_is_refused() -> None:
    split = MapSplit(lambda: FrozenLake(size=2, frozen_probability=1.0))
    with pytest.raises(ValueError, match=r"^evaluation\.maps=unseen: this scenario has too few maps"):
        split.training_seeds(np.random.default_rng(0), 1) if split.is_unseen(0) else split.unseen_seeds(1)
