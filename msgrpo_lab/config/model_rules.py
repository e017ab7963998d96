"""Rules that need a model's shape and tokenizer, and none of its weights: LoRA targets, and tokens that must fit."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgrpo_lab.config.tree import section, whole
from msgrpo_lab.messages import Mistake, closest_first, did_you_mean

if TYPE_CHECKING:
    from msgrpo_lab.lap.prompt import PromptBuilder
    from msgrpo_lab.lap.sources import Outline
    from msgrpo_lab.tsmg.base import TextGame

ALL_LINEAR = "all-linear"
SEEN = 16
"""Initial states whose prompts are measured; a board's prompts differ by a few tokens."""


def check_model(tree: Mapping[str, Any]) -> tuple[Mistake, ...]:
    """Mistakes that only the model's own configuration and tokenizer show. Reads no weights and asks no network.

    Args:
        tree: resolved values of a training configuration whose model, prompt, env and sections are sound by themselves.
    """
    model = dict(tree["model"])
    if isinstance(model.get("source"), Mapping):
        model["source"] = {key: value for key, value in model["source"].items() if key != "init_seed"}
    looked_at = {
        "model": {key: value for key, value in model.items() if key != "seed"},
        **{key: tree[key] for key in ("prompt", "env", "rollout", "update")},
    }
    return _mistakes(json.dumps(looked_at, sort_keys=True, default=str))


@functools.cache
def _mistakes(looked_at: str) -> tuple[Mistake, ...]:
    """Of plain values as JSON: the jobs of a sweep are mostly alike."""
    from hydra.utils import instantiate

    from msgrpo_lab.lap.prompt import PromptBuilder
    from msgrpo_lab.lap.sources import LocalModel, ModelSourceError

    tree = json.loads(looked_at)
    model = tree["model"]
    source = instantiate(model["source"]) if model.get("path") is None else LocalModel(path=model["path"])
    try:
        outline = source.outline()
    except (ModelSourceError, OSError):
        return ()  # it is told when the model is loaded, which may fetch it first
    mistakes = [] if model.get("lora_rank") is None else list(_check_adapter(model, outline))
    if outline.tokenizer is not None and getattr(outline.tokenizer, "chat_template", None):
        prompt = PromptBuilder(instantiate(tree["prompt"], _convert_="all"), outline.tokenizer)
        game = instantiate(tree["env"], _convert_="all")
        mistakes += _check_lengths(tree, outline, prompt, game)
        mistakes += _check_examples(prompt, game)
    mistakes += _check_top_k(tree, outline)
    return tuple(mistakes)


def _check_top_k(tree: Mapping[str, Any], outline: Outline) -> Iterator[Mistake]:
    top_k = whole(section(section(tree, "rollout"), "sampling").get("top_k"))
    size = getattr(outline.config.get_text_config(), "vocab_size", None)
    if top_k is not None and size is not None and top_k > size:
        problem = f"the model's vocabulary has only {size} tokens"
        yield Mistake("rollout.sampling.top_k", top_k, problem, "give for example 3, or null to keep all")


def _check_examples(prompt: PromptBuilder, game: TextGame) -> Iterator[Mistake]:
    """Worked examples teach the form of an answer: one that the prompt's own parser cannot read teaches a wrong one."""
    for number, (_, answer) in enumerate(prompt.template.examples):
        parsed = prompt.parse(answer, game.legal_actions)
        if parsed.action is None:
            problem = f"the prompt's parser reads no action in it ({parsed.error})"
            remedy = f"write an answer as the model is to write it, with one of: {', '.join(game.legal_actions)}"
            yield Mistake(f"prompt.examples[{number}]", answer, problem, remedy)


def _check_adapter(model: Mapping[str, Any], outline: Outline) -> Iterator[Mistake]:
    rank, width = model["lora_rank"], getattr(outline.config, "hidden_size", None)
    if width is not None and rank > width:
        problem = f"the model's matrices are only {width} wide, so that the adapter would be larger than they are"
        yield Mistake("model.lora_rank", rank, problem, "give for example model.lora_rank=16")
    targets = model.get("lora_targets", ALL_LINEAR)
    if targets == ALL_LINEAR:
        return
    names = linear_layers(outline)
    kinds = sorted({name.rpartition(".")[2] for name in names})
    remedy = f"give {ALL_LINEAR}, or a list of: {', '.join(kinds)}"
    if isinstance(targets, str):
        if not _matches(targets, names):
            problem = "a text is a pattern for the whole name of a layer, and none is called so"
            hint = f"[{targets}] for layers of that name, or " if targets in kinds else ""
            yield Mistake("model.lora_targets", targets, problem, f"give {hint}{remedy.removeprefix('give ')}")
        return
    if not targets:
        yield Mistake("model.lora_targets", targets, "no layer is named", remedy)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            closest = (
                f"{did_you_mean(target, kinds)}give {ALL_LINEAR}, or of: {', '.join(closest_first(target, kinds))}"
            )
            yield Mistake("model.lora_targets", targets, f"the model has no layer {target!r} to adapt", closest)


def linear_layers(outline: Outline) -> list[str]:
    """Names of the layers that can be adapted: the linear ones but the output projection, whose rows are read as they
    are."""
    import torch
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM  # its methods carry no types
    with torch.device("meta"):
        model = make.from_config(outline.config)
    head = model.get_output_embeddings()
    return [n for n, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head]


def _matches(pattern: str, names: Sequence[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error:
        return False


def _check_lengths(
    tree: Mapping[str, Any], outline: Outline, prompt: PromptBuilder, game: TextGame
) -> Iterator[Mistake]:
    """A row must fit into a forward pass and into the model, and a legal word into a completion."""
    sampling = section(section(tree, "rollout"), "sampling")
    tokens = whole(sampling.get("max_new_tokens"))
    budget = whole(section(tree, "update").get("token_budget"))
    if tokens is None or budget is None:
        return
    observations = [game.reset(seed=seed)[0] for seed in range(SEEN)]
    longest = max(len(prompt.render(game.rules, text, game.legal_actions)) for text in observations)
    answer = tokens
    if sampling.get("constrain") is True:
        words = dict(zip(game.legal_actions, map(len, prompt.choices(game.legal_actions)), strict=True))
        word = max(words, key=lambda name: words[name])
        answer = words[word]
        if tokens < answer:
            problem = f"the legal word {word} has {answer} tokens"
            remedy = f"give at least {answer}"
            yield Mistake("rollout.sampling.max_new_tokens", tokens, problem, remedy)
    row = longest + answer
    if budget < row:
        problem = f"the longest row has {row} tokens ({longest} of the prompt, {answer} of the answer)"
        yield Mistake("update.token_budget", budget, problem, f"give at least {row}; 4096 is usual")
    context = getattr(outline.config, "max_position_embeddings", None)
    if context is not None and row > context:
        problem = f"with a prompt of {longest} tokens that is more than the {context} that the model can read"
        yield Mistake("rollout.sampling.max_new_tokens", tokens, problem, f"give at most {max(1, context - longest)}")
