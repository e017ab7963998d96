"""The hot operations of a decoder, each as one autograd node that keeps little and copies little.

Composed from torch's own operations, so they run on any device. What they save over the modules of a model library is
the passes over memory in between: on a CPU these cost more than the matrix products of a small model.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

SCORES = 1_500_000
"""Attention scores that are held at a time on a CPU: about a megabyte or two, what a core's own cache holds."""


def rms_norm(x: Float[Tensor, "T H"], weight: Float[Tensor, " H"], eps: float) -> Float[Tensor, "T H"]:
    """x / sqrt(mean x² + eps) · weight, normalised in float32."""
    if weight.requires_grad:
        wide = x.to(_wide(x.dtype))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    """`rms_norm` for a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x.dtype))
        scale = norm.square_().div_(size).add_(eps).rsqrt_()
        normed = (x * scale if x.dtype == scale.dtype else x.float().mul_(scale)).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        g = grad * weight
        along = (g * normed).sum(-1, keepdim=True, dtype=scale.dtype).div_(normed.shape[-1])
        return g.addcmul_(normed, along.to(g.dtype), value=-1.0).mul_(scale.to(g.dtype)), None, None


def rotate(
    x: Float[Tensor, "T N D"], cos: Float[Tensor, "T 1 D/2"], sin: Float[Tensor, "T 1 D/2"]
) -> Float[Tensor, "T N D"]:
    """Rotary position embedding over the two halves of the last axis. Source: arXiv 2104.09864."""
    out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """A rotation, whose gradient is the rotation back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out


def attend(
    query: Float[Tensor, "R N W D"],
    key: Float[Tensor, "R G M D"],
    value: Float[Tensor, "R G M D"],
    bias: Float[Tensor, "R|1 W M"],
    scale: float,
) -> Float[Tensor, "R N W D"]:
    """softmax(scale · q kᵀ + bias) v with N/G query heads a key head; no copy of keys for each query head.

    Probabilities are computed again in the backward pass, so memory grows with W + M and not with W · M.
    """
    out: Tensor = _Attend.apply(query, key, value, bias, scale)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        rows, heads, width, size = query.shape
        groups = key.shape[1]
        ctx.axes = (rows, groups, heads // groups, width)
        q = query.reshape(rows * groups, -1, size)
        k, v = (part.reshape(rows * groups, -1, size) for part in (key, value))
        out = torch.empty_like(q)
        for part in _parts(ctx.axes, k):
            torch.bmm(_probabilities(q[part], k[part], bias, scale, ctx.axes, part), v[part], out=out[part])
        ctx.save_for_backward(q, k, v, bias)
        ctx.scale = scale
        return out.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        rows, groups, _, _ = ctx.axes
        g = grad.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(ctx.axes, k):
            probs = _probabilities(q[part], k[part], bias, ctx.scale, ctx.axes, part)
            torch.bmm(probs.transpose(1, 2), g[part], out=dv[part])
            dprobs = torch.bmm(g[part], v[part].transpose(1, 2))
            dscores = torch.ops.aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            torch.baddbmm(dq[part], dscores, k[part], beta=0, alpha=ctx.scale, out=dq[part])
            torch.baddbmm(dk[part], dscores.transpose(1, 2), q[part], beta=0, alpha=ctx.scale, out=dk[part])
        shape = (rows, groups, -1, q.shape[-1])
        return dq.view(grad.shape), dk.view(shape), dv.view(shape), None, None


def _parts(axes: tuple[int, int, int, int], k: Tensor) -> list[slice]:
    """Which of the R·G products are done at a time: whole rows, or one by one where a row alone is large.

    On a CPU the scores of a part stay in its cache; elsewhere fewer calls count more.
    """
    rows, groups, repeats, width = axes
    if k.device.type != "cpu":
        return [slice(0, rows * groups)]
    each = repeats * width * k.shape[1]
    step = 1 if each * groups > SCORES else SCORES // (each * groups) * groups
    return [slice(start, start + step) for start in range(0, rows * groups, step)]


def _probabilities(
    q: Tensor, k: Tensor, bias: Tensor, scale: float, axes: tuple[int, int, int, int], part: slice
) -> Tensor:
    """Of the products `part`, [·, (N/G)·W, M]. A bias that all of them share is added by the product itself."""
    _, groups, repeats, width = axes
    first, last = (0, 1) if len(bias) == 1 else (part.start // groups, -(-part.stop // groups))
    own = bias[first:last]
    if len(own) == 1:
        scores = torch.baddbmm(own.repeat(1, repeats, 1), q, k.transpose(1, 2), alpha=scale)
    else:
        scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
        scores.view(-1, groups * repeats, width, scores.shape[-1]).add_(own[:, None])
    return torch.softmax(scores, dim=-1)
