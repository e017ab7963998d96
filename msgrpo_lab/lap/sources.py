"""Where base models come from. A source gives a causal language model and its tokenizer, and says so when it cannot.

A new kind of source is a class here (or anywhere) with a `load` method, named by `model.source._target_`.
"""

from __future__ import annotations

import contextlib
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from msgrpo_lab.files import check_manifest

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


OFFLINE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""How folders are read: nothing is fetched, and no code that lies in them is run."""
COMMIT = re.compile(r"[0-9a-f]{40}")


class Loaded(NamedTuple):
    """A base model and the tokenizer that goes with it."""

    model: Any
    tokenizer: Any


class Outline(NamedTuple):
    """What a base model is, without its weights."""

    config: Any
    """Its configuration, from which a model can be made on the meta device."""
    tokenizer: Any | None
    """None where it cannot be had without the network."""


class ModelSource(Protocol):
    """Somewhere a base model can be had from."""

    def load(self, dtype: torch.dtype) -> Loaded:
        """The model with parameters in `dtype`, on the CPU. Raises `ModelSourceError` in one line if it cannot."""
        ...

    def outline(self) -> Outline:
        """What `load` would give, without weights and without the network. Raises `ModelSourceError` if it cannot.

        A source may leave it out: nothing is then checked before the model is loaded, and no plan can be made.
        """
        ...


class ModelSourceError(ValueError):
    """A base model cannot be had; the message names the key, the value and the remedy in one line."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars while a model is read."""
    bars: Any = logging  # its functions carry no types
    enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            bars.enable_progress_bar()


def load_folder(folder: Path, dtype: torch.dtype) -> Loaded:
    """The model of a folder, after its checksums have been compared where it has them (0.2 s for SmolLM2's 270 MB)."""
    try:
        check_manifest(folder)
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **OFFLINE)
            tokenizer = AutoTokenizer.from_pretrained(folder, **OFFLINE)
    except SafetensorError as error:
        problem = f"{folder}: its weights cannot be read ({error}), so that a file is damaged"
        raise ModelSourceError(f"{problem}; copy the folder again, or delete it if it is a cache") from error
    except ValueError as error:
        raise ModelSourceError(" ".join(str(error).split())) from error
    return Loaded(model, tokenizer)


def outline_of_folder(folder: Path) -> Outline:
    """The shape and the tokenizer of a model's folder, without its weights."""
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder, **OFFLINE)
        return Outline(config, AutoTokenizer.from_pretrained(folder, **OFFLINE))


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A folder in the Hugging Face layout (config.json, *.safetensors, tokenizer.json)."""

    path: str

    def load(self, dtype: torch.dtype) -> Loaded:
        """Read the folder; see `ModelSource.load`."""
        return load_folder(self._folder(), dtype)

    def outline(self) -> Outline:
        """Read the folder's configuration; see `ModelSource.outline`."""
        return outline_of_folder(self._folder())

    def _folder(self) -> Path:
        folder = Path(self.path).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelSourceError(
                f"model.path={self.path}: no config.json there; give a folder written by save_pretrained"
            )
        return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """A model on the Hugging Face Hub, downloaded because the configuration says so and for no other reason."""

    repo: str
    revision: str = "main"
    architecture: Mapping[str, Any] | None = None
    """Fields of its published config.json, `model_type` among them: what a run costs can then be planned offline. They
    are held against the real ones before weights are fetched."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; to be asked for by name, and for a `revision` that is a commit."""

    def __post_init__(self) -> None:
        """Raises `ModelSourceError` for what is no name, and for code that may be another tomorrow."""
        if not self.repo.strip() or not self.revision.strip():
            key = "revision" if self.repo.strip() else "repo"
            raise ModelSourceError(
                f"model.source.{key}=: must not be empty; give for example Qwen/Qwen2.5-0.5B-Instruct"
            )
        if self.trust_remote_code and not COMMIT.fullmatch(self.revision):
            problem = f"the code of revision {self.revision} may be another tomorrow, and runs with your rights"
            raise ModelSourceError(
                f"model.source.trust_remote_code=true: {problem}; read it, and set model.source.revision to its commit"
            )

    @property
    def _named(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def load(self, dtype: torch.dtype) -> Loaded:
        """Fetch (or read from the Hub's own cache) and load; see `ModelSource.load`."""
        try:
            with quiet_transformers():
                if self.architecture is not None:
                    self._compare(AutoConfig.from_pretrained(self.repo, **self._named))
                model = AutoModelForCausalLM.from_pretrained(self.repo, dtype=dtype, **self._named)
                tokenizer = AutoTokenizer.from_pretrained(self.repo, **self._named)
        except ModelSourceError:
            raise
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelSourceError(
                f"model.source.repo={self.repo}: the Hub did not give it ({reason}); check name and network, or set "
                "model.path to a local folder"
            ) from error
        return Loaded(model, tokenizer)

    def outline(self) -> Outline:
        """The architecture that is given; the tokenizer if the Hub's cache has it. See `ModelSource.outline`."""
        if self.architecture is None or "model_type" not in self.architecture:
            raise ModelSourceError(
                f"model.source.architecture={self.architecture}: a plan needs it, since nothing is downloaded for one; "
                "give the fields of the model's config.json as in conf/model/qwen2_5_3b.yaml"
            )
        try:
            config = AutoConfig.for_model(**self.architecture)
        except (ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelSourceError(
                f"model.source.architecture={dict(self.architecture)}: {reason}; give fields of the model's config.json"
            ) from error
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(self.repo, local_files_only=True, **self._named)
        except (OSError, ValueError):
            tokenizer = None
        return Outline(config, tokenizer)

    def _compare(self, config: PretrainedConfig) -> None:
        """Raises `ModelSourceError` where the model's configuration is not the architecture that is given."""
        for key, given in (self.architecture or {}).items():
            found = getattr(config, key, None)
            if found != given:
                raise ModelSourceError(
                    f"model.source.architecture.{key}={given}: {self.repo} at {self.revision} has {found}; correct the "
                    "model's file, or name the revision that is meant"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLlama:
    """A Llama of random weights over the games' words: made in a moment, learns from scratch, needs no file."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    init_seed: int = 0
    """Seed of the weights."""

    def __post_init__(self) -> None:
        """Raises `ModelSourceError` for sizes that no such model has."""
        for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, key) < 1:
                raise ModelSourceError(f"model.source.{key}={getattr(self, key)}: must be at least 1")
        if self.hidden_size % (2 * self.num_heads):
            raise ModelSourceError(
                f"model.source.hidden_size={self.hidden_size}: must be an even multiple of the {self.num_heads} heads "
                "(model.source.num_heads); 128 with 4 is usual"
            )

    def load(self, dtype: torch.dtype) -> Loaded:
        """Make the model; see `ModelSource.load`."""
        config, tokenizer = self.outline()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.init_seed)
            model: Any = LlamaForCausalLM(config)
        return Loaded(model.to(dtype), tokenizer)

    def outline(self) -> Outline:
        """Its sizes and the word tokenizer; see `ModelSource.outline`."""
        tokenizer = word_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
        return Outline(config, tokenizer)
