"""How much there is to do: episodes, turns and tokens of a rollout, an update and an evaluation.

Counted on a rollout of the configuration's own size that a random player plays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int
from omegaconf import DictConfig

from msgrpo_lab.decoder.decoding import num_candidates
from msgrpo_lab.decoder.plan import ForwardPlan, plan_forward
from msgrpo_lab.engines.base import Settled, check_lengths
from msgrpo_lab.engines.hf.constrained import choice_trie
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.prompt import PromptBuilder
from msgrpo_lab.rollout.collect import Collector
from msgrpo_lab.seeding import FIRST_HELD_OUT_SEED, episode_generators, generator, held_out_seeds
from msgrpo_lab.training.assemble import component, decoding_rule
from msgrpo_lab.training.collate import collate, split_episodes
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Completion, Credit, RolloutBatch, Sampling, Selection, TrainBatch


class RandomAnswers:
    """A rollout engine whose answers name a legal action, each as often as any other.

    Args:
        answer_tokens: tokens of an answer under free decoding.
        vocabulary: each of them is a random number below it, or below k under top-k: the more there are to choose from,
            the less often two answers begin alike.
    """

    samples_policy = False

    def __init__(self, answer_tokens: int, vocabulary: int) -> None:
        self.answer_tokens = answer_tokens
        self.vocabulary = vocabulary
        self._games: Sequence[TextGame] = ()

    def sync(self, policy: LanguagePolicy, version: int) -> None:
        """There is no policy."""

    def observe(self, games: Sequence[TextGame]) -> None:
        """See `RolloutEngine.observe`."""
        self._games = games

    def generate(
        self,
        prompts: Sequence[Int[np.ndarray, " P"]],
        sampling: Sampling,
        rngs: Sequence[np.random.Generator],
        settled: Settled | None = None,  # noqa: ARG002
    ) -> list[Completion]:
        """A random legal action in each of the games shown last."""
        check_lengths(prompts, rngs)
        completions = []
        for prompt, game, rng in zip(prompts, self._games, rngs, strict=True):
            number = int(rng.integers(len(game.legal_actions)))
            if sampling.choices is None:
                tokens = rng.integers(min(self.vocabulary, sampling.top_k or self.vocabulary), size=self.answer_tokens)
            else:
                tokens = np.array(sampling.choices[number], dtype=np.int64)
            completions.append(
                Completion(
                    prompt_ids=prompt,
                    token_ids=tokens,
                    logprobs=np.zeros(len(tokens), dtype=np.float32),
                    # Read alike by the parsers of words and of tags.
                    text=f"<action>{game.legal_actions[number]}</action>",
                    finish_reason="stop",
                    policy_version=0,
                )
            )
        return completions

    def metrics(self) -> Mapping[str, float]:
        """Nothing was computed."""
        return {}

    def close(self) -> None:
        """Lets go of the games."""
        self._games = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """Episodes played with the policy."""

    episodes: int
    turns: int
    prompt_tokens: int
    """Of all turns, as a plain loop would read them."""
    answer_tokens: int
    """Of all turns."""
    read_tokens: int
    """Prompt tokens that are really read: common beginnings once a turn, prompts met before not at all."""
    branch_tokens: int
    """Tokens computed behind the distinct prompts: beginnings of answers, or the tree of legal words."""
    steps: int
    """Calls of the model one after the other, beside the reading of prompts."""
    turn_tokens: int
    """Distinct prompt tokens of the largest turn."""
    turn_texts: int
    """Distinct texts being written in the largest turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A forward and backward pass of the update."""

    tokens: int
    padded_tokens: int
    nodes: int
    roots: int
    """Rows that trees stand behind."""
    attended: int
    """Keys that the tokens attend to, added up."""
    cells: int
    """Key and value rows as they are put side by side for attention, read ones repeated: tokens · (1 + repetition)."""
    scores: int
    """Attention scores of the largest block, for one head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one job does."""

    rollouts: int
    updates: int
    evaluations: int
    rollout: Play
    evaluation: Play
    """One pass over the held-out seeds; an evaluation makes two, sampled and greedy."""
    passes: tuple[Pass, ...]
    """Of one rollout's update: all passes and mini-batches."""
    samples: int
    """Turns that a rollout's update is made of, as often as they are trained on."""
    trained_tokens: int
    """Completion tokens that a rollout's update is made of, likewise."""
    batch_width: int
    """Columns of the training batch."""
    columns: int
    """Tokens that decoding may choose from."""
    candidates: int | None
    """Tokens that top-k is decided among, where only their logits are made (`decoder.decoding.top_logits`)."""
    whole_distribution: bool
    """Log-probabilities are taken of whole rows of the vocabulary (free decoding with top-p, or with a large top-k)."""
    constrained: bool
    reference: bool
    """π_ref is asked for the log-probabilities of every update's samples."""
    horizon: int
    longest_prompt: int
    longest_answer: int
    """Completion tokens at most."""


