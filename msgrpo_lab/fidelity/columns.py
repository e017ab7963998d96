"""The columns of a rollout file: one row a turn, nothing nested, every value of `types.RolloutBatch` to the bit.

Token ids and log-probabilities are binary: little-endian int64, and float32 or float64 as the engine gave them.
"""

from __future__ import annotations

import ast
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from msgrpo_lab.types import Completion, Episode, ParsedAction, RolloutBatch, Turn

IDS = np.dtype("<i8")
LOGPROBS: Mapping[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8")}

SCHEMA = pa.schema(
    [
        # of the episode, the same on each of its rows
        pa.field("episode", pa.int32(), nullable=False),
        pa.field("group_index", pa.int64(), nullable=False),
        pa.field("group_id", pa.int64(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("terminated", pa.bool_(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("success", pa.bool_(), nullable=False),
        # of the turn
        pa.field("turn", pa.int32(), nullable=False),
        pa.field("observation", pa.string(), nullable=False),
        pa.field("state_key", pa.string(), nullable=False),  # a Python literal
        pa.field("prompt_ids", pa.binary(), nullable=False),
        pa.field("token_ids", pa.binary(), nullable=False),
        pa.field("logprobs", pa.binary(), nullable=False),
        pa.field("logprobs_type", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("action", pa.int32()),  # null is ⊥
        pa.field("span_start", pa.int64()),
        pa.field("span_end", pa.int64()),
        pa.field("error", pa.string()),
        pa.field("executed_action", pa.int32(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("game_reward", pa.float64(), nullable=False),
        pa.field("exact_adv", pa.float64()),  # null where no oracle was asked
    ]
)

Columns = Mapping[str, Sequence[Any]]


def as_columns(batch: RolloutBatch) -> dict[str, list[Any]]:
    """A rollout's turns as columns.

    Raises:
        ValueError: an episode has no turns, or a value that no column can hold.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for number, (episode, group) in enumerate(zip(batch.episodes, batch.group_index.tolist(), strict=True)):
        if not episode.turns:
            raise ValueError(f"episode {number} has no turns: leave unplayed episodes out of the rollout")
        for time, turn in enumerate(episode.turns):
            exact = None if batch.exact_adv is None else float(batch.exact_adv[number, time])
            row = {
                "episode": number,
                "group_index": group,
                "group_id": episode.group_id,
                "seed": episode.seed,
                "terminated": episode.terminated,
                "truncated": episode.truncated,
                "success": episode.success,
                "turn": time,
                "exact_adv": exact,
                **_turn_row(turn),
            }
            for name, value in row.items():
                columns[name].append(value)
    return columns


def _turn_row(turn: Turn) -> dict[str, Any]:
    completion, parsed = turn.completion, turn.parsed
    span = parsed.span or (None, None)
    kind = completion.logprobs.dtype.name
    if kind not in LOGPROBS:
        raise ValueError(f"Completion.logprobs has the type {kind}: a rollout file holds {' or '.join(LOGPROBS)}")
    return {
        "observation": turn.observation,
        "state_key": _literal(turn.state_key),
        "prompt_ids": _packed(completion.prompt_ids),
        "token_ids": _packed(completion.token_ids),
        "logprobs": completion.logprobs.astype(LOGPROBS[kind]).tobytes(),
        "logprobs_type": kind,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "policy_version": completion.policy_version,
        "action": parsed.action,
        "span_start": span[0],
        "span_end": span[1],
        "error": parsed.error,
        "executed_action": turn.executed_action,
        "reward": turn.reward,
        "game_reward": turn.game_reward,
    }


def _packed(ids: Int[np.ndarray, " P"]) -> bytes:
    return ids.astype(IDS).tobytes()


def _literal(key: Hashable) -> str:
    """A state key as a Python literal that reads back equal."""
    text = repr(key)
    try:
        same = ast.literal_eval(text) == key
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise ValueError(f"state_key={text}: cannot be kept in a file; make it of tuples, texts and numbers")
    return text


def from_columns(columns: Columns) -> RolloutBatch:
    """The rollout that `as_columns` was given.

    Raises:
        ValueError: the rows are none, not those of whole episodes in order, or hold a value that no rollout has.
    """
    number = np.array(columns["episode"], dtype=np.int64)
    time = np.array(columns["turn"], dtype=np.int64)
    first = np.flatnonzero(time == 0)
    length = np.diff(np.append(first, len(time)))
    in_order = len(first) > 0 and first[0] == 0 and np.array_equal(number, np.repeat(np.arange(len(first)), length))
    if not in_order or not np.array_equal(time, np.concatenate([np.arange(n) for n in length])):
        raise ValueError("the rows are not whole episodes in order")
    turns = _turns(columns)
    bounds = [*first.tolist(), len(time)]
    episodes = tuple(
        Episode(
            turns=tuple(turns[start:end]),
            **{name: columns[name][start] for name in ("group_id", "seed", "terminated", "truncated", "success")},
        )
        for start, end in pairwise(bounds)
    )
    exact_ET = None
    if columns["exact_adv"][0] is not None:
        exact_ET = np.zeros((len(first), int(length.max())))
        exact_ET[number, time] = np.array(columns["exact_adv"], dtype=np.float64)
    return RolloutBatch(
        episodes=episodes,
        group_index=np.array([columns["group_index"][start] for start in bounds[:-1]], dtype=np.int64),
        exact_adv=exact_ET,
    )


def _turns(columns: Columns) -> list[Turn]:
    """The turns in order. Equal completions are one object, as an engine hands them out, and so are equal states."""
    completions: dict[tuple[Any, ...], Completion] = {}
    keys: dict[str, Hashable] = {}
    names = ("prompt_ids", "token_ids", "logprobs", "logprobs_type", "text", "finish_reason", "policy_version")
    turns = []
    for row, of_completion in enumerate(zip(*(columns[name] for name in names), strict=True)):
        completion = completions.get(of_completion)
        if completion is None:
            completion = completions[of_completion] = _completion(*of_completion)
        literal = columns["state_key"][row]
        if literal not in keys:
            keys[literal] = ast.literal_eval(literal)
        start, end = columns["span_start"][row], columns["span_end"][row]
        turns.append(
            Turn(
                observation=columns["observation"][row],
                state_key=keys[literal],
                completion=completion,
                parsed=ParsedAction(
                    action=columns["action"][row],
                    span=None if start is None else (start, end),
                    error=columns["error"][row],
                ),
                executed_action=columns["executed_action"][row],
                reward=columns["reward"][row],
                game_reward=columns["game_reward"][row],
            )
        )
    return turns


def _completion(
    prompt_ids: bytes, token_ids: bytes, logprobs: bytes, kind: str, text: str, finish_reason: Any, policy_version: int
) -> Completion:
    return Completion(
        prompt_ids=np.frombuffer(prompt_ids, IDS).astype(np.int64),
        token_ids=np.frombuffer(token_ids, IDS).astype(np.int64),
        logprobs=np.frombuffer(logprobs, LOGPROBS[kind]).astype(kind),
        text=text,
        finish_reason=finish_reason,
        policy_version=policy_version,
    )
