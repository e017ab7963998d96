"""`debug=profiler`: a trace that viewers read, with rollouts and updates labelled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lab_made import composed, fit, small_lab

from msgrpo_lab.callbacks.profiler import TraceProfiler
from msgrpo_lab.training.assemble import component


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return [event for event in found if event.get("ph") == "X"]


def labelled(path: Path, name: str) -> list[dict[str, Any]]:
    return sorted(
        (e for e in events(path) if e["name"] == name and e["cat"] == "user_annotation"), key=lambda e: e["ts"]
    )


def test_a_trace_holds_the_rollouts_and_updates_asked_for_with_their_operators(tmp_path: Path) -> None:
    profiler = TraceProfiler(skip=1, rollouts=2)
    fit(small_lab("update.minibatches=2"), epochs=4, callbacks=[profiler], folder=tmp_path)
    assert profiler.path == tmp_path / "trace.json"
    rollouts, updates = labelled(profiler.path, "rollout"), labelled(profiler.path, "update")
    assert (len(rollouts), len(updates)) == (2, 4)
    for label in (rollouts[0], updates[0]):
        within = [
            event["name"]
            for event in events(profiler.path)
            if event["cat"] == "cpu_op" and label["ts"] <= event["ts"] <= label["ts"] + label["dur"]
        ]
        assert "aten::linear" in within
    assert rollouts[0]["ts"] + rollouts[0]["dur"] <= updates[0]["ts"]


def test_a_shorter_run_writes_what_it_has(tmp_path: Path) -> None:
    profiler = TraceProfiler(skip=1, rollouts=9)
    fit(small_lab(), epochs=2, callbacks=[profiler], folder=tmp_path)
    assert profiler.path is not None
    assert len(labelled(profiler.path, "rollout")) == len(labelled(profiler.path, "update")) == 1


def test_a_run_without_rollouts_to_record_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(small_lab(), epochs=1, callbacks=[TraceProfiler(skip=1)], folder=tmp_path)
    assert not (tmp_path / "trace.json").exists()
    assert "callbacks.profiler.skip=1" in caplog.text


def test_the_data_module_is_left_as_it_was(tmp_path: Path) -> None:
    lab = small_lab()
    fit(lab, epochs=1, callbacks=[TraceProfiler(skip=0, rollouts=1)], folder=tmp_path)
    assert "collect" not in vars(lab.data)


def test_recording_does_not_change_the_run(tmp_path: Path) -> None:
    plain = fit(small_lab(), epochs=2)
    recorded = fit(small_lab(), epochs=2, callbacks=[TraceProfiler(skip=0, rollouts=2)], folder=tmp_path)
    assert plain.training() == recorded.training()


@pytest.mark.parametrize(("key", "value"), [("skip", -1), ("rollouts", 0)])
def test_numbers_out_of_range_are_refused(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"callbacks\.profiler\.{key}={value}: must be at least"):
        TraceProfiler(**{key: value})


def test_the_preset_records_within_its_own_run() -> None:
    config = composed("debug=profiler")
    profiler = component(config.callbacks.profiler)
    assert isinstance(profiler, TraceProfiler)
    assert profiler.skip + profiler.rollouts <= config.trainer.max_epochs
