"""From an observation to the token ids the language model reads. Each prompt holds the current state only [P]."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from msgrpo_lab.types import Message, ParsedAction

_EXCERPT = 40
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers write for the first bytes of a character whose last bytes are yet to come."""


class ActionParser(Protocol):
    """Reads the action out of a completion's text.

    A parser may also have a method `is_settled(text, legal_actions) -> bool`: whether no continuation of `text` could
    change what is read. Free decoding then ends there.
    """

    def __call__(self, text: str, legal_actions: tuple[str, ...]) -> ParsedAction:
        """The index of the legal action that `text` names, or ⊥."""
        ...


def _invalid(reason: str) -> ParsedAction:
    return ParsedAction(action=None, span=None, error=reason)


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…")


@functools.cache
def _legal_words(legal_actions: tuple[str, ...]) -> tuple[dict[str, int], re.Pattern[str]]:
    """The number of each legal word in lower case, and a pattern that whole words of a text must match to be one."""
    number: dict[str, int] = {}
    for index, action in enumerate(legal_actions):
        if re.fullmatch(r"\w+", action):
            number.setdefault(action.lower(), index)
    words = "|".join(re.escape(word) for word in number) or r"(?!)"
    return number, re.compile(rf"\b(?:{words})\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstWordParser:
    """The first legal word in the text, whatever stands around it; letter case is ignored."""

    def __call__(self, text: str, legal_actions: tuple[str, ...]) -> ParsedAction:
        """See `ActionParser.__call__`."""
        number, pattern = _legal_words(legal_actions)
        for match in pattern.finditer(text):
            # Regular expressions take a few letters for each other that `lower` does not, such as ſ for s.
            if (action := number.get(match.group().lower())) is not None:
                return ParsedAction(action=action, span=match.span(), error=None)
        return _invalid("empty text" if not text.strip() else f"no legal word in {_excerpt(text)}")

    def is_settled(self, text: str, legal_actions: tuple[str, ...]) -> bool:
        """Whether a legal word stands there complete: the first one, with something after it that cannot lengthen it.

        The end of the text could still grow, and so could the mark of a character whose bytes are incomplete.
        """
        parsed = self(text, legal_actions)
        return parsed.span is not None and text[parsed.span[1] :].rstrip(_INCOMPLETE) != ""


_ACTION_TAG = re.compile(r"<action>([^<>]*)</action>", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionTagParser:
    """What stands in the last well-formed `<action>` tag, trimmed and lower-cased [A].

    A tag is well formed if it is closed and holds no other tag.
    """

    def __call__(self, text: str, legal_actions: tuple[str, ...]) -> ParsedAction:
        """See `ActionParser.__call__`."""
        last = max(_ACTION_TAG.finditer(text), key=lambda match: match.start(), default=None)
        if last is None:
            return _invalid("empty text" if not text.strip() else "no well-formed <action> tag")
        content = last.group(1)
        word = content.strip().lower()
        words = [action.lower() for action in legal_actions]
        if word not in words:
            return _invalid(f"{_excerpt(content.strip())} in the <action> tag is no legal action")
        start = last.start(1) + len(content) - len(content.lstrip())
        return ParsedAction(action=words.index(word), span=(start, start + len(content.strip())), error=None)


MEMORY = 200_000
"""Rendered prompts and parsed texts remembered at most."""
FIELDS = frozenset({"rules", "observation", "actions"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """What a prompt says, before any tokenizer: texts with the fields {rules}, {observation} and {actions}."""

    user: str
    """The user's message."""
    parser: ActionParser
    """How an answer to this prompt is read."""
    system: str | None = None
    """The system message; None leaves it to the model's chat template (which may add one of its own)."""
    opening: str = ""
    """Text that opens the assistant's turn; the model goes on from it."""
    examples: Sequence[Sequence[str]] = ()
    """Worked examples as (observation, answer) pairs, given as earlier turns of the chat."""
    stop: Sequence[str] = ()
    """Texts that end a completion (free decoding)."""
    stop_at_action: bool = True
    """Whether a completion ends once its action can no longer change (free decoding, where the parser can tell)."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for an unknown field or an example that is no pair."""
        if not callable(self.parser):
            raise ValueError(
                f"prompt.parser={self.parser}: must be a parser; give a _target_ as in conf/prompt/action_only.yaml"
            )
        for key in ("system", "user", "opening"):
            text = getattr(self, key) or ""
            try:
                fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
            except ValueError as error:
                raise ValueError(f"prompt.{key}={text!r}: {error}; write a literal brace as {{{{ or }}}}") from error
            if unknown := fields - FIELDS:
                raise ValueError(
                    f"prompt.{key}={text!r}: no field {{{min(unknown)}}}; the fields are {', '.join(sorted(FIELDS))}"
                )
        if "{observation}" not in self.user:
            raise ValueError(
                f"prompt.user={self.user!r}: must show the state; write {{observation}} where it is to stand"
            )
        if "" in self.stop:
            raise ValueError(
                f"prompt.stop={list(self.stop)}: an empty text would end every answer at once; leave it out"
            )
        for example in self.examples:
            if isinstance(example, str) or len(example) != 2:
                raise ValueError(
                    f"prompt.examples={example!r}: each example must be a pair; write [observation, answer]"
                )

    def messages(self, rules: str, observation: str, legal_actions: Sequence[str]) -> list[Message]:
        """The chat up to the assistant's turn."""
        actions = f"{', '.join(legal_actions[:-1])} or {legal_actions[-1]}"

        def fill(text: str, observation: str) -> str:
            return text.format(rules=rules, observation=observation, actions=actions)

        chat = [] if self.system is None else [Message(role="system", content=fill(self.system, observation))]
        for example_observation, answer in self.examples:
            chat.append(Message(role="user", content=fill(self.user, example_observation)))
            chat.append(Message(role="assistant", content=answer))
        chat.append(Message(role="user", content=fill(self.user, observation)))
        return chat


class PromptBuilder:
    """A template bound to a tokenizer. Every distinct observation is rendered and tokenised once."""

    def __init__(self, template: PromptTemplate, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"model: the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model"
            )
        self.template = template
        self.tokenizer = tokenizer
        self._rendered: dict[tuple[str, str, tuple[str, ...]], Int[np.ndarray, " P"]] = {}
        self._parsed: dict[tuple[str, tuple[str, ...]], ParsedAction] = {}
        self._settled: dict[tuple[str, ...], dict[str, bool]] = {}

    def text(self, rules: str, observation: str, legal_actions: tuple[str, ...]) -> str:
        """The whole prompt as text, with the chat template's special tokens written out."""
        chat = [
            {"role": message.role, "content": message.content}
            for message in self.template.messages(rules, observation, legal_actions)
        ]
        text: str = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return text + self.template.opening

    def render(self, rules: str, observation: str, legal_actions: tuple[str, ...]) -> Int[np.ndarray, " P"]:
        """Token ids of the prompt. The same observation gives the very same (read-only) array."""
        key = (rules, observation, legal_actions)
        ids = self._rendered.get(key)
        if ids is None:
            text = self.text(rules, observation, legal_actions)
            ids = np.array(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
            ids.flags.writeable = False
            if len(self._rendered) >= MEMORY:
                self._rendered.clear()
            self._rendered[key] = ids
        return ids

    def parse(self, text: str, legal_actions: tuple[str, ...]) -> ParsedAction:
        """The action that a completion names, or ⊥. Every distinct text is parsed once."""
        key = (text, legal_actions)
        parsed = self._parsed.get(key)
        if parsed is None:
            if len(self._parsed) >= MEMORY:
                self._parsed.clear()
            parsed = self._parsed[key] = self.template.parser(text, legal_actions)
        return parsed

    def settled(self, legal_actions: tuple[str, ...]) -> Callable[[str], bool] | None:
        """Tells of a completion's text whether more of it could change the action; None if it is not to be asked."""
        is_settled = getattr(self.template.parser, "is_settled", None)
        if is_settled is None or not self.template.stop_at_action:
            return None
        known = self._settled.setdefault(legal_actions, {})

        def remembered(text: str) -> bool:
            if text not in known:
                if len(known) >= MEMORY:
                    known.clear()
                known[text] = is_settled(text, legal_actions)
            return known[text]

        return remembered

    def choices(self, legal_actions: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each legal word as it would follow the prompt, for constrained decoding.

        Raises:
            ValueError: the tokenizer knows no token for a part of a legal word, so that words cannot be told apart.
        """
        space = "" if not self.template.opening or self.template.opening[-1].isspace() else " "
        choices = tuple(tuple(self.tokenizer.encode(space + word, add_special_tokens=False)) for word in legal_actions)
        for word, tokens in zip(legal_actions, choices, strict=True):
            if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in tokens:
                raise ValueError(
                    f"model: its tokenizer does not know the legal word {word!r}; use another model, or add it to "
                    "msgrpo_lab/lap/sources.py for tiny"
                )
        return choices
