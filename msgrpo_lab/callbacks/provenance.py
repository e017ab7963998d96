"""Where a result comes from: code, packages, machine. Never environment variables, and nothing that looks secret."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from msgrpo_lab.messages import redact_text

GIT_TIMEOUT_S = 20
LONGEST_DIFF = 1_000_000
"""Characters of an uncommitted diff that are kept."""
_SECRET_FILES = (".env", ".env.*", "*.env", "*.pem", "*.key", "*secret*", "*credential*", ".netrc", ".npmrc", ".pypirc")


@dataclass(frozen=True, slots=True, kw_only=True)
class GitState:
    """The code that ran."""

    commit: str | None
    """Full hash; None outside a git checkout."""
    branch: str | None
    dirty: bool
    """Tracked files differ from the commit, or untracked ones lie beside them."""
    diff: str
    """Uncommitted changes of tracked files, secret-looking files left out and values hidden."""


def git_state(root: Path | None) -> GitState:
    """The state of the checkout whose top is `root`; all None and empty where there is none, or no git."""
    commit = None if root is None or not _is_top(root) else _git(root, "rev-parse", "HEAD")
    if root is None or commit is None:
        return GitState(commit=None, branch=None, dirty=False, diff="")
    status = _git(root, "status", "--porcelain") or ""
    left_out = [f":(exclude,glob)**/{pattern}" for pattern in _SECRET_FILES]
    diff = redact_text(_git(root, "diff", "HEAD", "--no-color", "--no-ext-diff", "--", ".", *left_out) or "")
    if len(diff) > LONGEST_DIFF:
        diff = f"{diff[:LONGEST_DIFF]}\n[cut: {len(diff)} characters in all]\n"
    branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD")
    return GitState(commit=commit.strip(), branch=branch and branch.strip(), dirty=bool(status.strip()), diff=diff)


def _is_top(root: Path) -> bool:
    """Whether `root` is a checkout itself, and does not only lie in somebody else's."""
    top = _git(root, "rev-parse", "--show-toplevel")
    return top is not None and Path(top.rstrip("\n")).resolve() == root.resolve()


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Version of every installed distribution by name, sorted."""
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def hardware() -> dict[str, Any]:
    """The machine: system, processor, cores usable by this process, memory in GB (10⁹ bytes), accelerators, threads."""
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": cores,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
