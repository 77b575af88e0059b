"""Encoders at other sizes against stock `transformers`; tiles and native images from pixels to visual prompts."""

import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from test_vision import DINO, FAMILIES, IMAGE, PATCH, SMALL, stock_model
from tiny import tiny_tokenizer
from tiny_training import Pictures, build_vlm, make_models

from vpgtrans.config import (
    EfficientNetLite0Config,
    HuggingFaceEncoderConfig,
    IdentityConnectorConfig,
    ImageConfig,
    PoolConnectorConfig,
    PromptConfig,
    QFormerConnectorConfig,
    ResolutionConfig,
)
from vpgtrans.data.mixture import Mixture
from vpgtrans.errors import DataError, RecipeError
from vpgtrans.layout import Layout
from vpgtrans.prompts import VISUAL, Prompter
from vpgtrans.training.features import FeatureCache, FrozenFront
from vpgtrans.training.samples import BadSamples, Samples
from vpgtrans.vision import connectors, encoders
from vpgtrans.vision import vpg as vpg_module
from vpgtrans.vision.preprocess import ImageTransform
from vpgtrans.vision.vpg import VPG, of_pieces
from vpgtrans.vlm import VLM

SIDE = 28
TILES = ResolutionConfig(fit="tiles", max_tiles=4)
NATIVE = ResolutionConfig(fit="native", max_patches=9)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory):
    return make_models(tmp_path_factory.mktemp("models"))


