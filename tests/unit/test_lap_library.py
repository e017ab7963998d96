"""The model library's side: who is sent there, and that it reads what the block decoder reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lab_made import gradients, ids, move, plain_stats, small_policy, train_batch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from msgrpo_lab.decoder.library_decoder import LibraryDecoder
from msgrpo_lab.engines.hf.engine import HFEngine
from msgrpo_lab.engines.naive import NaiveEngine
from msgrpo_lab.lap.build import build_policy
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.sources import RandomLlama, word_tokenizer
from msgrpo_lab.seeding import episode_generators
from msgrpo_lab.types import Sampling

BEGINNING = list(range(20, 32))
BATCH = train_batch(
    [([*BEGINNING, 7], [8, 9, 10]), ([*BEGINNING, 9, 5], [8, 9]), ([*BEGINNING, 7], [8, 6, 7]), ([*BEGINNING, 7], [9])]
)
RULE = Sampling(max_new_tokens=4)


def unknown() -> LanguagePolicy:
    """A model of a family that the block decoder does not compute: it normalises queries and keys."""
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, **sizes)
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8.0)
    return LanguagePolicy(model, tokenizer, torch.float32)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the other decoder was asked")


def test_a_family_that_the_block_decoder_does_not_know_is_read_as_a_tree_by_the_library() -> None:
    policy = unknown()
    assert policy.blocks is None
    (plan,) = policy.plan(BATCH, None, 8192)
    assert plan.branches
    assert plan.rows.input_ids.tolist() == [list(BEGINNING)]
    found, expected = policy.token_stats(plan, None, Sampling()), plain_stats(policy, BATCH, Sampling())
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, atol=1e-5, rtol=1e-5)


def test_its_rollouts_are_those_of_the_naive_engine() -> None:
    policy = unknown()
    prompts = [ids(*BEGINNING, 7), ids(*BEGINNING, 9, 10), ids(5, 6)] * 4
    written = []
    for engine in (HFEngine(), NaiveEngine()):
        engine.sync(policy, 0)
        written.append(engine.generate(prompts, RULE, episode_generators(0, "engine", 0, len(prompts))))
    for fast, plain in zip(*written, strict=True):
        assert fast.token_ids.tolist() == plain.token_ids.tolist()
        np.testing.assert_allclose(fast.logprobs, plain.logprobs, atol=1e-5)


def test_what_shares_nothing_never_asks_the_block_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    assert policy.blocks is not None
    monkeypatch.setattr(policy.blocks, "plan_hidden", refuse)
    monkeypatch.setattr(policy.blocks, "extend", refuse)
    for plan in policy.plan(BATCH, None, 8192, "none"):
        assert policy.token_stats(plan, None, Sampling()).logprobs.any()
    engine = NaiveEngine()
    engine.sync(policy, 0)
    assert len(engine.generate([ids(*BEGINNING), ids(5)], RULE, episode_generators(0, "engine", 0, 2))) == 2


@pytest.mark.parametrize("sharing", ["tree", "rows"])
def test_what_shares_asks_the_block_decoder_where_there_is_one(sharing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    monkeypatch.setattr(policy.library, "plan_hidden", refuse)
    monkeypatch.setattr(policy.library, "extend", refuse)
    for plan in policy.plan(BATCH, None, 8192, sharing):
        assert policy.token_stats(plan, None, Sampling()).logprobs.any()
    engine = HFEngine()
    engine.sync(policy, 0)
    assert len(engine.generate([ids(*BEGINNING), ids(5)], RULE, episode_generators(0, "engine", 0, 2))) == 2


def test_the_reference_of_all_weights_is_computed_as_the_policy_is() -> None:
    policy = small_policy()
    policy.keep_reference()
    with policy.as_reference() as reference:
        assert reference.blocks is not None
    policy.blocks = None
    with policy.as_reference() as reference:
        assert reference.blocks is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("four_axes", [False, True])
def test_both_decoders_extend_a_cache_alike(attention: str, four_axes: bool) -> None:
    policy = small_policy()
    policy.model.set_attn_implementation(attention)  # type: ignore[operator]
    numbers = torch.Generator().manual_seed(0)
    tokens, lengths = torch.randint(40, (3, 12), generator=numbers), torch.tensor([7, 5, 6])
    caches = [DynamicCache(), DynamicCache()]
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 8), (8, 12)):
            columns = torch.arange(stop)
            mask = (columns < lengths[:, None]) | (columns >= 7)
            positions = torch.arange(start, stop)[None].expand(3, -1)
            real = mask[:, start:]
            if four_axes:
                mask = mask[:, None] & (columns <= torch.arange(start, stop)[:, None])
                # Each new token looks away from one before it, as one of another branch does.
                mask[:, :, columns == start - 1] = False
                mask = mask[:, None]
            found = [
                decoder.extend(tokens[:, start:stop], cache, mask, positions)[real]
                for decoder, cache in zip((policy.decoder(), policy.decoder(use_library=True)), caches, strict=True)
            ]
            torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert [cache.get_seq_length() for cache in caches] == [12, 12]


def test_the_library_reads_padding_on_the_left() -> None:
    policy = small_policy()
    tokens, mask = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        hidden = policy.decoder(use_library=True).extend(
            tokens, policy.empty_cache(), mask.bool(), (mask.cumsum(dim=1) - 1).clamp(min=0)
        )
        alone = policy.model.model(input_ids=tokens[:1, 2:], use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden[:1, 2:], alone, atol=1e-5, rtol=1e-5)


def test_an_attention_that_takes_no_such_mask_cannot_branch_and_says_so_in_one_line() -> None:
    policy = unknown()
    policy.model.config._attn_implementation = "flash_attention_2"
    library = LibraryDecoder(policy.model, torch.float32)
    assert not library.branches
    token, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention by flash_attention_2 cannot read a tree of texts") as told:
        library.extend(token, library.empty_cache(), mask, token)
    assert len(str(told.value).splitlines()) == 1
    assert all(not plan.branches for plan in policy.plan(BATCH, None, 8192)), "updates read whole rows instead"


def test_an_adapter_in_float32_on_weights_in_bfloat16_is_read_by_either_decoder() -> None:
    """Only autocast brings the two together in the library's modules."""
    source = RandomLlama(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2)
    policy = build_policy(source=source, precision="bfloat16", lora_rank=2)
    move(policy)
    assert policy.blocks is not None
    found = []
    for blocks in (policy.blocks, None):
        policy.blocks = blocks
        (plan,) = policy.plan(BATCH, None, 8192)
        assert plan.branches
        stats = policy.token_stats(plan, None, Sampling())
        assert gradients(policy, stats.logprobs.sum()).any()
        found.append(stats.logprobs.detach())
    torch.testing.assert_close(*found, atol=0.02, rtol=0.0)
    assert float(found[0].abs().max()) > 1.0
