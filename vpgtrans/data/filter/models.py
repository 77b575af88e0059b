"""Scorers that ask a model: the caption loss of one of our VLMs, image-text cosine of a CLIP or SigLIP."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vpgtrans.data.filter.choose import Better
from vpgtrans.data.filter.scorers import Batch, Scorer
from vpgtrans.data.mixture import Mixture
from vpgtrans.data.sources import Source
from vpgtrans.errors import DataError, ReferenceError_
from vpgtrans.prompts import VISUAL, Encoded, TooLong, answer_of
from vpgtrans.references import digest, file_sha256, resolve
from vpgtrans.vision.preprocess import to_rgb
from vpgtrans.vlm import VLM

VLM_SCORES: dict[str, Better] = {"vlm-loss": "low", "vlm-blind-gap": "high", "vlm-gap": "high", "vlm-rank": "high"}


class VlmLoss(Scorer):
    """What a VLM makes of a text, in nats a token of its answers.

    vlm-loss        loss with its own images
    vlm-blind-gap   loss without any image, less that
    vlm-gap         mean loss with the images of other samples, less that: is the text about *this* image?
    vlm-rank        share of those other images with which the text is less likely

    The others are the same few images for all samples, drawn once. The model is opened when it is first needed, and
    sees every image as one square, so that an image of many tiles is no better than another.
    """

    looks = True

    def __init__(
        self,
        source: Source,
        reference: str,
        names: Sequence[str],
        *,
        open_vlm: Callable[[str], VLM],
        others: int = 8,
        batch_size: int = 16,
        seed: int = 0,
    ):
        """names: of `VLM_SCORES`. open_vlm: of a reference. others: images. seed: of their choice.

        Raises:
            ReferenceError_: it is no VLM of ours.
        """
        self.names = {name: better for name, better in VLM_SCORES.items() if name in names}
        self._source = source
        self._batch_size = batch_size
        self._count, self._seed = others, seed
        self._open = lambda: open_vlm(reference).eval()
        found = resolve(reference)
        if found.kind != "vlm":
            raise ReferenceError_(f"{reference}: no VLM directory, run or registry entry of ours")
        self._sha256 = file_sha256(found.path / "manifest.json")

    @property
    def settings(self) -> dict[str, Any]:
        return {"scorer": "vlm", "sha256": self._sha256, "others": self._count, "seed": self._seed}

    @cached_property
    def _vlm(self) -> VLM:
        vlm = self._open()
        vlm.see_squares()
        return vlm

    @cached_property
    def _others(self) -> tuple[list[int], Tensor]:
        """Rows and visual prompts [count + 1, T, d_llm]: one more, because a sample's own image is no other."""
        count = self._count
        rows: list[int] = []
        images: list[Image.Image] = []
        for row in Mixture([(self._source, 1.0)]).some(4 * count + 16, seed=self._seed):
            try:
                sample = self._source.sample(row)
                images += self._source.open(replace(sample, images=sample.images[:1]))
            except DataError:
                continue
            if len(images) > len(rows):
                rows.append(row)
            if len(rows) == count + 1:
                break
        if len(rows) < 2:
            raise DataError(f"{self._source.name}: has no other images to compare with; right would be vlm-loss")
        with torch.no_grad():
            return rows, torch.cat([self._vlm.prompts([image]) for image in images])

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        found = {name: np.full(len(batch.rows), np.nan) for name in self.names}
        encoded: dict[int, Encoded] = {}
        for place, sample in enumerate(batch.samples):
            try:
                encoded[place] = self._vlm.splice.prompter.encode(sample.text)
            except TooLong:
                continue  # this LLM can't judge it
        # Of like lengths, so that little is padded.
        places = sorted(encoded, key=lambda place: len(encoded[place]))
        for start in range(0, len(places), self._batch_size):
            chosen = places[start : start + self._batch_size]
            texts = [encoded[place] for place in chosen]
            images = [image for p, text in zip(chosen, texts, strict=True) for image in batch.images[p][: text.images]]
            for name, values in self._scores([batch.rows[p] for p in chosen], images, texts).items():
                found[name][chosen] = values
        return found

    def _scores(self, rows: list[int], images: list[Image.Image], encoded: list[Encoded]) -> dict[str, np.ndarray]:
        counts = np.array([text.images for text in encoded])
        own = self._loss(self._vlm.prompts(images), encoded)
        scores = {"vlm-loss": own}
        if "vlm-blind-gap" in self.names:
            scores["vlm-blind-gap"] = self._loss(self._vlm.prompts([]), [_blind(text) for text in encoded]) - own
        if not self.names.keys().isdisjoint(("vlm-gap", "vlm-rank")):
            of, prompts = self._others
            # [n, k]: those that are not the sample's own image
            others = np.array([[o for o, other in enumerate(of) if other != row][: len(of) - 1] for row in rows])
            losses = [self._loss(prompts[np.repeat(column, counts)], encoded) for column in others.T]
            scores["vlm-gap"] = np.mean(losses, axis=0) - own
            scores["vlm-rank"] = np.mean(np.array(losses) > own, axis=0)
        # A text without images is not about any.
        return {name: np.where((counts > 0) | (name == "vlm-loss"), scores[name], np.nan) for name in self.names}

    def _loss(self, prompts: Tensor, encoded: list[Encoded]) -> np.ndarray:
        """Nats a token of each text, float64 [n]."""
        nll, rows = self._vlm.splice.token_nll(prompts, encoded)
        sums = np.bincount(rows.cpu().numpy(), weights=nll.double().cpu().numpy(), minlength=len(encoded))
        return sums / np.array([text.answers for text in encoded])