def measure(config: DictConfig, tokenizer: Any, vocabulary: int, answer_tokens: int | None) -> Workload:
    """Plays one rollout and one evaluation of a composed configuration of the main job at random, and counts.

    Args:
        config: see `conf/train.yaml`.
        tokenizer: the model's, or an `EstimatedTokenizer`.
        vocabulary: size of the model's vocabulary.
        answer_tokens: tokens of an answer under free decoding; None takes half of `rollout.sampling.max_new_tokens`.
    """
    update, rollout_cfg = config["update"], config.rollout
    prompt = PromptBuilder(component(config.prompt), tokenizer)
    collector = Collector(component(config.env, _partial_=True), prompt)
    rule = decoding_rule(config, prompt, collector.example_game)
    length = answer_length(config, answer_tokens)
    engine = RandomAnswers(length, vocabulary)
    groups, size = rollout_cfg.num_groups, rollout_cfg.group_size
    seeds = generator(config.seed, "env_seeds").integers(FIRST_HELD_OUT_SEED, size=groups).tolist()
    batch = _played(collector, engine, rule, seeds, size, config.seed)
    held_out = _played(collector, engine, rule, held_out_seeds(config.evaluation.episodes), 1, config.seed)
    drawn, pieces = _training(batch, config)
    trie = None if rule.choices is None else choice_trie(rule.choices)
    few = trie is None and LanguagePolicy.keeps_few(rule) and update.sharing == "tree"
    plans = [
        plan for piece in pieces for plan in plan_forward(piece, trie, update.token_budget, update.sharing)
    ]  # of one pass over the drawn episodes
    epochs, every = config.trainer.max_epochs, config.evaluation.every
    return Workload(
        rollouts=epochs,
        updates=epochs * update.passes * update.minibatches,
        evaluations=1 + epochs // every + (epochs % every > 0),
        rollout=_count(batch, rule, length),
        evaluation=_count(held_out, rule, length),
        passes=tuple(_pass(plan) for plan in plans) * update.passes,
        samples=len(drawn.input_ids) * update.passes,
        trained_tokens=drawn.num_tokens * update.passes,
        batch_width=int(drawn.input_ids.shape[1]),
        columns=vocabulary if trie is None else len(trie.columns),
        candidates=num_candidates(vocabulary, rule.top_k) if few and rule.top_k is not None else None,
        whole_distribution=trie is None and not few and (rule.top_k is not None or rule.top_p is not None),
        constrained=trie is not None,
        reference=config.loss.beta > 0,
        horizon=collector.example_game.horizon,
        longest_prompt=max(len(turn.completion.prompt_ids) for episode in batch.episodes for turn in episode.turns),
        longest_answer=rule.max_new_tokens if rule.choices is None else max(map(len, rule.choices)),
    )


def answer_length(config: DictConfig, answer_tokens: int | None) -> int:
    """Tokens that an answer is taken to have under free decoding."""
    limit = int(config.rollout.sampling.max_new_tokens)
    return max(1, math.ceil(limit / 2)) if answer_tokens is None else min(answer_tokens, limit)


def _played(
    collector: Collector, engine: RandomAnswers, rule: Sampling, seeds: Sequence[int], size: int, seed: int
) -> RolloutBatch:
    count = len(seeds) * size
    return collector.collect(
        seeds=seeds,
        group_size=size,
        members=generator(seed, "members").integers(2**31, size=count).tolist(),
        engine=engine,
        sampling=rule,
        rngs=episode_generators(seed, "engine", 0, count),
    )


def _training(batch: RolloutBatch, config: DictConfig) -> tuple[TrainBatch, list[TrainBatch]]:
    """A training batch of episodes drawn uniformly, and its mini-batches."""
    lengths, rng = batch.num_turns, generator(config.seed, "sampler")
    mask = np.arange(lengths.max()) < lengths[:, None]
    episodes = len(lengths)
    count = config.sampler.num_episodes
    index = rng.choice(episodes, size=count, replace=count > episodes)
    credit = Credit(turn_adv=np.zeros(mask.shape), turn_mask=mask, episode_adv=np.zeros(episodes))
    even = np.full(episodes, 1 / episodes)
    selection = Selection(index=index, prob=even, weight=np.ones(count), inclusion=even * count)
    drawn = collate(batch, credit, selection)
    return drawn, split_episodes(drawn, config["update"].minibatches, generator(config.seed, "data_order"))


