"""Rollouts in files: Parquet, one row a turn, with all that is needed to know what is true of them without the model.

A file holds every turn to the bit, and in its metadata the game's settings, the decoding rule and the sampling policy's
action probabilities on every text of every map played. So any credit rule can be held against the exact values later,
by dynamic programming alone. Columns and their meaning: `SCHEMA`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from inspect import Parameter, signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from msgrpo_lab.fidelity.action_probs import ActionTable
from msgrpo_lab.fidelity.truth import LakeTruth, lake_truth
from msgrpo_lab.files import written_whole
from msgrpo_lab.oracle.frozen_lake import has_oracle
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.types import Completion, Episode, ParsedAction, RolloutBatch, Sampling, Turn

log = logging.getLogger(__name__)

VERSION = "msgrpo_lab.rollouts/2"
"""Names the layout of a file; another layout gets another number."""
WITHOUT_DIGEST = "msgrpo_lab.rollouts/1"
"""The same without a checksum; still read."""
META = b"msgrpo_lab"
"""Key of the metadata, a JSON text, in the Parquet schema."""
DIGEST = b"msgrpo_lab.sha256"
"""Key of the checksum."""
MAGIC = b"PAR1"
"""What a Parquet file begins and ends with."""


def write_rows(path: Path, columns: Columns, meta: Mapping[str, Any]) -> None:
    """Writes rows and metadata, whole or not at all.

    Raises:
        OSError: it cannot be written; what stood there still does.
        ValueError: a value that JSON cannot hold.
    """
    text = json.dumps({"schema": VERSION, **meta}, allow_nan=False).encode()
    schema = SCHEMA.with_metadata({META: text, DIGEST: content_digest(columns, text)})
    table = pa.table(dict(columns), schema=schema)
    with written_whole(path) as stream:
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)


def read_rows(path: Path) -> tuple[Columns, dict[str, Any]]:
    """The rows and the metadata of a file, as they were written.

    Raises:
        ValueError: there is no such file, it is none of this layout, or damaged; one line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise ValueError(format_error(path, what, "give a file that callbacks.rollouts has written"))
    ends = _ends(path)
    if ends[0] != MAGIC:
        raise ValueError(format_error(path, "is no Parquet file", "give a file that callbacks.rollouts has written"))
    if ends[1] != MAGIC:
        raise ValueError(format_error(path, "is cut short", "copy it again, or save the rollout again"))
    try:
        schema = pq.read_schema(path)
        text, digest = (schema.metadata or {}).get(META, b"null"), (schema.metadata or {}).get(DIGEST)
        meta = json.loads(text)
        _check_schema(path, schema, meta)
        columns = pq.read_table(path, columns=SCHEMA.names, page_checksum_verification=True).to_pydict()
    except (pa.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            format_error(path, f"is damaged ({reason})", "copy it again, or save the rollout again")
        ) from error
    if digest is None and meta["schema"] == WITHOUT_DIGEST:
        log.warning("rollouts=%s: written by an earlier version, without a checksum: damage to it cannot be told", path)
    elif digest != content_digest(columns, text):
        raise ValueError(
            format_error(path, "is damaged (its checksum is another)", "copy it again, or save the rollout again")
        )
    return columns, meta


def content_digest(columns: Columns, meta: bytes) -> bytes:
    """SHA-256 in hexadecimal digits over what a rollout file says: its metadata, and every value of every column."""
    digest = hashlib.sha256(meta)
    for name in SCHEMA.names:
        # A list's literal tells its values and their types apart, floats to the bit.
        digest.update(f"{name}={list(columns[name])!r}".encode(errors="surrogatepass"))
    return digest.hexdigest().encode()


