"""Groups and keys as pictures and numbers, against layers whose choices are known."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmdgt import DGT
from mmdgt.openmmlab.apis.inference import Predictor, read_image
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
            tinted = 0.45 * image[y, x] + 0.55 * colours[2]
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


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet', 'mmpretrain'])
def test_every_framework(tiny_models, scope):
    """An image of odd sides through the config's own pipeline and preprocessor."""
    config, checkpoint = tiny_models[scope]
    predictor = Predictor(Config.fromfile(config), checkpoint, 'cpu')
    view, inputs = predictor.see(picture()[..., ::-1])
    # Normalised as the configs say, RGB; Mask R-CNN's config pads to 32.
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    height, width = view.shape[:2]
    normalised = torch.from_numpy((view - np.array(mean)) / std).permute(2, 0, 1)
    torch.testing.assert_close(
        inputs[0, :, :height, :width].double(), normalised, atol=1e-4, rtol=0
    )
    sizes = {'mmseg': (H, W), 'mmdet': (71, 96), 'mmpretrain': (64, 64)}
    assert (height, width) == sizes[scope]
    groups = find_groups(predictor.model, inputs, stage=2, block=1, head=2)
    assert draw_groups(view, groups).shape == view.shape


def test_the_command(tiny_models, demo_data, call_tool, tmp_path):
    scene = next((demo_data / 'ade20k/images/validation').iterdir())
    out = tmp_path / 'groups.png'
    config, _ = tiny_models['mmseg']
    what = ('--stage', 2, '--head', 2, '--pixels', '5,60', '63,0', '--groups', 3)
    call_tool('show_groups', config, 'random', scene, '--out', out, *what)
    found = json.loads(out.with_suffix('.json').read_text())
    assert (found['stage'], found['block'], found['head']) == (2, 1, 2)
    assert found['tokens'] == sum(found['group_sizes']) == 64
    assert set(found['group_of_pixels']) == {'5,60', '63,0'}
    # A strip of captions above three rows of three panels, enlarged five times.
    assert cv2.imread(str(out)).shape == (30 + 3 * (5 * 64 + 6), 3 * (5 * 64 + 6), 3)


def test_what_is_no_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'there is no file .*nothing\.png'):
        read_image(tmp_path / 'nothing.png')
    for text in ('text', ''):
        (tmp_path / 'text.png').write_text(text)
        with pytest.raises(ValueError, match=r'text\.png is damaged or no picture'):
            read_image(tmp_path / 'text.png')


MEAN, STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]


class Model(BaseModel):
    def __init__(self):
        super().__init__(
            dict(
                type='ImgDataPreprocessor',
                mean=MEAN,
                std=STD,
                bgr_to_rgb=True,
                pad_size_divisor=32,
            )
        )
        self.backbone = backbone()

    def forward(self, inputs, data_samples, mode):
        return [out.mean() for out in self.backbone(inputs)]


class Pictures(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {'inputs': torch.from_numpy(picture(index)).permute(2, 0, 1)}


def make_runner(work_dir, **hook):
    return Runner(
        model=Model(),
        work_dir=str(work_dir),
        val_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=Pictures(),
            collate_fn=dict(type='pseudo_collate'),
        ),
        val_cfg=dict(),
        val_evaluator=dict(metrics=[]),
        custom_hooks=[dict(type='GroupVisualizationHook', **hook)],
        default_scope='mmengine',
        experiment_name=work_dir.name,
    )


def test_the_hook_draws_the_first_picture_of_a_validation(tmp_path):
    runner = make_runner(tmp_path, stage=2, head=2)
    runner.val()
    (file,) = tmp_path.rglob('vis_image/*.png')
    assert file.name == 'groups_stage2_block1_head2_0.png'
    rgb = picture(0)[..., ::-1]
    padded = torch.zeros(1, 3, 64, 64)
    padded[0, :, :H, :W] = torch.from_numpy((rgb - np.array(MEAN)) / STD).permute(
        2, 0, 1
    )
    expected = draw_groups(rgb, find_groups(runner.model, padded, stage=2, head=2))
    np.testing.assert_array_equal(cv2.imread(str(file))[..., ::-1], expected)


def test_the_hook_knows_at_once_that_a_stage_has_no_groups(tmp_path):
    with pytest.raises(ValueError, match='stage 4 has GlobalAttention'):
        make_runner(tmp_path, stage=4).call_hook('before_run')
