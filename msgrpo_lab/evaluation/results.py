"""Cells in a folder, a file each: what has been played is not played again, and nothing else is taken for it.

A file (Parquet; JSON for the reference players' scores) is named after its policy, scenario, decoding and a digest of
everything that its numbers depend on, the lab's own code included. So another request, other weights or a changed
program never meet old results. It holds the whole digest and a checksum: a file that was damaged, cut, edited or
renamed is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from msgrpo_lab.config.paths import PACKAGE
from msgrpo_lab.files import written_whole
from msgrpo_lab.rollout.collect import action_entropy
from msgrpo_lab.rollout.held_out import Outcomes
from msgrpo_lab.types import RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """The E episodes of a cell."""

    outcomes: Outcomes
    seeds: Int[np.ndarray, " E"]
    """Environment seeds."""
    tokens: Int[np.ndarray, " E"]
    """Completion tokens."""
    surprise: Float[np.ndarray, " E"]
    """−Σ log p of an episode's completion tokens, nats; nan where no log-probability is known, or none was drawn by."""
    action_entropy: float
    """Nats, mean over turns (`rollout.collect.action_entropy`); nan where it is not defined."""

    @classmethod
    def of(cls, rollout: RolloutBatch, *, drawn: bool, constrained: bool) -> Played:
        """Of a rollout of one episode a group.

        Args:
            rollout: the episodes.
            drawn: whether completions were drawn from a distribution whose log-probabilities they carry. Without,
                there are no entropies: −log p of a token that was not drawn estimates nothing.
            constrained: whether a completion was one of the legal words and nothing else.
        """
        completions = [[turn.completion for turn in episode.turns] for episode in rollout.episodes]
        surprise = [-sum(float(one.logprobs.sum(dtype=np.float64)) for one in episode) for episode in completions]
        return cls(
            outcomes=Outcomes.of(rollout),
            seeds=np.array([episode.seed for episode in rollout.episodes], dtype=np.int64),
            tokens=np.array([sum(len(one.token_ids) for one in episode) for episode in completions], dtype=np.int64),
            surprise=np.array(surprise if drawn else [math.nan] * len(surprise)),
            action_entropy=action_entropy(rollout, constrained) if drawn else math.nan,
        )

    def __len__(self) -> int:
        """Episodes."""
        return len(self.seeds)

    @property
    def token_entropy(self) -> float:
        """Mean over completion tokens of −log p, nats: an unbiased estimate of the entropy of the distributions that
        they were drawn from, at the states that were visited; nan where it is not defined.
        """
        total = int(self.tokens.sum())
        return float(self.surprise.sum() / total) if total else math.nan

    def scores(self, ends: tuple[float, float] | None) -> dict[str, float]:
        """`Outcomes.scores`, and the two entropies."""
        return {
            **self.outcomes.scores(ends),
            "token_entropy": self.token_entropy,
            "action_entropy": self.action_entropy,
        }


VERSION = "msgrpo_lab.evaluation/1"
"""Names the layout of a file; another layout gets another number."""
META = b"msgrpo_lab"
"""Key of the metadata, a JSON text, in the Parquet schema."""
DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)
"""What reading a damaged file may raise."""
SCHEMA = pa.schema(
    [
        ("seed", pa.int64()),
        ("return", pa.float64()),
        ("success", pa.bool_()),
        ("turns", pa.int64()),
        ("valid_turns", pa.int64()),
        ("tokens", pa.int64()),
        ("surprise", pa.float64()),
    ]
)


class DamagedCellError(ValueError):
    """A file of results cannot be used; one line that names it, what is wrong and what to do."""


def digest_of(plain: Any) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 of the package's own sources: results are those of the program that made them."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CellKey:
    """Which cell it is."""

    policy: str
    scenario: str
    decoding: str
    digest: str
    """Of everything that its numbers depend on."""

    @property
    def file(self) -> str:
        """Name of its file, without the suffix."""
        words = [re.sub(r"[^\w.-]+", "_", part)[-60:] for part in (self.policy, self.scenario, self.decoding)]
        return f"{'--'.join(words)}--{self.digest[:16]}"


