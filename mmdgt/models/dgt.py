"""The Dynamic Group Transformer (DGT, Liu et al., IJCAI 2022) as a backbone."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from .attention import DynamicGroupAttention, GlobalAttention
from .blocks import Block, DropPath, Layer, LayerNorm2d, Stage, Stem
from .checks import check_integers, check_rate, check_sequence
from .deploy import Affine
from .mixers import build_token_mixer

MIN_SIZE = 32  # pixels a side of images
LINEAR_STD = 0.02  # of the truncated normal that linear layers start from


class DGT(nn.Module):
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
            of tokens: 392 for dense prediction, the paper's 98 to classify 224x224
            images. It shapes no parameter (:meth:`set_num_keys`).
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
        norm_layer (Callable): Makes the norms over feature maps, in stem and IRFFN,
            of their channels.
        drop_path_layer (Callable): Makes the stochastic depth of its rate.
        drop_path_rate (float): Stochastic depth, rising linearly to this rate at
            the last block.
        token_mixer (str | type | dict): What attends in every stage but the last:
            'group' for DG-Attention, or a subclass of it with another rule of choice;
            'shifted_window' (Swin), 'cross_window' (CSWin) or 'reduction' (CMT) to
            compare with. A dict with that as ``type`` also has settings of
            :func:`mmdgt.models.mixers.build_token_mixer`.

    Linear layers start from a truncated normal distribution of standard deviation
    0.02 and zero biases, all others as PyTorch starts them.
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
        num_keys: int = 392,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        norm_layer: Layer = nn.BatchNorm2d,
        drop_path_layer: Callable[[float], nn.Module] = DropPath,
        drop_path_rate: float = 0.0,
        token_mixer: str | type | dict = 'group',
    ) -> None:
        super().__init__()
        arch = self._check_arch(arch)
        dims, depths, num_heads = arch['dims'], arch['depths'], arch['num_heads']
        post_norm = arch.get('post_norm', False)
        num_stages = len(dims)
        check_integers(
            1, in_channels=in_channels, num_groups=num_groups, num_keys=num_keys
        )
        check_integers(-1, frozen_stages=frozen_stages)
        check_sequence(0, out_indices=out_indices)
        check_rate(drop_path_rate=drop_path_rate)
        self.out_indices = sorted(out_indices)
        distinct = set(out_indices)
        once = 0 < len(distinct) == len(out_indices)
        if not once or not distinct <= set(range(num_stages)):
            raise ValueError(
                f'out_indices must name stages from 0 to {num_stages - 1}, each once,'
                f' got {tuple(out_indices)}'
            )
        if frozen_stages > num_stages:
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
            return build_token_mixer(
                token_mixer, stage, block, num_groups, num_keys, norm_layer, **shape
            )

        self.stem = Stem(in_channels, arch['stem_dims'], norm_layer)
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
                    drop_path_layer(next(drop_paths)),
                    norm_layer,
                    with_cp,
                )
                for block in range(depths[stage])
            ]
            self.stages.append(Stage(previous, dims[stage], blocks))
            previous = dims[stage]
        for stage in self.out_indices:
            norm = LayerNorm2d(dims[stage]) if out_norm else nn.Identity()
            self.add_module(f'norm{stage}', norm)
        self.apply(init_linear)
        for module in self._frozen():
            module.requires_grad_(False)

    @classmethod
    def _check_arch(cls, arch: str | dict) -> dict:
        if isinstance(arch, str):
            for names, settings in cls.arch_zoo.items():
                if arch.lower() in names:
                    return settings
            known = ', '.join(repr(name) for names in cls.arch_zoo for name in names)
            raise ValueError(f'arch must be one of {known} or a dict, got {arch!r}')
        if not isinstance(arch, Mapping):
            raise TypeError(
                f'arch must be a name or a dict, got {arch!r} ({type(arch).__name__})'
            )
        required = {'dims', 'depths', 'num_heads', 'stem_dims'}
        given = set(arch)
        if not required <= given or not given <= required | {'post_norm'}:
            raise ValueError(
                f'arch must be a dict of {sorted(required)} and optionally'
                f" 'post_norm', got {sorted(given)}"
            )
        sequences = {key: arch[key] for key in ('dims', 'depths', 'num_heads')}
        check_sequence(1, **sequences)
        check_integers(1, stem_dims=arch['stem_dims'])
        lengths = {key: len(entries) for key, entries in sequences.items()}
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
        if min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f'images must have at least {MIN_SIZE} pixels a side, got'
                f' {tuple(x.shape)}; resize or pad them'
            )
        x = self.stem(x)
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

    def set_num_keys(self, num_keys: int) -> None:
        """Let every group attend to another number of keys, from the next pass on.

        K shapes no parameter, so a trained network takes any: fewer are faster, more
        see more (docs/attention.md).

        Args:
            num_keys (int): K, at least 1; clamped to the number of tokens.
        """
        check_integers(1, num_keys=num_keys)
        for module in self.modules():
            if isinstance(module, DynamicGroupAttention):
                module.num_keys = num_keys

    def switch_to_deploy(self) -> None:
        """Fold what inference can spare, once the checkpoint is loaded.

        Batch norms go into the convolutions beside them. The outputs stay the same up
        to rounding, the keys of the state dict do not, and the model can be trained
        no more.

        Raises:
            TypeError: If ``norm_layer`` makes no batch norms.
        """
        self.eval().requires_grad_(False)
        for i, layer in enumerate(self.stem):
            if i % 3 == 2:
                self.stem[i] = Affine(layer)
        for block in self.modules():
            if isinstance(block, Block):
                block.irffn.switch_to_deploy()
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


def init_linear(module: nn.Module) -> None:
    """Let a linear layer start from a truncated normal and zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=LINEAR_STD)
        nn.init.zeros_(module.bias)
