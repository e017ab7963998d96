"""From a checked configuration to the objects of a run, each made once and handed to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig

from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.prompt import PromptBuilder, PromptTemplate
from msgrpo_lab.rollout.collect import Collector
from msgrpo_lab.training.data import RolloutDataModule
from msgrpo_lab.training.module import LAPModule
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.types import Sampling


class Lab(NamedTuple):
    """What a run is made of."""

    policy: LanguagePolicy
    data: RolloutDataModule
    module: LAPModule


def component(config: DictConfig, **extra: Any) -> Any:
    """The object a configuration node names by `_target_`; its lists and mappings are plain Python ones."""
    return instantiate(config, _convert_="all", **extra)


def build_lab(config: DictConfig) -> Lab:
    """Policy, data module and Lightning module of a configuration."""
    update = config["update"]  # `config.update` is the mapping's own method
    template: PromptTemplate = component(config.prompt)
    policy: LanguagePolicy = component(config.model)
    loss = component(config.loss)
    needs_reference = loss.beta > 0
    if needs_reference:
        policy.keep_reference()
    prompt = PromptBuilder(template, policy.tokenizer)
    make_game: Callable[[], TextGame] = component(config.env, _partial_=True)
    collector = Collector(make_game, prompt)
    sampling = decoding_rule(config, prompt, collector.example_game)
    data = RolloutDataModule(
        policy=policy,
        collector=collector,
        engine=component(config.engine),
        credit=component(config.credit),
        sampler=component(config.sampler),
        sampling=sampling,
        num_groups=config.rollout.num_groups,
        group_size=config.rollout.group_size,
        passes=update.passes,
        minibatches=update.minibatches,
        token_budget=update.token_budget,
        needs_reference=needs_reference,
        seed=config.seed,
        sharing=update.sharing,
        truth_completions=config.rollout.truth_completions,
        action_entropy=update.action_entropy,
        maps=config.evaluation.get("maps", "all"),
    )
    module = LAPModule(
        policy=policy,
        loss=loss,
        optim=component(config.optim),
        sampling=sampling,
        token_budget=update.token_budget,
        max_grad_norm=update.max_grad_norm,
        total_updates=config.trainer.max_epochs * data.updates_per_epoch,
        sharing=update.sharing,
    )
    return Lab(policy=policy, data=data, module=module)


def decoding_rule(config: DictConfig, prompt: PromptBuilder, game: TextGame) -> Sampling:
    """The decoding rule of `rollout.sampling`, constrained to the game's legal words if it says so."""
    sampling = config.rollout.sampling
    return Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        stop=tuple(prompt.template.stop),
        choices=prompt.choices(game.legal_actions) if sampling.constrain else None,
    )
