"""The backbone still computes what it computed when tests/data/golden.pth was made."""

from pathlib import Path

import pytest
import torch

from mmdgt import DGT
from mmdgt.ops import use_backend

GOLDEN = torch.load(Path(__file__).parent / 'data/golden.pth', weights_only=True)


@pytest.mark.parametrize('backend', ['reference', 'fused'])
@pytest.mark.parametrize('case', GOLDEN['cases'], ids=['pre-norm', 'post-norm'])
def test_no_drift(case, backend):
    if backend == 'fused':
        pytest.importorskip('mmdgt._ext', reason='the extension is not built')
    model = DGT(**case['settings']).eval()
    model.load_state_dict(case['state_dict'])
    with torch.no_grad(), use_backend(backend):
        outputs = model(GOLDEN['image'] / 64 - 2)
    for ours, frozen in zip(outputs, case['outputs'], strict=True):
        torch.testing.assert_close(ours, frozen, atol=1e-4, rtol=1e-4)
