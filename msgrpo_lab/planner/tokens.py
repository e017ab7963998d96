"""Token counts without a tokenizer: for models whose files are not on this machine.

Byte-pair tokenizers first split a text into words with the space before them, digits, punctuation and white space, and
hold the common words of English whole. Such pieces are what is counted here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

PIECE = re.compile(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]|\s+")
LONGEST_WORD = 10
"""Letters of a word that is one token; a longer one is split."""
DEFAULT_SYSTEM = "You are a helpful assistant."
"""What chat templates say where a prompt has no system message of its own."""


class EstimatedTokenizer:
    """Stands where a tokenizer would: texts become numbers, equal pieces equal ones.

    The numbers mean nothing to a model. What can be read from them is how many there are and what texts begin alike.
    """

    name_or_path = "estimated"
    chat_template = "<|im_start|>{role}\n{content}<|im_end|>\n"
    """The ChatML layout, which Qwen2.5 and SmolLM2 are taught."""
    unk_token_id = None
    eos_token_id = None

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:  # noqa: ARG002  a tokenizer's signature
        """One number a piece."""
        return [self._numbers.setdefault(piece, len(self._numbers)) for piece in _pieces(text)]

    def apply_chat_template(
        self,
        chat: Sequence[Mapping[str, str]],
        tokenize: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat as text, with the special tokens that open and close a message.

        Raises:
            ValueError: token numbers are asked for.
        """
        if tokenize:
            raise ValueError("tokenize=True: the estimate renders texts only; call encode() on them")
        system = [] if chat and chat[0]["role"] == "system" else [{"role": "system", "content": DEFAULT_SYSTEM}]
        text = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in [*system, *chat])
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _pieces(text: str) -> list[str]:
    found: list[str] = []
    for special, plain in re.findall(r"(<\|im_\w+\|>)|((?:(?!<\|im_).)+)", text, re.DOTALL):
        if special:
            found.append(special)
            continue
        for piece in PIECE.findall(plain):
            found += [piece[start : start + LONGEST_WORD] for start in range(0, len(piece), LONGEST_WORD)]
    return found
