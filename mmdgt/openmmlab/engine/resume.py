"""Training that goes on, after an interruption, with the very bits it would have had.

What a sample is augmented with depends on its place in the run alone, not on the worker
that loads it or on what was loaded before, so that loading can start anywhere. What is
random in the main process goes on from its stored state.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_world_size
from mmengine.registry import DATA_SAMPLERS, DATASETS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # that ask a training to stop


def random_state() -> dict:
    """The state of all generators of this process, as plain data."""
    _, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    keys = torch.from_numpy(numpy['state']['key'].astype(np.int64))
    state = dict(
        python=[torch.tensor(words), gauss],
        numpy=[keys, numpy['state']['pos'], numpy['has_gauss'], numpy['gauss']],
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Go on from what :func:`random_state` returned."""
    words, gauss = state['python']
    random.setstate((3, tuple(words.tolist()), gauss))
    keys, *rest = state['numpy']
    np.random.set_state(('MT19937', keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Draw from generators with seeds of their own, for a while, on the CPU."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(int(words[0]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class Draw(NamedTuple):
    """A sample by its index, and its place in the run, which seeds its augmentation."""

    sample: int
    place: tuple[int, ...]


class SeededDataset(Dataset):
    """A data set whose samples are augmented as their place in the run says.

    Args:
        dataset (dict | Dataset): The data set, in mmengine's terms.
    """

    def __init__(self, dataset: dict | Dataset) -> None:
        built: Any = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.dataset = built

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: int | Draw) -> Any:
        if not isinstance(draw, Draw):
            return self.dataset[draw]
        with seeded(*draw.place):
            return self.dataset[draw.sample]

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'dataset':  # not there yet: a copy
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'dataset':
            super().__setattr__(name, value)
        else:  # such as a pipeline, which hooks switch for the last epochs
            setattr(self.dataset, name, value)


class PlacedBatches(Sampler):
    """Batches of :class:`Draw`, from any of them on.

    Args:
        sampler: The indices of this process, from a sampler of mmengine or one that
            has its ``seed`` and ``rank`` too.
        batch_size (int): Samples of a batch.
        batches (dict, optional): Another sampler of batches, in mmengine's terms.
        drop_last (bool): Whether a last batch of fewer samples is left out.

    Attributes:
        start (int): Batches that the next pass leaves out, without loading them.
    """

    def __init__(
        self,
        sampler: Any,
        batch_size: int,
        batches: dict | None = None,
        drop_last: bool = False,
    ) -> None:
        self.sampler, self.batch_size, self.start = sampler, batch_size, 0
        self.batches = (
            DATA_SAMPLERS.build(
                batches, default_args=dict(sampler=sampler, batch_size=batch_size)
            )
            if batches
            else BatchSampler(sampler, batch_size, drop_last)
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        start, self.start = self.start, 0
        run = self.sampler.seed, self.sampler.rank, getattr(self.sampler, 'epoch', 0)
        for number, batch in enumerate(
            itertools.islice(self.batches, start, None), start
        ):
            yield [Draw(index, (*run, number, i)) for i, index in enumerate(batch)]


def resumable(loader: dict) -> dict:
    """The settings of a data loader for training, with samples as their place says."""
    settings = dict(loader)
    batches = dict(
        type=PlacedBatches,
        batches=settings.pop('batch_sampler', None),
        drop_last=settings.pop('drop_last', False),
    )
    dataset = dict(type=SeededDataset, dataset=settings.pop('dataset'))
    return dict(settings, dataset=dataset, batch_sampler=batches)


def steady(loader: DataLoader) -> DataLoader:
    """Keep a loader from what befalls the main process, and the other way round.

    A pass would draw a seed from torch's generator. Workers get the signals that
    people and slurm send to all processes; if they ended, the iteration could not. They
    obey the SIGTERM of a main process that ends, or it would wait for them forever.
    """
    leaving = multiprocessing.RawValue('b', 0)
    # Before multiprocessing ends the workers, which in its own processes atexit is not.
    Finalize(None, setattr, (leaving, 'value', 1), exitpriority=0)
    loader.generator = torch.Generator()
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn, leaving)
    return loader


def _start_worker(then: Any, leaving: Any, worker: int) -> None:
    if os.environ.get('OMP_PROC_BIND', 'false').lower() != 'false':
        # Not the one core to which OpenMP has bound the main thread.
        with contextlib.suppress(AttributeError, OSError):  # where there is no such
            os.sched_setaffinity(0, range(os.sysconf('SC_NPROCESSORS_CONF')))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)
    if then is not None:
        then(worker)


