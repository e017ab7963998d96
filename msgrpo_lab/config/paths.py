"""Where the project and its configuration files lie, from whatever folder a command is started."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT_VARIABLE = "MSGRPO_ROOT"


def code_checkout() -> Path | None:
    """The folder that holds the package, if it is a checkout: one with `conf/` and `pyproject.toml` beside it."""
    folder = PACKAGE.parent
    return folder if (folder / "conf").is_dir() and (folder / "pyproject.toml").is_file() else None


def conf_dir() -> Path:
    """The folder of configuration files: `conf/` beside the package in a checkout, else inside the installed package.

    Raises:
        FileNotFoundError: neither is there, so the installation is broken.
    """
    checkout = code_checkout()
    folder = checkout / "conf" if checkout is not None else PACKAGE / "conf"
    if not folder.is_dir():
        raise FileNotFoundError(f"configuration folder {folder} does not exist; install the package again")
    return folder


def project_root() -> Path:
    """The folder that outputs go under: `$MSGRPO_ROOT` if set, else the checkout, else the working directory."""
    chosen = os.environ.get(ROOT_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().resolve()
    return code_checkout() or Path.cwd()


def why_unwritable(folder: Path) -> str | None:
    """Why nothing can be written to `folder`, which need not be there yet; None if it can. Leaves nothing behind."""
    path = folder.expanduser().absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        return f"{existing} is no folder"
    try:
        # To be asked whether one may write is not enough: root may everywhere, and a disk may be read-only.
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{error.strerror}: {existing}"
