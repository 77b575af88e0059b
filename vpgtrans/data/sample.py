"""One sample of any data set, and what can be wrong with one."""

from dataclasses import dataclass

from vpgtrans.prompts import Text


@dataclass(frozen=True)
class Sample:
    """A caption or a conversation, with its images still encoded.

    Attributes:
        text: a string is a caption of one image. images: encoded bytes, a path or an fsspec URL each, in the order of
            their places in the text. references: all answers that count as right. row: in its source.
    """

    id: str
    text: Text
    images: tuple[bytes | str, ...]
    references: tuple[str, ...]
    row: int
