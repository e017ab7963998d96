"""The audit: a vulnerability fails unless it is accepted with a reason; what was not audited is not called sound."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / ".ci" / "audit.py"
spec = importlib.util.spec_from_file_location("audit", PATH)
assert spec is not None
assert spec.loader is not None
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

SOUND = {"name": "numpy", "version": "2.4.6", "vulns": []}
SKIPPED = {"name": "torch", "skip_reason": "not found"}
HOLED = {"name": "x", "version": "1", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-9"], "fix_versions": ["2"]}]}


@pytest.mark.parametrize(
    ("packages", "accepted", "code", "said"),
    [
        ([SOUND, SKIPPED], {}, 0, "audited 1 of 2 pinned packages"),
        ([SKIPPED, SKIPPED], {}, 0, "audit skipped: the advisory database knows none of 2 packages"),
        ([], {}, 0, "audit skipped"),
        ([SOUND, HOLED], {}, 1, "x 1: PYSEC-1, fixed in 2"),
        ([HOLED], {"CVE-9": "not reachable"}, 0, "(accepted: not reachable)"),
        ([HOLED], {"CVE-8": "another"}, 1, "PYSEC-1"),
    ],
)
def test_what_was_found_decides(packages: list[Any], accepted: dict[str, str], code: int, said: str) -> None:
    found, lines = audit.report({"dependencies": packages}, accepted)
    assert found == code
    assert said in "\n".join(lines)


def test_exceptions_have_reasons() -> None:
    assert audit.exceptions("# a\n\nCVE-1 only on Windows\n") == {"CVE-1": "only on Windows"}
    listed = audit.exceptions(audit.EXCEPTIONS.read_text())
    assert all(reason for reason in listed.values())


def test_a_database_out_of_reach_is_told_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "LIMIT_S", 0.01)
    assert audit.main() == 0
    assert "audit skipped: pip-audit did not answer (TimeoutExpired)" in capsys.readouterr().out
