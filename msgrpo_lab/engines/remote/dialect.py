"""How each kind of OpenAI-compatible server is told of a decoding rule.

The common API has temperature, top_p, a length, stop texts and a seed. The rest differs from server to server, and two
things would silently play another policy than the one that is meant:

- Servers fill in what a request leaves out from the model's own generation settings (Qwen2.5-Instruct: top-k 20,
  repetition penalty 1.05) or from defaults of their own (llama.cpp: top-k 40, min-p 0.05; `transformers serve` decodes
  greedily at any temperature unless told to draw). Every request therefore names the neutral value of each.
- A stop text is left out of the answer by the common API, while in this project it belongs to the answer, as in
  `</action>`. Where a server can be told to keep it, it is; elsewhere no stop text is sent, and the answer is cut
  after it on arrival, which costs tokens and changes nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from msgrpo_lab.types import Sampling


class Chat(NamedTuple):
    """What a remote model is asked to go on from."""

    messages: tuple[dict[str, str], ...]
    """`role` and `content` of each message, up to the assistant's turn."""
    opening: str
    """How the assistant's turn begins; empty if it is the model's from its first character."""


class ChatBytes:
    """A codec with the face of a tokenizer: one token a byte of UTF-8."""

    name_or_path = "chat as bytes"
    chat_template = "the server's own"
    unk_token_id = None

    def apply_chat_template(
        self, chat: Sequence[dict[str, str]], *, tokenize: bool = False, add_generation_prompt: bool = True
    ) -> str:
        """The chat as JSON. Raises `ValueError` for what only a real chat template can do."""
        if tokenize or not add_generation_prompt:
            raise ValueError("chat as bytes: it is text and always asks for an answer")
        return json.dumps(list(chat), ensure_ascii=False)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The bytes of `text`; there are no special ones."""
        if add_special_tokens:
            raise ValueError("chat as bytes: it has no special tokens")
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these bytes. Raises `ValueError` for what is no UTF-8."""
        return bytes(token_ids).decode()


def read_chat(prompt_ids: Int[np.ndarray, " P"]) -> Chat:
    """The chat that `ChatBytes` wrote.

    Raises:
        ValueError: the ids are a tokenizer's, not a chat's bytes.
    """
    try:
        text = ChatBytes().decode(prompt_ids.tolist())
        messages, end = json.JSONDecoder().raw_decode(text)
        chat = Chat(tuple({"role": entry["role"], "content": entry["content"]} for entry in messages), text[end:])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            "prompt: these token ids are no chat; a remote model's prompts are built with ChatBytes in the "
            "tokenizer's place"
        ) from error
    return chat


Server = Literal["vllm", "sglang", "llama_cpp", "transformers", "openai"]
Constraint = Literal["structured_outputs", "guided_choice", "regex", "grammar"]
Fields = dict[str, Any]
"""Fields of a request's JSON body."""

OWN_FIELDS = frozenset(
    {"model", "messages", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "stop", "seed"}
    | {"n", "stream", "logprobs"}
)
"""Fields that say what is asked; `extra_body` may not change them."""


def _no_top_k(top_k: int | None) -> Fields:
    if top_k is not None:
        raise ValueError("it has no top-k; use top_k=null, or another server")
    return {}


