"""The block decoder against Hugging Face's own forward and backward passes, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from msgrpo_lab.decoder.block_decoder import AttendsTo, Block, BlockDecoder, KeyValues
from msgrpo_lab.decoder.kernels import Linear, Packed, Prepared, packs, project

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def model_of(family: str, lora: bool) -> tuple[Any, Any]:
    """The trained model and the causal LM inside it."""
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(LlamaConfig(**SIZES)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**SIZES))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    if not lora:
        return base, base
    adapted: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted, adapted.get_base_model()


MODELS = [(family, lora) for family in ("llama", "qwen2") for lora in (True, False)]
TEXTS = torch.randint(50, (5, 16), generator=torch.Generator().manual_seed(1))
"""Whole texts: 6 shared tokens, then prompts of 5, then completions of 5; texts 0, 1 and 2 have one prompt."""
TEXTS[:, :6] = TEXTS[0, :6]
TEXTS[1:3, :11] = TEXTS[0, :11]


def tree_blocks(keep_prefix: KeyValues | None = None) -> list[Block]:
    prefix = Block(token_ids=TEXTS[:1, :6], positions=torch.arange(6)[None])
    first = AttendsTo(source=0 if keep_prefix is None else keep_prefix)
    prompts = Block(token_ids=TEXTS[[0, 3, 4], 6:11], positions=torch.arange(6, 11)[None].expand(3, -1), reads=(first,))
    # Texts 0 and 1 share a packed row; each sees its own half of it.
    half = torch.ones(5, 5, dtype=torch.bool).tril()
    packed = torch.block_diag(half, half).bool()
    tail = torch.block_diag(half, torch.eye(5)).bool()
    second = AttendsTo(source=1 if keep_prefix is None else 0, rows=torch.tensor([0, 0, 1, 2]))
    completions = Block(
        token_ids=torch.stack(
            [
                torch.cat([TEXTS[0, 11:], TEXTS[1, 11:]]),
                *(torch.cat([TEXTS[n, 11:], torch.zeros(5, dtype=torch.long)]) for n in (2, 3, 4)),
            ]
        ),
        positions=torch.arange(11, 16).repeat(2)[None].expand(4, -1),
        own_mask=torch.stack([packed, tail, tail, tail]),
        reads=(first, second),
    )
    return [prompts, completions] if keep_prefix is not None else [prefix, prompts, completions]


def tree_hidden(decoder: BlockDecoder) -> torch.Tensor:
    """Hidden states of the ten last positions of every text, put together from the blocks."""
    (_, prompts, rest), _ = decoder(tree_blocks())
    completions = torch.stack([rest[0, :5], rest[0, 5:], rest[1, :5], rest[2, :5], rest[3, :5]])
    return torch.cat([prompts[[0, 0, 0, 1, 2]], completions], dim=1)


def plain_hidden(causal_lm: Any) -> torch.Tensor:
    hidden: torch.Tensor = causal_lm.get_decoder()(input_ids=TEXTS, use_cache=False).last_hidden_state
    return hidden[:, 6:]


@pytest.mark.parametrize(("family", "lora"), MODELS)
def test_a_tree_has_the_hidden_states_of_whole_texts(family: str, lora: bool) -> None:
    _, causal_lm = model_of(family, lora)
    with torch.no_grad():
        found, expected = tree_hidden(BlockDecoder(causal_lm)), plain_hidden(causal_lm)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("family", "lora"), MODELS)
def test_a_tree_has_the_gradient_of_whole_texts(family: str, lora: bool, recompute: bool) -> None:
    model, causal_lm = model_of(family, lora)
    weight = torch.randn(5, 10, 24, generator=torch.Generator().manual_seed(2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = []
    for hidden in (tree_hidden(BlockDecoder(causal_lm, recompute)), plain_hidden(causal_lm)):
        model.zero_grad()
        (hidden * weight).sum().backward()
        grads.append([None if parameter.grad is None else parameter.grad.clone() for parameter in trained])
    assert sum(grad is not None for grad in grads[0]) > 20
    for found, expected in zip(*grads, strict=True):
        if expected is None:
            assert found is None
            continue
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_an_earlier_pass_kept_is_read_like_a_block_of_the_same_pass() -> None:
    _, causal_lm = model_of("llama", lora=True)
    decoder = BlockDecoder(causal_lm)
    with torch.no_grad():
        whole, _ = decoder(tree_blocks())
        _, (prefix,) = decoder(tree_blocks()[:1], keep=[0])
        later, _ = decoder(tree_blocks(prefix))
    assert prefix.num_tokens == 6
    for found, expected in zip(later, whole[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("four_axes", [False, True])
def test_a_cache_is_extended_as_hugging_face_extends_it(four_axes: bool) -> None:
    _, causal_lm = model_of("qwen2", lora=True)
    decoder, caches = BlockDecoder(causal_lm), [DynamicCache(), DynamicCache()]
    lengths = torch.tensor([9, 7, 9, 8, 9])
    with torch.no_grad():
        for start, stop in ((0, 9), (9, 10), (10, 12)):
            columns = torch.arange(stop)
            mask = (columns[None] < lengths[:, None]) | (columns[None] >= 9)
            positions = torch.arange(start, stop)[None].expand(5, -1)
            given = mask
            if four_axes:
                seen = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)
                given = (mask[:, None] & seen)[:, None]
                given = given | torch.eye(stop, dtype=torch.bool)[start:stop]
            found = decoder.extend(TEXTS[:, start:stop], caches[0], given, positions)
            expected = causal_lm.get_decoder()(
                input_ids=TEXTS[:, start:stop],
                past_key_values=caches[1],
                attention_mask=given,
                position_ids=positions,
                use_cache=True,
            ).last_hidden_state
            real = mask[:, start:]
            torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 12


def test_an_adapter_that_is_switched_off_has_no_say() -> None:
    model, causal_lm = model_of("llama", lora=True)
    with torch.no_grad():
        adapted = tree_hidden(BlockDecoder(causal_lm))
        with model.disable_adapter():
            found, expected = tree_hidden(BlockDecoder(causal_lm)), plain_hidden(causal_lm)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, found, atol=1e-3)


def test_models_that_it_does_not_compute_are_left_to_hugging_face() -> None:
    _, causal_lm = model_of("llama", lora=False)
    assert BlockDecoder.supports(causal_lm, torch.float32)
    assert not BlockDecoder.supports(causal_lm, torch.bfloat16), "weights of another type than is computed with"
    causal_lm.config.hidden_act = "gelu"
    assert not BlockDecoder.supports(causal_lm, torch.float32)
    causal_lm.config.hidden_act, causal_lm.config.model_type = "silu", "mamba"
    assert not BlockDecoder.supports(causal_lm, torch.float32)


@pytest.mark.parametrize(("family", "lora"), MODELS)
@torch.no_grad()
def test_a_frozen_decoder_computes_the_same_and_keeps_its_adapter(family: str, lora: bool) -> None:
    trained, causal_lm = model_of(family, lora)
    decoder = BlockDecoder(causal_lm)
    frozen, before = decoder.frozen(), tree_hidden(decoder)
    assert torch.equal(tree_hidden(frozen), before)
    if lora:
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
        assert torch.equal(tree_hidden(frozen), before)
        assert not torch.equal(tree_hidden(decoder), before)


@torch.no_grad()
def test_packed_projections_are_the_plain_ones() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 4

    linears = [
        Linear(normal(width, 24).bfloat16(), normal(width).bfloat16(), normal(4, 24), normal(width, 4), 2.0)
        for width in (16, 8, 40)
    ]
    assert all(packs(linear.weight) for linear in linears)
    prepared = Prepared.of(linears, torch.bfloat16)
    packed = Packed.of(prepared, None)
    for tokens in (1, 5, 70):
        x = normal(tokens, 24).bfloat16()
        for found, expected in zip(project(x, packed), project(x, prepared), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    again = Packed.of(
        Prepared.of([one._replace(lora_b=one.lora_b * 3) for one in linears], torch.bfloat16), packed.weight
    )
    assert again.weight is packed.weight
    assert not torch.equal(project(x, again)[0], project(x, packed)[0])


@pytest.mark.parametrize("weight", [torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)])
def test_only_frozen_bfloat16_weights_are_packed(weight: torch.Tensor) -> None:
    assert not packs(weight)
