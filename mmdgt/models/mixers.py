"""What mixes the tokens: DG-Attention, or that of Swin, CSWin or CMT in its place.

For the paper's table 4(c). The projections, the scale of the scores and everything
around the attention stay those of DGT; an image may have any size.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, DynamicGroupAttention, GlobalAttention
from .layout import feature_map

TOKEN_MIXERS = ('group', 'shifted_window', 'cross_window', 'reduction')


class Windows(NamedTuple):
    """The cutting of a map of tokens into windows of one size.

    Rows and columns that no window would hold whole are filled up with zeros.

    Attributes:
        size: Height and width of the map.
        window: Height and width of the windows, at most those of the map.
        shift: How many rows and columns the windows are moved down and right. What
            they leave uncovered joins, cyclically, the windows at the other end.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns of zeros."""
        (H, W), (h, w) = self.size, self.window
        return -H % h, -W % w

    def cut(self, x: Tensor) -> Tensor:
        """(B, heads, H * W, D) -> (B * windows, heads, h * w, D)."""
        (h, w), (rows, columns) = self.window, self.padding
        x = F.pad(x.unflatten(2, self.size), (0, 0, 0, columns, 0, rows))
        if any(self.shift):
            x = x.roll([-step for step in self.shift], (2, 3))
        x = x.unflatten(3, (-1, w)).unflatten(2, (-1, h))  # B, heads, n, h, m, w, D
        return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)

    def join(self, x: Tensor) -> Tensor:
        """(B * windows, heads, h * w, D) -> (B, heads, H * W, D)."""
        (H, W), (h, w), (rows, columns) = self.size, self.window, self.padding
        grid = (H + rows) // h, (W + columns) // w
        x = x.unflatten(2, self.window).unflatten(0, (-1, *grid))
        x = x.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
        if any(self.shift):
            x = x.roll(self.shift, (2, 3))
        return x[:, :, :H, :W].flatten(2, 3)

    def allowed(self, device: torch.device) -> Tensor | None:
        """Who attends to whom: (windows, 1, h * w, h * w) bool, None for everyone.

        Nobody to the zeros, and no token to one that was far away before the shift.
        """
        if not any(self.padding) and not any(self.shift):
            return None
        # Row and column of the tokens, counted from 1: what is 0 has been filled up.
        sides = (torch.arange(1, side + 1, device=device) for side in self.size)
        place = torch.cartesian_prod(*sides).T[None, :, :, None]  # (1, 2, H * W, 1)
        place = self.cut(place)[..., 0]  # (windows, 2, h * w)
        distance = (place[..., :, None] - place[..., None, :]).abs()
        near = (distance < distance.new_tensor(self.window)[:, None, None]).all(1)
        real = place.all(1)[:, None, :]
        # Zeros attend to themselves, for a softmax over nothing is not a number.
        itself = torch.eye(place.shape[-1], dtype=torch.bool, device=device)
        return (near & real | itself)[:, None]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend within the windows.

        Args:
            query, key, value (Tensor): (B * windows, heads, h * w, D).
            scale (float, optional): Of the scores, ``D ** -0.5`` by default.
            bias (Tensor, optional): (heads, h * w, h * w), added to the scores.

        Returns:
            Tensor: (B * windows, heads, h * w, D).
        """
        mask = self.allowed(query.device)
        if bias is not None:
            bias = bias.to(query.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        if mask is not None and mask.ndim == 4:
            mask = mask.repeat(len(query) // len(mask), 1, 1, 1)
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


class ShiftedWindowAttention(Attention):
    """Attention of Swin Transformer (Liu et al., ICCV 2021) within square windows.

    mmpretrain's ShiftWindowMSA shifts or refuses maps that one window covers, and
    attends to padding; where neither matters this layer computes the same.

    Args:
        dims (int): Channels C, divisible by the heads.
        num_heads (int): Heads H.
        window_size (int): Height and width of the windows.
        shifted (bool): Whether the windows are moved by half of their size, in
            dimensions of the map that are larger than a window.
        cosine (bool): As in :class:`Attention`.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        window_size: int = 7,
        shifted: bool = False,
        cosine: bool = False,
    ) -> None:
        super().__init__(dims, num_heads, cosine)
        if window_size < 1:
            raise ValueError(f'window_size must be at least 1, got {window_size}')
        self.window_size = window_size
        self.shifted = shifted
        table = torch.empty(num_heads, 2 * window_size - 1, 2 * window_size - 1)
        # By the rows and columns from key to query, both plus window_size - 1.
        self.relative_position_bias = nn.Parameter(
            nn.init.trunc_normal_(table, 0, 0.02)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        H, W = x.shape[1:3]
        size = self.window_size
        window = min(H, size), min(W, size)
        step = size // 2 if self.shifted else 0
        shift = step if size < H else 0, step if size < W else 0
        windows = Windows((H, W), window, shift)
        *qkv, scale = self.project(x)
        query, key, value = map(windows.cut, qkv)
        out = windows.attend(query, key, value, scale, self._bias(*window))
        return self.join(windows.join(out), x.shape)

    def _bias(self, height: int, width: int) -> Tensor:
        """The bias in a window: (heads, height * width, height * width)."""
        table = self.relative_position_bias
        steps = torch.arange(self.window_size, device=table.device)
        rows, columns = (
            steps[:side, None] - steps[:side] + self.window_size - 1
            for side in (height, width)
        )
        bias = table[:, rows[:, None, :, None], columns[None, :, None]]
        return bias.flatten(3, 4).flatten(1, 2)


class CrossWindowAttention(Attention):
    """Attention of CSWin Transformer (Dong et al., CVPR 2022) within stripes.

    The first half of the heads attends within horizontal stripes, the other half
    within vertical ones, with locally-enhanced positional encoding (LePE): a 3x3
    depth-wise convolution of the values in a stripe is added to the result.

    Args:
        dims (int): Channels C, divisible by the heads.
        num_heads (int): Heads H, an even number.
        stripe_width (int): Rows of the horizontal stripes, columns of the others.
        cosine (bool): As in :class:`Attention`.
    """

    def __init__(
        self, dims: int, num_heads: int, stripe_width: int = 7, cosine: bool = False
    ) -> None:
        super().__init__(dims, num_heads, cosine)
        if num_heads % 2:
            raise ValueError(
                f"token_mixer 'cross_window' halves the heads, so their number must be"
                f' even in every stage but the last, got {num_heads}'
            )
        if stripe_width < 1:
            raise ValueError(f'stripe widths must be at least 1, got {stripe_width}')
        self.stripe_width = stripe_width
        half = dims // 2
        self.lepe = nn.ModuleList(
            nn.Conv2d(half, half, 3, padding=1, groups=half) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        H, W = x.shape[1:3]
        stripes = (min(self.stripe_width, H), W), (H, min(self.stripe_width, W))
        *qkv, scale = self.project(x)
        halves = zip(*(part.chunk(2, dim=1) for part in qkv), strict=True)
        out = []
        for window, lepe, half in zip(stripes, self.lepe, halves, strict=True):
            windows = Windows((H, W), window)
            query, key, value = map(windows.cut, half)
            local = value.transpose(2, 3).flatten(1, 2).unflatten(2, window)
            local = lepe(local).flatten(2).unflatten(1, value.shape[1::2]).mT
            attended = windows.attend(query, key, value, scale)
            out.append(windows.join(attended + local))
        return self.join(torch.cat(out, dim=1), x.shape)


class ReductionAttention(GlobalAttention):
    """Lightweight attention of CMT (Guo et al., CVPR 2022) to a coarser map.

    Keys and values come from the map after a depth-wise convolution and a norm. CMT
    also learns a bias for every pair of positions in images of one size; DGT's CPE
    tells positions already, as CMT's own block does, and images have any size here.

    Args:
        dims (int): Channels C, divisible by the heads.
        num_heads (int): Heads H.
        stride (int): Side of the pixels of the coarser map, and of the convolution.
        cosine (bool): As in :class:`Attention`.
        norm_layer (Callable): Makes the norm of its channels.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        stride: int,
        cosine: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__(dims, num_heads, cosine)
        if stride < 1:
            raise ValueError(f'strides must be at least 1, got {stride}')
        self.stride = stride
        self.reduce = nn.Conv2d(dims, dims, stride, stride, groups=dims)
        self.norm = norm_layer(dims)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """(B, H, W, C) -> queries (B, heads, H * W, D), fewer keys and values."""
        _, H, W, C = x.shape
        padding = (0, -W % self.stride, 0, -H % self.stride)
        coarse = self.norm(self.reduce(F.pad(feature_map(x), padding)))
        weight, bias = self.qkv.weight, self.qkv.bias
        query = F.linear(x.flatten(1, 2), weight[:C], bias[:C])
        both = F.linear(coarse.flatten(2).mT, weight[C:], bias[C:])
        return self.split(query, *both.chunk(2, dim=-1))


def build_token_mixer(
    settings: str | type | dict,
    stage: int,
    block: int,
    num_groups: int,
    num_keys: int,
    norm_layer: Callable[[int], nn.Module],
    **shape: Any,
) -> nn.Module:
    """Build what mixes the tokens of a block.

    Args:
        settings (str | type | dict): The name, or a dict with the name as ``type`` and

            - of 'group', DG-Attention, **num_groups** and **num_keys** (int) in
              place of those below;
            - of 'shifted_window', **window_size** (int), 7 as in Swin; every second
              block of a stage shifts its windows;
            - of 'cross_window', **stripe_widths** (Sequence[int]) of the stages,
              (1, 2, 7) as in CSWin;
            - of 'reduction', **strides** (Sequence[int]) of the stages, (8, 4, 2) as
              in CMT.

            The type may also be a subclass of :class:`DynamicGroupAttention`.
        stage, block (int): Place of the block, from 0.
        num_groups, num_keys (int): G and K of DG-Attention.
        norm_layer (Callable): Makes a norm over feature maps of their channels.
        shape: ``dims``, ``num_heads`` and ``cosine`` as in :class:`Attention`.

    Raises:
        ValueError: If the name is none of these, or a setting does not fit.
    """
    settings = dict(settings) if isinstance(settings, dict) else dict(type=settings)
    kind = settings.pop('type', None)
    if kind == 'group':
        kind = DynamicGroupAttention
    if isinstance(kind, type) and issubclass(kind, DynamicGroupAttention):
        return kind(
            **shape, **(dict(num_groups=num_groups, num_keys=num_keys) | settings)
        )
    if kind == 'shifted_window':
        return ShiftedWindowAttention(**shape, shifted=block % 2 == 1, **settings)
    if kind == 'cross_window':
        width = _of_stage('stripe_widths', settings, (1, 2, 7), stage)
        return CrossWindowAttention(**shape, stripe_width=width, **settings)
    if kind == 'reduction':
        stride = _of_stage('strides', settings, (8, 4, 2), stage)
        return ReductionAttention(
            **shape, stride=stride, norm_layer=norm_layer, **settings
        )
    raise ValueError(
        f'token_mixer must be one of {", ".join(map(repr, TOKEN_MIXERS))}, a subclass'
        f' of DynamicGroupAttention, or a dict with one of these as its type, got'
        f' {kind!r}'
    )


def _of_stage(name: str, settings: dict, default: Sequence[int], stage: int) -> Any:
    """Take a setting with a value for every stage but the last out of the others."""
    values = settings.pop(name, default)
    if stage >= len(values):
        raise ValueError(
            f'token_mixer needs {name} with a value for every stage but the last, got'
            f' {tuple(values)}'
        )
    return values[stage]
