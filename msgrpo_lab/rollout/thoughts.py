"""What a rollout says of answers that think before they act: how long, how sure, and whether the thought is meant."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from msgrpo_lab.types import Completion, RolloutBatch, Turn


def thought_metrics(
    batch: RolloutBatch, legal_actions: Sequence[str], decode: Callable[[int], str]
) -> dict[str, float]:
    """Means over the turns that name a legal action behind a text of their own; empty where there is none.

    Everything before the named action is the *thought*, tags included; the tokens that the action stands in are the
    *action*. −log p of the drawn tokens is an unbiased estimate of the entropy of their distributions.

        thought_tokens            tokens of the thought
        thought_token_entropy     nats a token of the thought
        action_token_entropy      nats a token of the action
        thought_names_action      share of turns whose thought's last legal word is the action that is taken
        distinct_thoughts         share of distinct texts among the thoughts: near 0, the thought is always the same

    Args:
        batch: the rollout.
        legal_actions: words of the actions.
        decode: the text of a single token, without special tokens.
    """
    lengths: dict[int, int] = {}
    pattern = re.compile(rf"\b(?:{'|'.join(re.escape(word) for word in legal_actions)})\b", re.IGNORECASE)
    turns = [turn for episode in batch.episodes for turn in episode.turns if turn.parsed.span is not None]
    by_completion = {id(turn.completion): turn for turn in turns}
    times = Counter(id(turn.completion) for turn in turns)
    rows, thoughts, count = list[tuple[float, ...]](), set[str](), list[int]()
    for key, turn in by_completion.items():
        found = _of_turn(turn, decode, lengths)
        if found is None:
            continue
        thought, numbers = found
        words = pattern.findall(thought)
        action = turn.parsed.action
        named = bool(words) and action is not None and words[-1].lower() == legal_actions[action].lower()
        rows.append((*numbers, float(named)))
        thoughts.add(thought)
        count.append(times[key])
    if not rows:
        return {}
    names = ("thought_tokens", "thought_token_entropy", "action_token_entropy", "thought_names_action")
    means = np.average(np.array(rows), axis=0, weights=count).tolist()
    return {**dict(zip(names, means, strict=True)), "distinct_thoughts": len(thoughts) / sum(count)}


def _of_turn(
    turn: Turn, decode: Callable[[int], str], lengths: dict[int, int]
) -> tuple[str, tuple[float, float, float]] | None:
    """The thought, its tokens, and the nats a token of thought and action; None where there is no thought to tell.

    Characters are counted token by token, which is exact unless a character's bytes are spread over several tokens;
    such an answer is left out.
    """
    completion: Completion = turn.completion
    span = turn.parsed.span
    if span is None or span[0] == 0:
        return None
    for token in completion.token_ids.tolist():
        if token not in lengths:
            lengths[token] = len(decode(token))
    ends = np.cumsum([lengths[token] for token in completion.token_ids.tolist()])
    if int(ends[-1]) != len(completion.text):
        return None
    first = int(ends.searchsorted(span[0], side="right"))
    last = int(ends.searchsorted(span[1], side="left"))
    if first == 0:
        return None
    nats = -completion.logprobs
    numbers = (float(first), float(nats[:first].mean()), float(nats[first : last + 1].mean()))
    return completion.text[: span[0]], numbers
