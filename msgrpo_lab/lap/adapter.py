"""A trained adapter in a folder, as PEFT writes it: what it is without its weights, and how it gets into a policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgrpo_lab.files import check_manifest

if TYPE_CHECKING:
    from msgrpo_lab.lap.policy import LanguagePolicy

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAdapter:
    """An adapter's folder that has been found whole."""

    folder: Path
    shape: Mapping[str, Any]
    """`lora_rank`, `lora_alpha` and `lora_targets`: keys of a `model` node that make room for it."""
    base: str
    """The model that it says it was trained on; "" if it does not say."""

    def check_base(self, model: Mapping[str, Any]) -> None:
        """Refuses a base model that is, by its name, another one.

        Raises:
            ValueError: it is; one line without the key.
        """
        expected, found = base_name(model), Path(self.base).name
        if expected and found and found != expected:
            raise ValueError(
                f"the adapter was trained on {found}, and the model is {expected}; give model=… of its own"
            )


def read_adapter(folder: Path) -> SavedAdapter:
    """What an adapter's folder says of itself; its checksums are compared where it has them.

    Raises:
        ValueError: it is none, incomplete or damaged; one line without the key.
    """
    check_manifest(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; give a whole adapter folder")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        targets = config["target_modules"]
        shape = {
            "lora_rank": int(config["r"]),
            "lora_alpha": int(config["lora_alpha"]),
            "lora_targets": targets if isinstance(targets, str) else sorted(targets),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({type(error).__name__}: {error})") from error
    return SavedAdapter(folder=folder, shape=shape, base=str(config.get("base_model_name_or_path") or ""))


def base_name(model: Mapping[str, Any]) -> str:
    """The name that PEFT would know a configured base model by; "" where a name would tell nothing."""
    source = model["source"]
    if model.get("path") is not None:
        return ""
    if "repo" in source:
        return Path(str(source["repo"])).name
    return f"{source['distribution']}-{str(source['sha256'])[:16]}" if "distribution" in source else ""


def load_adapter(policy: LanguagePolicy, folder: Path) -> None:
    """Puts a trained adapter in the place of the policy's own.

    Raises:
        ValueError: it cannot be read, or is of another model; one line.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        check_manifest(folder)
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
