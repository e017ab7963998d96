"""Policies as contenders: reference players, language models and remote servers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from msgrpo_lab.config import ConfigError
from msgrpo_lab.engines.scripted import ScriptedEngine
from msgrpo_lab.evaluation.contender import Contender, Kind, Opened, Origin, PolicySpec
from msgrpo_lab.evaluation.results import digest_of
from msgrpo_lab.evaluation.trained import folder_digest
from msgrpo_lab.lap.prompt import FirstWordParser, PromptBuilder, PromptTemplate
from msgrpo_lab.lap.sources import word_tokenizer
from msgrpo_lab.messages import one_line
from msgrpo_lab.oracle.players import HoleAvoidingPlayer, OptimalPlayer, Player, RandomPlayer, SearchPlayer
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.types import Sampling

if TYPE_CHECKING:
    from msgrpo_lab.lap.policy import LanguagePolicy

REMOTE_ENGINE = "msgrpo_lab.engines.remote.engine.OpenAIEngine"
"""What the node of an engine of remote models names."""


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

        from msgrpo_lab.training.assemble import component

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
        from msgrpo_lab.lap.prompt import PromptBuilder
        from msgrpo_lab.training.assemble import component

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
        from msgrpo_lab.training.assemble import component, decoding_rule

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


class Cast(NamedTuple):
    """A player and what it plays."""

    make: Callable[[], Player]
    game: type[TextGame] | None
    """The only class of games it plays; None: any."""


PLAYERS: Mapping[str, Cast] = {
    "random": Cast(RandomPlayer, None),
    "optimal": Cast(OptimalPlayer, FrozenLake),
    "hole_avoiding": Cast(HoleAvoidingPlayer, FrozenLake),
    "search": Cast(SearchPlayer, Snake),
}
"""Every player that can be evaluated, by the name it has on the command line."""


def player_contender(name: str) -> Contender:
    """The player of this name in `PLAYERS`."""
    cast = PLAYERS[name]

    def opened() -> Opened:
        return Opened(
            prompt=_any_prompt(),
            engine=ScriptedEngine(player=cast.make()),
            sampling=lambda _: Sampling(),
        )

    return Contender(
        label=name,
        kind="player",
        identity={"player": name},
        open=opened,
        decodings=("sampled",),
        plays=lambda game: cast.game is None or issubclass(game, cast.game),
        has_logprobs=False,
    )


@lru_cache(maxsize=1)
def _any_prompt() -> PromptBuilder:
    """Players look at the game and not at the prompt; it only has to read a word back as the move that it is."""
    return PromptBuilder(PromptTemplate(user="{observation}", parser=FirstWordParser()), word_tokenizer())


ANSWER_KEYS = ("model", "base_url", "server", "logprobs", "constrain_by", "extra_body")
"""What answers depend on. With more patience or another key, an evaluation that failed goes on where it stopped."""


def remote_contender(label: str, model: str | None, remote: Mapping[str, Any], spec: PolicySpec) -> Contender:
    """A policy whose model and tokenizer are a server's.

    Results are kept under the server's address and the model's name: that the same name stands for the same weights
    when an evaluation is taken up again is the server's business.

    Args:
        label: its name in every result.
        model: the server's name for the model; None: `remote.model`.
        remote: the `remote` node, an engine of `conf/engine/openai.yaml`.
        spec: how it reads and answers; its model is not used. With engine=openai its engine is, in `remote`'s place.

    Raises:
        ValueError: no model is named, or the server cannot decode as asked; one line.
    """
    from msgrpo_lab.training.assemble import component, decoding_rule

    node = dict(spec.engine if asks_a_server(spec.engine) else remote)
    if model is not None:
        node["model"] = model
    try:
        engine = instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise ValueError(str(innermost(error))) from error
    template: PromptTemplate = component(OmegaConf.create(dict(spec.prompt)))
    prompt = engine.prompt(template)
    config = OmegaConf.create({"rollout": {"sampling": {**spec.sampling, "temperature": spec.temperature}}})
    # Any game will do: what a server can do does not depend on the words.
    engine.check_rule(decoding_rule(config, prompt, FrozenLake()), template.opening)

    def opened() -> Opened:
        return Opened(prompt=prompt, engine=engine, sampling=lambda game: decoding_rule(config, prompt, game))

    return Contender(
        label=label,
        kind="remote",
        identity={
            "remote": {key: node.get(key) for key in ANSWER_KEYS},
            "prompt": dict(spec.prompt),
            "sampling": dict(spec.sampling),
            "temperature": spec.temperature,
        },
        open=opened,
        origin=Origin(model=str(node["model"])),
    )
