"""What DG-Attention does to an image: groups of queries and the keys they select.

The pictures of section 5 and figure 3 of the paper, and numbers to them. Stages,
blocks and heads count from 1 as in the paper, groups from 0 as in the operators.
"""

import colorsys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .models import DGT, DynamicGroupAttention

GOLDEN_RATIO = 0.618034  # of the circle of hues lies between two groups
OPACITY = 0.55  # of a colour over the image
SHADE = 0.25  # brightness of what is not highlighted


@dataclass(frozen=True)
class Groups:
    """What one head of a DG-Attention layer chose for one image.

    Args:
        group (ndarray): (h, w), the group of the query of every token.
        keys (ndarray): (G, K), the tokens that every group selected, in row-major
            order of (h, w).
        stride (int): Pixels from a token to the next.
    """

    group: np.ndarray
    keys: np.ndarray
    stride: int

    def is_query(self, group: int) -> np.ndarray:
        """Which tokens' queries belong to a group, (h, w) bool."""
        self._check(group)
        return self.group == group

    def is_key(self, group: int) -> np.ndarray:
        """Which tokens' keys a group selected, (h, w) bool."""
        self._check(group)
        selected = np.zeros(self.group.size, bool)
        selected[self.keys[group]] = True
        return selected.reshape(self.group.shape)

    def _check(self, group: int) -> None:
        if not 0 <= group < len(self.keys):
            raise ValueError(
                f'group must be from 0 to {len(self.keys) - 1}, got {group}'
            )


