"""Language models as contenders: untrained, with an adapter, or with all weights trained."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from msgrpo_lab.config import ConfigError
from msgrpo_lab.evaluation.contender import Contender, Kind, Opened, Origin
from msgrpo_lab.evaluation.store import digest_of
from msgrpo_lab.evaluation.weights import folder_digest
from msgrpo_lab.messages import one_line

if TYPE_CHECKING:
    from msgrpo_lab.lap.policy import LanguagePolicy
    from msgrpo_lab.lap.prompt import PromptBuilder

REMOTE_ENGINE = "msgrpo_lab.engines.remote.engine.OpenAIEngine"
"""What the node of an engine of remote models names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """How a language policy reads and answers, as nodes and plain values of the configuration."""

    model: Mapping[str, Any]
    prompt: Mapping[str, Any]
    engine: Mapping[str, Any]
    sampling: Mapping[str, Any]
    """As `rollout.sampling`; its temperature is not used."""
    temperature: float


class Trained(Protocol):
    """What training has made of a model."""

    @property
    def digest(self) -> str:
        """Of all of it."""
        ...

    def model_node(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """The `model` node of a policy that it can be put into."""
        ...

    def put_into(self, policy: LanguagePolicy) -> None:
        """Gives the policy what was trained. Raises `ValueError` if it is of another model; one line."""
        ...


class ModelShelf:
    """Holds one language policy at a time, and loads as little as possible for the next.

    A base model stays while adapters of one form are put into it one after the other. Prompts that were rendered stay
    as long as template and tokenizer are alike, whichever folder the tokenizer came from.

    Args:
        device: where models run: auto (CUDA if there is any, else the CPU), or a name that torch knows.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._key = ""
        self._policy: LanguagePolicy | None = None
        self._prompts: dict[str, PromptBuilder] = {}

    def policy(self, node: Mapping[str, Any], weights: Trained | None) -> LanguagePolicy:
        """The policy of a `model` node, with these weights or as it is before training.

        Raises:
            ValueError: it cannot be had; one line.
        """
        node = node if weights is None else weights.model_node(node)
        key = digest_of([node, weights is None])  # an untrained policy is never one that an adapter has been put into
        if key != self._key or self._policy is None:
            self._load(node, key)
        assert self._policy is not None
        if weights is not None:
            weights.put_into(self._policy)
        return self._policy

    def _load(self, node: Mapping[str, Any], key: str) -> None:
        import torch

        from msgrpo_lab.assemble import component

        # The old one is let go of first: two large models may not fit.
        self._policy, self._key = None, ""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        policy: LanguagePolicy = component(OmegaConf.create(dict(node)))
        device = self._device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._policy, self._key = policy.to(device), key

    def prompt(self, node: Mapping[str, Any], tokenizer: Any) -> PromptBuilder:
        """A prompt builder for this template and tokenizer."""
        from msgrpo_lab.assemble import component
        from msgrpo_lab.lap.prompt import PromptBuilder

        words = tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else id(tokenizer)
        key = digest_of([dict(node), words, tokenizer.chat_template])
        if key not in self._prompts:
            self._prompts[key] = PromptBuilder(component(OmegaConf.create(dict(node))), tokenizer)
        return self._prompts[key]


def language_contender(
    *,
    label: str,
    kind: Kind,
    spec: PolicySpec,
    weights: Trained | None,
    origin: Origin,
    view: str | None,
    shelf: ModelShelf,
) -> Contender:
    """A language policy that plays in this process.

    Args:
        label: its name in every result.
        kind: where it comes from.
        spec: how it reads and answers.
        weights: what was trained; None for an untrained one.
        origin: the training run, for the record.
        view: `observation` it was trained with.
        shelf: loads it.

    Raises:
        ValueError: the engine asks a server, which cannot be given this policy; one line.
    """
    if asks_a_server(spec.engine):
        raise ValueError(
            "engine=openai asks a server and plays no model of this process; leave engine out, and name the server's "
            "models as policy=remote:<model> with remote.base_url=…"
        )

    def opened() -> Opened:
        from msgrpo_lab.assemble import component, decoding_rule

        try:
            policy = shelf.policy(spec.model, weights)
            prompt = shelf.prompt(spec.prompt, policy.tokenizer)
        except (ValueError, OSError, InstantiationException) as error:
            raise ConfigError([f"policy={label}: {one_line(str(innermost(error)))}"]) from error
        config = OmegaConf.create({"rollout": {"sampling": {**spec.sampling, "temperature": spec.temperature}}})
        return Opened(
            prompt=prompt,
            engine=component(OmegaConf.create(dict(spec.engine))),
            sampling=lambda game: decoding_rule(config, prompt, game),
            policy=policy,
        )

    path = spec.model.get("path")
    return Contender(
        label=label,
        kind=kind,
        identity={
            "spec": asdict(spec),
            "weights": None if weights is None else weights.digest,
            "path": None if path is None else folder_digest(Path(str(path)).expanduser()),
        },
        open=opened,
        origin=origin,
        view=view,
    )


def asks_a_server(engine: Mapping[str, Any]) -> bool:
    """Whether an `engine` node is of remote models."""
    return engine.get("_target_") == REMOTE_ENGINE


def innermost(error: BaseException) -> BaseException:
    """The error that Hydra's instantiation errors were raised from."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error
