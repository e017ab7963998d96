"""The prompt of a model whose tokenizer is elsewhere: the chat itself, as the bytes of its JSON.

A remote server applies its own chat template and tokenizer, so what a remote policy reads is the chat and not token
ids. `ChatBytes` stands where a tokenizer stands (`PromptBuilder` takes either): its "tokens" are the UTF-8 bytes of the
chat as JSON, followed by the opening of the assistant's turn if the prompt has one. That is lossless, so the engine
reads the chat back out of `prompt_ids`, and equal prompts are equal bytes, as everywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


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
