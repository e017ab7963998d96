"""The decoder's own operations against the plain formulas, with gradients by finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from msgrpo_lab.decoder.kernels import Linear, Prepared, attend, project, rms_norm, rotate, swiglu_mlp

RANDOM = torch.Generator().manual_seed(0)


def normal(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64).requires_grad_(grad)


def linear(out: int, inner: int, rank: int | None, bias: bool = False, scale: float = 2.0) -> Linear:
    factors = (None, None) if rank is None else (normal(rank, inner, grad=True), normal(out, rank, grad=True))
    return Linear(normal(out, inner), normal(out) if bias else None, *factors, scale)


def plain_projection(x: torch.Tensor, one: Linear) -> torch.Tensor:
    y = x @ one.weight.T
    if one.bias is not None:
        y = y + one.bias
    if one.lora_a is not None and one.lora_b is not None:
        y = y + one.scale * (x @ one.lora_a.T) @ one.lora_b.T
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(3,), (3, 3), (3, 2, 4), (None,), (3, None)])
def test_projections_are_the_plain_formula(ranks: tuple[int | None, ...], bias: bool) -> None:
    linears = [linear(4 + n, 5, rank, bias) for n, rank in enumerate(ranks)]
    x = normal(7, 5)
    for found, one in zip(project(x, linears), linears, strict=True):
        torch.testing.assert_close(found, plain_projection(x, one), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [(3,), (3, 2)])
def test_projections_have_the_gradient_of_finite_differences(ranks: tuple[int, ...]) -> None:
    linears = [linear(4, 5, rank) for rank in ranks]
    factors = [factor for one in linears for factor in (one.lora_a, one.lora_b)]

    def outputs(x: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = [one._replace(lora_a=a, lora_b=b) for one, a, b in zip(linears, given[0::2], given[1::2], strict=True)]
        return tuple(project(x, made))

    assert gradcheck(outputs, (normal(6, 5, grad=True), *factors))


def test_the_gradient_stops_at_an_input_that_needs_none() -> None:
    one = linear(4, 5, 3)
    (y,) = project(normal(6, 5), [one])
    y.sum().backward()
    assert one.lora_a is not None
    assert one.lora_a.grad is not None


def test_trained_weights_get_a_gradient() -> None:
    one = linear(4, 5, 3)._replace(weight=normal(4, 5, grad=True))
    (y,) = project(normal(6, 5), [one])
    y.sum().backward()
    assert one.weight.grad is not None


@pytest.mark.parametrize("trained", [False, True])
def test_rms_norm(trained: bool) -> None:
    x, weight = normal(5, 6, grad=True), normal(6, grad=trained)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, weight))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_the_mlp_is_the_plain_formula(rank: int | None, bias: bool) -> None:
    x = normal(6, 5)
    gate, up, down = linear(7, 5, rank, bias), linear(7, 5, rank, bias), linear(5, 7, rank, bias)
    opened = plain_projection(x, gate)
    expected = plain_projection(opened * torch.sigmoid(opened) * plain_projection(x, up), down)
    found = swiglu_mlp(x, [gate, up], [down])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if rank is not None:
        prepared = swiglu_mlp(x, Prepared.of([gate, up], x.dtype), Prepared.of([down], x.dtype))
        assert torch.equal(prepared, found)


def test_the_mlp_has_the_gradient_of_finite_differences() -> None:
    linears = [linear(7, 5, 2), linear(7, 5, 3), linear(5, 7, 2)]
    factors = [f.requires_grad_() for one in linears for f in (one.lora_a, one.lora_b) if f is not None]
    x = normal(6, 5).requires_grad_()

    def mlp(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        pairs = zip(factors[0::2], factors[1::2], strict=True)
        made = [one._replace(lora_a=a, lora_b=b) for one, (a, b) in zip(linears, pairs, strict=True)]
        return swiglu_mlp(x, made[:2], made[2:])

    assert gradcheck(mlp, (x, *factors))


def test_rotation_turns_pairs_by_their_angle_and_back() -> None:
    x, angle = normal(5, 3, 4, grad=True), normal(5, 1, 2)
    found = rotate(x, angle.cos(), angle.sin())
    pairs = torch.complex(x[..., :2], x[..., 2:]) * torch.exp(1j * angle)
    torch.testing.assert_close(found, torch.cat([pairs.real, pairs.imag], dim=-1), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda a: rotate(a, angle.cos(), angle.sin()), (x,))


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("biased_rows", [1, 3])
def test_attention_is_the_plain_formula(heads: tuple[int, int], biased_rows: int) -> None:
    query = normal(3, heads[0], 4, 5, grad=True)
    key, value = normal(3, heads[1], 6, 5, grad=True), normal(3, heads[1], 6, 5, grad=True)
    seen = torch.rand(biased_rows, 4, 6, generator=RANDOM) < 0.6
    seen[..., -1] = True
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    repeated = [part.repeat_interleave(heads[0] // heads[1], dim=1) for part in (key, value)]
    scores = query @ repeated[0].transpose(2, 3) * 0.3 + bias[:, None]
    expected = scores.softmax(-1) @ repeated[1]
    torch.testing.assert_close(attend(query, key, value, bias, 0.3), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda q, k, v: attend(q, k, v, bias, 0.3), (query, key, value))
