"""A Swin V2 in a DGT, tensor by tensor and where the functions coincide."""

import sys
from typing import NamedTuple

import pytest
import torch
from torch import nn

from mmdgt import DGT, transplant
from mmdgt.commands import run_command

SWIN_DIMS, SWIN_DEPTHS, HEADS = 8, (2, 2, 4, 2), (1, 2, 4, 8)
ARCH = dict(
    dims=(8, 16, 32, 64),
    depths=(1, 2, 3, 2),
    num_heads=HEADS,
    stem_dims=4,
    post_norm=True,
)
WINDOW = 4  # as large as the maps of the tests


class Swin(NamedTuple):
    """A Swin V2, and where its parts are."""

    model: nn.Module
    stages: nn.Module
    attention: str
    expand: str
    reduce: str


def timm_swin():
    swin = pytest.importorskip('timm.models.swin_transformer_v2').SwinTransformerV2(
        img_size=64,
        embed_dim=SWIN_DIMS,
        depths=SWIN_DEPTHS,
        num_heads=HEADS,
        window_size=WINDOW,
        num_classes=3,
    )
    return Swin(swin, swin.layers, 'attn', 'mlp.fc1', 'mlp.fc2')


def mmpretrain_swin():
    swin = pytest.importorskip('mmpretrain.models.backbones').SwinTransformerV2(
        dict(
            embed_dims=SWIN_DIMS,
            depths=SWIN_DEPTHS,
            num_heads=HEADS,
            extra_norm_every_n_blocks=0,
        ),
        img_size=64,
        window_size=WINDOW,
    )
    names = 'attn.w_msa', 'ffn.layers.0.0', 'ffn.layers.1'
    return Swin(swin, swin.stages, *names)


@pytest.fixture(params=[timm_swin, mmpretrain_swin], ids=['timm', 'mmpretrain'])
def swin(request):
    """With random weights, biases and scales."""
    swin = request.param()
    swin.model.double().eval()
    with torch.no_grad():
        for parameter in swin.model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return swin


@pytest.fixture
def dgt():
    return DGT(ARCH, num_groups=1, num_keys=WINDOW**2).double().eval()


def test_tensors_are_those_of_the_source(swin, dgt):
    before = {key: x.clone() for key, x in dgt.state_dict().items()}
    report = transplant.transplant(dgt, swin.model.state_dict(), strict=True)
    for i, stage in enumerate(dgt.stages):
        for ours, theirs in zip(stage.blocks, swin.stages[i].blocks):
            there = theirs.get_submodule(swin.attention)
            query, key, value = ours.attention.qkv.bias.chunk(3)
            assert torch.equal(ours.attention.qkv.weight, there.qkv.weight)
            assert torch.equal(query, there.q_bias) and torch.equal(value, there.v_bias)
            assert not key.any()
            assert torch.equal(ours.attention.proj.weight, there.proj.weight)
            assert torch.equal(ours.attention.proj.bias, there.proj.bias)
            assert torch.equal(ours.attention.logit_scale, there.logit_scale)
            for norm in ('norm1', 'norm2'):
                here, there = getattr(ours, norm), getattr(theirs, norm)
                assert torch.equal(here.weight, there.weight)
                assert torch.equal(here.bias, there.bias)
            for layer in ('expand', 'reduce'):
                here = getattr(ours.irffn, layer)
                there = theirs.get_submodule(getattr(swin, layer))
                assert torch.equal(here.weight[..., 0, 0], there.weight)
                assert torch.equal(here.bias, there.bias)
    # 13 tensors a block, four a patch merging, and each source is told of once.
    assert len(report.taken) == 13 * sum(ARCH['depths']) + 4 * 3
    used = {source for sources in report.taken.values() for source in sources}
    assert used | set(report.skipped) == swin.model.state_dict().keys()
    assert not used & set(report.skipped)
    after = dgt.state_dict()
    assert report.taken.keys() | set(report.left) == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in report.left)
    parts = ('cpe', 'depthwise', 'irffn.norm', 'centroids', 'stem.', 'stages.0.merge.')
    ours_alone = [key for key in report.left if not key.startswith('norm')]
    assert all(any(part in key for part in parts) for key in ours_alone)


def without_position_bias(attention):
    """Give every pair of tokens the same, which a softmax does not see."""
    attention.cpb_mlp[2].weight.data.zero_()


def apply_to_map(module, x):
    """(B, H, W, C) -> (B, H', W', C'); those of mmpretrain take tokens and a size."""
    if 'mmpretrain' not in type(module).__module__:
        return module(x)
    out = module(x.flatten(1, 2), x.shape[1:3])
    tokens, size = out if isinstance(out, tuple) else (out, x.shape[1:3])
    return tokens.unflatten(1, size)


