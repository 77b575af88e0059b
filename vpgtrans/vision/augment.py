"""Random views of an image, for training: a slightly turned, zoomed, shifted and recoloured copy.

Nothing is mirrored and no hue is changed: captions speak of left and right, of colours and skin tones.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance

from vpgtrans.config import AugmentConfig
from vpgtrans.vision.preprocess import Color, to_rgb


def random_view(
    image: Image.Image, config: AugmentConfig, *, seed: tuple[int, ...], background: Color = (255, 255, 255)
) -> Image.Image:
    """An RGB view of the image, of the same size; the same seed gives the same view on every machine.

    Args:
        background: fills what the turned or shrunk image leaves bare, and lies under transparency.
    """
    random = np.random.default_rng(seed)
    turn = math.radians(random.uniform(-config.rotation, config.rotation))
    scale = math.exp(random.uniform(math.log(config.scale[0]), math.log(config.scale[1])))
    right, down = random.uniform(-config.shift, config.shift, size=2)
    factors = 1 + random.uniform(-config.colour, config.colour, size=3)

    rgb = to_rgb(image, background=background)
    width, height = rgb.size
    # Pillow maps output to input coordinates: undo the shift, then turn and zoom about the centre.
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    x, y = width / 2 + right * width, height / 2 + down * height
    matrix = (cos, sin, width / 2 - cos * x - sin * y, -sin, cos, height / 2 + sin * x - cos * y)
    rgb = rgb.transform(rgb.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=background)
    enhancers = (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness)
    for enhancer, factor in zip(enhancers, factors, strict=True):
        if config.colour:
            rgb = enhancer(rgb).enhance(float(factor))
    return rgb
