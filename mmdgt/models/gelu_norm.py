"""Batch norm of GELU as one operator, where its kernels serve."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.gelu_norm import ops, serves
from .deploy import Affine, factor_and_shift
from .layout import rows, shaped


def _is_batch_norm(norm: nn.Module) -> bool:
    """Whether a norm is torch's own batch norm with all that it may have."""
    stock = nn.modules.batchnorm._BatchNorm.forward
    return type(norm).forward is stock and norm.affine and norm.track_running_stats


def trains_fused(x: Tensor, *norms: nn.Module) -> bool:
    """Whether the kernels serve a training pass; one pixel has no variance."""
    several = x.numel() > x.shape[1]
    batch_norms = all(_is_batch_norm(norm) and norm.training for norm in norms)
    return batch_norms and several and serves(x)


def evaluates_fused(x: Tensor, *norms: nn.Module) -> bool:
    """Whether the kernels serve an evaluation, in which maps may be overwritten."""
    fixed = all(
        isinstance(norm, Affine | nn.Identity)
        or (_is_batch_norm(norm) and not norm.training)
        for norm in norms
    )
    return fixed and not torch.is_grad_enabled() and serves(x)


def _affine(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The factor and the shift per channel that a norm is in evaluation mode."""
    if isinstance(norm, nn.Identity):
        return x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
    if isinstance(norm, Affine):
        return norm.scale, norm.shift
    return factor_and_shift(norm)


def wide(x: Tensor, *numbers: Tensor) -> list[Tensor]:
    """Numbers by channel as the operators take them beside x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [number.to(dtype) for number in numbers]


def evaluate(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``norm(GELU(x) + residual)`` in x's place."""
    residual = None if residual is None else rows(residual)
    x = x.contiguous(memory_format=torch.channels_last)
    ops.gelu_norm_(rows(x), residual, *wide(x, *_affine(norm, x)))
    return x


class Norm(NamedTuple):
    """A batch norm of rows in training, ``scale * s + shift``, (C,) each."""

    weight: Tensor
    mean: Tensor
    var: Tensor
    inverse_std: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, x, residual, weight, bias, eps) -> 'Norm':
        """That of ``s = GELU(x) + residual``, (N, C); the residual becomes s."""
        weight, bias = wide(x, weight, bias)
        mean, var = ops.gelu_statistics(x, residual)
        inverse_std = (var + eps).rsqrt()
        scale = weight * inverse_std
        return cls(weight, mean, var, inverse_std, scale, bias - mean * scale)

    def backward(self, total, product, count) -> tuple[list[Tensor], list[Tensor]]:
        """From the sums over the rows of dy, y's gradient, and of ``dy * (s - mean)``.

        Returns the gradients of weight and bias, and the slope and the shift of
        ``ds = scale * dy + slope * s + shift``: ``n = (s - mean) * inverse_std`` has,
        but for eps, the mean 0 and the mean square 1 whatever s, so
        ``ds = scale * (dy - mean(dy) - n * mean(dy * n))``.
        """
        grad_weight = product * self.inverse_std
        slope = self.scale * self.inverse_std * grad_weight / -count
        shift = self.scale * total / -count - slope * self.mean
        return [grad_weight, total], [slope, shift]


def record(norm: nn.Module, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics, as a batch norm does in training."""
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # the mean of all batches
        momentum = 1.0 / float(norm.num_batches_tracked)
    for running, now in (
        (norm.running_mean, mean),
        (norm.running_var, var * (count / (count - 1))),
    ):
        running.lerp_(now.to(running.dtype), momentum)


class _GeluNorm(torch.autograd.Function):
    """Batch norm of GELU, which keeps x alone for its gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        norm = Norm.of(rows(x), None, weight, bias, eps)
        ctx.save_for_backward(x, *norm)
        ctx.mark_non_differentiable(norm.mean, norm.var)
        out = ops.gelu_norm(rows(x), None, norm.scale, norm.shift)
        return shaped(out, x), norm.mean, norm.var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, *numbers = ctx.saved_tensors
        grad_x = grad.clone(memory_format=torch.channels_last)
        grads = gelu_norm_backward(rows(grad_x), None, rows(x), Norm(*numbers))
        return grad_x, *grads, None


def gelu_norm_backward(
    grad: Tensor, more: Tensor | None, x: Tensor, norm: Norm
) -> list[Tensor]:
    """Put the gradient of x into grad, or grad + more; those of weight and bias."""
    sums = ops.gelu_norm_sums(grad, more, x, norm.mean)
    grads, (slope, shift) = norm.backward(*sums, x.shape[0])
    ops.gelu_norm_backward_(grad, x, None, norm.scale, slope, shift)
    return grads


def norm_of_gelu(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(GELU(x))``, (B, C, H, W) -> (B, C, H, W), fused where kernels serve.

    Without gradients x may be overwritten.
    """
    if evaluates_fused(x, norm):
        return evaluate(norm, x)
    if trains_fused(x, norm):
        out, mean, var = _GeluNorm.apply(x, norm.weight, norm.bias, norm.eps)
        record(norm, mean, var, x.numel() // x.shape[1])
        return out
    return norm(F.gelu(x))
