"""What a recipe says about data: one entry a source (no torch here)."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from vpgtrans.config import Config

Format = Literal["auto", "openmoji", "table", "llava", "coco", "vqa", "gqa", "webdataset", "folder", "huggingface"]


LONGEST_PACK = 1 << 30
"""Tokens; what is longer stands for samples that are none."""


class PackingConfig(Config):
    """Samples share a row of at most so many tokens, images and samples, without seeing each other."""

    max_tokens: Annotated[int, Field(gt=0, le=LONGEST_PACK)]
    """Tokens of a row, visual ones included. A sample that is longer is left out, and counted."""
    max_images: PositiveInt | None = None
    """Of a row; null: no limit."""
    max_samples: PositiveInt | None = None
    """Of a row; null: no limit."""


class DataSource(Config):
    """One set of samples: images with captions, questions with answers, conversations, documents or plain text."""

    dataset: str = Field(min_length=1)
    """`openmoji`; a file; a directory; tar shards (`shards/{000..099}.tar`, any fsspec URL); `hf:ORG/NAME[@REV]`."""
    format: Format = "auto"
    """How it is laid out, see `data.formats`; auto: by the file's ending."""
    split: str = "train"
    """Of a data set that has several."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of this source in the mixture, relative to the others' weights."""
    filter: str | None = None
    """A parquet file with a boolean column `keep` (`vpgtrans data filter` writes one): rows that are not kept are as
    rows that are not there. It belongs to this data set by row number, or by `id`."""
    limit: PositiveInt | None = None
    """Take at most this many rows, the first ones in the source's own order."""
    folder: str | None = None
    """What image paths are relative to; null: the folder of the file that names them."""
    annotations: str | None = None
    """vqa: the file of answers beside the file of questions."""
    streaming: bool = False
    """huggingface: read from the hub as the run goes on, download nothing beforehand."""

    # What a row's columns (or keys) hold. Which of them are given says what a sample is.
    image: str = "image"
    """Image: bytes, base64, a path, or what `datasets` decodes; a list of them where a sample has several."""
    caption: str | None = None
    """A caption: a string, or a list of them, of which the first is learnt; `caption` where nothing else is named."""
    question: str | None = None
    """A question about the image (or without one); `answer` then holds what is learnt."""
    answer: str | None = None
    """The answer, or a list of accepted ones: strings, or objects with a key `answer`."""
    conversation: str | None = None
    """A list of turns: {from, value} as LLaVA writes it, or {role, content} as chat APIs do."""
    document: str | None = None
    """A text with `<image>` where images stand, or a list of texts with null in their places."""
    text: str | None = None
    """Plain text without images, all of it learnt."""
    id: str = "id"
    """Name of a row in logs; without it rows are numbered."""

    @model_validator(mode="after")
    def _one_kind(self) -> "DataSource":
        if (self.question is None) != (self.answer is None):
            raise ValueError("question and answer name two columns that belong together; give both")
        kinds = ("caption", "question", "conversation", "document", "text")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: a sample is one of these; give one")
        if self.annotations is not None and self.format != "vqa":
            raise ValueError("annotations is a key of format: vqa")
        if self.streaming and not (self.format == "huggingface" or self.dataset.startswith("hf:")):
            raise ValueError("streaming is for data sets of the hub (hf:…); files are read in place as it is")
        return self


def named_split(name: str) -> tuple[str, str | None]:
    """`openmoji:test` -> (openmoji, test), `a.csv` -> (a.csv, None); a path or `hf:` reference keeps its colons."""
    head, colon, tail = name.rpartition(":")
    if not colon or Path(name).exists() or head == "hf" or "/" in tail:
        return name, None
    return head, tail
