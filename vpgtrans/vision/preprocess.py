"""From an image file to pixels: opening anything a data set may hold, and the encoder's own resizing and scaling.

`squash` (BLIP, SigLIP, ViT) and `crop` (CLIP, LLaVA, DINOv2) agree with the image processors of `transformers` to
float32 rounding, without torchvision. `pad` resizes before it pads, which is cheaper than padding first; beside the
border pixels differ a little from processors that pad first.
"""

import base64
import io
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile
from torch import Tensor

from vpgtrans.config import ImageConfig
from vpgtrans.errors import DataError, TransferError
from vpgtrans.layout import Layout
from vpgtrans.parts import read_object

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_ASPECT = 16
"""A `crop` cuts longer images to this ratio first: a 1 x 30,000 strip would otherwise be resized to 4 GB."""

MAX_PIXELS = 2 * 89_478_485
"""An image with more is not decoded: a small file may unpack to gigabytes. (Pillow's own limit, stated here.)"""

Color = tuple[int, int, int]


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Decode an image completely and turn it upright: RGB, or RGBA where it has transparency.

    Palettes, grey, CMYK and 16-bit images become 8-bit; of an animation the first frame is taken. A PIL image is
    treated the same way.

    Raises:
        DataError: the file does not exist, is no image, is damaged, or would unpack to an absurd size.
    """
    with _readable(source):
        if isinstance(source, Image.Image):
            return _to_8_bit(ImageOps.exif_transpose(source))
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                size = f"{opened.width} x {opened.height} pixels; at most {MAX_PIXELS:,} are decoded"
                raise Image.DecompressionBombError(size)
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)  # it would copy every image otherwise
            return _to_8_bit(opened)


def image_size(source: str | Path | bytes) -> tuple[int, int]:
    """Width and height of an upright image, from its header: nothing is decoded.

    Raises:
        DataError: as `open_image`, as far as the header tells.
    """
    with _readable(source), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        width, height = opened.size
        if isinstance(opened, TiffImageFile):  # its `size` may be turned already
            width, height = opened.tag_v2[IMAGEWIDTH], opened.tag_v2[IMAGELENGTH]
        # The PNG class's own `getexif` decodes, in search of a chunk behind the pixels.
        turned = Image.Image.getexif(opened).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


@contextmanager
def _readable(source: str | Path | bytes | Image.Image) -> Iterator[None]:
    """What Pillow's decoders raise on damaged input, as a DataError."""
    where = f"{len(source)} bytes of image data" if isinstance(source, bytes) else str(source)
    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error, OverflowError) as error:
        problem = "of no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{where}: not a readable image ({problem})") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: refused ({error})") from error


def thumbnail(image: Image.Image, *, side: int = 160) -> str:
    """A small picture of an image for a page: a PNG in base64."""
    picture = to_rgb(image)
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def to_rgb(image: Image.Image, *, background: Color = (255, 255, 255)) -> Image.Image:
    """The image in mode RGB, its transparency laid on `background`."""
    image = _to_8_bit(image)
    if image.mode == "RGBA":
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image)
        image = canvas.convert("RGB")
    return image


