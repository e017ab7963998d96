"""What an update says of its own work: tokens, operations, memory; and that a run which shares nothing is the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_made import SMALL_RUN, composed, fit, small_lab, small_policy, train_batch

from msgrpo_lab.decoder.decoding import ChoiceTrie
from msgrpo_lab.decoder.plan import plan_forward
from msgrpo_lab.lap.policy import UpdateWork, peak_memory_mb, update_work
from msgrpo_lab.types import Sampling

FREE = ("rollout.sampling.constrain=false", "rollout.sampling.max_new_tokens=3")
BATCH = train_batch([([20, 21, 22], [11]), ([20, 21, 22], [12, 13])])
"""Reads three prompt tokens and 12: four tokens, two nodes, 1 + 2 + 3 + 4 keys."""
LAYER = 4 * 32 * 32 + 3 * 32 * 64
"""Matrix entries of a small layer: four attention projections and three of the gated network."""
ADAPTER = 4 * (4 * (32 + 32) + 3 * (32 + 64))
"""The same of a rank-4 adapter on all of them."""
ATTENTION = 3 * 4 * 2 * 32 * 10
"""Three passes of four operations, two layers, 32 wide, 10 keys."""


def test_operations_of_full_training_by_hand() -> None:
    policy = small_policy()
    vocabulary = len(policy.output_weight(None))
    (plan,) = plan_forward(BATCH, None, 8192)
    work = update_work(policy, plan, None, Sampling())
    assert (work.tokens, work.padded_tokens) == (4, 4)
    assert work.flops == 6 * 2 * LAYER * 4 + 6 * 32 * vocabulary * 2 + ATTENTION


def test_a_frozen_base_needs_no_gradient_of_its_weights() -> None:
    trie = ChoiceTrie(((11,), (12, 13)))
    (plan,) = plan_forward(BATCH, trie, 8192)
    work = update_work(small_policy(lora_rank=4), plan, trie, Sampling())
    assert work.flops == (4 * 2 * LAYER + 6 * 2 * ADAPTER) * 4 + 4 * 32 * 3 * 2 + ATTENTION


def test_top_k_finds_its_candidates_by_one_product_and_computes_with_these() -> None:
    policy = small_policy(lora_rank=4)
    vocabulary = len(policy.output_weight(None))
    (plan,) = plan_forward(BATCH, None, 8192)
    work = update_work(policy, plan, None, Sampling(top_k=3))
    projection = 2 * (2 * 32 * vocabulary + 4 * 32 * (3 + 5))
    assert work.flops == (4 * 2 * LAYER + 6 * 2 * ADAPTER) * 4 + projection + ATTENTION


def test_work_adds_up() -> None:
    assert UpdateWork(1, 2, 3.0) + UpdateWork(10, 20, 30.0) == (11, 22, 33.0)


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory_mb(torch.device("cpu"))
    held = torch.ones(64 * 2**20 // 4 + int(before * 2**20 / 4))  # more than all that was ever held
    assert peak_memory_mb(torch.device("cpu")) > before + 32
    assert before > 50
    assert float(held[0]) == 1.0


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_the_peak_is_this_process_and_not_the_one_that_started_it() -> None:
    held = np.ones(100_000_000)  # 800 MB
    code = "import torch; from msgrpo_lab.lap.policy import peak_memory_mb; print(peak_memory_mb(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < held.nbytes / 2**20


@pytest.mark.parametrize("settings", [(), FREE, (*FREE, "loss.beta=0.1", "model.lora_rank=4")], ids=str)
def test_a_run_that_shares_nothing_is_the_same_run(settings: tuple[str, ...]) -> None:
    memories = [fit(small_lab(*settings, f"update.sharing={kind}"), epochs=2) for kind in ("tree", "none")]
    for one, other in zip(*(memory.training() for memory in memories), strict=True):
        for name in ("train/loss", "train/grad_norm", "train/kl", "train/ratio_mean", "train/token_entropy"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    (tree, none) = ({name: memory.series(f"perf/{name}") for name in MEASURED} for memory in memories)
    assert none["distinct_token_ratio"][0] <= 1.0
    assert tree["distinct_token_ratio"][0] < 0.7 * none["distinct_token_ratio"][0]
    assert tree["train_flops"][0] < 0.7 * none["train_flops"][0]
    for of_run in (tree, none):
        assert all(p >= c > 0 for p, c in zip(of_run["padded_tokens"], of_run["computed_tokens"], strict=True))
        assert min(of_run["peak_memory_mb"]) > 50


MEASURED = ("computed_tokens", "padded_tokens", "distinct_token_ratio", "train_flops", "peak_memory_mb")


def test_the_setting_arrives_where_it_acts() -> None:
    assert composed(*SMALL_RUN)["update"].sharing == "tree"
    lab = small_lab("update.sharing=none")
    assert (lab.module.sharing, lab.data.sharing) == ("none", "none")
