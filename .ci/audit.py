"""Known vulnerabilities of the pinned packages: `make audit`.

Asks the advisory database of PyPI through pip-audit. Where the database cannot be reached, or knows nothing of the
packages, nothing has been audited: that is said, and is no failure, so that a machine without a network can run CI. A
vulnerability that is found is one, unless `audit_exceptions.txt` lists it with a reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PINNED = HERE.parent / "constraints.txt"
EXCEPTIONS = HERE / "audit_exceptions.txt"
LIMIT_S = 90
"""Seconds after which the database counts as out of reach."""


def exceptions(text: str) -> dict[str, str]:
    """Identifiers of vulnerabilities that are accepted, and why: lines `<id> <reason>`, # for comments."""
    lines = [line.strip() for line in text.splitlines()]
    return {line.split()[0]: line.partition(" ")[2].strip() for line in lines if line and not line.startswith("#")}


def report(found: dict[str, Any], accepted: dict[str, str]) -> tuple[int, list[str]]:
    """The exit code and the lines to print, from what pip-audit found."""
    packages = found.get("dependencies", [])
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return 0, [f"audit skipped: the advisory database knows none of {len(packages)} packages here"]
    lines = [f"audited {len(audited)} of {len(packages)} pinned packages"]
    code = 0
    for package in audited:
        for vulnerability in package.get("vulns", []):
            names = [vulnerability["id"], *vulnerability.get("aliases", [])]
            reason = next((accepted[name] for name in names if name in accepted), None)
            fixed = ", ".join(vulnerability.get("fix_versions", [])) or "none yet"
            line = f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}"
            lines.append(f"{line} (accepted: {reason})" if reason else line)
            code = code if reason else 1
    return code, lines


def main() -> int:
    """Runs pip-audit and tells what it found."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINNED), "--no-deps", "--disable-pip"]
        options = ["--format", "json", "--output", str(output), "--timeout", "10", "--progress-spinner", "off"]
        try:
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=LIMIT_S, check=False)
        except (subprocess.TimeoutExpired, OSError) as error:
            print(f"audit skipped: pip-audit did not answer ({type(error).__name__})")
            return 0
        if not output.is_file() or not output.read_text().strip():
            reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            print(f"audit skipped: the advisory database is out of reach ({reason})")
            return 0
        code, lines = report(json.loads(output.read_text()), exceptions(EXCEPTIONS.read_text()))
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