def noise(width: int, height: int, *, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def vpg_of(name: str = "clip", connector: Any = None, *, select: str = "patch", **image: Any) -> VPG:
    config = HuggingFaceEncoderConfig(
        architecture=FAMILIES[name][0].to_diff_dict(), image=ImageConfig(**({"size": SIDE} | image)), select=select
    )
    encoder = encoders.build(config, load_weights=False)
    encoder.model.load_state_dict(stock_model(name).state_dict(), strict=False)
    made = connectors.build(connector or IdentityConnectorConfig(), width_in=encoder.width, patches=encoder.patches)
    return VPG(encoder, made).eval()


SIDES = st.integers(1, 200)
VPG_OF_ALL, TOKENIZER = vpg_of(), tiny_tokenizer()


# --- encoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(56, 56), (42, 84), (14, 28)])
def test_positions_are_interpolated_as_the_model_itself_does_it(name, height, width):
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    ours = vpg_of(name, fit="native", select="full" if name == "siglip" else "patch").encoder
    stock = stock_model(name)
    options = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = stock(pixel_values=pixels, **options).last_hidden_state[:, FAMILIES[name][1] :]
        found = ours(pixels)
    assert found.shape[1] == (height // PATCH) * (width // PATCH)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_that_cannot_interpolate_is_refused():
    architecture = transformers.CLIPVisionConfig(**SMALL).to_diff_dict()
    encoder = encoders.build(HuggingFaceEncoderConfig(architecture=architecture, image=IMAGE), load_weights=False)
    encoder._interpolates = False
    for image in (ImageConfig(size=56), ImageConfig(size=SIDE, fit="native")):
        with pytest.raises(RecipeError, match="takes images of 28 x 28 pixels, not of"):
            encoder.set_image(image)
    assert (encoder.config.image, encoder.patches) == (IMAGE, 5)


@pytest.mark.real
def test_lite0_at_another_size_is_what_it_would_have_been_from_the_start():
    def built(size: int) -> encoders.Encoder:
        return encoders.build(EfficientNetLite0Config(image=ImageConfig(size=size), levels=(10, -1), fold=2))

    encoder = built(160)
    some = next(encoder.parameters())
    some.requires_grad_(True)
    hashed = encoder.weights_sha256()
    for size in (96, 101, 224):
        encoder.set_image(encoder.config.image.model_copy(update={"size": size}))
        expected = built(size)
        pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            assert torch.equal(encoder(pixels), expected(pixels))
        assert (encoder.patches, encoder.square) == (expected.patches, expected.square)
    assert encoder.weights_sha256() == hashed == encoder.reference_sha256
    assert next(encoder.parameters()) is some, "an optimizer holds it"
    assert [parameter.requires_grad for parameter in encoder.parameters()].count(True) == 1
    assert not any(module.training for module in encoder.modules())
    encoder.train()
    encoder.set_image(encoder.config.image.model_copy(update={"size": 96}))
    assert encoder.model.training
    assert not any(module.training for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert encoder.weights_sha256() == hashed, "a batch norm took statistics of what it was measured with"
    with pytest.raises(RecipeError, match="efficientnet-lite0 is built for squares"):
        encoder.set_image(ImageConfig(size=160, fit="native"))


# --- a VPG's resolution -------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["patch", "full"])
def test_positions_of_a_connector_follow_the_image(select):
    config = QFormerConnectorConfig(queries=3, width=16, layers=2, heads=2, hidden=32, positions=True)
    vpg = vpg_of("clip", config, select=select)
    pixels = torch.randn(1, 3, 42, 56)
    vpg.set_resolution(ResolutionConfig(fit="native", max_patches=64))
    others = vpg.encoder.patches - 4
    table = vpg.connector.positions
    placed = F.interpolate(
        table[:, others:].unflatten(1, (2, 2)).permute(0, 3, 1, 2), size=(3, 4), mode="bicubic", align_corners=False
    )
    placed = torch.cat([table[:, :others], placed.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    with torch.no_grad():
        features = vpg.encode(pixels)
        expected = vpg.connector.qformer(query_embeds=vpg.connector.queries, encoder_hidden_states=features + placed)
        torch.testing.assert_close(vpg(pixels), expected.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_a_resolution_is_set_and_undone():
    vpg = vpg_of("clip", PoolConnectorConfig(tokens=4, width=8))
    own, pixels = vpg.config, torch.randn(1, 3, SIDE, SIDE)
    before = vpg(pixels)
    vpg.set_resolution(ResolutionConfig(image_size=56, visual_tokens=1))
    assert (vpg.tokens, vpg.encoder.patches, vpg.connector.patches) == (1, 16, 4)
    assert vpg(torch.randn(2, 3, 56, 56)).shape == (2, 1, 8)
    assert vpg.transform(noise(9, 9)).shape == (3, 56, 56)
    vpg.set_resolution(ResolutionConfig(image_size=14))
    assert (vpg.tokens, vpg.encoder.patches) == (1, 1)  # there are no more patches than that
    vpg.set_resolution(ResolutionConfig())
    assert vpg.config == own
    assert torch.equal(vpg(pixels), before)


@pytest.mark.parametrize("connector", [IdentityConnectorConfig(), PoolConnectorConfig(tokens=4, width=8)])
def test_more_tokens_than_it_was_made_for(connector):
    vpg = vpg_of("clip", connector)
    if connector.kind == "identity":
        vpg.set_resolution(ResolutionConfig(image_size=56, visual_tokens=9))
        assert vpg(torch.randn(1, 3, 56, 56)).shape[1] == vpg.tokens == 9
    else:
        with pytest.raises(RecipeError, match="can't give 9 visual tokens; right would be one of 1, 4"):
            vpg.set_resolution(ResolutionConfig(image_size=56, visual_tokens=9))
        assert (vpg.tokens, vpg.encoder.config.image.size) == (4, SIDE)


@pytest.mark.parametrize(
    ("stated", "saying"),
    [
        (
            {"image_size": 30},
            "30 is no multiple of the encoder's patch, 14 pixels; right would be 28 or 42",
        ),
        ({"image_size": 7}, "right would be 14"),
        ({"visual_tokens": 3}, "identity can't give 3 visual tokens; right would be one of"),
        ({"max_tiles": 3}, "max_tiles: goes with fit: tiles only, not with squash"),
        ({"thumbnail": False}, "thumbnail: goes with fit: tiles only"),
    ],
)
def test_what_a_vpg_cannot_is_refused_without_a_trace(stated, saying):
    vpg = vpg_of()
    before = vpg.config
    with pytest.raises(RecipeError) as refusal:
        vpg.set_resolution(ResolutionConfig(**stated))
    assert saying in str(refusal.value)
    assert vpg.config == before


@pytest.mark.parametrize(
    "stated", [{"fit": "pad", "max_tiles": 3}, {"fit": "tiles", "max_patches": 3}, {"max_tiles": 0}]
)
def test_keys_that_do_not_go_together(stated):
    with pytest.raises(ValidationError):
        ResolutionConfig(**stated)


def test_a_whole_image_in_tiles_is_seen_as_before():
    assert ResolutionConfig(fit="tiles").over(ImageConfig(fit="pad")).whole == "pad"
    assert ResolutionConfig(fit="tiles").over(ImageConfig(fit="crop", resize=256)).whole == "squash"
    halved = ResolutionConfig(image_size=112).over(ImageConfig(fit="crop", resize=256))
    assert (halved.size, halved.resize) == (112, 128)
    assert ResolutionConfig().over(IMAGE) is IMAGE
    assert "max_tiles" not in IMAGE.model_dump()
    with pytest.raises(ValidationError, match="max_tiles: is null, which fit: tiles can't do with"):
        ImageConfig(fit="tiles", max_tiles=None)


# --- pieces -------------------------------------------------------------------------------------


def test_tiles_are_cut_row_by_row_and_the_whole_comes_last():
    image = Image.new("RGB", (90, 60))
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 0), (0, 90, 90), (90, 0, 90)]
    for place, colour in enumerate(colours):
        image.paste(colour, (30 * (place % 3), 30 * (place // 3), 30 * (place % 3) + 30, 30 * (place // 3) + 30))
    transform = ImageTransform(ImageConfig(size=10, fit="tiles", resample="bilinear"))
    pieces = transform.pieces(image, Layout(1, grid=(2, 3), thumbnail=True))
    assert pieces.shape == (7, 3, 10, 10)
    assert [tuple(piece[:, 5, 5].tolist()) for piece in pieces[:6]] == colours
    assert torch.equal(pieces[6], ImageTransform(ImageConfig(size=10, resample="bilinear")).levels(image))
    assert torch.equal(transform.pieces(image, Layout(1))[0], pieces[6])
    padded = ImageTransform(ImageConfig(size=10, fit="tiles", whole="pad", resample="bilinear"))
    assert torch.equal(padded.pieces(image, Layout(1))[0][:, 0, 5], torch.tensor([255] * 3, dtype=torch.uint8))


def test_pieces_are_as_many_as_their_layout_says_whatever_the_image():
    transform = ImageTransform(ImageConfig(size=10, fit="tiles"))
    assert transform.pieces(noise(10, 90), Layout(1, grid=(1, 3), thumbnail=True)).shape == (4, 3, 10, 10)
    native = ImageTransform(ImageConfig(size=10, fit="native"), patch=5)
    assert native.pieces(noise(10, 90), Layout(6, patches=(2, 3))).shape == (1, 3, 10, 15)


def test_images_of_any_shape_go_together_with_their_like_and_come_back_in_order():
    vpg = vpg_of(fit="native", max_patches=9)
    images = [noise(28, 42, seed=1), noise(14, 14, seed=2), noise(28, 42, seed=3), noise(200, 100, seed=4)]
    pieces = vpg.pieces(images, [vpg.layouts(image.size) for image in images])
    calls: list[int] = []

    def compute(some: torch.Tensor) -> torch.Tensor:
        calls.append(len(some))
        return vpg(vpg.transform.scaled(some))

    with torch.no_grad():
        found = of_pieces(pieces, compute)
        alone = torch.cat([vpg(vpg.transform.scaled(piece[None]))[0] for piece in pieces])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    assert calls == [2, 1, 1]
    assert len(found) == sum(vpg.layouts(image.size).visual for image in images) == 6 + 1 + 6 + 8


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, st.sampled_from(["tiles", "native"]), st.integers(1, 9))
def test_an_image_has_as_many_places_as_the_vpg_gives_it_tokens(width, height, fit, most):
    vpg, key = VPG_OF_ALL, "max_tiles" if fit == "tiles" else "max_patches"
    vpg.set_resolution(ResolutionConfig(fit=fit, **{key: most}))
    prompter = Prompter(TOKENIZER, PromptConfig(), visual_tokens=vpg.tokens, layouts=vpg.layouts)
    encoded = prompter.encode("a cat", [(width, height)])
    pieces = vpg.pieces([Image.new("RGB", (width, height))], encoded.layouts)
    with torch.no_grad():
        tokens = of_pieces(pieces, lambda some: vpg(vpg.transform.scaled(some)))
    assert (encoded.ids == VISUAL).sum() == tokens.shape[:-1].numel()
    assert len(pieces) == encoded.pieces <= vpg.layouts.most_pieces


# --- a VLM and its data -------------------------------------------------------------------------


SHAPES = ((28, 28), (80, 40), (40, 90), (90, 84), (14, 100), (30, 28))


class Shapes(Pictures):
    """Images of several shapes with captions."""

    def __init__(self, count: int = 6, **options: Any):
        super().__init__(count, **options)
        for row in range(count):
            stream = io.BytesIO()
            noise(*SHAPES[row % 6], seed=row).save(stream, "PNG")
            self.rows.records[row]["image"] = stream.getvalue()
        self.fingerprint = f"shapes {count}"


def samples_of(vlm: VLM, tmp_path, *, level: str, cached: bool, source: Pictures | None = None) -> Samples:
    front = FrozenFront(vlm.vpg, level, dtype=torch.float32)
    mixture = Mixture([(source or Shapes(), 1.0)])
    samples = Samples(mixture, front, vlm.splice.prompter, bad=BadSamples(0.5), cached=cached, directory=tmp_path)
    if cached:
        samples.prepare(range(6), "images")
    return samples


@pytest.mark.parametrize(
    ("stated", "level", "cached"),
    [(TILES, "tokens", True), (TILES, "patches", True), (TILES, "tokens", False), (TILES, "pixels", False),
     (NATIVE, "pixels", False)],
)  # fmt: skip
def test_every_way_through_the_data_gives_the_same_prompts(root, tmp_path, stated, level, cached):
    vlm = build_vlm(root).eval()
    vlm.set_resolution(stated)
    samples = samples_of(vlm, tmp_path, level=level, cached=cached)
    batch = samples.fetch([3, 0, 1, 2, 4])
    source = samples.mixture.sources[0]
    images = [source.image(row) for row in (3, 0, 1, 2, 4)]
    with torch.no_grad():
        found = samples.front.rest(batch.inputs)
        torch.testing.assert_close(found, vlm.visual_tokens(images), rtol=1e-4, atol=1e-5)
        nll, _ = vlm.splice.token_nll(vlm.prompts_from(found), batch.encoded)
        one, _ = vlm.splice.token_nll(vlm.prompts_from(vlm.visual_tokens(images[:1])), batch.encoded[:1])
    torch.testing.assert_close(nll[: len(one)], one, rtol=1e-4, atol=1e-4)
    # In parts, and as the plan of packs counts them.
    parts = [samples.front.rest(batch.part(start, start + 2).inputs).flatten(0, -2) for start in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), found.flatten(0, -2), rtol=1e-4, atol=1e-5)
    assert [len(text) for text in batch.encoded] == [
        len(samples.mixture.encode(row, vlm.splice.prompter)) for row in (3, 0, 1, 2, 4)
    ]


def test_many_tiles_go_through_in_turns(root, tmp_path, monkeypatch):
    vlm = build_vlm(root).eval()
    vlm.set_resolution(TILES)
    image = [noise(90, 84)] * 3
    expected, sizes = vlm.visual_tokens(image), []
    encode = vlm.vpg.encode
    monkeypatch.setattr(vpg_module, "AT_ONCE", 4)
    monkeypatch.setattr(vlm.vpg, "encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    torch.testing.assert_close(vlm.visual_tokens(image), expected, rtol=1e-4, atol=1e-5)
    assert (len(expected), sizes) == (15, [4, 4, 4, 3])
    sizes.clear()
    batch = samples_of(vlm, tmp_path, level="tokens", cached=True).fetch([3])
    torch.testing.assert_close(batch.inputs, vlm.visual_tokens([Shapes().image(3)]), rtol=1e-4, atol=1e-5)
    assert max(sizes) == 4


def test_cached_and_other_images_share_a_batch(root, tmp_path):
    class Twice(Shapes):
        single = False

    vlm = build_vlm(root).eval()
    vlm.set_resolution(TILES)
    front = FrozenFront(vlm.vpg, "tokens", dtype=torch.float32)
    mixture = Mixture([(Shapes(), 1.0), (Twice(), 1.0)])
    samples = Samples(mixture, front, vlm.splice.prompter, bad=BadSamples(0.5), cached=True, directory=tmp_path)
    samples.prepare(range(12), "images")
    rows = [7, 1, 2, 9]
    loaded = samples.load(rows)
    assert set(loaded.cached) == {True, False}
    expected = vlm.visual_tokens([mixture.image(row) for row in rows])
    torch.testing.assert_close(samples.finish(loaded).inputs, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_keeps_how_many_tiles_an_image_had(root, tmp_path):
    vlm, pictures = build_vlm(root).eval(), Shapes()
    vlm.set_resolution(TILES)
    cache = FeatureCache(pictures, FrozenFront(vlm.vpg, "tokens"), directory=tmp_path)
    cache.ensure(range(6))
    assert len(cache.pieces(1, 3)) == 3
    with pytest.raises(DataError, match="has 2 tiles now and had 3 when its features were computed"):
        cache.pieces(1, 2)


def test_another_resolution_is_another_cache(root):
    vlm, pictures = build_vlm(root), Shapes()

    def key(level: str, **stated: Any) -> str:
        vlm.set_resolution(ResolutionConfig(**stated))
        return FeatureCache(pictures, FrozenFront(vlm.vpg, level)).directory.name

    own = key("tokens")
    some: list[dict[str, Any]] = [{"visual_tokens": 2}, {"image_size": 56}, {"fit": "tiles"}]
    keys = [own, *(key("tokens", **stated) for stated in [*some, {"fit": "tiles", "max_tiles": 2}])]
    assert len(set(keys)) == len(keys)
    assert key("patches", visual_tokens=2) == key("patches")
    assert key("tokens") == own


def test_generating_cuts_each_image_as_its_size_asks(root):
    vlm = build_vlm(root).eval()
    images = [noise(80, 40), noise(28, 28), noise(40, 90)]
    for stated in (TILES, NATIVE):
        vlm.set_resolution(stated)
        together = vlm.generate(images, max_new_tokens=4)
        assert together == [vlm.generate([image], max_new_tokens=4)[0] for image in images]
    asked = vlm.generate(images[:1], "What is it?", max_new_tokens=2)
    assert len(asked) == 1


def test_two_way_attention_is_refused_where_images_have_their_own_shapes(root):
    vlm = build_vlm(root)
    vlm.prompt = vlm.prompt.model_copy(update={"image_attention": "bidirectional"})
    with pytest.raises(RecipeError, match="bidirectional does not go with fit: native"):
        vlm.set_resolution(NATIVE)


def test_dinov2_sizes_that_its_patch_does_not_divide_stay_what_they_were():
    """SigLIP at 384 with patches of 14: what a checkpoint states itself is taken."""
    config = transformers.Dinov2Config(**DINO | {"image_size": 30})
    image = ImageConfig(size=30)
    encoder = encoders.build(
        HuggingFaceEncoderConfig(architecture=config.to_diff_dict(), image=image, select="patch"), load_weights=False
    )
    vpg = VPG(encoder, connectors.build(IdentityConnectorConfig(), width_in=16, patches=4))
    vpg.set_resolution(ResolutionConfig(fit="tiles", image_size=30))
    assert vpg(torch.randn(1, 3, 30, 30)).shape == (1, 4, 16)
