"""Mixed precision and activation checkpointing: training and its memory."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from test_configs import BATCHES, CONFIGS, build, smaller
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdgt import DGT, update_centroids

TINY = dict(
    dims=[16, 32, 48, 64], depths=(1, 1, 2, 1), num_heads=(2, 2, 3, 4), stem_dims=16
)
# What follows the backbone's widths.
WIDTHS = {
    'mmseg': {
        'decode_head.in_channels': TINY['dims'],
        'auxiliary_head.in_channels': TINY['dims'][2],
    },
    'mmdet': {'neck.in_channels': TINY['dims']},
    'mmpretrain': {'head.in_channels': TINY['dims'][3]},
}
DEMOS = {
    'mmseg': 'upernet_dgt_t_demo',
    'mmdet': 'mask_rcnn_dgt_t_demo',
    'mmpretrain': 'dgt_t_demo',
}
WRAPPERS = {
    ('cpu', 'bfloat16'): 'BFloat16OptimWrapper',
    ('cuda', 'bfloat16'): 'BFloat16OptimWrapper',
    ('cuda', 'float16'): 'AmpOptimWrapper',
}


@pytest.mark.parametrize('framework', BATCHES)
@pytest.mark.parametrize(('device', 'dtype'), WRAPPERS)
def test_mixed_precision_learns(framework, device, dtype):
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('needs a GPU')
    name = DEMOS[framework]
    settings, num_classes = smaller(Config.fromfile(CONFIGS / f'{name}.py').model)
    settings |= WIDTHS[framework] | {'backbone.num_keys': 10}
    settings = {f'model.{key}': value for key, value in settings.items()}
    cfg, model = build(name, TINY, **settings)
    model.to(device).train()
    cfg.optim_wrapper.type = WRAPPERS[device, dtype]
    wrapper = Runner.build_optim_wrapper(
        type('Runner', (), dict(model=model))(), cfg.optim_wrapper
    )
    dtypes = set()

    def note(module, args, out):
        dtypes.add(out.dtype)

    model.backbone.stages[0].merge[0].register_forward_hook(note)
    batch = BATCHES[framework](num_classes)
    losses = []
    for _ in range(100):
        losses.append(model.train_step(batch, wrapper)['loss'].item())
        update_centroids(model, keep=1e-4)
    assert dtypes == {getattr(torch, dtype)}
    assert np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert all(p.dtype == torch.float32 for p in model.parameters())


class Allocations(TorchDispatchMode):
    """Knows every storage that was made beside a model, and which still live."""

    def __init__(self, model):
        super().__init__()
        own = (*model.parameters(), *model.buffers())
        self.own = {StorageWeakRef(tensor.untyped_storage()) for tensor in own}
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (ref := StorageWeakRef(storage)) not in self.own:
                    self.sizes[ref] = storage.nbytes()
        return out

    def live(self):
        return sum(size for ref, size in self.sizes.items() if not ref.expired())


def test_checkpointing_halves_the_activations():
    """At 1024 x 1024 pixels; nothing is computed, sizes follow from the shapes."""
    kept = {}
    for with_cp in (False, True):
        with torch.device('meta'):
            model = DGT(num_keys=392, with_cp=with_cp).train()
            images = torch.empty(1, 3, 1024, 1024)
        with Allocations(model) as allocations:
            outs = model(images)
            kept[with_cp] = allocations.live()
            del outs
        # Without the graph nearly nothing is left: these were activations.
        assert allocations.live() < 0.1 * kept[with_cp]
    assert kept[True] < kept[False] / 2