class ImageTransform:
    """An image -> pixels [3, size, size], float32, as `config` says.

    In two steps, so that what travels between processes and to a device is a quarter of it: `levels` resizes, and
    `scaled` does the arithmetic.
    """

    def __init__(self, config: ImageConfig, *, patch: int = 1):
        """patch: its side in pixels, for images in their native size."""
        self.config = config
        self.patch = patch
        self._mean = torch.tensor(config.mean)[:, None, None]
        self._std = torch.tensor(config.std)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels of one opened image (see `open_image`)."""
        return self.scaled(self.levels(image))

    def levels(self, image: Image.Image) -> Tensor:
        """The resized image as it is, uint8 [3, size, size]."""
        return _levels(self.square(to_rgb(image, background=self.config.background)))

    def pieces(self, image: Image.Image, layout: Layout) -> Tensor:
        """What of an image goes through the encoder, uint8 [layout.pieces, 3, h, w]: as many as the layout says,
        whatever the image's size."""
        rgb = to_rgb(image, background=self.config.background)
        filter_, side = RESAMPLING[self.config.resample], self.config.size
        if layout.patches is not None:
            rows, columns = layout.patches
            return _levels(rgb.resize((columns * self.patch, rows * self.patch), filter_))[None]
        rows, columns = layout.grid
        pieces = []
        if rows * columns > 1:
            whole = _levels(rgb.resize((columns * side, rows * side), filter_))
            tiles = whole.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
            pieces.append(tiles.reshape(-1, 3, side, side))
        if layout.thumbnail or rows * columns == 1:
            pieces.append(_levels(self.square(rgb))[None])
        return torch.cat(pieces)

    def scaled(self, levels: Tensor) -> Tensor:
        """Levels [..., 3, size, size] as pixels, on the device that they are on."""
        mean, std = self._mean.to(levels.device), self._std.to(levels.device)
        pixels = torch.empty(levels.shape, dtype=torch.float32, device=levels.device)
        # On a CPU image by image: each stays in the cache for its four passes, a batch would not.
        pieces = zip(pixels, levels, strict=True) if levels.ndim == 4 and not levels.is_cuda else [(pixels, levels)]
        for piece, level in pieces:
            piece.copy_(level).div_(255).sub_(mean).div_(std)
        return pixels

    def batch(self, images: list[Image.Image]) -> Tensor:
        """Pixels [B, 3, size, size]."""
        return torch.stack([self(image) for image in images])

    def square(self, image: Image.Image) -> Image.Image:
        """The whole RGB image resized and cropped or padded to size x size."""
        size, fit = self.config.size, self.config.whole or self.config.fit
        filter_ = RESAMPLING[self.config.resample]
        width, height = image.size
        if fit in ("squash", "native"):
            return image.resize((size, size), filter_)
        if fit == "crop":
            if max(width, height) > MAX_ASPECT * min(width, height):
                image = _center(image, min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width))
                width, height = image.size
            # Truncation, not rounding, as CLIP's processor does it.
            short = self.config.resize or size
            scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
            return _center(image.resize(scaled, filter_), size, size)
        longest = max(width, height)
        scaled = max(1, round(width * size / longest)), max(1, round(height * size / longest))
        canvas = Image.new("RGB", (size, size), self.config.background)
        canvas.paste(image.resize(scaled, filter_), ((size - scaled[0]) // 2, (size - scaled[1]) // 2))
        return canvas


def image_config_from(directory: str | Path) -> ImageConfig | None:
    """The preprocessing that a Hugging Face checkpoint states, or None where it states none.

    Reads `preprocessor_config.json`, or the `image_processor` of `processor_config.json` (transformers 5).

    Raises:
        TransferError: it states something that `ImageConfig` has no words for.
    """
    path = Path(directory) / "preprocessor_config.json"
    if path.is_file():
        stated = read_object(path, otherwise=TransferError)
    else:
        path = Path(directory) / "processor_config.json"
        whole = read_object(path, otherwise=TransferError) if path.is_file() else {}
        stated = whole.get("image_processor", {})
    if "size" not in stated:
        return None

    crops = bool(stated.get("do_center_crop", False))
    side, fit = _side_and_fit(stated["size"], crops, path)
    resize = None
    if crops:
        cut_side, _ = _side_and_fit(stated.get("crop_size", side), False, path)
        if cut_side != side:
            if fit != "crop" or cut_side > side or stated.get("do_pad", False):
                raise TransferError(
                    f"{path}: resizes to {stated['size']} and crops to {cut_side}; right would be a shortest_edge of "
                    "at least the crop's size, without padding"
                )
            side, resize = cut_side, side
    if stated.get("do_pad", False):
        fit = "pad"
    resample = int(stated.get("resample", 3))
    names = {int(value): name for name, value in RESAMPLING.items()}
    if resample not in names:
        raise TransferError(f"{path}: resample {resample} is none of {names}")

    mean: list[float] = [0.0] * 3
    std: list[float] = [1.0] * 3
    if stated.get("do_normalize", True):
        mean = list(stated.get("image_mean") or ImageConfig().mean)
        std = list(stated.get("image_std") or ImageConfig().std)
    # Ours always divides by 255; another factor f goes into mean and std: (f·x - m)/s = (x/255 - m/255f)/(s/255f).
    factor = 255 * float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 255.0
    if abs(factor - 1) > 1e-9:
        mean, std = [m / factor for m in mean], [s / factor for s in std]
    # LLaVA's own processor pads with the mean colour; elsewhere the background is seen only through transparency.
    background = tuple(min(255, max(0, int(255 * m))) for m in mean) if fit == "pad" else ImageConfig().background
    fields = {"size": side, "fit": fit, "resize": resize, "resample": names[resample]}
    return ImageConfig.model_validate(fields | {"mean": mean, "std": std, "background": background})


def _side_and_fit(size: Any, crops: bool, path: Path) -> tuple[int, str]:
    """The side, and `crop` where `size` names the shortest edge."""
    if isinstance(size, int):
        return size, "crop" if crops else "squash"
    if isinstance(size, Mapping):
        if "shortest_edge" in size and "longest_edge" not in size:
            if crops:
                return int(size["shortest_edge"]), "crop"
        elif size.get("height") is not None and size.get("height") == size.get("width"):
            return int(size["height"]), "squash"
    raise TransferError(f"{path}: size {size} (center crop: {crops}) does not give a square")


def _levels(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, height, width]."""
    # Band by band: Pillow takes them apart four times faster than numpy transposes.
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))


def _center(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Any mode -> RGB or, with transparency, RGBA."""
    if image.mode in ("RGB", "RGBA") and "transparency" not in image.info:
        return image
    if image.mode[:1] in ("I", "F"):
        # Pillow clips these to 255 on conversion; a 16-bit grey must be scaled instead.
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F":
            values = np.nan_to_num(values) * (255 if values.max(initial=0) <= 1 else 1)
        elif image.mode != "I" or values.max(initial=0) > 255:
            values = values / 257
        return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8)).convert("RGB")
    transparent = image.mode in ("LA", "La", "PA", "RGBa", "RGBA") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")
