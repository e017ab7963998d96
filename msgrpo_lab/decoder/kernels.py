"""The hot operations of a decoder and its projections, each as one autograd node that keeps and copies little.

Composed from torch's own operations, so they run on any device. What they save over the modules of a model library is
the passes over memory in between: on a CPU these cost more than the matrix products of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


PACKED_ROWS = 64
"""Tokens a call that the packed layout is chosen for; others work as well."""


class Linear(NamedTuple):
    """One projection of a decoder: frozen or trained weight, and its LoRA adapter where it has one."""

    weight: Float[Tensor, "O I"]
    bias: Float[Tensor, " O"] | None
    lora_a: Float[Tensor, "r I"] | None
    lora_b: Float[Tensor, "O r"] | None
    scale: float
    """alpha / r of the adapter."""

    @property
    def adapted(self) -> bool:
        """Whether it has an adapter."""
        return self.lora_a is not None


class Prepared(NamedTuple):
    """Projections of one input, their adapters' factors in the type computed with and side by side."""

    weights: tuple[Float[Tensor, "O I"], ...]
    biases: tuple[Float[Tensor, " O"] | None, ...]
    a: Float[Tensor, "R I"]
    b: tuple[Float[Tensor, "O r"], ...]
    """Scaled."""
    ranks: tuple[int, ...]
    """r of each; they sum to R."""

    @classmethod
    def of(cls, linears: Sequence[Linear], dtype: torch.dtype) -> Prepared:
        """From projections that all have an adapter."""
        factors = [(linear.lora_a, linear.lora_b) for linear in linears]
        assert all(first is not None and second is not None for first, second in factors)
        return cls(
            weights=tuple(linear.weight for linear in linears),
            biases=tuple(linear.bias for linear in linears),
            a=torch.cat([first.to(dtype) for first, _ in factors if first is not None]),
            b=tuple(
                (second * linear.scale).to(dtype)
                for (_, second), linear in zip(factors, linears, strict=True)
                if second is not None
            ),
            ranks=tuple(len(first) for first, _ in factors if first is not None),
        )

    def apply(self, x: Float[Tensor, "T I"]) -> tuple[list[Float[Tensor, "T O"]], Float[Tensor, "T R"]]:
        """The outputs, and x Aᵀ.

        The adapters' first factors are applied to x as one product, because a product with r = 16 columns costs the
        reading of x and little else.
        """
        xa = x @ self.a.t()
        outputs = []
        parts = torch.split(xa, list(self.ranks), dim=1)
        for weight, bias, part, second in zip(self.weights, self.biases, parts, self.b, strict=True):
            y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
            outputs.append(y.addmm_(part, second.t()))
        return outputs, xa


class Packed(NamedTuple):
    """Frozen projections of one input as one matrix in oneDNN's own layout, with their adapters: for few tokens a call.

    A product with few rows costs the reading of its matrix. torch lays a bfloat16 matrix out anew at every call, which
    is several times that; here it is done once, and again for no policy version: adapters stay apart.
    """

    weight: Tensor
    """Opaque: W of all projections, stacked."""
    bias: Float[Tensor, " S"] | None
    a: Float[Tensor, "R I"]
    b: Float[Tensor, "R S"]
    """Scaled; each projection's second factor transposed, on its own rows and columns, 0 elsewhere."""
    widths: tuple[int, ...]
    """Outputs of each projection; they sum to S."""

    @classmethod
    def of(cls, prepared: Prepared, weight: Tensor | None) -> Packed:
        """From prepared projections; `weight` is what `pack` made of them before, if anything."""
        biases = [bias for bias in prepared.biases if bias is not None]
        assert len(biases) in (0, len(prepared.biases))
        return cls(
            weight=pack(prepared.weights) if weight is None else weight,
            bias=torch.cat(biases) if biases else None,
            a=prepared.a,
            b=_block_diagonal([second.t() for second in prepared.b]),
            widths=tuple(len(matrix) for matrix in prepared.weights),
        )

    def apply(self, x: Float[Tensor, "T I"]) -> list[Float[Tensor, "T O"]]:
        """The outputs, as views of one matrix."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        y.addmm_(x @ self.a.t(), self.b)
        return list(torch.split(y, list(self.widths), dim=1))


def _block_diagonal(matrices: Sequence[Float[Tensor, "r O"]]) -> Float[Tensor, "R S"]:
    made: Tensor = torch.block_diag(*matrices)  # type: ignore[no-untyped-call]
    return made


def packs(weight: Tensor) -> bool:
    """Whether products with this matrix gain from being packed: frozen bfloat16 on a CPU with oneDNN."""
    frozen = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.requires_grad
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return frozen and available


def pack(weights: Sequence[Float[Tensor, "O I"]]) -> Tensor:
    """Matrices of one input, stacked, in oneDNN's layout for few rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(torch.cat(list(weights)), PACKED_ROWS)
    return packed


