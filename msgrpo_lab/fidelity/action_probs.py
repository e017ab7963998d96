"""The language policy as a policy over actions: π_θ(a|s) = Σ_{y : Φ(y) = a} p_θ(y | prompt(s)) (paper section 2).

Exact where decoding is constrained to the legal words, since their probabilities are all there is to add up; estimated
from sampled completions where it is free. Either way each distinct text is worked on once.

Axes: X texts, B answers: the legal actions in their order and, last, ⊥.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from msgrpo_lab.decoder.decoding import ChoiceTrie, decoding_logprobs
from msgrpo_lab.engines.base import RolloutEngine
from msgrpo_lab.engines.hf.constrained import ChoiceDecoder, choice_trie, distinct_prompts
from msgrpo_lab.engines.hf.prompts import PromptReader
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.prompt import PromptBuilder
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Sampling


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActionTable:
    """What a policy answers to each of some texts."""

    texts: tuple[str, ...]
    prob_XB: Float[np.ndarray, "X B"]  # noqa: N815  axis letters
    """Probability of each answer; rows sum to 1."""
    standard_error_XB: Float[np.ndarray, "X B"]  # noqa: N815
    """Of each probability; 0 where they are exact."""
    exact: bool

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        self.prob_XB.setflags(write=False)
        self.standard_error_XB.setflags(write=False)

    @property
    def prob_of(self) -> Mapping[str, Float[np.ndarray, " B"]]:
        """The row of each text."""
        return dict(zip(self.texts, self.prob_XB, strict=True))

    def select(self, texts: Sequence[str]) -> ActionTable:
        """The rows of these texts, in their order: a `TableMaker` that asks no policy, for tables that were kept.

        Raises:
            ValueError: a text is not in the table.
        """
        row_of = {text: row for row, text in enumerate(self.texts)}
        if missing := [text for text in texts if text not in row_of]:
            raise ValueError(
                f"texts: {len(missing)} of {len(texts)} are not in the table, the first {missing[0]!r}; "
                "make a table of all of them"
            )
        rows = [row_of[text] for text in texts]
        return ActionTable(
            texts=tuple(texts),
            prob_XB=self.prob_XB[rows],
            standard_error_XB=self.standard_error_XB[rows],
            exact=self.exact,
        )


TableMaker = Callable[[Sequence[str]], ActionTable]
"""Gives the action table of some observations: `exact_table` or `sampled_table`, their other arguments bound."""

PROMPTS_PER_CALL = 2048
"""Completions asked of an engine at a time."""


def exact_table(
    texts: Sequence[str],
    *,
    policy: LanguagePolicy,
    prompt: PromptBuilder,
    game: TextGame,
    sampling: Sampling,
    token_budget: int = 8192,
) -> ActionTable:
    """Action probabilities of the policy as it is now, under a decoding rule that is constrained to the legal words.

    Computed as the engine computes them: each distinct prompt is read once, and the tree of legal words behind it. What
    a word means is asked of the prompt's own parser, so that a word it cannot read counts as ⊥.

    Args:
        texts: observations, each once.
        policy: the language policy.
        prompt: makes a prompt of an observation, and reads the answers.
        game: the scenario, for its rules and legal actions.
        sampling: the decoding rule. A greedy one gives probabilities of 0 and 1.
        token_budget: padded prompt tokens of one forward pass at most.

    Raises:
        ValueError: the decoding rule is not constrained, or there are no texts.
    """
    if sampling.choices is None:
        raise ValueError(
            "rollout.sampling.constrain=false: exact action probabilities need answers constrained to the legal words; "
            "set it to true, or estimate them with sampled_table"
        )
    _check_texts(texts)
    prompts = [prompt.render(game.rules, text, game.legal_actions) for text in texts]
    distinct, prompt_of = distinct_prompts(prompts)
    decoder = ChoiceDecoder(PromptReader(policy, token_budget), version=0)
    logprob_UW = choice_logprobs(decoder.logits(distinct, sampling.choices), choice_trie(sampling.choices), sampling)
    prob_UB = np.zeros((len(distinct), len(game.legal_actions) + 1))
    for number, choice in enumerate(sampling.choices):
        word = policy.tokenizer.decode(list(choice), skip_special_tokens=True)
        prob_UB[:, _column(prompt, word, game)] += np.exp(logprob_UW[:, number])
    prob_XB = (prob_UB / prob_UB.sum(axis=1, keepdims=True))[prompt_of]
    return ActionTable(texts=tuple(texts), prob_XB=prob_XB, standard_error_XB=np.zeros_like(prob_XB), exact=True)


def sampled_table(
    texts: Sequence[str],
    *,
    engine: RolloutEngine,
    prompt: PromptBuilder,
    game: TextGame,
    sampling: Sampling,
    completions: int,
    rng: np.random.Generator,
) -> ActionTable:
    """Action probabilities estimated from completions: the share of each action among `completions` a text.

    Standard errors are those of a share with two successes and two failures added (Agresti & Coull 1998), so that an
    action that was never drawn is not taken for an impossible one.

    Args:
        texts: observations, each once.
        engine: synced with the policy; draws the completions.
        prompt: makes a prompt of an observation, and reads the answers.
        game: the scenario, for its rules and legal actions.
        sampling: the decoding rule, constrained or free.
        completions: M, at least 2.
        rng: all chance.

    Raises:
        ValueError: too few completions, or no texts.
    """
    if completions < 2:
        raise ValueError(f"completions={completions}: must be at least 2 a text, for there to be an error estimate")
    _check_texts(texts)
    actions = game.legal_actions
    count_XB = np.zeros((len(texts), len(actions) + 1))
    width = max(1, PROMPTS_PER_CALL // completions)
    for first in range(0, len(texts), width):
        rows = np.repeat(np.arange(first, min(first + width, len(texts))), completions).tolist()
        prompts = [prompt.render(game.rules, texts[row], actions) for row in rows]
        made = engine.generate(prompts, sampling, [rng] * len(rows), prompt.settled(actions))
        for row, completion in zip(rows, made, strict=True):
            count_XB[row, _column(prompt, completion.text, game)] += 1
    softened_XB = (count_XB + 2) / (completions + 4)
    return ActionTable(
        texts=tuple(texts),
        prob_XB=count_XB / completions,
        standard_error_XB=np.sqrt(softened_XB * (1 - softened_XB) / (completions + 4)),
        exact=False,
    )


def table_maker(
    *,
    policy: LanguagePolicy,
    engine: RolloutEngine,
    prompt: PromptBuilder,
    game: TextGame,
    sampling: Sampling,
    completions: int,
    rng: np.random.Generator,
    token_budget: int = 8192,
) -> TableMaker:
    """Asks the policy as exactly as its decoding rule allows: `exact_table` where it is constrained to the legal words,
    else `sampled_table`. The arguments are theirs.
    """
    if sampling.choices is not None:
        return partial(
            exact_table, policy=policy, prompt=prompt, game=game, sampling=sampling, token_budget=token_budget
        )
    return partial(
        sampled_table, engine=engine, prompt=prompt, game=game, sampling=sampling, completions=completions, rng=rng
    )


def choice_logprobs(
    logits_UQA: Float[torch.Tensor, "U Q A"], trie: ChoiceTrie, sampling: Sampling
) -> Float[np.ndarray, "U W"]:
    """Log-probability (nats) of each of the W legal answers, given the logits of every state of their tree.

    The sum over an answer's tokens of their log-probabilities under the decoding rule; −inf where top-k or top-p cut
    one off. Under greedy decoding 0 for the answer that is taken and −inf for the others.
    """
    assert sampling.choices is not None
    shape = logits_UQA.shape
    allowed = torch.from_numpy(trie.allowed).expand(shape).reshape(-1, shape[-1])
    rows = decoding_logprobs(logits_UQA.reshape(-1, shape[-1]), replace(sampling, greedy=False), allowed)
    if sampling.greedy:
        rows = torch.full_like(rows, -torch.inf).scatter(1, rows.argmax(dim=1, keepdim=True), 0.0)
    logprob_UQA = rows.reshape(shape).double().numpy()
    columns = []
    for choice in sampling.choices:
        states = trie.states(np.array(choice))
        columns.append(sum(logprob_UQA[:, q, trie.column(token)] for q, token in zip(states, choice, strict=True)))
    return np.stack(columns, axis=1)


def _column(prompt: PromptBuilder, text: str, game: TextGame) -> int:
    """Column of the action that a completion names; the last one for ⊥."""
    action = prompt.parse(text, game.legal_actions).action
    return len(game.legal_actions) if action is None else action


def _check_texts(texts: Sequence[str]) -> None:
    if not texts or len(set(texts)) != len(texts):
        raise ValueError(f"texts: {len(texts)} given, {len(set(texts))} distinct; give at least one, each once")
