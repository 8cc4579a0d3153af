"""The feed-forward network of a DGT block, and what it shares with the stem."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.gelu_norm import ops, serves
from .deploy import Affine, factor_and_shift, fold_norms


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view where x is stored channels last."""
    return x.permute(0, 2, 3, 1)


def feature_map(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C), a view where x is stored channels last."""
    return tokens(x).flatten(0, 2).contiguous()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution, (B, C, H, W) -> (B, out_channels, H, W).

    The libraries of convolutions bring its weights into an order of their own
    whenever it is called. With few pixels for the channels that is most of the work,
    which a linear layer does not have.
    """
    if not _is_linear(x, weight):
        return F.conv2d(x, weight, bias)
    return feature_map(F.linear(tokens(x), weight.flatten(1), bias))


def _is_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution had better be a linear layer."""
    return weight.shape[2:].numel() == 1 and x[:, 0].numel() <= x.shape[1]


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution by :func:`pointwise`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        return pointwise(x, self.weight, self.bias)


def _is_batch_norm(norm: nn.Module) -> bool:
    """Whether a norm is torch's own batch norm with all that it may have."""
    stock = nn.modules.batchnorm._BatchNorm.forward
    return type(norm).forward is stock and norm.affine and norm.track_running_stats


def _trains_fused(x: Tensor, *norms: nn.Module) -> bool:
    """Whether the kernels serve a training pass; one pixel has no variance."""
    several = x.numel() > x.shape[1]
    batch_norms = all(_is_batch_norm(norm) and norm.training for norm in norms)
    return batch_norms and several and serves(x)


def _evaluates_fused(x: Tensor, *norms: nn.Module) -> bool:
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


def _wide(x: Tensor, *numbers: Tensor) -> list[Tensor]:
    """Numbers by channel as the operators take them beside x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [number.to(dtype) for number in numbers]


def _evaluate(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``norm(GELU(x) + residual)`` in x's place."""
    residual = None if residual is None else _rows(residual)
    x = x.contiguous(memory_format=torch.channels_last)
    ops.gelu_norm_(_rows(x), residual, *_wide(x, *_affine(norm, x)))
    return x


class _Norm(NamedTuple):
    """A batch norm of rows in training, ``scale * s + shift``, (C,) each."""

    weight: Tensor
    mean: Tensor
    var: Tensor
    inverse_std: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, x, residual, weight, bias, eps) -> '_Norm':
        """That of ``s = GELU(x) + residual``, (N, C); the residual becomes s."""
        weight, bias = _wide(x, weight, bias)
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


def _record(norm: nn.Module, mean: Tensor, var: Tensor, count: int) -> None:
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
        rows = _rows(x)
        norm = _Norm.of(rows, None, weight, bias, eps)
        ctx.save_for_backward(x, *norm)
        ctx.mark_non_differentiable(norm.mean, norm.var)
        out = ops.gelu_norm(rows, None, norm.scale, norm.shift)
        return _shaped(out, x), norm.mean, norm.var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, *numbers = ctx.saved_tensors
        grad_x = grad.clone(memory_format=torch.channels_last)
        grads = _gelu_norm_backward(_rows(grad_x), None, _rows(x), _Norm(*numbers))
        return grad_x, *grads, None


def _gelu_norm_backward(
    grad: Tensor, more: Tensor | None, x: Tensor, norm: _Norm
) -> list[Tensor]:
    """Put the gradient of x into grad, or grad + more; those of weight and bias."""
    sums = ops.gelu_norm_sums(grad, more, x, norm.mean)
    grads, (slope, shift) = norm.backward(*sums, x.shape[0])
    ops.gelu_norm_backward_(grad, x, None, norm.scale, slope, shift)
    return grads


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """(B * H * W, C) -> (B, C, H, W) of the other's B, H and W."""
    B, _, H, W = like.shape
    return feature_map(rows.view(B, H, W, -1))