def project(x: Float[Tensor, "T I"], linears: Sequence[Linear] | Prepared | Packed) -> list[Float[Tensor, "T O"]]:
    """Several projections of one input: x Wᵀ + b + scale · (x Aᵀ) Bᵀ each. Prepared ones have no gradient."""
    if isinstance(linears, Packed):
        return linears.apply(x)
    if isinstance(linears, Prepared):
        return linears.apply(x)[0]
    trained = any(linear.weight.requires_grad for linear in linears)
    if trained or not all(linear.adapted for linear in linears):
        return [_plain(x, linear) for linear in linears]
    factors = [factor for linear in linears for factor in (linear.lora_a, linear.lora_b)]
    outputs: tuple[Tensor, ...] = _LoraProjections.apply(x, tuple(linears), *factors)  # type: ignore[no-untyped-call]
    return list(outputs)


def _plain(x: Float[Tensor, "T I"], linear: Linear) -> Float[Tensor, "T O"]:
    y = torch.nn.functional.linear(x, linear.weight, linear.bias)
    if linear.lora_a is None or linear.lora_b is None:
        return y
    return y + (x @ linear.lora_a.to(x.dtype).t()) @ (linear.lora_b * linear.scale).to(x.dtype).t()


def swiglu_mlp(
    x: Float[Tensor, "T I"],
    gate_up: Sequence[Linear] | Prepared | Packed,
    down: Sequence[Linear] | Prepared | Packed,
) -> Float[Tensor, "T I"]:
    """down(silu(gate(x)) · up(x)). What lies between the projections is made again in the backward pass."""
    if not isinstance(gate_up, Prepared | Packed) and not isinstance(down, Prepared | Packed):
        linears = (*gate_up, *down)
        if not any(linear.weight.requires_grad for linear in linears) and all(linear.adapted for linear in linears):
            factors = [factor for linear in linears for factor in (linear.lora_a, linear.lora_b)]
            out: Tensor = _LoraMLP.apply(x, tuple(gate_up), tuple(down), *factors)  # type: ignore[no-untyped-call]
            return out
    gate, up = project(x, gate_up)
    return project(torch.nn.functional.silu(gate).mul(up), down)[0]


class _Saved(NamedTuple):
    """What the backward pass of some projections needs beside their input."""

    prepared: Prepared
    xa: Float[Tensor, "T R"]
    scales: tuple[float, ...]
    types: tuple[torch.dtype, ...]
    """Of the factors as parameters: first and second of each projection in turn."""

    def backward(
        self, x: Tensor, grads: Sequence[Tensor], needs_input: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of the input and of the factors."""
        _, _, a, b, ranks = self.prepared
        through = torch.cat([grad @ second for grad, second in zip(grads, b, strict=True)], dim=1)
        dx: Tensor | None = None
        if needs_input:
            dx = grads[0] @ self.prepared.weights[0]
            for grad, weight in zip(grads[1:], self.prepared.weights[1:], strict=True):
                dx.addmm_(grad, weight)
            dx.addmm_(through, a)
        da = torch.split(through.t() @ x, list(ranks))
        factors: list[Tensor] = []
        parts = torch.split(self.xa, list(ranks), dim=1)
        for index, (grad, part, scale) in enumerate(zip(grads, parts, self.scales, strict=True)):
            db = (grad.t() @ part).to(self.types[2 * index + 1]).mul_(scale)
            factors += [da[index].to(self.types[2 * index]), db]
        return dx, factors

    @classmethod
    def of(cls, prepared: Prepared, xa: Tensor, linears: Sequence[Linear]) -> _Saved:
        types = [factor.dtype for linear in linears for factor in (linear.lora_a, linear.lora_b) if factor is not None]
        return cls(prepared, xa, tuple(linear.scale for linear in linears), tuple(types))


class _LoraProjections(torch.autograd.Function):
    """`project` for frozen weights with adapters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: tuple[Linear, ...], *factors: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        prepared = Prepared.of(linears, x.dtype)
        outputs, xa = prepared.apply(x)
        ctx.save_for_backward(x)
        ctx.saved = _Saved.of(prepared, xa, linears)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx, factors = ctx.saved.backward(x, grads, ctx.needs_input_grad[0])
        return (dx, None, *factors)


class _LoraMLP(torch.autograd.Function):
    """`swiglu_mlp` for frozen weights with adapters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: tuple[Linear, ...],
        down: tuple[Linear, ...],
        *factors: Tensor,  # noqa: ARG004
    ) -> Tensor:
        first, last = Prepared.of(gate_up, x.dtype), Prepared.of(down, x.dtype)
        (gate, up), xa = first.apply(x)
        (out,), ha = last.apply(torch.nn.functional.silu(gate).mul_(up))
        ctx.save_for_backward(x, gate, up)
        ctx.saved = _Saved.of(first, xa, gate_up), _Saved.of(last, ha, down)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up = ctx.saved_tensors
        first, last = ctx.saved
        opened = torch.nn.functional.silu(gate)
        dh, of_down = last.backward(opened * up, (grad,))
        assert dh is not None
        dup = opened.mul_(dh)
        dgate = torch.ops.aten.silu_backward(dh.mul_(up), gate)
        dx, of_gate_up = first.backward(x, (dgate, dup), ctx.needs_input_grad[0])
        return (dx, None, None, *of_gate_up, *of_down)
