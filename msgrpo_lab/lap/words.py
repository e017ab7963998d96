"""A word-level tokenizer over the games' own words, made without a file: for `tiny` and scripted players."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|pad|>", "<|unknown|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

_WORDS = (
    "Frozen Lake Reach reach the goal Goal avoid holes hole ice Ice wall Wall is slippery you You are may "
    "slide sideways Left left Down down Right right Up up and of at to a an in on it this that one word Reply "
    "with only or your Your move Move moves turn turns step steps here Here start end Player player position "
    "Position cell cells grid Grid row column map Map Legend legend Snake snake snakes Snakes apple Apple "
    "apples Apples banana Banana bananas Bananas poison Poison poisonous healthy free Free body Body danger "
    "Danger head Head tail eat Eat eating die death other another grow grows by reward costs point points "
    "action Action actions think plan answer Answer tag inside last legal Legal state State rules Rules none "
    "None no not each every from until when if then game Game horizon Avoid Food The bodies dead either fell into "
    "reached side walls Actions All An Coordinates Cross Eating Entering Holes Other Reaching after always angles any "
    "board chosen columns direction directions eaten ends falling frozen gives have hits item its kind lake leaves "
    "longer makes most new off playing probability random replaced rows same them time top two where without First "
    "about next choose out exactly format thoughts "
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def word_tokenizer() -> Any:
    """A tokenizer whose tokens are words, numbers, single characters and runs of spaces; decoding restores the text.

    A word that is not in the vocabulary becomes one `<|unknown|>` token.
    """
    vocabulary: dict[str, int] = {}
    numbers = [str(number) for number in range(100)]
    characters = [*string.ascii_letters, *string.punctuation, " ", "\n", "  "]
    for token in (*SPECIAL, *_WORDS.split(), *numbers, *characters):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[A-Za-z]+|[0-9]{1,2}| {1,2}|\n|."), behavior="isolated")
    tokenizer.decoder = Fuse()
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
