"""The Dynamic Group Transformer (DGT, Liu et al., IJCAI 2022) as a backbone."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import DynamicGroupAttention, GlobalAttention
from .deploy import Affine, fold_sum
from .feed_forward import IRFFN
from .gelu_norm import norm_of_gelu
from .layout import feature_map, tokens
from .mixers import build_token_mixer
from .pretrained import strict_init

BATCH_NORM = dict(type='BN')
LINEAR_INIT = dict(type='TruncNormal', layer='Linear', std=0.02)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a feature map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return feature_map(super().forward(tokens(x)))


class Stem(nn.Sequential):
    """Three 3x3 convolutions, the first of stride 2, each with GELU and norm."""

    def __init__(self, in_channels: int, dims: int, norm_cfg: dict) -> None:
        layers: list[nn.Module] = []
        for stride in (2, 1, 1):
            layers += [
                nn.Conv2d(in_channels, dims, 3, stride=stride, padding=1),
                nn.GELU(),
                build_norm_layer(norm_cfg, dims)[1],
            ]
            in_channels = dims
        super().__init__(*layers)
        self.to(memory_format=torch.channels_last)  # as the feature maps

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, dims, ceil(H / 2), ceil(W / 2))."""
        layers = list(self)
        for conv, norm in zip(layers[::3], layers[2::3], strict=True):
            x = norm_of_gelu(norm, conv(x))
        return x


