"""Kept cells: they come back to the bit, and nothing else is taken for them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from msgrpo_lab.evaluation import results as module
from msgrpo_lab.evaluation.results import CellKey, DamagedCellError, Played, Store, digest_of
from msgrpo_lab.rollout.held_out import Outcomes

KEY = CellKey(policy="run:abc/best", scenario="frozenlake", decoding="sampled", digest=digest_of({"a": 1}))


def played(entropy: float = 0.25, surprise: float = 1 / 3) -> Played:
    return Played(
        outcomes=Outcomes(
            returns=np.array([1.0, -0.1 - 0.2]),
            success=np.array([True, False]),
            turns=np.array([3, 8]),
            valid_turns=np.array([3, 7]),
        ),
        seeds=np.array([10_000_000, 10_000_001]),
        tokens=np.array([4, 9]),
        surprise=np.array([surprise, 2 / 7]),
        action_entropy=entropy,
    )


def same(one: Played, other: Played) -> bool:
    pairs = [
        *((getattr(one.outcomes, f.name), getattr(other.outcomes, f.name)) for f in dataclasses.fields(Outcomes)),
        *((getattr(one, name), getattr(other, name)) for name in ("seeds", "tokens", "surprise")),
    ]
    arrays = all(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)
    both_nan = math.isnan(one.action_entropy) and math.isnan(other.action_entropy)
    return arrays and (both_nan or one.action_entropy == other.action_entropy)


@pytest.mark.parametrize("cell", [played(), played(entropy=math.nan, surprise=math.nan)], ids=["known", "unknown"])
def test_a_cell_comes_back_to_the_bit(cell: Played, tmp_path: Path) -> None:
    store = Store(tmp_path / "cells")
    assert store.read(KEY) is None
    store.write(KEY, cell)
    found = store.read(KEY)
    assert found is not None
    assert same(found, cell)
    assert found.scores((0.1, 0.9)).keys() == cell.scores((0.1, 0.9)).keys()
    assert [path.suffix for path in (tmp_path / "cells").iterdir()] == [".parquet"], "nothing is left beside it"


def test_another_request_does_not_meet_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(KEY, played())
    assert store.read(dataclasses.replace(KEY, digest=digest_of({"a": 2}))) is None
    assert Store(tmp_path, resume=False).read(KEY) is None


def test_a_renamed_file_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(KEY, played())
    other = dataclasses.replace(KEY, digest=digest_of({"a": 2}))
    (tmp_path / f"{KEY.file}.parquet").rename(tmp_path / f"{other.file}.parquet")
    with pytest.raises(DamagedCellError, match="it holds the results of another request"):
        store.read(other)


def test_any_flipped_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Parquet's own padding and statistics hold no result; wherever a result is touched, the file is refused."""
    store = Store(tmp_path)
    cell = played()
    store.write(KEY, cell)
    path = tmp_path / f"{KEY.file}.parquet"
    whole = path.read_bytes()
    refused = []
    for position in range(0, len(whole), max(1, len(whole) // 400)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        try:
            found = store.read(KEY)
        except DamagedCellError as error:
            refused.append(str(error))
        else:
            assert found is not None
            assert same(found, cell), f"byte {position}"
    assert len(refused) > 50
    for line in refused:
        assert str(path) in line
        assert "delete the file to play it again" in line
        assert "\n" not in line


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all"])
def test_what_is_no_cell_is_refused(content: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = tmp_path / f"{KEY.file}.parquet"
    path.write_bytes(content)
    with pytest.raises(DamagedCellError, match=str(path)):
        store.read(KEY)


def test_plain_values_come_back_and_edited_ones_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    values = {"random": {"return_mean": 0.1, "exact": True}}
    assert store.read_plain(KEY) is None
    store.write_plain(KEY, values)
    assert store.read_plain(KEY) == values
    path = tmp_path / f"{KEY.file}.json"
    kept = json.loads(path.read_text())
    kept["values"]["random"]["return_mean"] = 0.2
    path.write_text(json.dumps(kept))
    with pytest.raises(DamagedCellError, match="its checksum is not that of its values"):
        store.read_plain(KEY)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.pq, "write_table", broken)
    with pytest.raises(OSError, match="No space left"):
        Store(tmp_path).write(KEY, played())
    assert list(tmp_path.iterdir()) == []


def test_entropies_are_per_token_and_only_of_what_was_drawn() -> None:
    assert played(surprise=0.5).token_entropy == pytest.approx((0.5 + 2 / 7) / 13)
    assert math.isnan(played(surprise=math.nan).token_entropy)
