"""Where the project and its configuration lie, and what a command may write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from msgrpo_lab.messages import Mistake

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


def file_mistakes(key: str, text: str, remedy: str) -> Iterator[Mistake]:
    """What keeps a file from being written at `text`; its folder must be there.

    Args:
        key: the key whose value it is.
        text: the path as it was given.
        remedy: what to give instead, for example "give a file, for example output=scores.json".
    """
    path = Path(text).expanduser().resolve()
    if not text.strip():
        yield Mistake(key, text, "must not be empty", remedy)
    elif path.is_dir():
        yield Mistake(key, text, f"{path} is a folder", remedy)
    elif not path.parent.is_dir():
        yield Mistake(key, text, f"there is no folder {path.parent}", "make it, or give a file in one that exists")
    elif path.exists() and not path.is_file():
        yield Mistake(key, text, f"{path} is no plain file", remedy)
    elif (reason := why_unwritable(path.parent)) is not None:
        yield Mistake(key, text, f"cannot be written ({reason})", "give a file you may write")


def folder_mistakes(key: str, text: str, remedy: str) -> Iterator[Mistake]:
    """What keeps a folder from being made, or written to, at `text`. Arguments as above."""
    path = Path(text).expanduser().resolve()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not text.strip():
        yield Mistake(key, text, "must not be empty", remedy)
    elif not existing.is_dir():
        yield Mistake(key, text, f"{existing} is no folder", remedy)
    elif (reason := why_unwritable(path)) is not None:
        yield Mistake(key, text, f"cannot be written ({reason})", remedy)