def _count(batch: RolloutBatch, rule: Sampling, answer_tokens: int) -> Play:
    by_turn: list[list[bytes]] = []
    prompts: dict[bytes, np.ndarray] = {}
    turns = [(number, turn) for episode in batch.episodes for number, turn in enumerate(episode.turns)]
    for number, turn in turns:
        key = turn.completion.prompt_ids.tobytes()
        prompts[key] = turn.completion.prompt_ids
        by_turn += [[] for _ in range(number + 1 - len(by_turn))]
        by_turn[number].append(key)
    free = rule.choices is None
    answers = {(turn.completion.prompt_ids.tobytes(), tuple(turn.completion.token_ids.tolist())) for _, turn in turns}
    # Distinct beginnings of answers; the last token of one is never read.
    begun = {(key, tokens[:cut]) for key, tokens in answers for cut in range(1, len(tokens))}
    # The tree of legal words has one inner token for every proper beginning of a word but the empty one.
    inner = len({word[:cut] for word in rule.choices or () for cut in range(1, len(word))})
    return Play(
        episodes=len(batch.episodes),
        turns=len(turns),
        prompt_tokens=sum(len(turn.completion.prompt_ids) for _, turn in turns),
        answer_tokens=sum(len(turn.completion.token_ids) for _, turn in turns),
        read_tokens=_read_tokens([[prompts[key] for key in dict.fromkeys(keys)] for keys in by_turn]),
        branch_tokens=len(begun) if free else len(prompts) * inner,
        steps=len(by_turn) * (answer_tokens if free else 1),
        turn_tokens=max(distinct_tokens([prompts[key] for key in set(keys)]) for keys in by_turn),
        turn_texts=max(len(keys) if free else len(set(keys)) for keys in by_turn),
    )


def _read_tokens(turns: Sequence[Sequence[np.ndarray]]) -> int:
    """Prompt tokens that `engine=hf` reads: what the first turn's prompts open with, once; then, turn by turn, the
    forest of the prompts that were not met before, behind as much of that as they open with."""
    prefix = turns[0][0]
    for prompt in turns[0]:
        prefix = prefix[: _shared(prefix, prompt)]
    met: set[bytes] = set()
    total = len(prefix)
    for prompts in turns:
        new = [prompt for prompt in prompts if prompt.tobytes() not in met]
        met |= {prompt.tobytes() for prompt in new}
        start = min((_shared(prefix, prompt) for prompt in new), default=0)
        total += distinct_tokens([prompt[start:] for prompt in new])
    return total


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that both begin with."""
    limit = min(len(one), len(other))
    same = one[:limit] == other[:limit]
    return limit if same.all() else int(same.argmin())


def distinct_tokens(prompts: Sequence[np.ndarray]) -> int:
    """Tokens of a forest that holds every beginning of the prompts once."""
    # In this order, what a prompt shares with any earlier one it shares with the one before.
    ordered = [np.array(row) for row in sorted(prompt.tolist() for prompt in prompts)]
    shared = sum(_shared(one, other) for one, other in pairwise(ordered))
    return sum(map(len, ordered)) - shared


def _pass(plan: ForwardPlan) -> Pass:
    roots = plan.rows.input_ids
    cells, scores = roots.size, roots.shape[0] * roots.shape[1] ** 2
    for group in plan.branches:
        rows, width = group.token_ids.shape
        cells += rows * (width + roots.shape[1])
        scores = max(scores, rows * width * (width + roots.shape[1]))
    return Pass(
        tokens=plan.num_tokens,
        padded_tokens=plan.num_padded_tokens,
        nodes=plan.num_nodes,
        roots=len(roots),
        attended=plan.num_attended,
        cells=cells,
        scores=scores,
    )


PIECE = re.compile(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]|\s+")
LONGEST_WORD = 10
"""Letters of a word that is one token; a longer one is split."""
DEFAULT_SYSTEM = "You are a helpful assistant."
"""What chat templates say where a prompt has no system message of its own."""


class EstimatedTokenizer:
    """Stands where a tokenizer would: texts become numbers, equal pieces equal ones.

    The numbers mean nothing to a model. What can be read from them is how many there are and what texts begin alike.
    """

    name_or_path = "estimated"
    chat_template = "<|im_start|>{role}\n{content}<|im_end|>\n"
    """The ChatML layout, which Qwen2.5 and SmolLM2 are taught."""
    unk_token_id = None
    eos_token_id = None

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:  # noqa: ARG002  a tokenizer's signature
        """One number a piece."""
        return [self._numbers.setdefault(piece, len(self._numbers)) for piece in _pieces(text)]

    def apply_chat_template(
        self,
        chat: Sequence[Mapping[str, str]],
        tokenize: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat as text, with the special tokens that open and close a message.

        Raises:
            ValueError: token numbers are asked for.
        """
        if tokenize:
            raise ValueError("tokenize=True: the estimate renders texts only; call encode() on them")
        system = [] if chat and chat[0]["role"] == "system" else [{"role": "system", "content": DEFAULT_SYSTEM}]
        text = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in [*system, *chat])
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _pieces(text: str) -> list[str]:
    found: list[str] = []
    for special, plain in re.findall(r"(<\|im_\w+\|>)|((?:(?!<\|im_).)+)", text, re.DOTALL):
        if special:
            found.append(special)
            continue
        for piece in PIECE.findall(plain):
            found += [piece[start : start + LONGEST_WORD] for start in range(0, len(piece), LONGEST_WORD)]
    return found