@torch.no_grad()
def find_groups(
    model: nn.Module, image: Tensor, stage: int = 1, block: int = 1, head: int = 1
) -> Groups:
    """Run an image through a backbone and see what one head chooses.

    Args:
        model (nn.Module): A DGT or any model that holds one, in evaluation mode.
        image (Tensor): (1, C, H, W), as the backbone gets it: normalised, padded.
        stage (int): 1 to 3 in the published architectures, whose stage 4 has global
            attention.
        block (int): From 1 to the depth of the stage.
        head (int): From 1 to the heads of the stage.

    Raises:
        ValueError: If the model has no DGT or is training, if there is no such
            stage, block or head, or if it is not one image.
    """
    backbone, layer = _find_backbone(model), find_layer(model, stage, block, head)
    if backbone.training:
        raise ValueError('expected a model in evaluation mode: call model.eval()')
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(
            f'expected one image of shape (1, C, H, W), got {tuple(image.shape)}'
        )
    seen = []  # by the layer
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        backbone(image.to(layer.centroids.device))
    finally:
        handle.remove()
    query, key, *_ = layer.project(seen[0])
    group, keys = (x[0, head - 1].cpu().numpy() for x in layer.choose(query, key))
    stride = 2 ** (stage + 1)
    shape = [-(-side // stride) for side in image.shape[2:]]
    return Groups(group.reshape(shape), keys, stride)


def find_layer(
    model: nn.Module, stage: int, block: int, head: int
) -> DynamicGroupAttention:
    """The layer that :func:`find_groups` looks into, with the same arguments.

    Raises:
        ValueError: If the model has no DGT or it no such stage, block or head.
    """
    stages: Any = _find_backbone(model).stages
    _check_number('stage', stage, len(stages))
    blocks = stages[stage - 1].blocks
    _check_number(f'block of stage {stage}', block, len(blocks))
    layer = blocks[block - 1].attention
    if not isinstance(layer, DynamicGroupAttention):
        raise ValueError(
            f'stage {stage} has {type(layer).__name__}, which knows no groups; choose'
            ' a stage with DynamicGroupAttention, by default any but the last'
        )
    _check_number(f'head of stage {stage}', head, layer.num_heads)
    return layer


def _find_backbone(model: nn.Module) -> DGT:
    backbone = next((m for m in model.modules() if isinstance(m, DGT)), None)
    if backbone is None:
        raise ValueError(f'expected a model with a DGT backbone, got {type(model)}')
    return backbone


def _check_number(what: str, number: int, last: int) -> None:
    if not 1 <= number <= last:
        raise ValueError(f'{what} must be from 1 to {last}, got {number}')


def group_statistics(groups: Groups) -> dict:
    """Sum up what a head chose, in plain numbers that JSON can hold.

    Returns:
        dict: Lengths are in pixels.

        - **tokens**, **groups**, **keys_per_group** (int): L, G and K.
        - **group_sizes** (list[int]): Queries of every group.
        - **empty_groups** (int): Groups without queries.
        - **largest_group** (float): Share of the queries in the largest group.
        - **key_distance** (list[float | None]): For every group the mean distance
          from its queries to its keys, None without queries.
        - **mean_key_distance** (float): From a query to a key that it attends to.
        - **mean_token_distance** (float): From a token to any token, as it would be
          if the choice had nothing to do with the place.
        - **tokens_by_choices** (list[int]): Tokens that 0, 1, 2, ... groups with
          queries selected as a key.
    """
    num_groups, num_keys = groups.keys.shape
    indices = np.indices(groups.group.shape).reshape(2, -1).T
    place = torch.from_numpy(groups.stride * indices).double()
    sizes = np.bincount(groups.group.ravel(), minlength=num_groups)
    live = np.flatnonzero(sizes)
    distance: list[float | None] = [None] * num_groups
    for group in live:
        queries = place[groups.is_query(group).ravel()]
        distances = torch.cdist(queries, place[groups.keys[group]])
        distance[group] = distances.mean().item()
    choices = np.bincount(groups.keys[live].ravel(), minlength=groups.group.size)
    return {
        'tokens': groups.group.size,
        'groups': num_groups,
        'keys_per_group': num_keys,
        'group_sizes': sizes.tolist(),
        'empty_groups': num_groups - len(live),
        'largest_group': float(sizes.max() / groups.group.size),
        'key_distance': distance,
        'mean_key_distance': float(
            np.average([distance[group] for group in live], weights=sizes[live])
        ),
        'mean_token_distance': _mean_token_distance(groups),
        'tokens_by_choices': np.bincount(choices).tolist(),
    }


def _mean_token_distance(groups: Groups) -> float:
    """Over all pairs of tokens: dy rows apart are (h - dy) pairs of rows, ..."""
    h, w = groups.group.shape
    dy, dx = np.abs(np.mgrid[1 - h : h, 1 - w : w])
    pairs = (h - dy) * (w - dx)
    return float(groups.stride * np.average(np.hypot(dy, dx), weights=pairs))


def group_colours(num_groups: int) -> np.ndarray:
    """A colour for every group, (G, 3) uint8, RGB.

    Hues that follow each other by the golden ratio are far apart, however many; the
    brightness tells close ones apart.
    """
    return np.array(
        [
            [
                round(255 * channel)
                for channel in colorsys.hsv_to_rgb(
                    j * GOLDEN_RATIO % 1, 0.85, (1.0, 0.75, 0.5)[j % 3]
                )
            ]
            for j in range(num_groups)
        ],
        np.uint8,
    )


def group_at(image: np.ndarray, groups: Groups, x: int, y: int) -> int:
    """The group of the query whose token covers a pixel.

    Args:
        image (ndarray): (H, W, 3), as for :func:`draw_groups`.
        groups (Groups): What :func:`find_groups` found for it.
        x, y (int): Pixels from the left and from the top edge.

    Raises:
        ValueError: If the pixel lies outside the image.
    """
    height, width = image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f'the pixel must lie in the image, x from 0 to {width - 1} and y from 0 to'
            f' {height - 1}, got {x},{y}'
        )
    return int(groups.group[y // groups.stride, x // groups.stride])


def draw_groups(image: np.ndarray, groups: Groups) -> np.ndarray:
    """Colour every token by the group of its query.

    Args:
        image (ndarray): (H, W, 3) uint8, RGB, the image before normalisation. Tokens
            of padding to the right and below it are left out.
        groups (Groups): What :func:`find_groups` found for it.

    Returns:
        ndarray: (H, W, 3) uint8, RGB, as all that is drawn here.
    """
    colours = group_colours(len(groups.keys))
    return _blend(image, _to_pixels(colours[groups.group], groups, image))


def draw_queries(image: np.ndarray, groups: Groups, group: int) -> np.ndarray:
    """Highlight the queries of a group in its colour; as :func:`draw_groups`."""
    return _highlight(image, groups, groups.is_query(group), group)


def draw_keys(image: np.ndarray, groups: Groups, group: int) -> np.ndarray:
    """Highlight the keys that a group selected; as :func:`draw_groups`."""
    return _highlight(image, groups, groups.is_key(group), group)


def viewable(image: Tensor) -> np.ndarray:
    """(3, H, W) BGR as pipelines of OpenMMLab leave it -> (H, W, 3) RGB, uint8."""
    return image.byte().flip(0).permute(1, 2, 0).contiguous().cpu().numpy()


def _highlight(
    image: np.ndarray, groups: Groups, tokens: np.ndarray, group: int
) -> np.ndarray:
    inside = _to_pixels(tokens[..., None], groups, image)
    # Opaque: over the picture one colour looks like several.
    colour = group_colours(len(groups.keys))[group]
    return np.where(inside, colour, (SHADE * image).astype(np.uint8))


def _blend(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return np.rint((1 - OPACITY) * image + OPACITY * colours).astype(np.uint8)


def _to_pixels(tokens: np.ndarray, groups: Groups, image: np.ndarray) -> np.ndarray:
    """(h, w, C) of tokens -> (H, W, C) of the pixels that they cover."""
    height, width = image.shape[:2]
    pixels = tokens.repeat(groups.stride, 0).repeat(groups.stride, 1)
    return pixels[:height, :width]
