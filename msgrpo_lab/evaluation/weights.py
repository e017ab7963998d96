"""Trained weights in a folder, as `LanguagePolicy.save` writes them: what they are, and how they get into a policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgrpo_lab.files import check_manifest

if TYPE_CHECKING:
    from msgrpo_lab.lap.policy import LanguagePolicy

LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A folder of trained weights."""

    folder: Path
    digest: str
    """SHA-256 of its configuration and weights."""
    lora: Mapping[str, Any] | None
    """Keys of a `model` node that make room for this adapter; None where all weights were trained."""
    base: str = ""
    """What the adapter says it was trained on; "" if it does not say."""

    def model_node(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """A `model` node with room for these weights: its base with such an adapter, or the folder itself."""
        if self.lora is None:
            return {**node, "path": str(self.folder), "lora_rank": None}
        return {**node, **self.lora, "seed": 0}  # what the adapter begins as is overwritten

    def put_into(self, policy: LanguagePolicy) -> None:
        """Gives the policy the adapter; where all weights were trained, it was read from them.

        Raises:
            ValueError: the file cannot be read, or is of another model; one line without the key.
        """
        if self.lora is not None:
            _load_adapter(policy, self.folder / LORA_WEIGHTS)

    def check_base(self, node: Mapping[str, Any]) -> None:
        """Refuses a base model that is, by its name, another one than the adapter's.

        Raises:
            ValueError: it is; one line without the key.
        """
        expected = _base_name(node)
        found = Path(self.base).name
        if self.lora is not None and expected and found and found != expected:
            raise ValueError(
                f"the adapter was trained on {found}, and the model is {expected}; give model=… of its own"
            )


def read_weights(folder: Path) -> Weights | None:
    """What a folder holds; None if it is no folder of trained weights.

    Raises:
        ValueError: it is one, and incomplete or damaged; one line without the key.
    """
    if any((folder / name).is_file() for name in (LORA_CONFIG, MODEL_CONFIG)):
        check_manifest(folder)
    if (folder / LORA_CONFIG).is_file():
        try:
            config = json.loads((folder / LORA_CONFIG).read_text(encoding="utf-8"))
            targets = config["target_modules"]
            lora = {
                "lora_rank": int(config["r"]),
                "lora_alpha": int(config["lora_alpha"]),
                "lora_targets": targets if isinstance(targets, str) else sorted(targets),
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / LORA_CONFIG} is damaged ({type(error).__name__}: {error})") from error
        if not (folder / LORA_WEIGHTS).is_file():
            raise ValueError(f"{folder} has no {LORA_WEIGHTS}; give a whole adapter folder")
        base = str(config.get("base_model_name_or_path") or "")
        return Weights(folder=folder, digest=folder_digest(folder), lora=lora, base=base)
    if (folder / MODEL_CONFIG).is_file():
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} has no *.safetensors; give a whole folder written by save_pretrained")
        return Weights(folder=folder, digest=folder_digest(folder), lora=None)
    return None


def folder_digest(folder: Path) -> str:
    """SHA-256 of a folder's configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")]):
        with path.open("rb") as stream:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _base_name(node: Mapping[str, Any]) -> str:
    """The name that PEFT would know a configured base model by; "" where a name would tell nothing."""
    source = node["source"]
    if node.get("path") is not None:
        return ""
    if "repo" in source:
        return Path(str(source["repo"])).name
    return f"{source['distribution']}-{str(source['sha256'])[:16]}" if "distribution" in source else ""


def _load_adapter(policy: LanguagePolicy, path: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again") from error
    # PEFT leaves the adapter's name out of what it saves.
    wanted = {
        name.replace(".default.", "."): parameter
        for name, parameter in policy.model.named_parameters()
        if parameter.requires_grad
    }
    odd = sorted(saved.keys() ^ wanted.keys()) or sorted(
        name for name in wanted if wanted[name].shape != saved[name].shape
    )
    if odd:
        problem = f"{path} is an adapter of another model: {len(odd)} of its tensors do not fit, {odd[0]} the first"
        raise ValueError(f"{problem}; give model=… that it was trained on")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])