@pytest.mark.parametrize('stage', [0, 3], ids=['DG-Attention', 'global attention'])
def test_attention_coincides(swin, dgt, stage):
    """One group that keeps all keys, a window as large as the map."""
    transplant.transplant(dgt, swin.model.state_dict())
    theirs = swin.stages[stage].blocks[0].get_submodule(swin.attention)
    without_position_bias(theirs)
    x = torch.randn(2, WINDOW, WINDOW, SWIN_DIMS << stage, dtype=torch.double)
    side = theirs.window_size[0]
    x = x[:, :side, :side]
    expected = theirs(x.flatten(1, 2)).view_as(x)
    actual = dgt.stages[stage].blocks[0].attention(x)
    torch.testing.assert_close(actual, expected)


def test_the_branch_of_attention_coincides(swin, dgt):
    """With no CPE, and no output of the feed-forward network: norms behind."""
    transplant.transplant(dgt, swin.model.state_dict())
    theirs, ours = swin.stages[0].blocks[0], dgt.stages[0].blocks[0]
    without_position_bias(theirs.get_submodule(swin.attention))
    for norm in theirs.norm2, ours.norm2:
        norm.weight.data.zero_()
        norm.bias.data.zero_()
    ours.cpe.weight.data.zero_()
    ours.cpe.bias.data.zero_()
    x = torch.randn(2, WINDOW, WINDOW, SWIN_DIMS, dtype=torch.double)
    if hasattr(theirs, 'set_input_size'):  # timm's knows the size of its map
        theirs.set_input_size((WINDOW, WINDOW), (WINDOW, WINDOW))
    expected = apply_to_map(theirs, x)
    actual = ours(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('size', [(6, 8), (5, 7)], ids=['even', 'odd'])
def test_patch_merging_coincides(swin, dgt, size):
    transplant.transplant(dgt, swin.model.state_dict())
    x = torch.randn(2, *size, 2 * SWIN_DIMS, dtype=torch.double)
    expected = apply_to_map(swin.stages[2].downsample, x)
    actual = dgt.stages[2].merge(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(actual, expected)


def test_microsofts_layout_and_prefixes(dgt):
    """Theirs has patch merging at the end of a stage, and buffers."""
    swin = timm_swin().model.double()
    weights = {}
    for key, tensor in swin.state_dict().items():
        for stage in 1, 2, 3:
            key = key.replace(
                f'layers.{stage}.downsample', f'layers.{stage - 1}.downsample_'
            )
        weights[key.replace('downsample_', 'downsample')] = tensor
    weights['layers.0.blocks.0.attn.relative_position_index'] = torch.arange(4)
    prefixed = {f'module.encoder.{key}': x for key, x in weights.items()}
    prefixed['module.decoder.weight'] = torch.ones(1)
    report = transplant.transplant(dgt, prefixed, strict=True)
    reduction = swin.layers[3].downsample.reduction.weight
    kernel = dgt.stages[3].merge[0].weight
    assert torch.equal(kernel[:, :, 1, 1], reduction[:, : kernel.shape[1]])
    assert 'layers.0.blocks.0.attn.relative_position_index' in report.skipped
    assert 'module.decoder.weight' in report.skipped


@pytest.mark.parametrize(('size', 'share'), [('small', 0.987), ('base', 0.989)])
def test_all_of_the_published_sizes_fits(size, share):
    timm = pytest.importorskip('timm')
    swin = timm.create_model(f'swinv2_{size}_window8_256', device='meta')
    with torch.device('meta'):
        dgt = DGT(size, out_norm=False)
    report = transplant.transplant(dgt, swin.state_dict(), strict=True)
    assert len(report.taken) == 13 * 22 + 4 * 3
    sizes = {key: x.numel() for key, x in dgt.named_parameters()}
    taken = sum(sizes[key] for key in report.taken)
    assert round(taken / sum(sizes.values()), 3) == share
    # Two blocks more than DGT has.
    unused = {key.split('.attn')[0] for key in report.skipped if 'q_bias' in key}
    assert unused == {'layers.0.blocks.1', 'layers.2.blocks.17'}


def test_strict_names_what_does_not_fit(dgt):
    weights = timm_swin().model.state_dict()
    few = {key: x for key, x in weights.items() if not key.startswith('layers.2.bl')}
    before = {key: x.clone() for key, x in dgt.state_dict().items()}
    with pytest.raises(ValueError, match=r'39 tensors .*stages\.2\.blocks\.0.*not the'):
        transplant.transplant(dgt, few, strict=True)
    assert all(torch.equal(x, before[key]) for key, x in dgt.state_dict().items())
    report = transplant.transplant(dgt, few)
    assert 'stages.2.blocks.0.norm1.weight' in report.left
    assert 'stages.3.blocks.0.norm1.weight' in report.taken


def test_what_is_no_relative_is_refused(dgt):
    weights = timm_swin().model.state_dict()
    with pytest.raises(ValueError, match='not the weights of a Swin Transformer V2'):
        transplant.transplant(dgt, {'conv1.weight': torch.ones(1)})
    with pytest.raises(ValueError, match="arch='small' or 'base'"):
        transplant.transplant(DGT('tiny'), weights)
    with pytest.raises(
        ValueError, match=r'116 tensors .*\(\(8,\) there, \(16,\) here\)'
    ):
        wide = {key: [2 * x for x in ARCH[key]] for key in ('dims', 'num_heads')}
        transplant.transplant(DGT(ARCH | wide), weights)


@pytest.fixture
def command(monkeypatch):
    """The command, for a smaller DGT-S."""
    small = {('s', 'small'): ARCH}
    monkeypatch.setattr(DGT, 'arch_zoo', small)

    def call(*args):
        argv = ['transplant', *map(str, args), '--arch', 'small', '--num-groups', '5']
        monkeypatch.setattr(sys, 'argv', argv)
        run_command(transplant.main)

    return call


def test_the_command_writes_a_checkpoint_of_ours(command, tmp_path, capsys):
    torch.save({'model': timm_swin().model.state_dict()}, tmp_path / 'swin.pth')
    command(tmp_path / 'swin.pth', tmp_path / 'new' / 'dgt.pth', '--strict')
    written = torch.load(tmp_path / 'new' / 'dgt.pth', weights_only=True)
    weights = {
        key.removeprefix('backbone.'): x for key, x in written['state_dict'].items()
    }
    dgt = DGT(ARCH, num_groups=5, out_norm=False)
    dgt.load_state_dict(weights)
    assert written['meta']['transplant']['seed'] == 0
    said = capsys.readouterr().out
    for line in (
        'taken: 116 tensors',
        '     8  stages.*.blocks.*.attention.qkv.weight',
        '     2  layers.*.blocks.*.attn.q_bias',  # blocks more than the DGT has
        '     6  stages.*.blocks.*.attention.centroids',
    ):
        assert f'{line}\n' in said
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['dgt.pth']
    # The same seed leaves the same at random.
    command(tmp_path / 'swin.pth', tmp_path / 'again.pth')
    again = torch.load(tmp_path / 'again.pth', weights_only=True)['state_dict']
    assert all(torch.equal(again[f'backbone.{key}'], x) for key, x in weights.items())


def test_openmmlab_loads_what_the_command_writes(command, tmp_path):
    openmmlab = pytest.importorskip('mmdgt.openmmlab')
    weights = timm_swin().model.state_dict()
    torch.save(weights, tmp_path / 'swin.pth')
    command(tmp_path / 'swin.pth', tmp_path / 'dgt.pth')
    init_cfg = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'dgt.pth'), prefix='backbone.'
    )
    dgt = openmmlab.DGT(ARCH, num_groups=5, init_cfg=init_cfg)
    dgt.init_weights()
    theirs = weights['layers.1.blocks.1.attn.proj.weight']
    assert torch.equal(dgt.stages[1].blocks[1].attention.proj.weight, theirs)


