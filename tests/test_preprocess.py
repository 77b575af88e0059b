"""Opening images and turning them into pixels, against the image processors of `transformers`."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vpgtrans.config import EncoderConfig, ImageConfig
from vpgtrans.errors import DataError, TransferError
from vpgtrans.vision import preprocess
from vpgtrans.vision.preprocess import MAX_PIXELS, ImageTransform, image_config_from, image_size, open_image, to_rgb

PROCESSORS = {
    "blip": (BlipImageProcessorPil, {"size": {"height": 40, "width": 40}}),
    "clip": (CLIPImageProcessorPil, {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}),
    "siglip": (SiglipImageProcessorPil, {"size": {"height": 40, "width": 40}}),
    "vit": (ViTImageProcessorPil, {"size": {"height": 40, "width": 40}}),
    "dinov2": (BitImageProcessorPil, {"size": {"shortest_edge": 46}, "crop_size": {"height": 40, "width": 40}}),
    "crop-odd": (BitImageProcessorPil, {"size": {"shortest_edge": 45}, "crop_size": 40, "resample": 2}),
    "clip-old": (CLIPImageProcessorPil, {"size": 40, "crop_size": 40}),
    "no-normalise": (ViTImageProcessorPil, {"size": {"height": 40, "width": 40}, "do_normalize": False}),
    "other-factor": (ViTImageProcessorPil, {"size": {"height": 40, "width": 40}, "rescale_factor": 1 / 127.5}),
    "no-rescale": (ViTImageProcessorPil, {"size": {"height": 40, "width": 40}, "do_rescale": False}),
    "lanczos": (BlipImageProcessorPil, {"size": {"height": 40, "width": 40}, "resample": 1}),
}


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=15, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), seed=st.integers(0, 1000))
def test_pixels_equal_those_of_the_stock_processors(tmp_path_factory, name, width, height, seed):
    if max(width, height) > 16 * min(width, height):
        return  # longer images are cut first, on purpose
    processor_class, options = PROCESSORS[name]
    processor = processor_class(**options)
    directory = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(directory)
    transform = ImageTransform(image_config_from(directory))
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    expected = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(transform(image) / scale, expected.float() / scale, rtol=0, atol=1e-5)


def test_processor_configs_of_both_generations_are_read(tmp_path):
    stated = {"size": {"height": 30, "width": 30}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    expected = ImageConfig(size=30, resample="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert image_config_from(tmp_path) is None
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": stated}))
    assert image_config_from(tmp_path) == expected
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated | {"size": 30}))
    assert image_config_from(tmp_path) == expected


@pytest.mark.parametrize(
    "stated",
    [
        {"size": {"height": 30, "width": 40}},
        {"size": {"shortest_edge": 30}},
        {"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": 32},
        {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": 30, "do_pad": True},
        {"size": {"height": 32, "width": 32}, "do_center_crop": True, "crop_size": 30},
        {"size": {"longest_edge": 30}},
        {"size": 30, "resample": 0},
    ],
)
def test_preprocessing_without_words_for_it_is_refused(tmp_path, stated):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    with pytest.raises(TransferError, match="preprocessor_config"):
        image_config_from(tmp_path)


def test_dinov2s_own_preprocessing_resizes_and_then_crops(tmp_path):
    stated = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    config = image_config_from(tmp_path)
    assert (config.size, config.fit, config.resize) == (224, "crop", 256)
    # a frame of 32 pixels at full height is what the crop takes off
    image = Image.new("RGB", (256, 256), (255, 0, 0))
    image.paste((0, 255, 0), (16, 16, 240, 240))
    assert ImageTransform(config).square(image).getcolors() == [(224 * 224, (0, 255, 0))]


@pytest.mark.parametrize(
    ("keys", "saying"),
    [
        ({"fit": "squash", "resize": 256}, "fit: crop only"),
        ({"fit": "pad", "resize": 256}, "fit: crop only"),
        ({"fit": "crop", "resize": 223}, "below size"),
        ({"fit": "crop", "resize": 0}, "greater than 0"),
    ],
)
def test_a_resize_goes_before_a_crop_and_is_no_smaller(keys, saying):
    with pytest.raises(ValidationError, match=saying):
        ImageConfig(size=224, **keys)


def test_a_config_without_resize_is_written_as_before_there_was_one():
    """Keys of feature caches and the files of VLM directories hang on it."""
    plain = ImageConfig(size=30, fit="crop")
    assert list(plain.model_dump(mode="json")) == ["size", "fit", "resample", "mean", "std", "background"]
    assert list(plain.model_dump()) == list(json.loads(plain.model_dump_json())) == list(plain.model_dump(mode="json"))
    larger = ImageConfig(size=30, fit="crop", resize=32)
    for config in (plain, larger):
        assert ImageConfig.model_validate_json(config.model_dump_json()) == config
    assert larger.model_dump()["resize"] == 32
    file = Path(__file__).parent.parent / "checkpoints/openmoji-qformer-smollm2-135m/encoder/config.json"
    written = json.loads(file.read_text())["encoder"]
    assert TypeAdapter(EncoderConfig).validate_python(written).model_dump(mode="json") == written


@pytest.mark.parametrize(("fit", "resize"), [("squash", None), ("crop", None), ("crop", 30), ("pad", None)])
@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (33, 57), (300, 200)])
def test_any_shape_becomes_a_finite_square(fit, resize, size):
    transform = ImageTransform(ImageConfig(size=24, fit=fit, resize=resize))
    pixels = transform.batch([Image.new("RGB", size, (10, 20, 30))] * 2)
    assert pixels.shape == (2, 3, 24, 24)
    assert pixels.dtype == torch.float32
    assert torch.isfinite(pixels).all()


def test_pad_keeps_the_whole_image_and_fills_with_the_background():
    config = ImageConfig(size=20, fit="pad", mean=(0,) * 3, std=(1,) * 3, background=(0, 255, 0))
    pixels = ImageTransform(config)(Image.new("RGB", (40, 20), (255, 0, 0)))
    red, green = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    assert all(torch.equal(pixels[:, row, col], green) for row in (0, 4, 15, 19) for col in (0, 10, 19))
    assert all(torch.equal(pixels[:, row, col], red) for row in (5, 10, 14) for col in (0, 10, 19))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_transparency_is_laid_on_the_background():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    opened = open_image(encoded(image))
    assert opened.mode == "RGBA"
    assert to_rgb(opened, background=(0, 0, 255)).getpixel((0, 0)) == (200, 0, 0)
    assert to_rgb(opened, background=(0, 0, 255)).getpixel((1, 1)) == (0, 0, 255)
    assert to_rgb(open_image(encoded(half))).getpixel((0, 0)) == (127, 127, 127)
    assert to_rgb(open_image(encoded(palette, transparency=1))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(palette)).mode == "RGB"
    key = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    assert to_rgb(open_image(key)).getpixel((0, 0)) == (255, 255, 255)


def test_unusual_modes_become_8_bit_colour():
    wide = Image.fromarray(np.array([[0, 65535], [32896, 257]], dtype=np.uint16))
    opened = open_image(encoded(wide))
    assert opened.mode == "RGB"
    assert [opened.getpixel(xy)[0] for xy in ((0, 0), (1, 0), (0, 1), (1, 1))] == [0, 255, 128, 1]
    assert open_image(encoded(Image.new("CMYK", (3, 3), (0, 255, 255, 0)), "JPEG")).mode == "RGB"
    assert open_image(encoded(Image.new("1", (3, 3), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32))).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("container", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_says_the_size_that_the_upright_image_has(container, orientation):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, container, exif=exif)
    assert image_size(stream.getvalue()) == open_image(stream.getvalue()).size


def test_a_camera_held_sideways_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (30, 10)).save(path, exif=exif)
    assert open_image(path).size == (10, 30)
    assert open_image(Image.open(path)).size == (10, 30)


def test_what_is_no_image_is_a_data_error(tmp_path, monkeypatch):
    good = encoded(Image.effect_noise((64, 64), 50))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    for source in (tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "absent.png", tmp_path, b"", good[:40]):
        with pytest.raises(DataError, match="not a readable image"):
            open_image(source)
    assert 2 * Image.MAX_IMAGE_PIXELS == MAX_PIXELS  # Pillow refuses no less than we say
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 64 * 64)
    assert open_image(good).size == (64, 64)
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(DataError, match=r"refused \(64 x 64 pixels; at most 4,095"):
        open_image(good)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="refused"):
        open_image(good)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    opened = open_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert opened.size == (6, 4)
    assert to_rgb(opened).getpixel((1, 1)) == (250, 0, 0)
    levels = ImageTransform(ImageConfig(size=4)).levels(opened)  # the file is closed by now
    assert levels[:, 0, 0].tolist() == [250, 0, 0]


def test_a_jpeg_that_ends_early_is_a_data_error():
    good = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    for size in (20, len(good) // 2, len(good) - 40):
        with pytest.raises(DataError, match="not a readable image"):
            open_image(good[:size])


def test_levels_are_pixels_before_the_arithmetic():
    transform = ImageTransform(ImageConfig(size=5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    levels = transform.levels(image)
    assert levels.dtype == torch.uint8
    assert torch.equal(levels, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    mean, std = torch.tensor([[[0.1]], [[0.2]], [[0.3]]]), torch.tensor([[[0.5]], [[0.6]], [[0.7]]])
    expected = (levels.float() / 255 - mean) / std
    assert torch.equal(transform(image), expected)
    assert torch.equal(transform.scaled(torch.stack([levels, levels])), torch.stack([expected, expected]))


@settings(max_examples=60, deadline=None)
@given(
    at=st.integers(0, 10_000), value=st.integers(0, 255), kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"])
)
def test_damaged_files_open_or_are_data_errors(at, value, kind):
    data = bytearray(encoded(Image.linear_gradient("L").resize((20, 20)).convert("RGB"), kind))
    data[at % len(data)] = value
    try:
        opened = open_image(bytes(data))
    except DataError:
        return
    assert opened.mode in ("RGB", "RGBA")