def norm_of_gelu(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(GELU(x))``, (B, C, H, W) -> (B, C, H, W), fused where kernels serve.

    Without gradients x may be overwritten.
    """
    if _evaluates_fused(x, norm):
        return _evaluate(norm, x)
    if _trains_fused(x, norm):
        out, mean, var = _GeluNorm.apply(x, norm.weight, norm.bias, norm.eps)
        _record(norm, mean, var, x.numel() // x.shape[1])
        return out
    return norm(F.gelu(x))


class _Mix(torch.autograd.Function):
    """Everything in the IRFFN between its expansion and its last norm.

    Autograd would keep six maps of the expanded channels: before and after each GELU
    and each norm. This keeps two, the inputs of the GELUs, and computes the others
    again. The second norm is never applied to a map: scale and shift go into the 1x1
    convolution behind it.
    """

    @staticmethod
    def forward(ctx, x, weight1, bias1, eps1, *others):
        mixer, mixer_bias, weight2, bias2, eps2, reducer, reducer_bias = others
        rows = _rows(x)
        norm1 = _Norm.of(rows, None, weight1, bias1, eps1)
        y = ops.gelu_norm(rows, None, norm1.scale, norm1.shift)
        z = F.conv2d(_shaped(y, x), mixer, mixer_bias, padding=1, groups=x.shape[1])
        norm2 = _Norm.of(_rows(z), y, weight2, bias2, eps2)  # y is s now
        out = pointwise(_shaped(y, x), *_behind(norm2, reducer, reducer_bias))
        ctx.save_for_backward(x, z, mixer, reducer, reducer_bias, *norm1, *norm2)
        statistics = (norm1.mean, norm1.var, norm2.mean, norm2.var)
        ctx.mark_non_differentiable(*statistics)
        return out, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, z, mixer, reducer, reducer_bias, *numbers = ctx.saved_tensors
        half = len(numbers) // 2
        norm1, norm2 = _Norm(*numbers[:half]), _Norm(*numbers[half:])
        one, zero = torch.ones_like(norm2.scale), torch.zeros_like(norm2.shift)
        y = ops.gelu_norm(_rows(x), None, norm1.scale, norm1.shift)
        s = ops.gelu_norm(_rows(z), y, one, zero)

        folded, _ = _behind(norm2, reducer, reducer_bias)
        grad_z, *grads = _convolution_backward(grad, _shaped(s, x), folded)
        grads_reducer, sums = _before(norm2, reducer, *grads)
        grads2, (slope, shift) = norm2.backward(*sums, s.shape[0])
        ops.gelu_norm_backward_(_rows(grad_z), _rows(z), s, one, slope, shift)

        # s is now its own gradient, a part of y's.
        more, *grads_mixer = _convolution_backward(grad_z, _shaped(y, x), mixer)
        del grad_z, y
        grads1 = _gelu_norm_backward(s, _rows(more), _rows(x), norm1)
        grad_x = _shaped(s, x)
        return grad_x, *grads1, None, *grads_mixer, *grads2, None, *grads_reducer


def _behind(norm: _Norm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (out, C, 1, 1) and bias of a convolution of s that is one of the norm."""
    rows, wide_bias = _wide(weight, weight.flatten(1), bias)
    folded = (rows * norm.scale).to(weight.dtype).view_as(weight)
    return folded, (wide_bias + rows @ norm.shift).to(bias.dtype)


def _before(
    norm: _Norm, weight: Tensor, grad_folded: Tensor, grad_bias: Tensor
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """From the gradients of a folded convolution those of the one behind the norm.

    And the sums for :meth:`_Norm.backward`, without a look at the maps: with g the
    convolution's gradient, ``dy = g @ weight`` and ``grad_folded = g.T @ s``.
    """
    rows, grad_rows, summed = _wide(
        weight, weight.flatten(1), grad_folded.flatten(1), grad_bias
    )
    grad_weight = grad_rows * norm.scale + summed.outer(norm.shift)
    total = summed @ rows
    product = (rows * grad_rows).sum(0) - norm.mean * total
    grads = [grad_weight.to(weight.dtype).view_as(weight), grad_bias]
    return grads, (total, product)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of a 1x1 or a depth-wise 3x3 convolution."""
    if _is_linear(x, weight):
        rows = _rows(grad)
        grad_x = _shaped(rows @ weight.flatten(1), x)
        return grad_x, (rows.mT @ _rows(x)).view_as(weight), rows.sum(0)
    groups = x.shape[1] // weight.shape[1]
    padding = [side // 2 for side in weight.shape[2:]]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        bias_sizes=[weight.shape[0]],
        stride=[1, 1],
        padding=padding,
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=groups,
        output_mask=[True, True, True],
    )
    grad_x = grad_x.contiguous(memory_format=torch.channels_last)
    return grad_x, grad_weight, grad_bias


class IRFFN(nn.Module):
    """Inverted residual feed-forward network of CMT (Guo et al., 2021).

    Args:
        dims (int): Channels in and out.
        ratio (int): Hidden channels over ``dims``.
        norm_cfg (dict): Normalisation over feature maps.
    """

    def __init__(self, dims: int, ratio: int, norm_cfg: dict) -> None:
        super().__init__()
        hidden = dims * ratio
        self.expand = PointwiseConv(dims, hidden)
        self.norm1 = build_norm_layer(norm_cfg, hidden)[1]
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm2 = build_norm_layer(norm_cfg, hidden)[1]
        self.reduce = PointwiseConv(hidden, dims)
        self.norm3 = build_norm_layer(norm_cfg, dims)[1]
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.expand(x)
        if _trains_fused(x, self.norm1, self.norm2):
            return self.norm3(self._mix(x))
        if _evaluates_fused(x, self.norm1, self.norm2):
            x = _evaluate(self.norm1, x)
            x = _evaluate(self.norm2, self.depthwise(x), residual=x)
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
        _record(norm1, mean1, var1, count)
        _record(norm2, mean2, var2, count)
        return out

    def switch_to_deploy(self) -> None:
        """Fold the batch norms."""
        self.reduce = fold_norms(self.norm2, self.reduce, self.norm3)
        self.norm1 = Affine(self.norm1)  # before a zero-padded convolution
        self.norm2 = self.norm3 = nn.Identity()
