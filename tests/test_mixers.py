"""The attention of other networks in DGT's place, against loops and formulas."""

import itertools

import loops
import numpy as np
import pytest
import torch
from test_attention import cosine, join, project, to_numpy
from torch.utils.flop_counter import FlopCounterMode

from mmdgt import DGT
from mmdgt.models import DynamicGroupAttention, GlobalAttention
from mmdgt.models.mixers import (
    CrossWindowAttention,
    ReductionAttention,
    ShiftedWindowAttention,
)

TINY = dict(
    dims=(8, 16, 16, 32), depths=(1, 2, 3, 1), num_heads=(2, 2, 2, 4), stem_dims=8
)
MIXERS = {
    'group': DynamicGroupAttention,
    'shifted_window': ShiftedWindowAttention,
    'cross_window': CrossWindowAttention,
    'reduction': ReductionAttention,
}


def attend(q, k, v, regions, bias=None, scale=8**-0.5):
    """Everyone attends to its own region; regions: H times (L,)."""
    B, H, L, _ = q.shape
    index = np.empty((B, H, L), dtype=object)
    for b, h, i in np.ndindex(B, H, L):
        index[b, h, i] = [t for t in range(L) if regions[h][t] == regions[h][i]]
    group = np.broadcast_to(np.arange(L), (B, H, L))
    return loops.attend(q, k, v, group, index, scale, bias)


def of_tokens(function, size):
    """A function of row and column, for every token in turn."""
    return np.array([function(y, x) for y, x in np.ndindex(*size)])


def check(layer, x, expected):
    """expected: (B, H, L, D), before the last projection."""
    expected = join(layer, expected).reshape(x.shape)
    np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=2e-5)


