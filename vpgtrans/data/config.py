"""What a recipe says about data: one entry a source (no torch here)."""

from pydantic import Field, PositiveFloat, PositiveInt

from vpgtrans.config import Config


class DataSource(Config):
    """One set of images with captions."""

    dataset: str = Field(min_length=1)
    """`openmoji`; a path (a parquet, JSON-lines or CSV file, a directory of parquet files); or `hf:ORG/NAME[@REV]`."""
    split: str = "train"
    weight: PositiveFloat = 1.0
    """Share of this source in the mixture, relative to the others' weights."""
    limit: PositiveInt | None = None
    """Take at most this many samples, the first ones in the source's own order."""
    image: str = "image"
    """Column (or key) of the image: bytes, a path, or what `datasets` decodes."""
    caption: str = "caption"
    """Column (or key) of the caption: a string, or a list of them."""
