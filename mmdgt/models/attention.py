"""The attention layers of DGT: Dynamic Group Attention and global attention."""

import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import assign_and_sum, assign_queries, group_attention, select_keys
from ..ops.backend import serves_few
from ..ops.functional import choose_and_attend

MAX_LOGIT_SCALE = 100.0  # of Swin Transformer V2, which starts at 10
# An optimizer step changes a weight in place once or twice. So many changes without
# a move of the centroids are no initialisation and no loading of weights any more.
UNMOVED_CHANGES = 20


class Attention(nn.Module):
    """What attention layers share: the projections, and cosine scores or not.

    Args:
        dims (int): Channels C, divisible by the heads.
        num_heads (int): Heads H.
        cosine (bool): Whether scores are cosines times a learned factor per head,
            at most 100 (Swin Transformer V2), instead of dot products times
            ``D ** -0.5``.
    """

    def __init__(self, dims: int, num_heads: int, cosine: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dims, 3 * dims)
        self.proj = nn.Linear(dims, dims)
        self.logit_scale: nn.Parameter | None = None
        if cosine:
            start = torch.full((num_heads, 1, 1), math.log(10.0))
            self.logit_scale = nn.Parameter(start)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """(B, ..., C) -> query, key, value, (B, H, L, D) each, and the scale."""
        return self.split(*self.qkv(x.flatten(1, -2)).chunk(3, dim=-1))

    def split(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """(B, L, C) each -> (B, H, L, D) each, and the scale of the scores."""
        # Views of one projection; the operators read them where they are. Of all ways
        # to take them, this one makes a single copy of their gradients.
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (query, key, value)
        )
        if self.logit_scale is None:
            return query, key, value, None
        factor = self.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()
        query = (F.normalize(query, dim=-1) * factor).to(value.dtype)
        key = F.normalize(key, dim=-1).to(value.dtype)
        return query, key, value, 1.0

    def join(self, out: Tensor, shape: torch.Size) -> Tensor:
        """(B, H, L, D) -> (B, ..., C), the shape, through the last projection."""
        return self.proj(out.transpose(1, 2).flatten(2)).view(shape)


class GlobalAttention(Attention):
    """Multi-head self-attention over all tokens; arguments as :class:`Attention`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) -> (B, ..., C), the tokens in one dimension or two."""
        query, key, value, scale = self.project(x)
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
        return self.join(out, x.shape)


