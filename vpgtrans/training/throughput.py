"""How fast a stage trains: samples and real tokens a second, and the share of the processor's peak that is used.

MFU as PaLM (2022, appendix B) counts it: the operations that forward and backward passes need, recomputed activations
aside, over what the processor could do in the same time. It is that of the first device's own share of every batch.
"""

from collections.abc import Callable
from typing import Any

from vpgtrans.flops import StageFlops
from vpgtrans.gpus import of_device
from vpgtrans.memory import span_peak
from vpgtrans.training.config import Stage
from vpgtrans.training.samples import Batch
from vpgtrans.vlm import VLM

Operations = Callable[[list[Batch]], float]
"""Floating-point operations of updates, forward and backward."""


def meter_of(vlm: VLM, stage: Stage, total: dict[str, Any], *, cached: bool) -> "Meter":
    """The meter of a stage on the device that the VLM is on; MFU is known on types of GPUs that `gpus` lists.

    cached: images don't pass the encoder, because its features are kept.
    """
    gpu = of_device(vlm.device.index or 0) if vlm.device.type == "cuda" else None
    if gpu is None:
        return Meter(total)
    flops = StageFlops(vlm, stage.trainable)

    def operations(batches: list[Batch]) -> float:
        texts = [text for batch in batches for text in batch.encoded]
        images = sum(text.pieces for text in texts)
        return flops.update(
            lengths=[len(text) for text in texts],
            targets=sum(text.answers for text in texts),
            images=images,
            encoded=0 if cached else images,
        )

    return Meter(total, operations=operations, peak=gpu.bf16 or gpu.fp32)


class Meter:
    """Adds up the updates of a stage; what it knows is in `total`, so that a resumed run counts on.

    Nothing here asks the device for anything: time is taken where an update has ended anyway.
    """

    def __init__(self, total: dict[str, Any], *, operations: Operations | None = None, peak: float | None = None):
        """total: of `Progress.work`, which is written to. operations, peak: of this device; None: MFU is not known."""
        self.total = total
        for name in ("seconds", "samples", "tokens", "operations"):
            total.setdefault(name, 0)
        self.operations = operations
        self.peak = peak
        self._pending: list[Batch] = []
        self._before = dict(total)

    def add(self, batch: Batch, *, seconds: float, samples: int, tokens: float) -> None:
        """An update. batch: this device's share; samples, tokens: of all devices."""
        self.total["seconds"] += seconds
        self.total["samples"] += samples
        self.total["tokens"] += int(tokens)
        if self.operations is not None and self.peak:
            # Not the images: what is counted are lengths, and pixels would stay in memory until the next line.
            self._pending.append(Batch(batch.ids, [], batch.encoded, []))

    def flush(self) -> None:
        """Count the operations of the updates since the last time: before `total` is written anywhere."""
        if self._pending and self.operations is not None:
            self.total["operations"] += self.operations(self._pending)
            self._pending = []

    def line(self) -> dict[str, float | int | None]:
        """Figures for the log, over the updates since the last line; memory is the peak of the stage so far."""
        self.flush()
        span = {name: value - self._before[name] for name, value in self.total.items()}
        self._before = dict(self.total)
        return self._figures(span) | {"memory_bytes": span_peak()}

    def overall(self) -> dict[str, float | None]:
        """The same over the whole stage."""
        self.flush()
        return self._figures(self.total)

    def _figures(self, span: dict[str, Any]) -> dict[str, Any]:
        seconds = span["seconds"]
        if not seconds:
            return {"samples_per_second": None, "tokens_per_second": None, "mfu": None}
        return {
            "samples_per_second": round(span["samples"] / seconds, 3),
            "tokens_per_second": round(span["tokens"] / seconds, 1),
            "mfu": round(span["operations"] / seconds / self.peak, 4) if self.peak and self.operations else None,
        }
