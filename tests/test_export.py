"""Exported networks compute what the model computes."""

import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from mmengine.config import Config

from mmdgt import DGT
from mmdgt.ops import assign_queries, select_keys, use_backend

# The tokens of an image of this size are many in the first stages and few in the
# third: both ways in which the reference attends.
SIZE = (64, 96)
ARCH = dict(
    dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), stem_dims=8
)
SMALLER = {
    'upernet_dgt_t_demo': f"""
model = dict(
    backbone=dict(arch=dict(_delete_=True, **{ARCH}), num_groups=6, num_keys=20),
    decode_head=dict(in_channels={list(ARCH['dims'])}, channels=8),
    auxiliary_head=dict(in_channels=16, channels=8),
)
""",
    'dgt_t_demo': f"""
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, **{ARCH}, post_norm=True), num_groups=6, num_keys=20
    ),
    head=dict(in_channels=16, mid_channels=[16]),
)
""",
}


def test_torch_export_keeps_the_operators():
    model = DGT(ARCH, num_groups=6, num_keys=20).eval()
    image = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        exported = torch.export.export(model, (image,))
        outputs = exported.module()(image)
        for ours, expected in zip(outputs, model(image), strict=True):
            torch.testing.assert_close(ours, expected)
    called = {
        str(node.target)
        for module in exported.graph_module.modules()
        for node in module.graph.nodes
        if node.op == 'call_function'
    }
    names = ('assign_queries', 'select_keys', 'group_attention')
    assert {f'mmdgt.{name}.default' for name in names} <= called


@pytest.fixture
def run():
    """Run an ONNX file in onnxruntime."""
    pytest.importorskip('onnxscript', reason='needs the extra "export"')
    runtime = pytest.importorskip('onnxruntime', reason='needs the extra "export"')

    def run(file, *inputs):
        session = runtime.InferenceSession(file, providers=['CPUExecutionProvider'])
        names = [argument.name for argument in session.get_inputs()]
        return session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))

    return run


def test_choices_in_onnx(run, tmp_path):
    """Of small integers, which tie often: the lowest group, the lowest keys."""

    class Choose(torch.nn.Module):
        def forward(self, tokens, centroids):
            group = assign_queries(tokens, centroids)
            return group, select_keys(tokens, centroids, num_keys=7)

    inputs = (
        torch.randint(-2, 3, (2, 2, 40, 8)).float(),
        torch.randint(-2, 3, (2, 5, 8)).float(),
    )
    with use_backend('fused'):  # ONNX gets plain PyTorch nonetheless
        torch.onnx.export(
            Choose().eval(), inputs, tmp_path / 'choose.onnx', dynamo=True
        )
    group, index = run(tmp_path / 'choose.onnx', *inputs)
    scores = inputs[0].numpy() @ inputs[1].mT.numpy()  # (B, H, L, G)
    np.testing.assert_array_equal(group, scores.argmax(-1))
    order = np.argsort(-scores.swapaxes(2, 3), axis=-1, kind='stable')
    np.testing.assert_array_equal(index, order[..., :7])


def segmentor(config, image):
    """A model as mmsegmentation builds it, and its scores of an image."""
    from mmseg.apis import init_model
    from mmseg.structures import SegDataSample

    model = init_model(config, device='cpu')
    shape = dict(img_shape=SIZE, ori_shape=SIZE)
    batch = dict(inputs=[image], data_samples=[SegDataSample(metainfo=shape)])
    (result,) = model.test_step(batch)
    return model, result.seg_logits.data.detach().numpy()


def classifier(config, image):
    """A model as mmpretrain builds it, and its probabilities for an image."""
    from mmpretrain import get_model
    from mmpretrain.structures import DataSample

    model = get_model(config, device='cpu')
    (result,) = model.test_step(dict(inputs=image[None], data_samples=[DataSample()]))
    return model, result.pred_score.detach().numpy()


@pytest.mark.parametrize(
    ('name', 'build'),
    [('upernet_dgt_t_demo', segmentor), ('dgt_t_demo', classifier)],
)
def test_the_command(name, build, run, tmp_path, monkeypatch):
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'weights.pth'
    base = REPOSITORY / f'configs/{name}.py'
    config.write_text(f'_base_ = {str(base)!r}\n{SMALLER[name]}')
    image = torch.randint(256, (3, *SIZE), dtype=torch.uint8)  # BGR, as OpenCV reads
    model, expected = build(str(config), image)
    torch.save(dict(state_dict=model.state_dict()), checkpoint)

    monkeypatch.syspath_prepend(REPOSITORY / 'tools')
    import export_onnx

    file = tmp_path / 'new/network.onnx'
    command = ['export_onnx.py', config, checkpoint, '--out', file, '--shape', *SIZE]
    monkeypatch.setattr(sys, 'argv', list(map(str, command)))
    export_onnx.main()

    rgb = image.flip(0)[None].float()
    (scores,) = run(file, rgb)
    if build is classifier:
        scores = torch.from_numpy(scores).softmax(-1).numpy()
    np.testing.assert_allclose(scores[0], expected, atol=1e-4, rtol=1e-4)
    # It notices what differs.
    wrong = torch.from_numpy(scores).roll(1, dims=1)
    assert export_onnx.compare(file, rgb, wrong) > export_onnx.MAX_ERROR


def test_detectors_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / 'tools')
    import export_onnx

    cfg = Config.fromfile(REPOSITORY / 'configs/mask_rcnn_dgt_t_demo.py')
    with pytest.raises(ValueError, match=r'is of mmdet; .*model\.backbone'):
        export_onnx.build(cfg, 'none.pth')
