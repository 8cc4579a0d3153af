"""Groups and keys as pictures and numbers, against layers whose choices are known."""

import numpy as np
import pytest
import torch
from torch import nn

from mmdgt import DGT
from mmdgt.visualization import (
    Groups,
    draw_groups,
    draw_keys,
    draw_queries,
    find_groups,
    group_at,
    group_colours,
    group_statistics,
)

ARCH = dict(dims=(8, 8, 8, 8), depths=(1, 1, 2, 1), num_heads=(2,) * 4, stem_dims=8)
H, W = 37, 50  # 10 x 13 tokens of stage 1
TOKENS = (10, 13)


def backbone(**kwargs):
    return DGT({**ARCH, **kwargs}, num_groups=3, num_keys=2).eval()


def with_known_choices(model):
    """Quadrants are the groups of head 1, stripes those of head 2, in stage 1.

    Group j selects the tokens j and j + 20 of head 1, of which the first points to
    the centroid, while the second is longer and turned away from it by 45 degrees.
    """
    rows, columns = np.indices(TOKENS)
    groups = np.stack([np.minimum(rows // 5 * 2 + columns // 7, 2), columns % 3])
    layer = model.stages[0].blocks[0].attention
    axes = torch.eye(4)  # D = 4
    layer.centroids[:] = axes[:3]
    query = 7 * axes[torch.from_numpy(groups.reshape(2, -1))]  # (heads, L, D)
    key = -torch.ones(2, query.shape[1], 4)
    for j in range(3):
        key[:, j] = axes[j]
        key[:, j + 20] = 50 * (axes[j] + axes[3])
    qkv = torch.stack([query, key, key])  # (3, heads, L, D)
    fixed = qkv.permute(2, 0, 1, 3).reshape(1, -1, 3 * 8)
    layer.qkv.register_forward_hook(lambda *_: fixed)
    return groups


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('head', [1, 2])
def test_groups_and_keys_that_are_known(head, cosine):
    model = backbone(post_norm=cosine)
    expected = with_known_choices(model)
    groups = find_groups(model, torch.randn(1, 3, H, W), head=head)
    np.testing.assert_array_equal(groups.group, expected[head - 1])
    # Only a cosine prefers the key that points to the centroid to the longer one.
    best = [0, 20] if cosine else [20, 0]
    assert groups.keys.tolist() == [[j + token for token in best] for j in range(3)]
    assert groups.stride == 4


def test_the_model_stays_as_it_was():
    model, image = backbone(), torch.randn(1, 3, H, W)
    before = [out.clone() for out in model(image)]
    state = {key: x.clone() for key, x in model.state_dict().items()}
    find_groups(model, image, stage=3, block=2)
    assert all(map(torch.equal, model(image), before))
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize(('stage', 'shape'), [(1, (10, 13)), (2, (5, 7)), (3, (3, 4))])
def test_any_stage_inside_any_model(stage, shape):
    model = nn.Sequential(nn.Identity(), backbone())
    groups = find_groups(model, torch.randn(1, 3, H, W), stage=stage)
    assert groups.group.shape == shape
    assert groups.stride == 2 ** (stage + 1)


@pytest.mark.parametrize(
    ('place', 'message'),
    [
        (dict(stage=4), 'stage 4 has GlobalAttention.*any but the last'),
        (dict(stage=5), 'stage must be from 1 to 4, got 5'),
        (dict(stage=0), 'stage must be from 1 to 4, got 0'),
        (dict(stage=3, block=3), 'block of stage 3 must be from 1 to 2, got 3'),
        (dict(head=3), 'head of stage 1 must be from 1 to 2, got 3'),
    ],
)
def test_a_place_that_is_not_there(place, message):
    with pytest.raises(ValueError, match=message):
        find_groups(backbone(), torch.randn(1, 3, 32, 32), **place)


def test_what_is_no_image_or_no_model():
    image = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r'one image .* got \(2, 3, 32, 32\)'):
        find_groups(backbone(), image.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match='evaluation mode'):
        find_groups(backbone().train(), image)
    with pytest.raises(ValueError, match=r'DGT backbone, got .*Conv2d'):
        find_groups(nn.Conv2d(3, 3, 1), image)


def picture(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (H, W, 3), dtype=np.uint8)


def known_groups():
    """Five groups, the last without queries."""
    rng = np.random.default_rng(1)
    group = rng.integers(0, 4, TOKENS)
    keys = np.stack([rng.permutation(group.size)[:6] for _ in range(5)])
    return Groups(group, keys, stride=4)


def test_the_colours_are_those_of_the_groups():
    image, groups = picture(), known_groups()
    colours = group_colours(5)
    assert len({tuple(colour) for colour in group_colours(48)}) == 48
    drawn = draw_groups(image, groups)
    queries, keys = draw_queries(image, groups, 2), draw_keys(image, groups, 2)
    assert drawn.shape == queries.shape == keys.shape == image.shape
    for y, x in np.ndindex(H, W):
        j = groups.group[y // 4, x // 4]
        assert group_at(image, groups, x, y) == j
        blend = 0.45 * image[y, x] + 0.55 * colours[j]
        np.testing.assert_allclose(drawn[y, x], blend, atol=0.51)
        token = y // 4 * TOKENS[1] + x // 4
        for panel, inside in ((queries, j == 2), (keys, token in groups.keys[2])):
            tinted = colours[2]
            expected = tinted if inside else 0.25 * image[y, x]
            np.testing.assert_allclose(panel[y, x], expected, atol=1)


def test_pixels_and_groups_that_are_not_there():
    image, groups = picture(), known_groups()
    for x, y in ((W, 0), (0, H), (-1, 0)):
        with pytest.raises(ValueError, match=f'x from 0 to 49 .*, got {x},{y}'):
            group_at(image, groups, x, y)
    for group in (5, -1):
        with pytest.raises(ValueError, match=f'group must be from 0 to 4, got {group}'):
            draw_keys(image, groups, group)


def test_statistics_by_loops():
    groups = known_groups()
    flat = groups.group.ravel()
    place = [(4 * (t // 13), 4 * (t % 13)) for t in range(130)]

    def distance(a, b):
        return np.hypot(place[a][0] - place[b][0], place[a][1] - place[b][1])

    sizes, by_group, attended = [0] * 5, [[] for _ in range(5)], []
    choices = [0] * 130
    for query in range(130):
        sizes[flat[query]] += 1
        for key in groups.keys[flat[query]]:
            by_group[flat[query]].append(distance(query, key))
            attended.append(distance(query, key))
    for j in range(4):
        for key in groups.keys[j]:
            choices[key] += 1
    every = [distance(a, b) for a in range(130) for b in range(130)]

    found = group_statistics(groups)
    assert (found['tokens'], found['groups'], found['keys_per_group']) == (130, 5, 6)
    assert found['group_sizes'] == sizes
    assert found['empty_groups'] == 1
    assert found['largest_group'] == max(sizes) / 130
    assert found['key_distance'][4] is None
    means = [np.mean(distances) for distances in by_group[:4]]
    np.testing.assert_allclose(found['key_distance'][:4], means)
    assert found['mean_key_distance'] == pytest.approx(np.mean(attended))
    assert found['mean_token_distance'] == pytest.approx(np.mean(every))
    assert found['tokens_by_choices'] == [
        choices.count(n) for n in range(max(choices) + 1)
    ]
