"""A Qwen2 of random weights over the games' words: another architecture for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from msgrpo_lab.lap.sources import Loaded, word_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomQwen2:
    """Two small layers; needs no file."""

    hidden_size: int = 64
    init_seed: int = 0

    def load(self, dtype: torch.dtype) -> Loaded:
        """Make the model; see `ModelSource.load`."""
        tokenizer = word_tokenizer()
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.init_seed)
            model: Any = Qwen2ForCausalLM(config)
        return Loaded(model.to(dtype), tokenizer)
