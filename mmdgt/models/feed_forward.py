"""The feed-forward network of a DGT block."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.gelu_norm import ops
from .convolutions import PointwiseConv, convolution_backward, depthwise, pointwise
from .deploy import Affine, fold_norms
from .gelu_norm import (
    Norm,
    evaluate,
    evaluates_fused,
    gelu_norm_backward,
    record,
    trains_fused,
    wide,
)
from .layout import rows, shaped


class _Mix(torch.autograd.Function):
    """Everything in the IRFFN between its expansion and its last norm.

    Autograd would keep six maps of the expanded channels: before and after each GELU
    and each norm. This keeps the first and computes the others again, as cheap as they
    are. The second norm is never applied to a map: scale and shift go into the 1x1
    convolution behind it.
    """

    @staticmethod
    def forward(ctx, x, weight1, bias1, eps1, *others):
        mixer, mixer_bias, weight2, bias2, eps2, reducer, reducer_bias = others
        norm1 = Norm.of(rows(x), None, weight1, bias1, eps1)
        y = ops.gelu_norm(rows(x), None, norm1.scale, norm1.shift)
        z = depthwise(shaped(y, x), mixer, mixer_bias)
        norm2 = Norm.of(rows(z), y, weight2, bias2, eps2)  # y is s now
        bias = _bias_behind(norm2, reducer, reducer_bias)
        out = pointwise(shaped(y, x), _behind(norm2, reducer), bias)
        ctx.save_for_backward(x, mixer, mixer_bias, reducer, *norm1, *norm2)
        statistics = (norm1.mean, norm1.var, norm2.mean, norm2.var)
        ctx.mark_non_differentiable(*statistics)
        return out, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, mixer, mixer_bias, reducer, *numbers = ctx.saved_tensors
        half = len(numbers) // 2
        norm1, norm2 = Norm(*numbers[:half]), Norm(*numbers[half:])
        one, zero = torch.ones_like(norm2.scale), torch.zeros_like(norm2.shift)
        y = ops.gelu_norm(rows(x), None, norm1.scale, norm1.shift)
        z = depthwise(shaped(y, x), mixer, mixer_bias)
        s = ops.gelu_norm(rows(z), y, one, zero)

        folded = _behind(norm2, reducer)
        grad_z, *grads = convolution_backward(grad, shaped(s, x), folded)
        grads_reducer, sums = _before(norm2, reducer, *grads)
        grads2, (slope, shift) = norm2.backward(*sums, s.shape[0])
        ops.gelu_norm_backward_(rows(grad_z), rows(z), s, one, slope, shift)
        del z

        # s is now its own gradient, a part of y's.
        more, *grads_mixer = convolution_backward(grad_z, shaped(y, x), mixer)
        del grad_z, y
        grads1 = gelu_norm_backward(s, rows(more), rows(x), norm1)
        grad_x = shaped(s, x)
        return grad_x, *grads1, None, *grads_mixer, *grads2, None, *grads_reducer


def _behind(norm: Norm, weight: Tensor) -> Tensor:
    """Weight (out, C, 1, 1) of a convolution of s that is one of the norm."""
    (matrix,) = wide(weight, weight.flatten(1))
    return (matrix * norm.scale).to(weight.dtype).view_as(weight)


def _bias_behind(norm: Norm, weight: Tensor, bias: Tensor) -> Tensor:
    """The bias of that convolution."""
    matrix, summand = wide(weight, weight.flatten(1), bias)
    return (summand + matrix @ norm.shift).to(bias.dtype)


def _before(
    norm: Norm, weight: Tensor, grad_folded: Tensor, grad_bias: Tensor
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """From the gradients of a folded convolution those of the one behind the norm.

    And the sums for :meth:`Norm.backward`, without a look at the maps: with g the
    convolution's gradient, ``dy = g @ weight`` and ``grad_folded = g.T @ s``.
    """
    matrix, grad_matrix, summed = wide(
        weight, weight.flatten(1), grad_folded.flatten(1), grad_bias
    )
    grad_weight = grad_matrix * norm.scale + summed.outer(norm.shift)
    total = summed @ matrix
    product = (matrix * grad_matrix).sum(0) - norm.mean * total
    grads = [grad_weight.to(weight.dtype).view_as(weight), grad_bias]
    return grads, (total, product)


class IRFFN(nn.Module):
    """Inverted residual feed-forward network of CMT (Guo et al., 2021).

    Args:
        dims (int): Channels in and out.
        ratio (int): Hidden channels over ``dims``.
        norm_layer (Callable): Makes the norms of their channels.
    """

    def __init__(
        self, dims: int, ratio: int, norm_layer: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        hidden = dims * ratio
        self.expand = PointwiseConv(dims, hidden)
        self.norm1 = norm_layer(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm2 = norm_layer(hidden)
        self.reduce = PointwiseConv(hidden, dims)
        self.norm3 = norm_layer(dims)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.expand(x)
        if trains_fused(x, self.norm1, self.norm2):
            return self.norm3(self._mix(x))
        if evaluates_fused(x, self.norm1, self.norm2):
            x = evaluate(self.norm1, x)
            x = evaluate(self.norm2, self.depthwise(x), residual=x)
        else:
            x = self.norm1(self.act(x))
            # In place: new memory for a large map costs more than the arithmetic.
            x = self.norm2(self.act(self.depthwise(x)).add_(x))
        return self.norm3(self.reduce(x))

    def _mix(self, x: Tensor) -> Tensor:
        weights = (
            self.depthwise.weight,
            self.depthwise.bias,
            self.reduce.weight,
            self.reduce.bias,
        )
        # As autocast would: the products in x's data type, the norms in float32.
        mixer, mixer_bias, reducer, reducer_bias = (w.to(x.dtype) for w in weights)
        norm1, norm2 = self.norm1, self.norm2
        out, mean1, var1, mean2, var2 = _Mix.apply(
            x,
            norm1.weight,
            norm1.bias,
            norm1.eps,
            mixer,
            mixer_bias,
            norm2.weight,
            norm2.bias,
            norm2.eps,
            reducer,
            reducer_bias,
        )
        count = x.numel() // x.shape[1]
        record(norm1, mean1, var1, count)
        record(norm2, mean2, var2, count)
        return out

    def switch_to_deploy(self) -> None:
        """Fold the batch norms."""
        self.reduce = fold_norms(self.norm2, self.reduce, self.norm3)
        self.norm1 = Affine(self.norm1)  # before a zero-padded convolution
        self.norm2 = self.norm3 = nn.Identity()
