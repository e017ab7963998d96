"""Every prompt under conf/prompt fits every scenario: fields are filled, and answers read back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml
from hydra.utils import instantiate

from msgrpo_lab.config import conf_dir
from msgrpo_lab.decoder.decoding import ChoiceTrie
from msgrpo_lab.lap.prompt import FirstWordParser, PromptBuilder, PromptTemplate
from msgrpo_lab.lap.sources import word_tokenizer
from msgrpo_lab.tsmg.base import TextGame


def group(name: str) -> dict[str, dict[str, Any]]:
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted((conf_dir() / name).glob("*.yaml"))}


PROMPTS, SCENARIOS = group("prompt"), group("env")
TOKENIZER = word_tokenizer()


@pytest.fixture(params=PROMPTS, scope="module")
def template(request: pytest.FixtureRequest) -> PromptTemplate:
    made: PromptTemplate = instantiate(PROMPTS[request.param], _convert_="all")
    return made


@pytest.fixture(params=SCENARIOS, scope="module")
def scenario(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SCENARIOS[request.param]


@pytest.fixture(params=["compact", "relative", "paper"], scope="module")
def game(request: pytest.FixtureRequest, scenario: dict[str, Any]) -> TextGame:
    made: TextGame = instantiate({**scenario, "observation": request.param})
    made.reset(seed=4)
    return made


def test_the_agent_reads_rules_state_and_every_legal_action(template: PromptTemplate, game: TextGame) -> None:
    chat = template.messages(game.rules, game.render_text(), game.legal_actions)
    text = "\n".join(message.content for message in chat)
    assert game.rules in text
    assert game.render_text() in chat[-1].content
    assert ", ".join(game.legal_actions[:-1]) + " or " + game.legal_actions[-1] in text
    assert chat[-1].role == "user"


def test_rules_come_before_the_state_so_that_prompts_share_them(template: PromptTemplate, game: TextGame) -> None:
    builder = PromptBuilder(template, TOKENIZER)
    first = builder.render(game.rules, game.render_text(), game.legal_actions)
    other = builder.render(game.rules, "elsewhere", game.legal_actions)
    shared = int((first[: len(other)] != other[: len(first)]).argmax())
    assert shared >= len(TOKENIZER.encode(game.rules, add_special_tokens=False))


def test_a_well_formed_answer_is_read_back(template: PromptTemplate, game: TextGame) -> None:
    bare = isinstance(template.parser, FirstWordParser)
    for index, word in enumerate(game.legal_actions):
        answer = word if bare else f"<think>hm</think>\n<plan>on</plan>\n<action>{word}</action>"
        for text in (answer, answer.lower(), f"  {answer}\n"):
            parsed = template.parser(text, game.legal_actions)
            assert parsed.action == index
            assert parsed.span is not None
            assert text[slice(*parsed.span)].lower() == word.lower()


def test_an_empty_answer_is_bottom(template: PromptTemplate, game: TextGame) -> None:
    assert template.parser("", game.legal_actions).action is None


def test_legal_words_make_a_tree(template: PromptTemplate, game: TextGame) -> None:
    choices = PromptBuilder(template, TOKENIZER).choices(game.legal_actions)
    trie = ChoiceTrie(choices)
    for choice, word in zip(choices, game.legal_actions, strict=True):
        assert TOKENIZER.decode(list(choice)).strip() == word
        assert trie.states(np.array(choice))[0] == 0


def test_a_stop_text_ends_what_the_parser_can_read(template: PromptTemplate) -> None:
    for stop in template.stop:
        assert template.parser(f"<action>Up{stop}", ("Up", "Down")).action == 0
