"""The batches of a stage, in the order of the run, and of its validation set."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import IterableDataset

from vpgtrans.errors import TrainingError
from vpgtrans.training.draws import Drawn, Draws
from vpgtrans.training.module import StageModule
from vpgtrans.training.samples import Batch, Loaded, Samples, Unreadable
from vpgtrans.training.workers import Loader, Work


class _Planned(Work[Loaded]):
    """Batches by number, each of given rows."""

    def __init__(self, samples: Samples, plan: Callable[[int], Drawn], length: int):
        """plan: number of a batch -> its samples."""
        self.samples = samples
        self.plan = plan
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Loaded:
        if not 0 <= number < self.length:
            raise IndexError(number)
        drawn = self.plan(number)
        rows, *more = (None if part is None else part.tolist() for part in (drawn.rows, drawn.positions, drawn.packs))
        assert rows is not None
        return self.samples.load(rows, positions=more[0], packs=more[1])

    def begin(self) -> None:
        self.samples.reopen()


class Updates(IterableDataset[Batch]):
    """The batches of a stage from update `start` on; a device gets its share of every batch."""

    def __init__(self, samples: Samples, draws: Draws, *, start: int, stop: int, workers: int = 0, pin: bool = False):
        """workers, pin: see `Loader`."""
        self.samples = samples
        self.draws = draws
        self.start = start
        self.stop = stop
        self.workers = workers
        self.pin = pin
        self.rank, self.world = 0, 1
        self._loader: Loader[Loaded] | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def _own(self, number: int) -> Drawn:
        return self.draws.update(self.start + number, rank=self.rank, world=self.world)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._loader = Loader(_Planned(self.samples, self._own, len(self)), workers=self.workers, pin=self.pin)
        try:
            for number, loaded in enumerate(self._loader):
                # Of several devices each counts what all of them see.
                drawn = self.draws.update(self.start + number) if self.samples.bad.shared else self._own(number)
                yield self.samples.finish(loaded, seen=self.samples.see(drawn.rows))
        finally:
            self.close()

    def close(self) -> None:
        """End the processes that load."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def visited(self) -> np.ndarray:
        """The distinct samples that the whole stage holds, also in its updates before `start`, int64 [n]."""
        return self.draws.visited(self.stop)

    def prepare(self, title: str, *, each: Callable[[], None]) -> list[Unreadable]:
        """Fill the caches with all that these updates need, see `Samples.prepare`."""
        if not len(self) or not self.samples.cached:
            return []
        drawn = [self.draws.update(update) for update in range(self.start, self.stop)]
        rows = np.concatenate([each.rows for each in drawn]).tolist()
        positions = np.concatenate([each.positions for each in drawn if each.positions is not None]).tolist()
        return self.samples.prepare(rows, title, positions=positions, each=each, workers=self.workers)


class Validator:
    """Loss on the validation set, per answer token; of several devices each takes its share of the rows."""

    def __init__(
        self,
        samples: Samples,
        rows: Sequence[int],
        *,
        batch_size: int = 32,
        workers: int = 0,
        pack_tokens: int | None = None,
    ):
        """pack_tokens: pack samples into rows of at most so many tokens."""
        self.samples = samples
        self.rows = list(rows)
        self.batch_size = batch_size
        self.pack_tokens = pack_tokens
        self.workers = workers
        self._loader: Loader[Loaded] | None = None

    @torch.no_grad()
    def __call__(self, module: StageModule, *, each: Callable[[], None] = lambda: None) -> float:
        """The caption loss, in nats a token, over all validation samples; where it is not trained, what is.

        Every device returns the same value. `each` is called after every batch.

        Raises:
            TrainingError: no validation sample is readable.
        """
        module.eval()
        names = list(module.objectives)
        sums, weights = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for part in module.together.paced(self._parts(module)):
            for name, (summed, _) in module.losses(part).items():
                sums[name] += summed.item()
                weights[name] += module.objectives[name].weight(part, module.vlm.vpg.tokens)
            each()
        module.train()
        sums = dict(zip(names, module.over_devices(list(sums.values())), strict=True))
        weights = dict(zip(names, module.over_devices(list(weights.values())), strict=True))
        # The caption loss alone where it is there: it is what arms and stages are compared by.
        counted = ["caption"] if "caption" in names else names
        if not all(weights[name] for name in counted):
            raise TrainingError("no validation sample is readable; quarantine.jsonl says why")
        return sum(sums[name] / weights[name] for name in counted)

    def prepare(self, title: str, *, each: Callable[[], None]) -> list[Unreadable]:
        """Fill the caches with all validation samples, see `Samples.prepare`."""
        return self.samples.prepare(self.rows, title, each=each, workers=self.workers)

    def close(self) -> None:
        """End the processes that load."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _parts(self, module: StageModule) -> Iterator[Batch]:
        """What goes through the model at once."""
        for batch in self._batches(module):
            yield from (batch if self.pack_tokens is None else batch.packed(self.pack_tokens)).parts(None)

    def _batches(self, module: StageModule) -> Iterator[Batch]:
        seen = self.samples.see(self.rows)
        own = np.array(self.rows[module.rank :: module.world], dtype=np.int64)
        if self._loader is None:
            size = self.batch_size

            def plan(number: int) -> Drawn:
                return Drawn(own[number * size : (number + 1) * size])

            self._loader = Loader(_Planned(self.samples, plan, -(-len(own) // size)), workers=self.workers)
        for loaded in self._loader:
            yield self.samples.finish(loaded, seen=seen)
            seen = 0
