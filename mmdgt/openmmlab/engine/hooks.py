"""Hooks for mmengine's Runner."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook, LoggerHook
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ...models import update_centroids
from ...visualization import draw_groups, find_groups, find_layer, viewable
from ...weights import not_finite, some


@HOOKS.register_module()
class CentroidHook(Hook):
    """Updates the centroids of DG-Attention and reports on their groups.

    After every training iteration: eqs. 3 and 4 with ``tau = factor * lr``, lr as
    the schedule has it in that iteration. Whenever the training log gets a line, for
    each layer that trains: the share of its groups that got a query (``live``) and the
    share of a head's queries that fell to its largest group (``largest``, the worst
    head).
    Both go to the visualizer as ``groups/...`` and, the worst of all layers, to the
    training log.

    Args:
        factor (float): tau over the learning rate.
        mirrored (bool): Whether tau weighs the new mean instead of the old
            centroid, the usual form of a moving average. Eq. 4 as printed, the
            default, gives a small tau to the old centroid.
        reseed (bool): Whether a group without queries splits a large one instead of
            keeping its centroid (:func:`mmdgt.update_centroids`).
    """

    priority = 'ABOVE_NORMAL'  # before EMAHook copies the centroids to its model

    def __init__(
        self, factor: float = 0.1, mirrored: bool = False, reseed: bool = False
    ) -> None:
        self.factor = factor
        self.mirrored = mirrored
        self.reseed = reseed

    def before_train(self, runner: Runner) -> None:
        """Look up when the training log gets a line."""
        loggers = (h for h in runner.hooks if isinstance(h, LoggerHook))
        self.logger = next(loggers, LoggerHook(interval=50))

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Update the centroids, before the schedule moves the learning rate on."""
        learning_rates = runner.optim_wrapper.get_lr()
        # Parameter groups may scale the rate; base_lr is the one before that.
        tau = self.factor * learning_rates.get('base_lr', learning_rates['lr'])[0]
        keep = 1 - tau if self.mirrored else tau
        group_counts = update_centroids(_unwrap(runner.model), keep, self.reseed)
        if not self._line_is_due(runner, batch_idx):
            return
        # The others do not train: frozen stages, a teacher.
        trained = {name: x for name, x in group_counts.items() if x.any()}
        if trained:
            self._report(runner, trained)

    def _line_is_due(self, runner: Runner, batch_idx: int) -> bool:
        """Whether LoggerHook, which comes later, will write one."""
        interval, loader = self.logger.interval, runner.train_dataloader
        if self.every_n_inner_iters(batch_idx, interval):
            return True
        last = not self.logger.ignore_last or len(loader) <= interval
        return last and self.end_of_epoch(loader, batch_idx)

    def _report(self, runner: Runner, group_counts: dict[str, Tensor]) -> None:
        usage = {name: group_usage(counts) for name, counts in group_counts.items()}
        scalars = {
            f'groups/{name}/{what}': share
            for name, shares in usage.items()
            for what, share in zip(('live', 'largest'), shares, strict=True)
        }
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
        live, largest = zip(*usage.values(), strict=True)
        runner.message_hub.update_scalar('train/live_groups', min(live))
        runner.message_hub.update_scalar('train/largest_group', max(largest))


def _unwrap(model: nn.Module) -> Any:
    """The model as the config describes it, without DDP or FSDP around it."""
    return model.module if is_model_wrapper(model) else model


def group_usage(counts: Tensor) -> tuple[float, float]:
    """Share of live groups, and of the largest group in the worst head.

    Args:
        counts (Tensor): (H, G), queries in every group.
    """
    live = (counts > 0).double().mean()
    largest = (counts.amax(1) / counts.sum(1).clamp(min=1)).max()
    return live.item(), largest.item()


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Writes checkpoints of plain data, which ``weights_only=True`` can load.

    mmengine pickles the logged history as objects of its own, which torch from 2.6
    on refuses to load safely. They are stored as tensors and restored on resume.
    Functions, of which ``OneCycleLR`` keeps one, are left out: resumed, it has its own.
    """

    priority = 'VERY_LOW'  # after every hook that adds to the checkpoint

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Turn what is not plain data into plain data."""
        for key in checkpoint.keys() - {'state_dict', 'optimizer'}:
            checkpoint[key] = _map_leaves(_to_plain, checkpoint[key])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Turn the logged history back into mmengine's objects."""
        if 'message_hub' in checkpoint:
            scalars = checkpoint['message_hub']['log_scalars']
            for name, history in scalars.items():
                if isinstance(history, dict):
                    scalars[name] = _to_history(**history)


def _map_leaves(function: Callable[[Any], Any], data: Any) -> Any:
    """Apply a function to everything in nested dicts, lists, tuples, but functions."""
    if isinstance(data, dict):
        return {
            key: _map_leaves(function, value)
            for key, value in data.items()
            if not inspect.isroutine(value)
        }
    if isinstance(data, (list, tuple)):
        return type(data)(_map_leaves(function, value) for value in data)
    return function(data)


def _to_plain(value: Any) -> Any:
    if isinstance(value, HistoryBuffer):
        log_history, count_history = map(torch.as_tensor, value.data)
        return dict(log_history=log_history, count_history=count_history)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return value


def _to_history(log_history: Tensor, count_history: Tensor) -> HistoryBuffer:
    return HistoryBuffer(log_history.cpu().numpy(), count_history.cpu().numpy())


