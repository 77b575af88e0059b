"""What is in memory while operations run that compute nothing: every tensor's storage, from its birth to its end."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["weights", "gradients", "logits", "activations"]


class Ledger(TorchDispatchMode):
    """Within it the storages that operations make are counted, and their peak is remembered by kind.

    It stands above a `FakeTensorMode`, and answers what that can't know: how many places of a mask are true.

    Attributes:
        peak: bytes at the highest moment so far, by kind.
    """

    def __init__(self, module: nn.Module, *, vocabulary: int):
        """module: its parameters and buffers are weights, and no one else's. vocabulary: the logits' last dimension."""
        super().__init__()
        self.vocabulary = vocabulary
        self.peak: Counter[Kind] = Counter()
        self.places = 0
        """How many places of any mask are true."""
        self.whole = False
        """Whether masks are true everywhere, where somebody asks."""
        self._now: Counter[Kind] = Counter()
        self._kinds: dict[int, Kind] = {}
        for tensor in [*module.parameters(), *module.buffers()]:
            self._kinds[tensor.untyped_storage()._cdata] = "weights"
        self._module = module

    def start(self) -> None:
        """Forget the peak so far."""
        self.peak = self._now.copy()

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Within the block what a parameter gathers is told apart as its gradient."""
        handles = [
            parameter.register_post_accumulate_grad_hook(self._gathered)
            for parameter in self._module.parameters()
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and arguments[0].dtype == torch.bool:
            return self.whole
        if function is torch.ops.aten.index.Tensor:
            arguments = (arguments[0], [found for index in arguments[1] for found in self._where(index)])
        found = function(*arguments, **(named or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._born(leaf)
        return found

    def _where(self, index: Tensor | None) -> list[Tensor | None]:
        """A mask as the places where it is true, an index of each of its dimensions."""
        if index is None or index.dtype != torch.bool:
            return [index]
        return [index.new_empty(self.places, dtype=torch.long) for _ in range(index.ndim)]

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        large = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
        kind: Kind = "logits" if large else "activations"
        self._kinds[key] = kind
        self._add(kind, storage.nbytes())
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._now[self._kinds.pop(key)] -= size

    def _gathered(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        before = self._kinds.get(storage._cdata)
        if before is not None and before != "gradients":
            self._now[before] -= storage.nbytes()
            self._kinds[storage._cdata] = "gradients"
            self._add("gradients", storage.nbytes())

    def _add(self, kind: Kind, size: int) -> None:
        self._now[kind] += size
        if self._now.total() > self.peak.total():
            self.peak = self._now.copy()
