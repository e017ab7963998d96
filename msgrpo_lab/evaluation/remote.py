"""A model behind an OpenAI-compatible server as a contender: `remote`, or `remote:<model>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from msgrpo_lab.evaluation.contender import Contender, Opened, Origin
from msgrpo_lab.evaluation.models import PolicySpec, asks_a_server, innermost
from msgrpo_lab.lap.prompt import PromptTemplate
from msgrpo_lab.tsmg.frozen_lake import FrozenLake

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
    from msgrpo_lab.assemble import component, decoding_rule

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
