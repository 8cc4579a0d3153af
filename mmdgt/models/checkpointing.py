"""Activation checkpointing that leaves running statistics alone."""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpointed(
    module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """``forward(x)``, whose maps are computed again for the gradients.

    Args:
        module (nn.Module): Holds the norms that ``forward`` moves.
        forward (Callable): Tensor to tensor.
        x (Tensor): Its input.
    """
    return checkpoint(
        forward,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(module)),
    )


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep running statistics while a checkpoint is computed again.

    The first pass has moved and counted them already; a second move would make
    training with checkpoints differ from training without.
    """
    norms = [
        m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in kept:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