class DynamicGroupAttention(Attention):
    """Dynamic Group Attention (DG-Attention), section 3.1 of the paper.

    Two steps: :meth:`choose` assigns the queries to groups and selects every group's
    keys, :meth:`attend` is softmax attention within the groups. A subclass with
    another rule of choice overrides the first (docs/attention.md).

    The centroids are a buffer, (H, G, D) unit vectors in float32. A training
    forward pass leaves the terms of eq. 3 in ``group_sums`` and ``group_counts``,
    :func:`mmdgt.update_centroids` applies eq. 4 once the iteration is over. So every
    pass of an iteration, a recomputation under activation checkpointing too, sees
    the same centroids, and nothing is counted twice.

    Args:
        dims, num_heads (int): As in :class:`Attention`.
        num_groups (int): Groups G.
        num_keys (int): Keys K that every group attends to, clamped to the tokens.
        cosine (bool): As in :class:`Attention`. The key is normalised before it is
            scored by the centroids.

    Warns:
        UserWarning: Once, if the layer is trained and its centroids never move.
    """

    centroids: Tensor
    group_sums: Tensor
    group_counts: Tensor

    def __init__(
        self,
        dims: int,
        num_heads: int,
        num_groups: int = 48,
        num_keys: int = 98,
        cosine: bool = False,
    ) -> None:
        super().__init__(dims, num_heads, cosine)
        self.num_keys = num_keys
        shape = (num_heads, num_groups, dims // num_heads)
        self.register_buffer('centroids', F.normalize(torch.randn(shape), dim=-1))
        sums, counts = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int32)
        self.register_buffer('group_sums', sums, persistent=False)
        self.register_buffer('group_counts', counts, persistent=False)
        self.moved = False  # whether update_centroids has ever seen this layer
        self._first_changes: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) -> (B, ..., C), the tokens in one dimension or two."""
        query, key, value, scale = self.project(x)
        if self._one_kernel_serves(query):
            out, *terms = choose_and_attend(
                *(query, key, value, self.centroids, self.num_keys, scale),
                with_sums=self.training,
            )
            if self.training:
                self._keep_terms(*terms)
        else:
            group, index = self.choose(query, key)
            out = self.attend(query, key, value, group, index, scale)
        return self.join(out, x.shape)

    def _one_kernel_serves(self, query: Tensor) -> bool:
        # For both steps, so neither may be another one.
        ours, own = DynamicGroupAttention, type(self)
        return (
            own.choose is ours.choose
            and own.attend is ours.attend
            and serves_few(query, self.centroids.shape[1])
        )

    def choose(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Assign every query to a group and select every group's keys, eq. 1.

        Args:
            query, key (Tensor): (B, H, L, D), as they are scored.

        Returns:
            tuple: ``group`` (B, H, L), integer, in [0, G); ``index`` (B, H, G, K),
            integer, in [0, L), no token twice in a row.
        """
        if self.training:
            group, sums, counts = assign_and_sum(query, self.centroids)
            self._keep_terms(sums, counts)
        else:
            group = assign_queries(query, self.centroids)
        return group, select_keys(key, self.centroids, self.num_keys, sorted=False)

    def _keep_terms(self, sums: Tensor, counts: Tensor) -> None:
        self.group_sums.copy_(sums)
        self.group_counts.copy_(counts)
        if not torch.compiler.is_compiling():
            self._warn_if_unmoved()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        group: Tensor,
        index: Tensor,
        scale: float | None,
    ) -> Tensor:
        """Attend every query to the keys of its group, eq. 2.

        Args:
            query, key, value (Tensor): (B, H, L, D).
            group, index (Tensor): What :meth:`choose` returned.
            scale (float, optional): Of the scores, ``D ** -0.5`` by default.

        Returns:
            Tensor: (B, H, L, D).
        """
        # Our own choice needs no look, for which a GPU had to be waited for.
        own = type(self).choose is DynamicGroupAttention.choose
        return group_attention(
            query, key, value, group, index, scale, check_range=not own
        )

    def train(self, mode: bool = True) -> 'DynamicGroupAttention':
        """Switch the mode; before an evaluation, see whether the centroids moved."""
        if self.training and not mode:
            # The only place to look where the forward pass is compiled.
            self._warn_if_unmoved()
        elif mode and self._first_changes is None:
            self._first_changes = self._changes()
        return super().train(mode)

    def _changes(self) -> int:
        """How often the weights changed in place; of inference nothing counts it."""
        weight = self.qkv.weight
        return 0 if weight.is_inference() else weight._version

    def _warn_if_unmoved(self) -> None:
        changes = self._changes()
        if self._first_changes is None:
            self._first_changes = changes
        changed = changes - self._first_changes >= UNMOVED_CHANGES
        if changed and not self.moved and self.group_counts.any():
            _warn_unmoved()

    def init_non_persistent_buffers(self) -> None:
        """Zero what no checkpoint holds; timm calls this after the meta device."""
        self.group_sums.zero_()
        self.group_counts.zero_()

    def extra_repr(self) -> str:
        """Name the groups and keys when printed."""
        return f'num_groups={self.centroids.shape[1]}, num_keys={self.num_keys}'


@functools.cache
def _warn_unmoved() -> None:
    warnings.warn(
        'DG-Attention is being trained, but its centroids never move. Call'
        ' mmdgt.update_centroids(model, keep=0.1 * lr) after every optimizer step; in'
        " OpenMMLab, put dict(type='CentroidHook') into custom_hooks",
        stacklevel=2,
    )
