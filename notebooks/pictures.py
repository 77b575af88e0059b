"""Pictures with words under them, for the tutorials."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
from PIL import Image


def show(images: Sequence[Image.Image], texts: Sequence[str], *, columns: int = 6, wrap: int = 22) -> None:
    """A sheet of images, each with a text of one or more lines under it; long lines are wrapped."""
    rows = -(-len(images) // columns)
    wrapped = ["\n".join(textwrap.fill(line, wrap) for line in text.split("\n")) for text in texts]
    lines = max(text.count("\n") + 1 for text in wrapped)
    size = 9.0 / columns
    _, axes = plt.subplots(rows, columns, figsize=(9, rows * (size + 0.16 * lines + 0.1)), dpi=80, squeeze=False)
    for place in axes.flat[len(images) :]:
        place.axis("off")
    for place, image, text in zip(axes.flat, images, wrapped):  # noqa: B905  # the last row may have room left
        place.set(xticks=[], yticks=[])
        for side in place.spines.values():
            side.set(visible=True, color="#e4e8e5")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
        place.imshow(white)
        place.text(0.5, -0.04, text, transform=place.transAxes, ha="center", va="top", fontsize=8.5)
    plt.show()