class Store:
    """The cells of a folder.

    Args:
        folder: made when the first cell is written.
        resume: whether cells that are there are read; else they are written anew.
    """

    def __init__(self, folder: Path, *, resume: bool = True) -> None:
        self.folder = folder
        self.resume = resume

    def read(self, key: CellKey) -> Played | None:
        """The cell, to the bit; None if it has not been played.

        Raises:
            DamagedCellError: there is a file in its place that is not this cell, whole and unchanged.
        """
        path = self.folder / f"{key.file}.parquet"
        if not self.resume or not path.exists():
            return None
        try:
            table = pq.read_table(path)
            meta = json.loads((table.schema.metadata or {})[META])
            if table.schema.names != SCHEMA.names or meta["schema"] != VERSION:
                raise ValueError(f"it is no cell of the schema {VERSION}")
            columns = table.to_pydict()
            checksum = meta.pop("checksum")
            if checksum != _checksum(columns, meta):
                raise ValueError("its checksum is not that of its rows")
            if meta["digest"] != key.digest:
                raise ValueError("it holds the results of another request")
            return _played(columns, meta)
        except DAMAGE as error:
            raise self._damaged(path, error) from error

    def write(self, key: CellKey, played: Played) -> None:
        """Keeps a cell, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        columns = as_columns(played)
        meta = {
            "schema": VERSION,
            "policy": key.policy,
            "scenario": key.scenario,
            "decoding": key.decoding,
            "digest": key.digest,
            "action_entropy": None if math.isnan(played.action_entropy) else played.action_entropy,
        }
        schema = SCHEMA.with_metadata({META: json.dumps({**meta, "checksum": _checksum(columns, meta)})})
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.folder / f"{key.file}.parquet") as stream:
            pq.write_table(pa.table(columns, schema=schema), stream, compression="zstd")

    def read_plain(self, key: CellKey) -> dict[str, Any] | None:
        """Plain values that `write_plain` has kept; None if it has not. Raises `DamagedCellError` as `read` does."""
        path = self.folder / f"{key.file}.json"
        if not self.resume or not path.exists():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["checksum"] != digest_of([key.digest, kept["values"]]):
                raise ValueError("its checksum is not that of its values")
            return dict(kept["values"])
        except DAMAGE as error:
            raise self._damaged(path, error) from error

    def write_plain(self, key: CellKey, values: Mapping[str, Any]) -> None:
        """Keeps plain values under a key, whole or not at all. Raises `OSError` if they cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"checksum": digest_of([key.digest, dict(values)]), "values": dict(values)}, indent=1)
        with written_whole(self.folder / f"{key.file}.json") as stream:
            stream.write(text.encode())

    def _damaged(self, path: Path, error: Exception) -> DamagedCellError:
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "delete the file to play it again, or give resume=null to play everything"
        return DamagedCellError(f"folder={self.folder.parent}: {path} cannot be used ({reason}); {remedy}")


def as_columns(played: Played) -> dict[str, list[Any]]:
    """The episodes by column; what is not known is None."""
    return {
        "seed": played.seeds.tolist(),
        "return": played.outcomes.returns.astype(np.float64).tolist(),
        "success": played.outcomes.success.tolist(),
        "turns": played.outcomes.turns.tolist(),
        "valid_turns": played.outcomes.valid_turns.tolist(),
        "tokens": played.tokens.tolist(),
        "surprise": [None if math.isnan(value) else value for value in played.surprise.tolist()],
    }


def _checksum(columns: Mapping[str, list[Any]], meta: Mapping[str, Any]) -> str:
    return digest_of({"rows": dict(columns), "meta": dict(meta)})


def _played(columns: Mapping[str, list[Any]], meta: Mapping[str, Any]) -> Played:
    entropy = meta["action_entropy"]
    return Played(
        outcomes=Outcomes(
            returns=np.array(columns["return"], dtype=np.float64),
            success=np.array(columns["success"], dtype=bool),
            turns=np.array(columns["turns"], dtype=np.int64),
            valid_turns=np.array(columns["valid_turns"], dtype=np.int64),
        ),
        seeds=np.array(columns["seed"], dtype=np.int64),
        tokens=np.array(columns["tokens"], dtype=np.int64),
        surprise=np.array([math.nan if value is None else value for value in columns["surprise"]], dtype=np.float64),
        action_entropy=math.nan if entropy is None else float(entropy),
    )
