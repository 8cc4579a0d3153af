"""The norms behind a GELU: batch norms in one function where its kernels serve."""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.gelu_batch_norm import gelu_affine_, gelu_batch_norm, recomputed, serves
from .deploy import Affine, BatchNorm, factor_and_shift, is_batch_norm


def conv_of_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``conv(norm(GELU(x)))``, where it can keeping x alone for the gradients."""
    if not _trains_fused(norm, x):
        return conv(_apply(norm, x))
    y = _train(norm, x)
    with recomputed(y):
        return conv(y)


def norm_of_gelu(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(GELU(x))``, (B, C, H, W) -> (B, C, H, W).

    Without gradients x may be overwritten.
    """
    return _train(norm, x) if _trains_fused(norm, x) else _apply(norm, x)


def _train(norm: BatchNorm, x: Tensor) -> Tensor:
    """A training pass of a batch norm, by the kernels."""
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # the mean of all batches
        momentum = 1.0 / norm.num_batches_tracked.item()
    running = norm.running_mean, norm.running_var
    return gelu_batch_norm(x, *running, norm.weight, norm.bias, momentum, norm.eps)


def _apply(norm: nn.Module, x: Tensor) -> Tensor:
    """Any other pass, by the kernels where nothing asks for gradients."""
    if not torch.is_grad_enabled() and serves(x):
        if isinstance(norm, nn.Identity):
            return gelu_affine_(x, x.new_ones(x.shape[1]), x.new_zeros(x.shape[1]))
        if isinstance(norm, Affine):
            return gelu_affine_(x, norm.scale, norm.shift)
        if not norm.training and _is_stock(norm):
            return gelu_affine_(x, *factor_and_shift(norm))
    return norm(F.gelu(x))


def _trains_fused(norm: nn.Module, x: Tensor) -> TypeGuard[BatchNorm]:
    """Whether the kernels serve a training pass; one pixel has no variance."""
    several = x.numel() > x.shape[1]
    return norm.training and _is_stock(norm) and several and serves(x)


def _is_stock(norm: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a batch norm computes as torch's own do, within one process."""
    stock = nn.modules.batchnorm._BatchNorm.forward
    return type(norm).forward is stock and is_batch_norm(norm)
