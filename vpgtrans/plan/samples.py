"""How long a recipe's samples are: measured where its data is at hand, else as stated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vpgtrans.data.config import DataSource, PackingConfig
from vpgtrans.data.mixture import Mixture
from vpgtrans.errors import DataError
from vpgtrans.plan.skeleton import Rows
from vpgtrans.prompts import Prompter

LOOKED_AT = 256
"""Samples that are tokenised."""
TEXT_TOKENS = 32
"""Of an answer, where neither data nor `--text-tokens` says it: a caption with its end token is shorter."""
TEMPLATE_TOKENS = 4
"""Of the words around an image, where there is no tokenizer to count them."""
_DRAWS = 64
"""Micro-batches among which the one with most answer tokens is taken: memory is for the worst."""


@dataclass(frozen=True)
class Lengths:
    """Of some samples their tokens (visual ones included), answer tokens and images' pieces, int64 [n] each.

    source: where they come from, in words. count: of the data set, if known. validation: likewise.
    """

    tokens: np.ndarray
    targets: np.ndarray
    pieces: np.ndarray
    source: str
    count: int | None = None
    validation: int | None = None

    @classmethod
    def stated(cls, text_tokens: int, *, visual: int, pieces: int = 1) -> "Lengths":
        """All alike."""
        tokens = visual * pieces + TEMPLATE_TOKENS + text_tokens
        said = f"assumed: {text_tokens} answer tokens behind {visual * pieces} visual ones"
        return cls(np.array([tokens]), np.array([text_tokens]), np.array([pieces]), said)

    @classmethod
    def measured(cls, mixture: Mixture, prompter: Prompter, *, validation: int) -> "Lengths":
        """Of some of a mixture's samples.

        Raises:
            DataError: none is readable.
        """
        rows = mixture.some(LOOKED_AT, seed=0)
        found = []
        problem: DataError | None = None
        for row in rows:
            try:
                encoded = mixture.encode(row, prompter)
            except DataError as error:
                problem = error
            else:
                found.append((len(encoded), encoded.answers, encoded.pieces))
        if not found:
            raise problem or DataError("the data set is empty")
        tokens, targets, pieces = np.array(found).T
        return cls(tokens, targets, pieces, f"{len(found)} samples of the data", len(mixture), validation)

    def rows(self, size: int) -> Rows:
        """A padded micro-batch of so many samples: the longest one in it, and many answers."""
        drawn = self._drawn(size)
        worst = max(drawn, key=lambda some: int(self.targets[some].sum()))
        lengths = [int(each) for each in self.tokens[worst]]
        lengths[0] = int(self.tokens.max())
        return Rows(lengths, int(self.targets[worst].sum()), max(int(self.pieces[some].sum()) for some in drawn))

    def pack(self, limits: PackingConfig, batch_size: int) -> Rows:
        """A full pack, and many answers."""
        packs = list(self._packs(limits, batch_size))
        worst = max(packs, key=lambda some: int(self.targets[some].sum()))
        lengths = [int(each) for each in self.tokens[worst]]
        left = limits.max_tokens - sum(lengths)
        if left > 1 and len(lengths) < (limits.max_samples or batch_size):
            lengths.append(left)  # a pack that others fill to the brim
        return Rows(lengths, int(self.targets[worst].sum()), int(self.pieces[worst].sum()), packed=True)

    def samples_per_pack(self, limits: PackingConfig, batch_size: int) -> float:
        return float(np.mean([len(pack) for pack in self._packs(limits, batch_size)]))

    def _drawn(self, size: int) -> list[np.ndarray]:
        random = np.random.default_rng(0)
        return [random.integers(0, len(self.tokens), size) for _ in range(_DRAWS)]

    def _packs(self, limits: PackingConfig, batch_size: int) -> Iterator[np.ndarray]:
        """Samples in packs, one after another as they fit; one that is too long for any is left out."""
        fit = np.flatnonzero(self.tokens <= limits.max_tokens)
        if not len(fit):
            raise DataError(
                f"data.packing.max_tokens: {limits.max_tokens} is less than a sample has, {int(self.tokens.min())} or "
                "more"
            )
        most = min(limits.max_samples or batch_size, batch_size)
        drawn = np.random.default_rng(0).choice(fit, 4 * max(LOOKED_AT, most))
        pack: list[int] = []
        tokens = images = 0
        for row in drawn:
            images_too = limits.max_images is not None and images + self.pieces[row] > limits.max_images
            if pack and (tokens + self.tokens[row] > limits.max_tokens or len(pack) == most or images_too):
                yield np.array(pack)
                pack, tokens, images = [], 0, 0
            pack.append(row)
            tokens, images = tokens + self.tokens[row], images + self.pieces[row]


def at_hand(sources: Sequence[DataSource]) -> bool:
    """Whether data is read without a network, as far as its names say."""
    return not any(
        source.dataset.startswith("hf:") or "://" in source.dataset or source.format == "huggingface"
        for source in sources
    )
