"""DGT in timm: ``timm.create_model('dgt_tiny' | 'dgt_small' | 'dgt_base')``.

timm's own training script moves no centroids. A training loop has to, after every
optimizer step (eqs. 3 and 4)::

    def move_centroids(optimizer, *_):
        mmdgt.update_centroids(model, keep=0.1 * optimizer.param_groups[0]['lr'])


    optimizer.register_step_post_hook(move_centroids)

"""

from collections.abc import Callable
from typing import Any

from timm.layers import (
    DropPath,
    NormMlpClassifierHead,
    get_device_dtype,
    get_norm_layer,
)
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from . import models
from .models.blocks import Block, Stem
from .models.dgt import init_linear

__all__ = ['DGT']

# Their forward passes look at shapes and modes, which torch.fx cannot trace.
for module in (Stem, Block):
    register_notrace_module(module)


class DGT(models.DGT):
    """The classifier of section 3.3 and table 1, with the interface of timm's models.

    Stem and stages have the weights of :class:`mmdgt.DGT` under the same names. The
    head averages over the pixels, a linear layer goes to 1280 channels, GELU, another
    to the classes.

    Args:
        arch (str | dict): As in :class:`mmdgt.DGT`.
        num_classes (int): Classes; 0 for the 1280 numbers before the classifier.
        in_chans (int): Channels of the images.
        global_pool (str): 'avg', 'max', 'avgmax', or '' for none.
        drop_rate (float): Dropout before the classifier.
        drop_path_rate (float): As in :class:`mmdgt.DGT`.
        norm_layer (str | Callable): Norms over feature maps, in stem and IRFFN, by
            timm's name or made of their channels.
        num_keys (int): Keys K of DG-Attention. The entry points say 392 with
            ``features_only``, 98 without.
        out_norm (bool): Whether each intermediate has a LayerNorm of its own. The
            entry points say so with ``features_only``, where it is applied.
        **kwargs: Others of :class:`mmdgt.DGT`.
    """

    head_width = 1280

    def __init__(
        self,
        arch: str | dict = 'tiny',
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: str | Callable[[int], nn.Module] = nn.BatchNorm2d,
        num_keys: int = 98,
        out_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            arch,
            in_chans,
            num_keys=num_keys,
            out_norm=out_norm,
            drop_path_rate=drop_path_rate,
            drop_path_layer=DropPath,
            norm_layer=get_norm_layer(norm_layer),
            **kwargs,
        )
        dims = self._check_arch(arch)['dims']
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = dims[-1]
        self.feature_info = [
            dict(num_chs=channels, reduction=4 << i, module=f'stages.{i}')
            for i, channels in enumerate(dims)
        ]
        self.head = NormMlpClassifierHead(
            self.num_features,
            num_classes,
            hidden_size=self.head_width,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=nn.Identity,
            act_layer='gelu',
        )
        self.head.apply(init_linear)
        self.head_hidden_size = self.head.num_features

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that do not decay: the scales of cosine attention."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.endswith('logit_scale')}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters into layers.

        Args:
            coarse (bool): Whether a layer is a stage instead of a block.
        """
        blocks = [
            (r'^stages\.(\d+)\.merge', (0,)),
            (r'^stages\.(\d+)\.blocks\.(\d+)', None),
            (r'^norm', (99999,)),  # with the last of the layers
        ]
        return dict(stem=r'^stem', blocks=r'^stages\.(\d+)' if coarse else blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether to checkpoint the blocks."""
        for module in self.modules():
            if isinstance(module, Block):
                module.with_cp = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    def reset_classifier(
        self,
        num_classes: int,
        global_pool: str | None = None,
        reset_other: bool = False,
    ) -> None:
        """Put a new classifier in the place of the last linear layer.

        Args:
            num_classes (int): Classes, 0 for no classifier.
            global_pool (str, optional): Another pooling, '' for none.
            reset_other (bool): Whether to drop the layer to 1280 channels too.
        """
        self.num_classes = num_classes
        self.head.reset(
            num_classes,
            global_pool,
            reset_other=reset_other,
            in_features=self.num_features,
            **get_device_dtype(self),
        )
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute what stages return.

        Args:
            x (Tensor): (B, in_chans, H, W).
            indices (int | list[int], optional): That many of the last stages, or
                these; None for all.
            norm (bool): Whether to apply the LayerNorms of ``out_norm``.
            stop_early (bool): Whether to leave out stages behind the last index.
            output_fmt (str): 'NCHW', the only one.
            intermediates_only (bool): Whether to return nothing else.

        Returns:
            list[Tensor]: One (B, C_i, ceil(H / 2^(i+2)), ceil(W / 2^(i+2))) for every
            index i; with the last stage's output before it, unless
            ``intermediates_only``.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in taken:
                intermediates.append(getattr(self, f'norm{i}')(x) if norm else x)
            if stop_early and i == last:
                break
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the intermediates do not need.

        Args:
            indices (int | list[int]): As in :meth:`forward_intermediates`.
            prune_norm (bool): Whether to remove their LayerNorms too.
            prune_head (bool): Whether to remove the head, even if the last stage
                remains.

        Returns:
            list[int]: The indices, counted from the first stage.
        """
        taken, last = feature_take_indices(len(self.stages), indices)
        for i in range(len(self.stages)):
            if prune_norm or i not in taken:
                self.add_module(f'norm{i}', nn.Identity())
        pruned = last < len(self.stages) - 1
        if pruned:
            self.stages = self.stages[: last + 1]
            self.num_features = self.feature_info[last]['num_chs']
        if prune_head or pruned:
            self.reset_classifier(0, '', reset_other=True)
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, ceil(H / 32), ceil(W / 32))."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify.

        Args:
            x (Tensor): (B, num_features, H, W).
            pre_logits (bool): Whether to stop before the classifier.

        Returns:
            Tensor: (B, num_classes), or (B, head_hidden_size).
        """
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(
    state_dict: dict[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Name the weights of an OpenMMLab checkpoint as they are here."""
    names = {
        'backbone.': '',
        'head.layers.0.': 'head.pre_logits.',
        'head.layers.1.': 'head.',
    }
    renamed = {}
    for key, value in state_dict.items():
        old = next(filter(key.startswith, names), '')
        renamed[names.get(old, '') + key.removeprefix(old)] = value
    return renamed


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        url='',
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation='bicubic',
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv='stem.0',
        classifier='head.fc',
        license='apache-2.0',
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {name: _cfg() for name in ('dgt_tiny', 'dgt_small', 'dgt_base')}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    dense = kwargs.get('features_only', False)
    kwargs.setdefault('num_keys', 392 if dense else 98)
    feature_cfg: dict[str, Any] = dict(out_indices=(0, 1, 2, 3), feature_cls='getter')
    if dense and kwargs.get('feature_cls', 'getter') == 'getter':
        kwargs.setdefault('out_norm', True)
        feature_cfg['norm'] = True
    return build_model_with_cfg(
        DGT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )


@register_model
def dgt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DGT-T: 24.09 M parameters, 4.35 G multiply-adds at 224 x 224 (table 1)."""
    return _create('dgt_tiny', pretrained, **{'arch': 'tiny', **kwargs})


@register_model
def dgt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DGT-S: 51.76 M parameters, 9.41 G multiply-adds at 224 x 224 (table 1)."""
    return _create('dgt_small', pretrained, **{'arch': 'small', **kwargs})


@register_model
def dgt_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DGT-B: 90.28 M parameters, 16.4 G multiply-adds at 224 x 224 (table 1)."""
    return _create('dgt_base', pretrained, **{'arch': 'base', **kwargs})