# One row of windows, and windows that no side of the map is a multiple of.
@pytest.mark.parametrize('size', [(3, 9), (6, 5), (8, 8)])
@pytest.mark.parametrize('shifted', [False, True])
def test_shifted_windows(size, shifted):
    layer = ShiftedWindowAttention(16, 2, window_size=4, shifted=shifted)
    torch.nn.init.normal_(layer.relative_position_bias)
    x = torch.randn(2, *size, 16)
    # Windows of four rows and columns, the first of which ends where the shift says.
    dy, dx = (2 if shifted and side > 4 else 0 for side in size)
    region = of_tokens(lambda y, x: 100 * ((y - dy) // 4) + (x - dx) // 4, size)
    table = to_numpy(layer.relative_position_bias)
    places = list(np.ndindex(*size))
    bias = np.zeros((2, len(places), len(places)))
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        rows, columns = query[0] - key[0], query[1] - key[1]
        if max(abs(rows), abs(columns)) < 4:
            bias[:, i, j] = table[:, rows + 3, columns + 3]
    q, k, v = project(layer, x.flatten(1, 2))
    check(layer, x, attend(q, k, v, [region, region], bias))


@pytest.mark.parametrize('shift', [0, 2])
def test_shifted_windows_as_in_mmpretrain(shift):
    utils = pytest.importorskip('mmpretrain.models.utils')
    theirs = utils.ShiftWindowMSA(16, 2, window_size=4, shift_size=shift)
    torch.nn.init.normal_(theirs.w_msa.relative_position_bias_table)
    layer = ShiftedWindowAttention(16, 2, window_size=4, shifted=shift > 0)
    state = theirs.w_msa.state_dict()
    del state['relative_position_index']
    table = state.pop('relative_position_bias_table').T.view(2, 7, 7)
    layer.load_state_dict({**state, 'relative_position_bias': table})
    x = torch.randn(2, 12, 8, 16)
    expected = theirs(x.flatten(1, 2), (12, 8)).view(x.shape)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('size', [(1, 6), (5, 7), (4, 4)])
@pytest.mark.parametrize('use_cosine', [False, True])
def test_cross_windows(size, use_cosine):
    layer = CrossWindowAttention(16, 2, stripe_width=2, cosine=use_cosine)
    x = torch.randn(2, *size, 16)
    q, k, v = project(layer, x.flatten(1, 2))
    scale = 8**-0.5
    if use_cosine:
        (q, k), scale = cosine(layer, q, k), 1.0
    # The first head has the rows in pairs, the second the columns.
    stripes = [of_tokens(lambda y, x, i=i: (y, x)[i] // 2, size) for i in range(2)]
    out = attend(q, k, v, stripes, scale=scale)
    for (b, h), first in itertools.product(np.ndindex(2, 2), range(0, max(size), 2)):
        stripe = [slice(None)] * 3
        stripe[1 + h] = slice(first, first + 2)
        stripe = tuple(stripe)
        # As maps (D, H, W).
        values, result = (part[b, h].T.reshape(8, *size) for part in (v, out))
        conv = layer.lepe[h]
        result[stripe] += loops.conv3x3(
            values[stripe], to_numpy(conv.weight), to_numpy(conv.bias), groups=8
        )
        out[b, h] = result.reshape(8, -1).T
    check(layer, x, out)


@pytest.mark.parametrize('size', [(1, 4), (5, 6)])
def test_reduction(size):
    layer = ReductionAttention(16, 2, stride=2).train()
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.norm.bias)
    x = torch.randn(2, *size, 16)
    padded = np.pad(to_numpy(x), ((0, 0), (0, -size[0] % 2), (0, -size[1] % 2), (0, 0)))
    weight, shift = to_numpy(layer.reduce.weight)[:, 0], to_numpy(layer.reduce.bias)
    coarse = np.zeros((2, padded.shape[1] // 2, padded.shape[2] // 2, 16))
    for b, y, x_, c in np.ndindex(*coarse.shape):
        patch = padded[b, 2 * y : 2 * y + 2, 2 * x_ : 2 * x_ + 2, c]
        coarse[b, y, x_, c] = (patch * weight[c]).sum() + shift[c]
    coarse -= coarse.mean((0, 1, 2))
    coarse /= np.sqrt(coarse.var((0, 1, 2)) + 1e-5)
    coarse = coarse * to_numpy(layer.norm.weight) + to_numpy(layer.norm.bias)
    q, _, _ = project(layer, x.flatten(1, 2))
    _, k, v = project(layer, torch.as_tensor(coarse).flatten(1, 2))
    everything = np.broadcast_to(np.arange(k.shape[2]), (2, 2, 1, k.shape[2]))
    same = np.zeros(q.shape[:3], dtype=int)
    check(layer, x, loops.attend(q, k, v, same, everything, 8**-0.5))


@pytest.mark.parametrize('mixer', MIXERS)
def test_in_the_backbone(mixer):
    model = DGT(TINY, num_groups=6, num_keys=10, token_mixer=mixer)
    kinds = [type(stage.blocks[-1].attention) for stage in model.stages]
    assert kinds == 3 * [MIXERS[mixer]] + [GlobalAttention]
    images = torch.randn(2, 3, 75, 49)
    outs = model(images)
    assert [out.shape[2:] for out in outs] == [(19, 13), (10, 7), (5, 4), (3, 2)]
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    together, alone = (model.eval()(part) for part in (images, images[1:]))
    for out, single in zip(together, alone):
        torch.testing.assert_close(out[1:], single, atol=1e-5, rtol=1e-4)


def test_settings_of_dg_attention():
    settings = dict(type='group', num_groups=5)
    layers = [
        block.attention
        for stage in DGT(TINY, num_keys=7, token_mixer=settings).stages[:3]
        for block in stage.blocks
    ]
    assert {(len(layer.centroids[0]), layer.num_keys) for layer in layers} == {(5, 7)}


def test_a_class_of_ones_own():
    class Mine(DynamicGroupAttention):
        pass

    model = DGT(TINY, num_groups=5, token_mixer=Mine)
    kinds = [type(stage.blocks[0].attention) for stage in model.stages]
    assert kinds == 3 * [Mine] + [GlobalAttention]


def test_every_second_block_of_a_stage_shifts_its_windows():
    settings = dict(type='shifted_window', window_size=3)
    stages = DGT(TINY, token_mixer=settings).stages[:3]
    layers = [[block.attention for block in stage.blocks] for stage in stages]
    shifted = [[layer.shifted for layer in stage] for stage in layers]
    assert shifted == [[False], [False, True], [False, True, False]]
    assert {layer.window_size for stage in layers for layer in stage} == {3}


# Keys of a token in the first three stages of a 224 x 224 image: windows of 7 x 7;
# stripes of 1, 2 and 7 along maps of 56, 28 and 14; maps reduced to 7 x 7.
@pytest.mark.parametrize(
    ('mixer', 'keys'),
    [
        ('shifted_window', (49, 49, 49)),
        ('cross_window', (56, 2 * 28, 7 * 14)),
        ('reduction', (49, 49, 49)),
    ],
)
def test_multiply_adds_of_dgt_t(mixer, keys):
    with torch.device('meta'):
        model = DGT('tiny', token_mixer=mixer).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    counted = counter.get_flop_counts()['Global']
    products = sum(n for name, n in counted.items() if str(name) == 'aten.bmm') / 2
    depths, tokens, dims = (1, 2, 17, 2), (3136, 784, 196, 49), (64, 128, 256, 512)
    assert products == sum(
        2 * depth * L * K * C
        for depth, L, K, C in zip(depths, tokens, (*keys, 49), dims)
    )


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ('windows', "'group', 'shifted_window', .* got 'windows'"),
        (dict(window_size=7), 'a dict with one of these as its type, got None'),
        (
            dict(type='shifted_window', window_size=0),
            'window_size .* at least 1, got 0',
        ),
        (dict(type='cross_window', stripe_widths=(1, 2)), r'every stage .* \(1, 2\)'),
        (
            dict(type='reduction', strides=(0, 4, 2)),
            'strides must be at least 1, got 0',
        ),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DGT(TINY, token_mixer=settings)


def test_cross_windows_need_an_even_number_of_heads():
    with pytest.raises(ValueError, match='even in every stage but the last, got 3'):
        DGT('small', token_mixer='cross_window')