def _transformers_rule(top_k: int | None) -> Fields:
    """`transformers serve` takes what the common API lacks as a generation configuration, in JSON."""
    rule = {"do_sample": True, "top_k": top_k or 0, "min_p": None, "typical_p": 1.0, "repetition_penalty": 1.0}
    return {"generation_config": json.dumps(rule)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One kind of server."""

    top_k: Callable[[int | None], Fields]
    """Top-k (None: no cut), and the neutral values of whatever else would bend the distribution."""
    max_tokens: str = "max_tokens"
    """The field of the answer's greatest length."""
    keep_stop: Fields | None = None
    """What keeps the stop text in the answer; None if nothing does."""
    continuing: Fields | None = None
    """What makes the server go on from an assistant's message at the chat's end; None if nothing does."""


def _neutral(**fields: Any) -> Callable[[int | None], Fields]:
    """Top-k as a field of its own, its neutral value being the one given."""
    unlimited = fields.pop("top_k")
    return lambda top_k: {"top_k": unlimited if top_k is None else top_k, **fields}


DIALECTS: Mapping[Server, Dialect] = {
    "vllm": Dialect(
        top_k=_neutral(top_k=-1, min_p=0.0, repetition_penalty=1.0),
        keep_stop={"include_stop_str_in_output": True},
        continuing={"continue_final_message": True, "add_generation_prompt": False},
    ),
    "sglang": Dialect(
        top_k=_neutral(top_k=-1, min_p=0.0, repetition_penalty=1.0),
        keep_stop={"no_stop_trim": True},
        continuing={"continue_final_message": True},
    ),
    "llama_cpp": Dialect(
        top_k=_neutral(top_k=0, min_p=0.0, typical_p=1.0, repeat_penalty=1.0),
        continuing={},  # it always goes on from an assistant's message, unless started with --no-prefill-assistant
    ),
    # It keeps stop texts, but answers 500 where it cannot spell one in the model's tokens.
    "transformers": Dialect(top_k=_transformers_rule),
    "openai": Dialect(top_k=_no_top_k, max_tokens="max_completion_tokens"),
}

CONSTRAINTS: Mapping[Constraint, Callable[[Sequence[str]], Fields]] = {
    "structured_outputs": lambda words: {"structured_outputs": {"choice": list(words)}},  # vLLM from 0.11
    "guided_choice": lambda words: {"guided_choice": list(words)},  # vLLM before
    "regex": lambda words: {"regex": "(" + "|".join(map(re.escape, words)) + ")"},  # SGLang
    "grammar": lambda words: {"grammar": "root ::= " + " | ".join(map(json.dumps, words))},  # llama.cpp
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestWriter:
    """Turns a chat and a decoding rule into the body of a request."""

    server: Server
    constrain_by: Constraint | None = None
    logprobs: bool = False
    """Whether log-probabilities are asked for."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def body(self, model: str, chat: Chat, sampling: Sampling, seed: int | None) -> Fields:
        """The JSON body, without a seed if that is None.

        Raises:
            ValueError: the server cannot do what the prompt or the decoding rule asks for.
        """
        dialect = DIALECTS[self.server]
        messages: list[dict[str, str]] = list(chat.messages)
        body: Fields = {"model": model, "messages": messages}
        body["temperature"] = 0.0 if sampling.greedy else sampling.temperature
        body["top_p"] = 1.0 if sampling.greedy or sampling.top_p is None else sampling.top_p
        body[dialect.max_tokens] = sampling.max_new_tokens
        try:
            body |= dialect.top_k(None if sampling.greedy else sampling.top_k)
        except ValueError as error:
            raise ValueError(f"server={self.server}: {error}") from error
        if sampling.stop and dialect.keep_stop is not None:
            body |= {"stop": list(sampling.stop), **dialect.keep_stop}
        if chat.opening:
            if dialect.continuing is None:
                raise ValueError(
                    f"prompt.opening={chat.opening!r}: server={self.server} cannot go on from an opened "
                    f"answer; use prompt.opening='' or one of: {', '.join(_continuing())}"
                )
            messages.append({"role": "assistant", "content": chat.opening})
            body |= dialect.continuing
        if sampling.choices is not None:
            body |= self._constraint(legal_words(sampling))
        if seed is not None:
            body["seed"] = seed
        if self.logprobs:
            body["logprobs"] = True
        return body | dict(self.extra_body)

    def _constraint(self, words: Sequence[str]) -> Fields:
        if self.constrain_by is None:
            raise ValueError(
                "rollout.sampling.constrain=true: only the server could keep a remote model to the legal words; set "
                f"rollout.sampling.constrain=false, or name its way with constrain_by: {', '.join(CONSTRAINTS)}"
            )
        return CONSTRAINTS[self.constrain_by](words)


def legal_words(sampling: Sampling) -> tuple[str, ...]:
    """The words that `choices` spell in the bytes of `ChatBytes`."""
    return tuple(bytes(choice).decode() for choice in sampling.choices or ())


def _continuing() -> list[str]:
    return [name for name, dialect in DIALECTS.items() if dialect.continuing is not None]