class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's, which also goes on within an epoch.

    Attributes:
        began (int): The iteration that the epoch began with; None if it is not known.
    """

    dataloader: Any  # mmengine's
    _max_iters: int
    began: int | None = None

    def place(self) -> dict[str, Any]:
        """What :meth:`go_on_from` needs to know of an epoch."""
        return dict(
            number=self._epoch,
            began=self.began,
            size=len(self.dataloader),
            samples=self.dataloader.batch_sampler.batch_size * get_world_size(),
        )

    def go_on_from(self, number: int, began: int, size: int, samples: int) -> None:
        """Find the place in the epoch by that of a checkpoint.

        Of an iteration of another size, by a batch or a number of processes, as many
        are left out as have no new sample.
        """
        done = self._iter - began if self._epoch == number else 0
        now = self.place()
        if (size, samples) != (now['size'], now['samples']):
            self.runner.logger.warning(
                f'The checkpoint is of epochs of {size} iterations with {samples}'
                f' samples, this run has {now["size"]} with {now["samples"]}: it goes'
                f' on at the same samples, but schedules count iterations as before'
            )
            left_out = min(done * samples // now['samples'], now['size'])
            done = now['size'] if done == size else left_out
        self._begin_epoch_at(self._iter - done)

    def _begin_epoch_at(self, iteration: int) -> None:
        """Let the epoch have begun with an iteration, and the training end in time."""
        self.began = iteration
        end = iteration + (self._max_epochs - self._epoch) * len(self.dataloader)
        if end != self._max_iters:
            self._max_iters = end
            # With its last iteration gradients that were summed up make a step.
            self.runner.optim_wrapper.initialize_count_status(
                self.runner.model, self._iter, end
            )

    def run_epoch(self) -> None:
        """Run what is left of an epoch."""
        if self.began is None:  # There is no checkpoint, or it is of another hook.
            if self._iter != self._epoch * len(self.dataloader):
                self.runner.logger.warning(
                    'The checkpoint does not say where in its epoch it is, for another'
                    ' hook than AtomicCheckpointHook wrote it: if it was within an'
                    ' epoch, that begins anew'
                )
            self._begin_epoch_at(self._iter)
        done = self._iter - self.began
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        self.dataloader.batch_sampler.start = done
        for number, batch in enumerate(self.dataloader, done):
            self.run_iter(number, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        self.began = self._iter


class ResumableIterLoop(IterBasedTrainLoop):
    """mmengine's, which goes on without loading what was trained on already."""

    dataloader: Any  # mmengine's

    def __init__(self, runner: Any, dataloader: Any, *args: Any, **kwargs: Any) -> None:
        BaseLoop.__init__(self, runner, dataloader)
        loader = self.dataloader
        # mmengine up to 0.10.7 starts to load here, by a pass that ends its
        # InfiniteSampler when another takes its place.
        super().__init__(runner, _NothingYet(loader.dataset), *args, **kwargs)
        self.dataloader = loader
        self.dataloader_iterator = _Passes(loader)

    def run(self) -> Any:
        """Train, or go on."""
        if not hasattr(_InfiniteDataloaderIterator, 'skip_iter'):
            self.dataloader_iterator.skip_iter(self._iter)
            self.dataloader_iterator.behind = self._iter
        return super().run()


class _NothingYet:
    """Stands for a loader, of which it has the data set and no batches."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Passes(_InfiniteDataloaderIterator):
    """The batches of a loader, pass after pass; nothing is loaded before the first.

    Attributes:
        behind (int): Batches that an older mmengine takes to come to where it goes on,
            and which are none.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__(_NothingYet(loader.dataset))
        self._iterator = _one_pass(loader)
        self._dataloader: Any = loader
        self.behind = 0

    def __next__(self) -> Any:
        if self.behind:
            self.behind -= 1
            return None
        return super().__next__()

    def skip_iter(self, num_iters: int) -> None:
        """Go on behind so many batches."""
        batches = self._dataloader.batch_sampler
        if hasattr(batches.sampler, 'epoch'):  # else it has no end
            self._epoch, num_iters = divmod(num_iters, len(batches))
            batches.sampler.set_epoch(self._epoch)
        batches.start = num_iters


def _one_pass(loader: Any) -> Iterator[Any]:
    yield from loader


RESUMABLE = {
    'EpochBasedTrainLoop': ResumableEpochLoop,
    'IterBasedTrainLoop': ResumableIterLoop,
}
