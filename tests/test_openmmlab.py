"""The backbone as OpenMMLab builds it."""

import re
import sys

import pytest
import torch
from conftest import REPOSITORY
from mmengine.analysis import FlopAnalyzer
from mmengine.registry import MODELS, DefaultScope
from test_dgt import PUBLISHED, TINY, classifier
from torch import nn

import mmdgt
from mmdgt.models import DynamicGroupAttention
from mmdgt.openmmlab import DGT
from mmdgt.openmmlab.registration import register_backbone


@pytest.mark.parametrize('framework', ['mmpretrain', 'mmdet', 'mmseg'])
def test_registered(framework):
    registry = pytest.importorskip(f'{framework}.registry').MODELS
    assert registry.module_dict['DGT'] is DGT
    with DefaultScope.overwrite_default_scope(framework):
        model = registry.build(dict(type='DGT', arch=TINY, num_groups=3, num_keys=4))
    assert isinstance(model, DGT)


@pytest.mark.parametrize(
    'failure', ['assert False, "MMCV==2.2.0 is used"', 'import no_such_module']
)
def test_a_framework_that_does_not_import_costs_no_other(
    tmp_path, monkeypatch, failure
):
    others = [pytest.importorskip(f'{x}.registry').MODELS for x in ('mmdet', 'mmseg')]
    for name in [x for x in sys.modules if x.split('.')[0] == 'mmpretrain']:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / 'mmpretrain').mkdir()
    (tmp_path / 'mmpretrain/__init__.py').write_text(failure)
    monkeypatch.syspath_prepend(tmp_path)

    class Fresh(nn.Module):
        pass

    try:
        with pytest.warns(UserWarning, match='Fresh is not registered in mmpretrain'):
            register_backbone(Fresh)
        assert all(registry.module_dict['Fresh'] is Fresh for registry in others)
        with pytest.warns(UserWarning):  # and once more is no error
            register_backbone(Fresh)
    finally:
        for registry in others:
            registry.module_dict.pop('Fresh', None)


@pytest.mark.parametrize('arch', PUBLISHED)
def test_flops_of_table_1_by_the_counter_of_mmengine(arch):
    analyzer = FlopAnalyzer(classifier(arch), torch.randn(1, 3, 224, 224))
    analyzer.unsupported_ops_warnings(False)
    assert analyzer.total() / 1e9 == pytest.approx(PUBLISHED[arch][1], rel=0.015)
    page = (REPOSITORY / 'docs/cmt.md').read_text()
    (printed,) = re.findall(r'^\| pooling first \| (.+) \|$', page, re.MULTILINE)
    assert (
        printed.split(' | ')[[*PUBLISHED].index(arch)]
        == f'{analyzer.total() / 1e9:.3f}'
    )


def test_the_same_network_as_without_openmmlab():
    ours, core = DGT(TINY).eval(), mmdgt.DGT(TINY).eval()
    core.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert all(map(torch.equal, ours(image), core(image)))


def test_norm_cfg():
    model = DGT(TINY, norm_cfg=dict(type='GN', num_groups=4))
    kinds = {type(m) for m in model.modules()}
    assert nn.GroupNorm in kinds and nn.BatchNorm2d not in kinds
    frozen = DGT(TINY, norm_cfg=dict(type='BN', requires_grad=False))
    assert not frozen.stem[2].weight.requires_grad


def test_a_registered_rule_of_choice():
    @MODELS.register_module()
    class RuleOfChoice(DynamicGroupAttention):
        pass

    try:
        for mixer in ('RuleOfChoice', dict(type='RuleOfChoice', num_groups=5)):
            model = DGT(TINY, token_mixer=mixer)
            assert type(model.stages[0].blocks[0].attention) is RuleOfChoice
        assert len(model.stages[0].blocks[0].attention.centroids[0]) == 5
    finally:
        MODELS.module_dict.pop('RuleOfChoice')