class CPE(nn.Conv2d):
    """Conditional positional encoding: a 3x3 depth-wise convolution, added, eq. 8."""

    def __init__(self, dims: int) -> None:
        super().__init__(dims, dims, 3, padding=1, groups=dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + super().forward(x)


class PatchMerging(nn.Sequential):
    """A 3x3 convolution of stride 2 and a LayerNorm."""

    def __init__(self, in_channels: int, dims: int) -> None:
        conv = nn.Conv2d(in_channels, dims, 3, stride=2, padding=1)
        super().__init__(conv, LayerNorm2d(dims))
        self.to(memory_format=torch.channels_last)  # as the feature maps


class Block(nn.Module):
    """CPE, attention and IRFFN, eqs. 8 to 10.

    Args:
        dims (int): Channels C.
        attention (nn.Module): Maps (B, H, W, C) to (B, H, W, C).
        ffn_ratio (int): Hidden channels of the IRFFN over C.
        post_norm (bool): Whether LayerNorm comes after attention and IRFFN
            (DGT-S, DGT-B) instead of before (DGT-T).
        drop_path (float): Rate of stochastic depth.
        norm_cfg (dict): Normalisation inside the IRFFN.
        with_cp (bool): Whether to trade compute for memory by checkpointing.
    """

    def __init__(
        self,
        dims: int,
        attention: nn.Module,
        ffn_ratio: int,
        post_norm: bool,
        drop_path: float,
        norm_cfg: dict,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.cpe = CPE(dims)
        self.norm1 = LayerNorm2d(dims)
        self.attention = attention
        self.norm2 = LayerNorm2d(dims)
        self.ffn = IRFFN(dims, ffn_ratio, norm_cfg)
        self.drop_path = DropPath(drop_path)
        self.post_norm = post_norm
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(
                self._forward,
                x,
                use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(self)),
            )
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = self.cpe(x)  # eq. 8
        if self.post_norm:
            x = x + self.drop_path(self.norm1(self._attend(x)))
            return x + self.drop_path(self.norm2(self.ffn(x)))
        x = x + self.drop_path(self._attend(self.norm1(x)))  # eq. 9
        return x + self.drop_path(self.ffn(self.norm2(x)))  # eq. 10

    def _attend(self, x: Tensor) -> Tensor:
        return feature_map(self.attention(tokens(x)))


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep running statistics while a checkpoint is recomputed.

    The first pass has moved them already; a second move would make training with
    checkpoints differ from training without.
    """
    norms = [
        m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class Stage(nn.Module):
    """A patch merging layer and the blocks behind it."""

    def __init__(self, in_channels: int, dims: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.merge = PatchMerging(in_channels, dims)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dims, ceil(H / 2), ceil(W / 2))."""
        return self.blocks(self.merge(x))


class DGT(BaseModule):
    """Dynamic Group Transformer.

    Section 3.3 and table 1 of "Dynamic Group Transformer: A General Vision
    Transformer Backbone with Dynamic Group Attention"
    (https://arxiv.org/abs/2203.03937). Accepts images of any height and width
    from 32 pixels up.

    Args:
        arch (str | dict): 'tiny' | 't', 'small' | 's', 'base' | 'b', or a dict of

            - **dims** (Sequence[int]): Channels of the stages.
            - **depths** (Sequence[int]): Blocks of the stages.
            - **num_heads** (Sequence[int]): Heads of the stages.
            - **stem_dims** (int): Channels of the stem.
            - **post_norm** (bool): LayerNorm after attention and IRFFN, and cosine
              attention, as in DGT-S and DGT-B. Defaults to False.

            The last stage uses global attention, the others DG-Attention.
        in_channels (int): Channels of the images.
        num_groups (int): Groups G of DG-Attention.
        num_keys (int): Keys K that every group attends to, clamped to the number
            of tokens. It shapes no parameter: the paper's 98 for 224x224 images,
            392 for dense prediction.
        out_indices (Sequence[int]): Stages whose output is returned. Stages behind
            the last of them are not built.
        out_norm (bool): Whether each output passes a LayerNorm of its own, as dense
            prediction wants and classification does not.
        frozen_stages (int): 0 freezes the stem, n the stem and the first n stages;
            -1 freezes nothing. What is frozen stays in evaluation mode, its
            centroids too.
        norm_eval (bool): Whether BatchNorm layers stay in evaluation mode.
        with_cp (bool): Whether to checkpoint the blocks, which saves memory and
            costs a second forward pass.
        norm_cfg (dict): Normalisation over feature maps, in stem and IRFFN.
        drop_path_rate (float): Stochastic depth, rising linearly to this rate at
            the last block.
        token_mixer (str | dict): What attends in every stage but the last: 'group'
            for DG-Attention; 'shifted_window' (Swin), 'cross_window' (CSWin) or
            'reduction' (CMT) to compare with. A dict with the name as ``type`` also
            has settings of :func:`mmdgt.models.mixers.build_token_mixer`.
        init_cfg (dict | list[dict], optional): Initialisation, in mmengine's terms.
            None draws linear layers from a truncated normal distribution of standard
            deviation 0.02. ``dict(type='Pretrained', checkpoint=FILE,
            prefix='backbone.')`` loads the backbone of any model, and raises where
            the weights do not fit; a checkpoint of None is as if it were not there.
    """

    arch_zoo = {
        ('t', 'tiny'): dict(
            dims=(64, 128, 256, 512),
            depths=(1, 2, 17, 2),
            num_heads=(2, 4, 8, 16),
            stem_dims=32,
        ),
        ('s', 'small'): dict(
            dims=(96, 192, 384, 768),
            depths=(1, 2, 17, 2),
            num_heads=(3, 6, 12, 24),
            stem_dims=48,
            post_norm=True,
        ),
        ('b', 'base'): dict(
            dims=(128, 256, 512, 1024),
            depths=(1, 2, 17, 2),
            num_heads=(4, 8, 16, 32),
            stem_dims=64,
            post_norm=True,
        ),
    }
    ffn_ratio = 4

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        num_groups: int = 48,
        num_keys: int = 98,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        norm_cfg: dict = BATCH_NORM,
        drop_path_rate: float = 0.0,
        token_mixer: str | dict = 'group',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(strict_init(init_cfg, default=LINEAR_INIT))
        arch = self._check_arch(arch)
        dims, depths, num_heads = arch['dims'], arch['depths'], arch['num_heads']
        post_norm = arch.get('post_norm', False)
        num_stages = len(dims)
        for name, number in (('num_groups', num_groups), ('num_keys', num_keys)):
            if number < 1:
                raise ValueError(f'{name} must be at least 1, got {number}')
        self.out_indices = sorted(out_indices)
        if not out_indices or not set(out_indices) <= set(range(num_stages)):
            raise ValueError(
                f'out_indices must name stages from 0 to {num_stages - 1}, got'
                f' {tuple(out_indices)}'
            )
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(
                f'frozen_stages must be from -1 (none) to {num_stages} (all), got'
                f' {frozen_stages}'
            )
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.deployed = False

        def attention(stage: int, block: int) -> nn.Module:
            shape = dict(dims=dims[stage], num_heads=num_heads[stage], cosine=post_norm)
            if stage == num_stages - 1:
                return GlobalAttention(**shape)
            if token_mixer in ('group', dict(type='group')):
                return DynamicGroupAttention(
                    num_groups=num_groups, num_keys=num_keys, **shape
                )
            return build_token_mixer(
                token_mixer, stage, block, norm_cfg=norm_cfg, **shape
            )

        self.stem = Stem(in_channels, arch['stem_dims'], norm_cfg)
        last = max(sum(depths) - 1, 1)
        drop_paths = (drop_path_rate * i / last for i in range(sum(depths)))
        self.stages = nn.ModuleList()
        previous = arch['stem_dims']
        for stage in range(self.out_indices[-1] + 1):
            blocks = [
                Block(
                    dims[stage],
                    attention(stage, block),
                    self.ffn_ratio,
                    post_norm,
                    next(drop_paths),
                    norm_cfg,
                    with_cp,
                )
                for block in range(depths[stage])
            ]
            self.stages.append(Stage(previous, dims[stage], blocks))
            previous = dims[stage]
        for stage in self.out_indices:
            norm = LayerNorm2d(dims[stage]) if out_norm else nn.Identity()
            self.add_module(f'norm{stage}', norm)
        self._freeze()

    @classmethod
    def _check_arch(cls, arch: str | dict) -> dict:
        if isinstance(arch, str):
            for names, settings in cls.arch_zoo.items():
                if arch.lower() in names:
                    return settings
            known = ', '.join(repr(name) for names in cls.arch_zoo for name in names)
            raise ValueError(f'arch must be one of {known} or a dict, got {arch!r}')
        required = {'dims', 'depths', 'num_heads', 'stem_dims'}
        given = set(arch)
        if not required <= given or not given <= required | {'post_norm'}:
            raise ValueError(
                f'arch must be a dict of {sorted(required)} and optionally'
                f" 'post_norm', got {sorted(given)}"
            )
        lengths = {key: len(arch[key]) for key in ('dims', 'depths', 'num_heads')}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f'arch must give one value a stage for dims, depths and num_heads, got'
                f' {lengths}'
            )
        for dims, heads in zip(arch['dims'], arch['num_heads'], strict=True):
            if dims % heads:
                raise ValueError(
                    f'dims must be divisible by num_heads in every stage, got dims'
                    f' {dims} with {heads} heads; choose dims such as {heads * 32}'
                )
        return arch

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the multi-scale features of images.

        Args:
            x (Tensor): (B, in_channels, H, W).

        Returns:
            tuple[Tensor]: One (B, C_i, ceil(H / 2^(i+2)), ceil(W / 2^(i+2))) for
            every i in ``out_indices``.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'images must have shape (B, {self.in_channels}, H, W), got'
                f' {tuple(x.shape)}; for other images set in_channels'
            )
        # Channels last, tokens are views of feature maps and nothing is copied.
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x))
        return tuple(outs)

    def _frozen(self) -> list[nn.Module]:
        """The modules that frozen_stages covers."""
        if self.frozen_stages < 0:
            return []
        norms = [f'norm{i}' for i in self.out_indices if i < self.frozen_stages]
        stages = self.stages[: self.frozen_stages]
        return [self.stem, *stages, *(getattr(self, name) for name in norms)]

    def _freeze(self) -> None:
        for module in self._frozen():
            module.requires_grad_(False)

    def switch_to_deploy(self) -> None:
        """Fold what inference can spare, once the checkpoint is loaded.

        Batch norms and the sum of eq. 8 go into the convolutions beside them. The
        outputs stay the same up to rounding, the keys of the state dict do not, and
        the model can be trained no more.

        Raises:
            TypeError: If ``norm_cfg`` is no batch norm.
        """
        self.eval().requires_grad_(False)
        for i, layer in enumerate(self.stem):
            if i % 3 == 2:
                self.stem[i] = Affine(layer)
        for block in self.modules():
            if isinstance(block, Block):
                block.cpe = fold_sum(block.cpe)
                block.ffn.switch_to_deploy()
        self.requires_grad_(False)
        self.deployed = True

    def train(self, mode: bool = True) -> 'DGT':
        """Switch the mode, except of what is frozen."""
        if mode and self.deployed:
            raise RuntimeError(
                'switch_to_deploy has folded the batch norms of this DGT, so it'
                ' cannot be trained; build another and load the checkpoint into it'
            )
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self
