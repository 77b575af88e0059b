"""Connectors, against other implementations of the same numbers, and the promises that all of them make."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter
from ruamel.yaml import YAML
from tiny_runs import QFORMER, WARMUP, Tiny, source_keys
from torch import Tensor
from torch.nn import functional as F
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

import vpgtrans as vt
from vpgtrans import runs
from vpgtrans.config import (
    ConnectorConfig,
    EncoderConfig,
    HuggingFaceEncoderConfig,
    IdentityConnectorConfig,
    ImageConfig,
    QFormerConnectorConfig,
    VPGConfig,
)
from vpgtrans.errors import RecipeError
from vpgtrans.recipe import parse_recipe
from vpgtrans.vision import connectors, encoders
from vpgtrans.vision.connectors import Connector
from vpgtrans.vision.grid import average, fit
from vpgtrans.vision.vpg import build_vpg
from vpgtrans.vlm_directory import load_vision

WIDTH, SIDE = 12, 6
SMALL = {"width": 8, "heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "qformer": {"queries": 5, "layers": 2, "hidden": 16, "positions": True, **SMALL},
    "resampler": {"queries": 5, "hidden": 16, "positions": True, **SMALL},
    "cross-attention": {"queries": 5, **SMALL},
    "identity": {},
    "merge": {"window": [1, 4], "width": 7},
    "pixel-shuffle": {"factor": 2},
    "pool": {"tokens": 9, "width": 8},
    "pooled-queries": {"tokens": 9, "hidden": 16, **SMALL},
}
EACH = pytest.mark.parametrize("kind", KINDS)
GRIDS = ("identity", "merge", "pixel-shuffle", "pool", "pooled-queries")


def make(kind: str, *, side: int = SIDE, **changes: Any) -> Connector:
    config = TypeAdapter(ConnectorConfig).validate_python({"kind": kind} | KINDS[kind] | changes)
    return connectors.build(config, width_in=WIDTH, patches=side * side).eval()


def patches(rows: int = SIDE, columns: int = SIDE) -> Tensor:
    return torch.randn(2, rows * columns, WIDTH)


# --- what all promise ---------------------------------------------------------------------------


@EACH
@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
def test_tokens_are_as_many_as_were_announced_for_any_grid_and_limit(
    kind: str, rows: int, columns: int, data: st.DataObject
) -> None:
    connector = make(kind)
    whole = connector.tokens
    allowed = [n for n in range(1, whole + 1) if _can(connector, n)]
    limit = data.draw(st.sampled_from([None, *allowed]))
    connector.limit(limit)
    assert connector.tokens == (limit or whole)
    for grid in ((rows, columns), None):
        tokens = connector(patches(*(grid or connector.square)), grid)
        assert tokens.shape == (2, connector.tokens_of(grid), connector.width)
        assert limit is None or tokens.shape[1] <= limit
        assert tokens.isfinite().all()


def _can(connector: Connector, tokens: int) -> bool:
    try:
        connector.limit(tokens)
    except RecipeError:
        return False
    return True


@EACH
def test_every_parameter_trains_and_images_are_told_apart(kind: str) -> None:
    connector = make(kind).train()
    features = patches().requires_grad_()
    tokens = connector(features)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-4)
    # A linear readout: of a last layer norm the sum of squares would not depend on what comes before it.
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert features.grad.any(dim=2).all()  # every patch is looked at
    # A key's bias shifts all scores alike: its gradient is zero up to rounding.
    idle = [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in idle if not name.endswith("key.bias")] == []


@EACH
def test_the_grid_it_was_made_for_needs_no_name(kind: str) -> None:
    connector, features = make(kind), patches()
    assert torch.equal(connector(features), connector(features, (SIDE, SIDE)))


@EACH
def test_a_limit_is_undone_and_what_cannot_be_is_refused_without_a_trace(kind: str) -> None:
    connector, features = make(kind), patches()
    whole = connector(features)
    connector.limit(4)
    assert connector(features).shape[1] == connector.tokens == connector.config.limit == 4
    again = connectors.build(connector.config, width_in=WIDTH, patches=SIDE**2).eval()
    again.load_state_dict(connector.state_dict())
    assert torch.equal(again(features), connector(features))
    for tokens in (2, whole.shape[1] + 1) if kind in GRIDS else (6,):
        with pytest.raises(RecipeError, match=rf"{kind} can't give {tokens} visual tokens; right would be .*\d"):
            connector.limit(tokens)
    assert connector.tokens == 4
    connector.limit(None)
    assert torch.equal(connector(features), whole)
    assert "limit" not in connector.config.model_dump()


@EACH
def test_standardised_channels_come_in_with_mean_0_and_deviation_1(kind: str) -> None:
    plain, measured = make(kind), make(kind, standardised=True)
    measured.load_state_dict(plain.state_dict(), strict=False)
    features = patches() * torch.logspace(-0.3, 0.3, WIDTH) + 100
    measured.measure(features)
    scaled = (features - features.mean((0, 1))) / features.flatten(0, 1).std(0)
    torch.testing.assert_close(measured(features), plain(scaled), rtol=1e-3, atol=1e-3)


@EACH
def test_half_precision(kind: str) -> None:
    connector = make(kind, standardised=True).to(torch.bfloat16)
    tokens = connector(patches(3, 5).to(torch.bfloat16), (3, 5))
    assert tokens.dtype == torch.bfloat16
    assert tokens.shape[1] == connector.tokens_of((3, 5))


def test_old_configs_are_written_as_before() -> None:
    assert IdentityConnectorConfig().model_dump() == {"kind": "identity"}
    assert set(QFormerConnectorConfig().model_dump()) == set(QFormerConnectorConfig.model_fields) - {"limit"}


@settings(deadline=None)
@given(*[st.integers(1, 40)] * 3)
def test_a_grid_within_a_number_of_tokens_keeps_its_shape(rows: int, columns: int, tokens: int) -> None:
    high, wide = fit((rows, columns), tokens, most=(rows, columns))
    assert 1 <= high <= rows
    assert 1 <= wide <= columns
    assert high * wide <= tokens
    if rows == columns:
        assert high == wide == min(rows, math.isqrt(tokens))
    if tokens >= rows * columns:
        assert (high, wide) == (rows, columns)


# --- known answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_is_idefics3s(factor: int) -> None:
    config = transformers.Idefics3Config(
        vision_config={"hidden_size": WIDTH}, text_config={"hidden_size": 32}, scale_factor=factor
    )
    stock = Idefics3Connector(config)
    features = patches()
    tokens = make("pixel-shuffle", factor=factor)(features)
    assert torch.equal(tokens, stock.pixel_shuffle(features, factor))
    linear = make("pixel-shuffle", factor=factor, width=32)
    linear.linear.weight.data = stock.modality_projection.proj.weight.data
    torch.testing.assert_close(linear(features) - linear.linear.bias, stock(features))


def test_merge_is_a_linear_map_of_four_neighbours_as_in_minigpt_v2() -> None:
    connector, features = make("merge", side=8), patches(8, 8)
    # Its own lines: `image_embeds.view(bs, int(pn / 4), int(hs * 4))`, then a linear layer.
    torch.testing.assert_close(connector(features), connector.linear(features.view(2, 16, 4 * WIDTH)))
    window = make("merge", window=[2, 3])
    grid = features[:, :36].view(2, 6, 6, WIDTH)
    torch.testing.assert_close(
        window(features[:, :36])[:, 3],
        window.linear(grid[:, 2:4, 3:6].reshape(2, -1)),  # second row, second column
    )


def test_blocks_over_the_edge_are_filled_with_zeros() -> None:
    features = patches(3, 5)
    filled = F.pad(features.view(2, 3, 5, WIDTH), (0, 0, 0, 3, 0, 1)).flatten(1, 2)
    for kind in ("merge", "pixel-shuffle"):
        connector = make(kind)
        wide = 8 if kind == "merge" else 6
        grid = filled.view(2, 4, 8, WIDTH)[:, : 3 if kind == "merge" else 4, :wide].flatten(1, 2)
        torch.testing.assert_close(
            connector(features, (3, 5)), connector(grid, (3 if kind == "merge" else 4, wide)), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("side", [3, 4])
def test_pool_is_torchs_adaptive_average_and_an_mlp(side: int) -> None:
    connector, features = make("pool", tokens=side * side), patches()
    first, _, second = connector.mlp
    pooled = F.adaptive_avg_pool2d(features.transpose(1, 2).unflatten(2, (SIDE, SIDE)), side).flatten(2).transpose(1, 2)
    torch.testing.assert_close(connector(features), second(F.gelu(first(pooled))))


def test_a_limit_averages_the_tokens_of_a_grid() -> None:
    features = patches()
    for kind in ("identity", "merge", "pixel-shuffle"):
        connector = make(kind, width=None) if kind == "merge" else make(kind)
        whole = connector(features)
        rows, columns = connector.shape(connector.square)
        connector.limit(4)
        pooled = F.adaptive_avg_pool2d(whole.transpose(1, 2).unflatten(2, (rows, columns)), 2)
        torch.testing.assert_close(connector(features), pooled.flatten(2).transpose(1, 2))
    pool, coarse = make("pool"), make("pool", tokens=4)
    coarse.load_state_dict(pool.state_dict())
    pool.limit(4)
    assert torch.equal(pool(features), coarse(features))


def test_cross_attention_is_torchs_multi_head_attention_over_placed_patches() -> None:
    connector, features = make("cross-attention").double(), patches(3, 5).double()
    queries = F.layer_norm(connector.queries.expand(2, -1, -1), (8,))
    values = F.layer_norm(features @ connector.entry.weight.T, (8,))
    # Rows of 3 patches in a frame of 6: their centres lie at 0.5, 2.5 and 4.5.
    rows = torch.tensor([0.5, 2.5, 4.5]).repeat_interleave(5)
    columns = ((torch.arange(5) + 0.5) * 6 / 5 - 0.5).repeat(3)
    speeds = torch.tensor([1.0, 0.01])
    places = [f(axis[:, None] * speeds) for axis in (rows, columns) for f in (torch.sin, torch.cos)]
    keys = values + torch.cat(places, dim=1).double()
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    attention.load_state_dict(connector.attention.state_dict())
    expected = F.layer_norm(attention(queries, keys, values)[0], (8,))
    torch.testing.assert_close(connector(features, (3, 5)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cross-attention", "pooled-queries"])
def test_fixed_positions_make_the_order_of_patches_matter(kind: str) -> None:
    connector, features = make(kind), patches()
    turned = features.unflatten(1, (SIDE, SIDE)).transpose(1, 2).flatten(1, 2)
    tokens, other = connector(features), connector(turned)
    assert not torch.allclose(tokens.sum(1), other.sum(1), atol=1e-4)


def test_pooled_queries_ask_all_patches_and_keep_what_they_know() -> None:
    connector, features = make("pooled-queries"), patches()
    torch.nn.init.zeros_(connector.attention.out_proj.weight)
    torch.nn.init.zeros_(connector.feed_forward[-1].weight)
    torch.nn.init.zeros_(connector.feed_forward[-1].bias)
    # With both branches shut it is average pooling.
    pooled = average(connector.entry(features).unflatten(1, (SIDE, SIDE)), (3, 3)).flatten(1, 2)
    torch.testing.assert_close(connector(features), pooled)
    # Open, the last patch reaches the first token.
    torch.nn.init.normal_(connector.attention.out_proj.weight)
    moved = features.clone()
    moved[:, -1] += 5
    assert not torch.allclose(connector(features)[:, 0], connector(moved)[:, 0], atol=1e-4)


@pytest.mark.parametrize("kind", ["qformer", "resampler", "cross-attention"])
def test_the_first_queries_do_not_know_of_those_behind_a_limit(kind: str) -> None:
    connector, features = make(kind), patches()
    connector.limit(2)
    few = connector(features)
    with torch.no_grad():
        connector.queries[:, 2:] += 1
    assert torch.equal(connector(features), few)


@pytest.mark.parametrize("kind", ["qformer", "resampler"])
def test_learned_positions_are_interpolated_to_another_grid(kind: str) -> None:
    connector = make(kind)
    table = torch.arange(SIDE, dtype=torch.float32)[:, None, None].expand(SIDE, SIDE, WIDTH)
    connector.positions.data = table.reshape(1, -1, WIDTH).clone()
    placed = connector.placed(torch.zeros(1, 12 * 12, WIDTH), (12, 12)).view(12, 12, WIDTH)
    inner = (torch.arange(12) + 0.5) / 2 - 0.5  # twice as fine: centres lie between the table's
    torch.testing.assert_close(placed[3:-3, 5, 0], inner[3:-3], rtol=0, atol=0.06)  # cubic: no straight line exactly
    assert torch.equal(placed[:, 0], placed[:, 7])
    # A class token in front keeps its own.
    config = connector.config
    full = connectors.build(config, width_in=WIDTH, patches=SIDE**2 + 1)
    found = full.placed(torch.zeros(1, 3 * 5 + 1, WIDTH), (3, 5))
    assert torch.equal(found[:, :1], full.positions[:, :1])


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in GRIDS if kind != "identity"] + ["cross-attention"])
def test_a_class_token_among_the_patches_is_refused(kind: str) -> None:
    config = TypeAdapter(ConnectorConfig).validate_python({"kind": kind} | KINDS[kind])
    with pytest.raises(RecipeError, match=rf"{kind} needs patches in rows and columns.*encoder\.select: patch"):
        connectors.build(config, width_in=WIDTH, patches=SIDE**2 + 1)


def test_identity_takes_a_class_token_and_refuses_a_limit_then() -> None:
    connector = connectors.build(IdentityConnectorConfig(), width_in=WIDTH, patches=SIDE**2 + 1)
    assert connector.tokens == SIDE**2 + 1
    assert connector.tokens_of((3, 5)) == 16
    with pytest.raises(RecipeError, match=r"identity with a limit needs .*select: patch"):
        connector.limit(4)
    assert connector.tokens == SIDE**2 + 1


def test_registers_that_look_like_a_grid_are_still_refused() -> None:
    architecture = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, num_register_tokens=4
    ).to_dict()  # 4 patches, 4 registers and a class token: 9 tokens
    encoder = HuggingFaceEncoderConfig(architecture=architecture, image=ImageConfig(size=28))
    pool = TypeAdapter(ConnectorConfig).validate_python({"kind": "pool", "tokens": 4})
    with pytest.raises(RecipeError, match=r"encoder\.select: patch"):
        build_vpg(VPGConfig(encoder=encoder, connector=pool), load_weights=False)
    patch = encoder.model_copy(update={"select": "patch"})
    assert build_vpg(VPGConfig(encoder=patch, connector=pool), load_weights=False).tokens == 4


@pytest.mark.parametrize("kind", ["pool", "pooled-queries"])
@pytest.mark.parametrize("tokens", [10, 49])
def test_numbers_of_pooled_tokens_that_are_no_grid(kind: str, tokens: int) -> None:
    with pytest.raises(RecipeError, match=rf"connector\.tokens: .* {tokens}; right would be one of 1, 4, .*36"):
        make(kind, tokens=tokens)


def test_widths_that_positions_or_heads_do_not_divide() -> None:
    with pytest.raises(RecipeError, match="multiple of heads"):
        make("pooled-queries", width=9)
    with pytest.raises(RecipeError, match="multiple of 4"):
        make("cross-attention", width=6)


# --- several encoders ---------------------------------------------------------------------------


def vit(directory: Path, model_type: str, patch: int, **image: Any) -> dict[str, Any]:
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    architecture = {"model_type": model_type, "image_size": 28, "patch_size": patch} | config
    encoder = encoders.build(HuggingFaceEncoderConfig(architecture=architecture), load_weights=False)
    encoder.model.save_pretrained(directory)
    return {
        "kind": "huggingface", "reference": str(directory), "select": "patch", "image": {"size": 28, **image},
    }  # fmt: skip


def concat(*each: dict[str, Any]) -> VPGConfig:
    return VPGConfig.model_validate(
        {"encoder": {"kind": "concat", "encoders": list(each)}, "connector": {"kind": "merge", "window": [2, 2]}}
    )


def test_encoders_side_by_side_see_what_each_sees_alone(tmp_path: Path) -> None:
    half = [0.5, 0.5, 0.5]
    each = [vit(tmp_path / "a", "clip_vision_model", 7), vit(tmp_path / "b", "siglip_vision_model", 14, mean=half)]
    vpg = build_vpg(concat(*each))
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    alone = [build_vpg(VPGConfig.model_validate({"encoder": one, "connector": {"kind": "identity"}})) for one in each]
    first, second = (one.encode(one.transform(image)[None]) for one in alone)
    features = vpg.encode(vpg.transform(image)[None])
    assert features.shape == (1, 16, 32) == (1, vpg.encoder.patches, vpg.encoder.width)
    torch.testing.assert_close(features[..., :16], first)
    torch.testing.assert_close(  # 2 x 2 patches, repeated to 4 x 4
        features[..., 16:].view(4, 4, 16), second.view(2, 2, 16).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    again = encoders.build(TypeAdapter(type(vpg.encoder.config)).validate_python(vpg.encoder.config.model_dump()))
    assert again.reference_sha256 == vpg.encoder.reference_sha256 == vpg.encoder.weights_sha256()
    # the other way round the finer ones are averaged
    turned = build_vpg(concat(*reversed(each)))
    averaged = turned.encode(turned.transform(image)[None])[..., 16:]
    torch.testing.assert_close(averaged.view(2, 2, 16), average(first.view(1, 4, 4, 16), (2, 2))[0])


def test_encoders_that_cannot_be_joined_are_refused(tmp_path: Path) -> None:
    one = vit(tmp_path / "a", "clip_vision_model", 7)
    with pytest.raises(RecipeError, match=r"encoders\.1\.image: size is 42, the first one's 28"):
        build_vpg(concat(one, one | {"image": {"size": 42}}))
    with pytest.raises(RecipeError, match=r"encoders\.1\.image: fit is crop, the first one's squash"):
        build_vpg(concat(one, one | {"image": {"size": 28, "fit": "crop"}}))
    with pytest.raises(RecipeError, match=r"encoders\.0: a class token .* select: patch"):
        build_vpg(concat(one | {"select": "full"}, one))


# --- whole runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "connector",
    [
        {"kind": "pool", "tokens": 1, "width": 16, "standardised": True},
        {"kind": "pixel-shuffle", "limit": 1},
        {"kind": "cross-attention", "queries": 4, "limit": 3, **SMALL},
        {"kind": "pooled-queries", "tokens": 4, "hidden": 16, **SMALL},
    ],
    ids=lambda config: config["kind"],
)
def test_a_vlm_directory_opens_with_its_connector_and_limit(
    tiny: Tiny, tmp_path: Path, connector: dict[str, Any]
) -> None:
    keys = source_keys(tiny.encoder, tiny.source_llm, tiny.data())
    keys["source"]["vpg"]["encoder"]["select"] = "patch"
    keys["source"]["vpg"]["connector"] = connector
    run = runs.train(parse_recipe(keys), output=tmp_path / "run", device="cpu")
    vision = load_vision(str(run))
    asked = connector.get("limit") or connector.get("tokens")
    assert vision.vpg.tokens == vision.manifest["visual_tokens"] == asked
    assert vision.vpg.connector.config.model_dump(include=set(connector)) == connector
    if connector.get("standardised"):
        assert vision.vpg.connector.mean.any()
    # a limit is no tensor: without it the same VLM gives more
    vision.vpg.connector.limit(None)
    assert vision.vpg.tokens >= asked
    assert vt.load(run).vpg.tokens == asked
    transferred = runs.transfer(
        tiny.transfer_recipe(source={"vpg": str(run)}, stages=[WARMUP]), output=tmp_path / "moved", device="cpu"
    )
    assert load_vision(str(transferred)).vpg.tokens == asked


def test_side_by_side_encoders_train_and_open_again(tiny: Tiny, tmp_path: Path) -> None:
    each = {"kind": "huggingface", "reference": str(tiny.encoder), "select": "patch"}
    keys = source_keys(tiny.encoder, tiny.source_llm, tiny.data())
    keys["source"]["vpg"]["encoder"] = {"kind": "concat", "encoders": [each, each]}
    run = runs.train(parse_recipe(keys), output=tmp_path / "run", device="cpu")
    vision = load_vision(str(run))
    assert not (run / "vlm" / "encoder" / "model.safetensors").exists()
    assert vision.manifest["parts"]["encoder"]["width"] == vision.vpg.encoder.width == 48
    assert runs.validate(tiny.transfer_recipe(source={"vpg": str(run)}))["visual_tokens"] == QFORMER["queries"]


# --- docs ---------------------------------------------------------------------------------------


def test_every_kind_has_its_examples_in_the_docs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "connectors.md").read_text()
    lines = [line for line in text.splitlines() if line.strip().startswith("connector: {")]
    yaml = YAML(typ="safe")
    found = [TypeAdapter(ConnectorConfig).validate_python(yaml.load(line)["connector"]) for line in lines]
    assert {config.kind for config in found} == set(KINDS)
    block = re.search(r"```yaml\n(encoder:.*?)```", text, re.DOTALL)
    assert block is not None
    encoder = TypeAdapter(EncoderConfig).validate_python(yaml.load(block[1])["encoder"])
    assert [each.image.size for each in encoder.encoders] == [384, 384]
