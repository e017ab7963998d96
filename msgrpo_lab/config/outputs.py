"""Is there a place for what a command is to write? Asked before anything is computed; nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from msgrpo_lab.config.paths import why_unwritable
from msgrpo_lab.messages import Mistake


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
