"""From an observation to token ids: templates, examples, openings, and the words the tiny tokenizer knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from lab_made import composed

from msgrpo_lab.config import conf_dir
from msgrpo_lab.lap.prompt import ActionTagParser, FirstWordParser, PromptBuilder, PromptTemplate
from msgrpo_lab.lap.sources import word_tokenizer
from msgrpo_lab.training.assemble import component
from msgrpo_lab.types import Message

WORDS = ("Left", "Down", "Right", "Up")
SCENARIOS = sorted(path.stem for path in (conf_dir() / "env").glob("*.yaml"))


def template(**changes: Any) -> PromptTemplate:
    return PromptTemplate(**{"user": "{observation}", "parser": FirstWordParser(), **changes})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


def test_fields_are_filled_in_every_message() -> None:
    made = template(system="{rules} One of {actions}.", user="Now: {observation}")
    assert made.messages("Rules.", "ice", WORDS) == [
        Message(role="system", content="Rules. One of Left, Down, Right or Up."),
        Message(role="user", content="Now: ice"),
    ]


def test_without_a_system_text_there_is_no_system_message() -> None:
    assert [message.role for message in template().messages("Rules.", "ice", WORDS)] == ["user"]


def test_examples_are_earlier_turns_of_the_chat() -> None:
    made = template(system="S", user="See {observation}", examples=[["hole", "Up"], ["goal", "Down"]])
    assert [(message.role, message.content) for message in made.messages("R", "ice", WORDS)] == [
        ("system", "S"),
        ("user", "See hole"),
        ("assistant", "Up"),
        ("user", "See goal"),
        ("assistant", "Down"),
        ("user", "See ice"),
    ]


def test_braces_in_an_observation_are_only_text() -> None:
    assert template().messages("R", "{rules} {x}", WORDS)[0].content == "{rules} {x}"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"user": "{observatoin}"}, "prompt.user='{observatoin}': no field {observatoin}"),
        ({"system": "{state}"}, "prompt.system='{state}': no field {state}"),
        ({"user": "{}"}, "prompt.user='{}': no field {}"),
        ({"user": "{rules.x}"}, "prompt.user='{rules.x}': no field {rules.x}"),
        ({"user": "{observation"}, "prompt.user='{observation': expected '}'"),
        ({"user": "}"}, "prompt.user='}': Single '}'"),
        ({"examples": [["only one"]]}, "prompt.examples=['only one']: each example must be a pair"),
        ({"user": "no state"}, "prompt.user='no state': must show the state; write {observation}"),
        ({"stop": ["x", ""]}, "prompt.stop=['x', '']: an empty text would end every answer at once; leave it out"),
        ({"examples": ["ab"]}, "prompt.examples='ab': each example must be a pair"),
        ({"examples": [["a", "b", "c"]]}, "prompt.examples=['a', 'b', 'c']: each example"),
    ],
)
def test_a_wrong_template_is_told_in_one_line(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(error)) as caught:
        template(**changes)
    assert len(str(caught.value).splitlines()) == 1


def test_rendered_text_is_the_chat_template_and_the_opening(tokenizer: Any) -> None:
    builder = PromptBuilder(template(system="{rules}", opening="Move: "), tokenizer)
    assert builder.text("Avoid holes", "ice", WORDS) == (
        "<|system|>Avoid holes<|end|><|user|>ice<|end|><|assistant|>Move: "
    )


def test_rendered_ids_are_the_tokens_of_the_text_once(tokenizer: Any) -> None:
    builder = PromptBuilder(template(opening="Move:"), tokenizer)
    ids = builder.render("Avoid holes", "hole Left", WORDS)
    assert tokenizer.decode(ids.tolist()) == "<|user|>hole Left<|end|><|assistant|>Move:"
    assert len(ids) == 8
    assert ids.dtype == np.int64


def test_the_same_observation_gives_the_very_same_read_only_array(tokenizer: Any) -> None:
    builder = PromptBuilder(template(), tokenizer)
    ids = builder.render("R", "ice", WORDS)
    assert builder.render("R", "ice", WORDS) is ids
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 0


def test_whatever_a_prompt_may_depend_on_is_told_apart(tokenizer: Any) -> None:
    builder = PromptBuilder(template(system="{rules} {actions}"), tokenizer)
    made = [
        builder.render("Avoid", "ice", WORDS),
        builder.render("Reach", "ice", WORDS),
        builder.render("Avoid", "hole", WORDS),
        builder.render("Avoid", "ice", ("Up", "Down")),
    ]
    assert len({ids.tobytes() for ids in made}) == 4


def test_a_full_memory_is_emptied_and_goes_on(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msgrpo_lab.lap.prompt.MEMORY", 2)
    builder = PromptBuilder(template(), tokenizer)
    first = builder.render("R", "0", WORDS)
    for number in range(1, 6):
        assert len(builder.render("R", str(number), WORDS)) == len(first)
        assert builder.parse(f"Up {number}", WORDS).action == 3
    assert np.array_equal(builder.render("R", "0", WORDS), first)


def test_answers_are_parsed_once_for_each_text_and_set_of_words(tokenizer: Any) -> None:
    builder = PromptBuilder(template(), tokenizer)
    assert builder.parse("up", WORDS) is builder.parse("up", WORDS)
    assert builder.parse("up", ("Up", "Down")).action == 0
    assert builder.parse("up", WORDS).action == 3


@pytest.mark.parametrize(
    ("opening", "first"),
    [("", "Left"), ("Move: ", "Left"), ("Move:\n", "Left"), ("Move:", " Left"), ("<action>", " Left")],
)
def test_legal_words_as_they_follow_the_opening(tokenizer: Any, opening: str, first: str) -> None:
    builder = PromptBuilder(template(opening=opening), tokenizer)
    choices = builder.choices(WORDS)
    assert [tokenizer.decode(list(choice)) for choice in choices] == [first.replace("Left", word) for word in WORDS]
    assert {len(choice) for choice in choices} == {len(first) - len("Left") + 1}


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template") as caught:
        PromptBuilder(template(), tokenizer)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_papers_prompt_holds_rules_state_and_answer_format(scenario: str, tokenizer: Any) -> None:
    config = composed(
        f"env={scenario}", "env.observation=paper", "prompt=think_plan_action", "rollout.sampling.constrain=false"
    )
    game, made = component(config.env), component(config.prompt)
    observation, _ = game.reset(seed=1)
    (message,) = made.messages(game.rules, observation, game.legal_actions)
    assert message.role == "user"
    places = [message.content.find(part) for part in (game.rules, observation, "<think>", "<plan>", "<action>")]
    assert -1 not in places
    assert places == sorted(places)
    assert all(word in message.content for word in game.legal_actions)
    assert isinstance(made.parser, ActionTagParser)
    assert list(made.stop) == ["</action>"]


@lru_cache(maxsize=32)
def texts(scenario: str, view: str) -> frozenset[str]:
    """Rules and every text that random play meets."""
    game = component(composed(f"env={scenario}", f"env.observation={view}").env)
    rng = np.random.default_rng(0)
    return frozenset({game.rules, *(text for seed in range(40) for text in played(game, seed, rng))})


def played(game: Any, seed: int, rng: np.random.Generator) -> Iterator[str]:
    yield game.reset(seed=seed)[0]
    over = False
    while not over:
        text, _, terminated, truncated, _ = game.step(int(rng.integers(len(game.legal_actions))))
        yield text
        over = terminated or truncated


@pytest.mark.parametrize("view", ["compact", "paper"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_word_tokenizer_knows_every_word_and_restores_every_text(scenario: str, view: str, tokenizer: Any) -> None:
    for text in texts(scenario, view):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids, [
            word for word in re.findall(r"\w+", text) if tokenizer.encode(word) == [tokenizer.unk_token_id]
        ]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("path", sorted((conf_dir() / "prompt").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_word_tokenizer_knows_every_word_of_the_prompts(path: Any, tokenizer: Any) -> None:
    made = component(composed("model=tiny", "sampling=free", f"prompt={path.stem}").prompt)
    builder = PromptBuilder(made, tokenizer)
    ids = builder.render("Avoid holes", "ice", WORDS)
    assert tokenizer.unk_token_id not in ids


def test_an_unknown_word_is_one_unknown_token(tokenizer: Any) -> None:
    assert tokenizer.encode("Left zyzzyva Up", add_special_tokens=False).count(tokenizer.unk_token_id) == 1


def test_every_word_has_one_token_of_its_own(tokenizer: Any) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    for word in ("Left", "99", "x", "#", "\n", "  "):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1


def test_legal_words_that_the_tokenizer_cannot_tell_apart_are_named(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"legal word 'Zephyr'.*lap/sources\.py") as caught:
        PromptBuilder(template(), tokenizer).choices(("Left", "Zephyr"))
    assert "\n" not in str(caught.value)