def _blind(text: Encoded) -> Encoded:
    """The same without its visual tokens."""
    words = text.ids != VISUAL
    return Encoded(text.ids[words], text.answer[words], 0)


class Clip(Scorer):
    """Cosine of a text and its image (of several images, the mean) in the space of a CLIP or SigLIP."""

    looks = True

    def __init__(self, reference: str, *, device: torch.device):
        """
        Raises:
            ReferenceError_: it doesn't resolve to a directory with a model.
        """
        self.names = {"clip": "high"}
        self._reference = reference
        self._device = device
        self._path = resolve(reference).path
        weights = sorted(file for file in self._path.glob("*") if file.suffix in (".safetensors", ".bin"))
        if not weights:
            raise ReferenceError_(f"{reference}: no weights in {self._path}; right would be a CLIP or SigLIP")
        self._weights = {file.name: digest(file).hex() for file in weights}

    @property
    def settings(self) -> dict[str, Any]:
        return {"scorer": "clip", "weights": self._weights}

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        """Model and processor.

        Raises:
            ReferenceError_: they are none of images and texts.
        """
        from transformers import AutoModel, AutoProcessor

        try:
            model: Any = AutoModel.from_pretrained(self._path, dtype=torch.float32).eval().to(self._device)
            processor: Any = AutoProcessor.from_pretrained(self._path, use_fast=False)
        except (OSError, ValueError) as error:
            raise ReferenceError_(f"{self._reference}: not readable as a CLIP or SigLIP: {error}") from error
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ReferenceError_(
                f"{self._reference}: a {model.config.model_type} gives no features of images and texts; right would be "
                "a CLIP or SigLIP"
            )
        return model, processor

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        found = np.full(len(batch.rows), np.nan)
        places = [place for place, images in enumerate(batch.images) if images]
        if places:
            opened = [batch.images[place] for place in places]
            images = [to_rgb(image) for several in opened for image in several]
            owner = torch.tensor([i for i, several in enumerate(opened) for _ in several], device=self._device)
            cosine = self._cosine(images, [answer_of(batch.samples[place].text) for place in places], owner)
            found[places] = cosine.double().cpu().numpy()
        return {"clip": found}

    def _cosine(self, images: list[Any], texts: list[str], owner: Tensor) -> Tensor:
        """Images [m], texts [n] and the text of each image -> [n]."""
        model, processor = self._opened
        # SigLIP was trained with texts padded to its full length; CLIP gives the same either way.
        length = model.config.get_text_config().max_position_embeddings
        padding = {"padding": "max_length", "max_length": length, "truncation": True}
        pixels = processor(images=images, return_tensors="pt").to(self._device)
        words = processor(text=texts, return_tensors="pt", **padding).to(self._device)
        of_images = _features(model.get_image_features(**pixels))
        of_texts = _features(model.get_text_features(**words))
        cosine = (F.normalize(of_images, dim=1) * F.normalize(of_texts, dim=1)[owner]).sum(dim=1)
        sums = torch.zeros(len(texts), device=self._device).index_add_(0, owner, cosine)
        return sums / torch.bincount(owner, minlength=len(texts))


def _features(given: Any) -> Tensor:
    """Transformers 5 wraps features in an output, earlier versions give them bare."""
    return given if isinstance(given, Tensor) else given.pooler_output