def test_safetensors(command, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    weights = timm_swin().model.state_dict()
    safetensors.save_file(weights, tmp_path / 'model.safetensors')
    command(tmp_path / 'model.safetensors', tmp_path / 'dgt.pth')
    state = torch.load(tmp_path / 'dgt.pth', weights_only=True)['state_dict']
    theirs = weights['layers.2.blocks.1.attn.qkv.weight']
    assert torch.equal(state['backbone.stages.2.blocks.1.attention.qkv.weight'], theirs)


def test_nothing_is_written_if_something_is_wrong(command, tmp_path, monkeypatch):
    source, out = tmp_path / 'swin.pth', tmp_path / 'dgt.pth'
    out.write_text('as it was')
    weights = timm_swin().model.state_dict()
    source.write_text('no checkpoint')
    with pytest.raises(SystemExit, match='damaged'):
        command(source, out)
    with pytest.raises(SystemExit, match='nowhere'):
        command(tmp_path / 'nowhere.pth', out)
    torch.save([1.0], source)
    with pytest.raises(SystemExit, match='expected tensors by their names'):
        command(source, out)
    torch.save(weights | {'norm.bias': torch.tensor([torch.nan])}, source)
    with pytest.raises(SystemExit, match=r'norm\.bias holds a NaN'):
        command(source, out)
    torch.save(weights, source)

    def full(checkpoint, file):
        file.write_text('half of')
        raise OSError('No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='No space left'):
        command(source, out)
    assert out.read_text() == 'as it was'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['dgt.pth', 'swin.pth']