def _ends(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as stream:
        first = stream.read(len(MAGIC))
        size = stream.seek(0, 2)
        stream.seek(max(0, size - len(MAGIC)))
        return first, stream.read() if size >= 3 * len(MAGIC) else b""


def _check_schema(path: Path, schema: pa.Schema, meta: Any) -> None:
    if not isinstance(meta, dict) or "schema" not in meta:
        raise ValueError(
            format_error(path, "is Parquet, but no rollout", "give a file that callbacks.rollouts has written")
        )
    if meta["schema"] not in (VERSION, WITHOUT_DIGEST):
        remedy = "save the rollout again, or read it with the version of the lab that wrote it"
        raise ValueError(format_error(path, f"has the schema {meta['schema']}; this version reads {VERSION}", remedy))
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if missing:
        columns = "column" if len(missing) == 1 else "columns"
        raise ValueError(format_error(path, f"lacks the {columns} {', '.join(missing)}", "save the rollout again"))
    for wanted in SCHEMA:
        found = schema.field(wanted.name).type
        if found != wanted.type:
            raise ValueError(
                format_error(
                    path, f"has {found} in column {wanted.name}, which is {wanted.type}", "save the rollout again"
                )
            )


def format_error(path: Path, problem: str, remedy: str) -> str:
    """A line about a file."""
    return f"rollouts={path}: {problem}; {remedy}"


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


GAMES: Mapping[str, Callable[..., TextGame]] = {FrozenLake.__name__: FrozenLake}
"""Games with an oracle, by the name that a file holds. A file names no code to be run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GameSettings:
    """The scenario of a rollout."""

    game: str
    """Name of the game's class."""
    settings: Mapping[str, Any]
    """Its arguments, all of them."""

    @classmethod
    def of(cls, make_game: Callable[[], TextGame]) -> GameSettings:
        """The settings that a game class, or a partial call of one (a file of `conf/env`), makes games with."""
        of_class = make_game.func if isinstance(make_game, partial) else make_game
        given = make_game.keywords if isinstance(make_game, partial) else {}
        if not isinstance(of_class, type):
            raise ValueError(f"make_game={make_game!r}: must be a game's class, or functools.partial of one")
        defaults = {
            name: one.default
            for name, one in signature(of_class).parameters.items()
            if one.default is not Parameter.empty
        }
        return cls(game=of_class.__name__, settings={**defaults, **given})


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRollout:
    """A rollout, and under what it was played."""

    batch: RolloutBatch
    scenario: GameSettings
    sampling: Sampling
    table: ActionTable | None
    """The sampling policy on every text of every map played; None where nobody has asked it."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where the rollout comes from, for people: plain values by name."""

    def truth(self) -> LakeTruth:
        """The exact values of the policy that has sampled it, computed anew.

        Raises:
            ValueError: the game has no oracle, the file holds no action probabilities, or not those of this rollout.
        """
        make = GAMES.get(self.scenario.game)
        if make is None or not has_oracle(make):
            raise ValueError(
                f"game {self.scenario.game} has no oracle to hold credit against; save a rollout of {', '.join(GAMES)} "
                "(env=frozenlake)"
            )
        if self.table is None:
            raise ValueError(
                "no action probabilities are saved with the rollout; save it by callbacks.rollouts, which asks for them"
            )
        try:
            game = make(**self.scenario.settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings of {self.scenario.game}: {error}; save the rollout again") from error
        _check_played(self.batch, game)
        _check_answers(self.table, len(game.legal_actions) + 1)
        return lake_truth(self.batch, game=game, table_of=self.table.select)


def _check_played(batch: RolloutBatch, game: TextGame) -> None:
    """Refuses turns that the game has no place for; `LakeTruth.turns` tells whether they are of its maps."""
    actions = len(game.legal_actions)
    for number, episode in enumerate(batch.episodes):
        if episode.length > game.horizon:
            problem = f"has {episode.length} turns, where horizon={game.horizon}"
            raise ValueError(f"episode {number}: {problem}; save the rollout again")
        for time, turn in enumerate(episode.turns):
            key, action = turn.state_key, turn.parsed.action
            if not _is_cell(key):
                problem = f"state_key={key!r} is no map with one of its cells"
            elif action is not None and not 0 <= action < actions:
                problem = f"action={action}, where there are {actions} actions, 0 to {actions - 1}"
            else:
                continue
            raise ValueError(f"episode {number}, turn {time}: {problem}; save the rollout again")


def _is_cell(key: Hashable) -> bool:
    if not (isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str) and isinstance(key[1], int)):
        return False
    return 0 <= key[1] < len(key[0].replace("/", ""))


def _check_answers(table: ActionTable, answers: int) -> None:
    """Refuses what are no action probabilities of so many answers, ⊥ among them."""
    prob_XB = table.prob_XB
    if prob_XB.shape[1] != answers or not (prob_XB >= 0).all() or not np.allclose(prob_XB.sum(axis=1), 1.0, atol=1e-6):
        raise ValueError(
            f"action probabilities have the shape {prob_XB.shape}, or do not add up to 1: there must be {answers} for "
            "each text; save the rollout again"
        )


def save_rollout(path: Path, saved: SavedRollout) -> None:
    """Writes a rollout whole or not at all; loading it gives back an equal one, to the bit.

    Raises:
        OSError: it cannot be written; what stood there still does.
        ValueError: an episode without turns, or a value that no column can hold.
    """
    meta = {
        **asdict(saved.scenario),
        "sampling": asdict(saved.sampling),
        "table": None if saved.table is None else _plain_table(saved.table),
        "origin": dict(saved.origin),
    }
    write_rows(path, as_columns(saved.batch), meta)


def load_rollout(path: Path) -> SavedRollout:
    """Reads a rollout.

    Raises:
        ValueError: there is no file, or not one that this version reads; one line that says which, and what to do.
    """
    columns, meta = read_rows(path)
    try:
        sampling = meta["sampling"]
        choices = sampling["choices"]
        return SavedRollout(
            batch=from_columns(columns),
            scenario=GameSettings(game=str(meta["game"]), settings=dict(meta["settings"])),
            sampling=Sampling(
                **{
                    **sampling,
                    "stop": tuple(sampling["stop"]),
                    "choices": None if choices is None else tuple(map(tuple, choices)),
                }
            ),
            table=None if meta["table"] is None else _table(meta["table"]),
            origin=dict(meta["origin"]),
        )
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            format_error(path, f"holds what no rollout has ({reason})", "save the rollout again")
        ) from error


def _plain_table(table: ActionTable) -> dict[str, Any]:
    return {
        "texts": list(table.texts),
        "prob": table.prob_XB.tolist(),
        "standard_error": table.standard_error_XB.tolist(),
        "exact": table.exact,
    }


def _table(plain: Mapping[str, Any]) -> ActionTable:
    texts = tuple(plain["texts"])
    prob_XB, error_XB = (np.array(plain[name], dtype=np.float64) for name in ("prob", "standard_error"))
    if prob_XB.ndim != 2 or prob_XB.shape != error_XB.shape or len(prob_XB) != len(texts):
        raise ValueError(f"{len(texts)} texts with probabilities {prob_XB.shape} and errors {error_XB.shape}")
    return ActionTable(texts=texts, prob_XB=prob_XB, standard_error_XB=error_XB, exact=bool(plain["exact"]))