@HOOKS.register_module()
class LabelCheckHook(Hook):
    """Stops with the name of the file if a label map has labels of no class.

    Without it a GPU fails somewhere in the loss, without a name.
    """

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Look at the label maps of the batch, before they go to the device."""
        self._check(runner, data_batch)

    def before_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Look at the label maps of the batch."""
        self._check(runner, data_batch)

    def _check(self, runner: Runner, data_batch: dict) -> None:
        head: Any = getattr(_unwrap(runner.model), 'decode_head', None)
        if head is None:
            return
        if isinstance(head, nn.ModuleList):  # a cascade, which ends in the last
            head = head[-1]
        for sample in data_batch['data_samples']:
            labels = sample.gt_sem_seg.data
            wrong = labels[(labels >= head.num_classes) & (labels != head.ignore_index)]
            if wrong.numel():
                raise ValueError(
                    f'{sample.seg_map_path} has label {wrong.max().item()}, expected 0'
                    f' to {head.num_classes - 1}, or {head.ignore_index} for what does'
                    f' not count, after reduce_zero_label={sample.reduce_zero_label}.'
                    f' Fix the label map, or set num_classes of decode_head and'
                    f' auxiliary_head and the classes in the metainfo of the dataset'
                )


@HOOKS.register_module()
class LossCheckHook(Hook):
    """Stops before a loss that is not finite reaches the weights.

    Names what went wrong first: the pictures, a weight, or, if one process trains, the
    module whose output was the first with a NaN or infinity. Costs one wait for the
    device an iteration, and nothing a layer: the pass is repeated, layer by layer, only
    to find the culprit.
    """

    def before_train(self, runner: Runner) -> None:
        """Look at the losses of every forward pass from now on."""
        self.handle = _unwrap(runner.model).register_forward_hook(
            partial(self._check, runner), with_kwargs=True
        )

    def after_train(self, runner: Runner) -> None:
        """Look no longer."""
        self.handle.remove()

    def _check(
        self, runner: Runner, model: nn.Module, args: tuple, kwargs: dict, losses: Any
    ) -> None:
        if kwargs.get('mode') != 'loss':
            return
        terms = {  # as parse_losses of mmengine adds them up
            name: [value] if isinstance(value, Tensor) else value
            for name, value in losses.items()
            if 'loss' in name
        }
        sums = [
            torch.stack([x.detach().float().sum() for x in term]).sum()
            for term in terms.values()
        ]
        finite = torch.stack(sums).isfinite().tolist()
        wrong = [name for name, fine in zip(terms, finite, strict=True) if not fine]
        if wrong:
            self.handle.remove()
            raise FloatingPointError(
                f'iteration {runner.iter + 1}: {", ".join(wrong)} is not finite;'
                f' {_culprit(model, args, kwargs)}. The weights are those of the'
                f' iteration before; try a smaller learning rate, clip_grad, or'
                f' bfloat16 in place of float16'
            )


def _culprit(model: nn.Module, args: tuple, kwargs: dict) -> str:
    """What is not finite first, in the order of the pass."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if not all(x.isfinite().all() for x in tensors):
        samples = kwargs.get('data_samples') or []
        files = ', '.join(str(sample.get('img_path')) for sample in samples)
        return f'the pictures of the batch are not ({files})'
    if bad := not_finite(dict(model.named_parameters())):
        return f'weights are not: {some(bad)}'
    # The other processes would not take part in what the pass exchanges with them.
    if get_world_size() > 1:
        return (
            'the pictures of the batch and the weights are; a run in one process names'
            ' the module whose output is the first that is not'
        )
    found = []

    def look(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        outputs = output if isinstance(output, (list, tuple)) else [output]
        tensors = [x for x in outputs if isinstance(x, Tensor)]
        if not all(x.isfinite().all() for x in tensors):
            found.append(f'{name} ({type(module).__name__})')

    handles = [
        module.register_forward_hook(partial(look, name))
        for name, module in model.named_modules()
        if name
    ]
    with torch.no_grad():
        model.forward(*args, **kwargs)
    for handle in handles:
        handle.remove()
    where = found[0] if found else 'no module, so the loss itself'
    return f'the first output that is not is of {where}'


@HOOKS.register_module()
class GroupVisualizationHook(Hook):
    """Draws the groups of the first validation image at every validation.

    The picture goes to all back ends of the visualizer, such as the folder of
    ``LocalVisBackend`` or ``TensorboardVisBackend``.

    Args:
        stage, block, head (int): As in :func:`mmdgt.visualization.find_groups`.
    """

    def __init__(self, stage: int = 1, block: int = 1, head: int = 1) -> None:
        self.place = dict(stage=stage, block=block, head=head)

    def before_run(self, runner: Runner) -> None:
        """Make sure now, not at the first validation, that the head is there."""
        find_layer(_unwrap(runner.model), **self.place)

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Draw if it is the first batch."""
        if batch_idx:
            return
        model = _unwrap(runner.model)
        first = {key: values[:1] for key, values in data_batch.items()}
        inputs = model.data_preprocessor(first)['inputs']
        groups = find_groups(model, inputs, **self.place)
        picture = draw_groups(viewable(first['inputs'][0]), groups)
        place = '_'.join(f'{what}{number}' for what, number in self.place.items())
        runner.visualizer.add_image(f'groups_{place}', picture, step=runner.iter)
