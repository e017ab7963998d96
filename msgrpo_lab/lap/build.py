"""From a model's configuration to a policy: source, precision, LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig

from msgrpo_lab.lap.adapter import load_adapter
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.precision import Precision, choose_precision
from msgrpo_lab.lap.sources import LocalModel, ModelSource, ModelSourceError


def build_policy(
    *,
    source: ModelSource,
    path: str | None = None,
    precision: Precision = "auto",
    lora_rank: int | None = 16,
    lora_alpha: int = 32,
    lora_targets: str | list[str] = "all-linear",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    adapter: str | None = None,
) -> LanguagePolicy:
    """Loads the base model and makes what is to be trained of it.

    Args:
        source: where the base model comes from.
        path: a local folder that takes the source's place.
        precision: type of the frozen weights and of the forward pass, `auto` the faster one here; trained parameters
            are always float32.
        lora_rank: rank of the adapter; None trains all weights.
        lora_alpha: the adapter's output is scaled by alpha / rank.
        lora_targets: names of the layers that get an adapter, or `all-linear` (all but the output projection).
        gradient_checkpointing: recompute activations in the backward pass, for large models.
        seed: seed of the adapter's initial weights.
        adapter: folder of a trained adapter that training goes on from, such as `adapter/best` of a run.

    Raises:
        ModelSourceError: the base model cannot be had.
        ValueError: LoRA targets that the model does not have, or an adapter that does not fit.
    """
    source = source if path is None else LocalModel(path=path)
    chosen = choose_precision(precision, _config_of(source) if precision == "auto" else None)
    dtype = chosen.dtype
    model, tokenizer = source.load(torch.float32 if lora_rank is None else dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _trainable(model, dtype, lora_rank, lora_alpha, lora_targets)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = LanguagePolicy(model, tokenizer, dtype, chosen.speed)
    if adapter is not None:
        try:
            load_adapter(policy, Path(adapter).expanduser())
        except ValueError as error:
            raise ValueError(f"model.adapter={adapter}: {error}") from error
    return policy


def _config_of(source: ModelSource) -> PretrainedConfig | None:
    """The model's configuration, or None where it cannot be had before the model itself."""
    if not hasattr(source, "outline"):
        return None
    try:
        config: PretrainedConfig = source.outline().config
    except ModelSourceError:
        return None
    return config


class OutlinedModel(NamedTuple):
    """A policy's model without its weights."""

    model: Any
    """On the meta device, with its adapter."""
    tokenizer: Any | None
    """None where it cannot be had without the network."""
    dtype: torch.dtype
    """Type of the forward pass."""
    recompute: bool
    """Activations are computed again in the backward pass."""


def outline_model(
    *,
    source: ModelSource,
    path: str | None = None,
    precision: Precision = "auto",
    lora_rank: int | None = 16,
    lora_alpha: int = 32,
    lora_targets: str | list[str] = "all-linear",
    gradient_checkpointing: bool = False,
    seed: int = 0,  # noqa: ARG001  takes what `build_policy` takes
    adapter: str | None = None,  # noqa: ARG001
) -> OutlinedModel:
    """What `build_policy` would build of the same arguments, on the meta device: every shape and type, no weight.

    Raises:
        ModelSourceError: the source cannot say what it is without the network.
        ValueError: LoRA targets that the model does not have.
    """
    source = source if path is None else LocalModel(path=path)
    if not hasattr(source, "outline"):
        raise ModelSourceError(f"model.source={type(source).__name__}: has no outline(), so its size is not known")
    config, tokenizer = source.outline()
    dtype = choose_precision(precision, config).dtype
    make: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = make.from_config(config, dtype=torch.float32 if lora_rank is None else dtype)
        model = _trainable(model, dtype, lora_rank, lora_alpha, lora_targets)
    return OutlinedModel(model, tokenizer, dtype, gradient_checkpointing)


def _trainable(
    model: Any, dtype: torch.dtype, lora_rank: int | None, lora_alpha: int, lora_targets: str | list[str]
) -> Any:
    """The model with an adapter, if there is to be one; all of its weights are trained if not."""
    model.config.use_cache = False
    if lora_rank is None:
        return model
    config = LoraConfig(
        r=lora_rank, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules=lora_targets, task_type="CAUSAL_LM"
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"model.lora_targets={lora_targets}: {str(error).splitlines()[0]}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    layers: list[Any] = list(model.modules())
    for layer in layers:
        # Autocast brings inputs and adapter to one type by itself; PEFT's own cast to float32 would only copy.
        if dtype != torch.float32 and hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = False
    return model
