"""A transfer that changes the connector: what is taken over, said and counted."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tiny_runs import WARMUP, Tiny, source_keys
from tiny_vlms import tiny_blip2, tiny_llava

from vpgtrans import runs
from vpgtrans.config import ConnectorConfig, QFormerConnectorConfig
from vpgtrans.data.mixture import open_mixture
from vpgtrans.errors import RecipeError
from vpgtrans.recipe import load_recipe, parse_recipe
from vpgtrans.runs.data import open_prompter
from vpgtrans.runs.parts import open_source, outline_of, source_of
from vpgtrans.runs.start import begin, prepare
from vpgtrans.transfer.connector import exchange
from vpgtrans.vlm_directory import load_vision

MORE = {"kind": "qformer", "queries": 7}


def test_more_queries_keep_the_first_ones_and_everything_else(tiny: Tiny) -> None:
    recipe = tiny.transfer_recipe(target={"llm": str(tiny.target_llm), "connector": MORE})
    old, source = open_source(str(tiny.source), seed=0).vpg.connector, source_of(recipe)
    new = source.vpg.connector
    assert new.config == old.config.model_copy(update={"queries": 7})  # what is left out is the source's own
    assert source.taken.to_json() == {
        "kept": [name for name in old.state_dict() if name != "queries"],
        "enlarged": ["queries: 4 -> 7"],
        "new": [],
    }
    for name, tensor in old.state_dict().items():
        assert torch.equal(new.state_dict()[name][:, :4] if name == "queries" else new.state_dict()[name], tensor)
    # the others are like the first ones, and no two are alike
    queries = new.queries[0]
    assert (queries[4:] - queries[:3]).square().mean().sqrt() < 0.2 * queries[:4].square().mean().sqrt()
    assert len({tuple(row.tolist()) for row in queries}) == 7
    assert torch.equal(queries, source_of(recipe).vpg.connector.queries[0])
    # behind a limit to the source's own number nothing has changed
    features = torch.randn(2, old.patches, old.width_in)
    new.limit(4)
    assert torch.equal(new(features), old.eval()(features))


def test_fewer_queries_and_another_kind_take_what_fits(tiny: Tiny) -> None:
    vpg = open_source(str(tiny.source), seed=0).vpg
    fewer, taken = exchange(vpg, QFormerConnectorConfig(queries=2), seed=0)
    assert torch.equal(fewer.connector.queries, vpg.connector.queries[:, :2])
    assert "queries: the first 2 of 4" in taken.kept
    assert not taken.new
    config = TypeAdapter(ConnectorConfig).validate_python({"kind": "resampler", "width": 16, "heads": 2, "queries": 4})
    other, taken = exchange(vpg, config, seed=0)
    assert taken.kept == ["queries"]
    assert set(taken.new) == set(other.connector.state_dict()) - {"queries"}
    narrow, taken = exchange(vpg, QFormerConnectorConfig(width=8), seed=0)
    assert narrow.width == 8
    assert {"queries", "qformer.layernorm.weight"} <= set(taken.new)


def test_a_transfer_with_more_queries_runs_and_says_what_it_kept(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    recipe = tiny.transfer_recipe(target={"llm": str(tiny.target_llm), "connector": MORE})
    assert open_prompter(recipe).visual_tokens == runs.validate(recipe)["visual_tokens"] == 7
    assert runs.data_stats(recipe, samples=4)["visual_tokens"] == 7
    one = runs.data_pack(tiny.transfer_recipe(), max_tokens=64)
    assert runs.data_pack(recipe, max_tokens=64)["tokens"] - one["tokens"] == 3 * 24
    with caplog.at_level("INFO"):
        run = runs.transfer(recipe, output=tiny.root / "more", device="cpu")
    kept = len(load_vision(str(run)).vpg.connector.state_dict()) - 1
    said = f"connector: kept qformer.layernorm.weight, qformer.layernorm.bias, (.+), (.+) and {kept - 4} more; "
    assert re.search(said + "enlarged queries: 4 -> 7$", caplog.text, re.MULTILINE)
    said = {"enlarged": ["queries: 4 -> 7"], "new": []}
    for file in ("summary.json", "lineage.json"):
        found = json.loads((run / file).read_text())["connector"]
        assert {key: found[key] for key in said} == said
        assert "qformer.layernorm.weight" in found["kept"]
    vision = load_vision(str(run))
    assert vision.vpg.tokens == 7
    assert vision.manifest["lineage"]["connector"]["new"] == []
    # what was left out is written out, and a resumed run takes that for the same recipe
    assert load_recipe(run / "recipe.yaml").target.connector == vision.vpg.connector.config
    runs.transfer(recipe, output=run, resume=True, device="cpu")


@pytest.mark.parametrize("kind", ["auto", "caption-fit"])
def test_initialisers_see_the_new_connectors_tokens(tiny: Tiny, kind: str) -> None:
    recipe = tiny.transfer_recipe(
        target={"llm": str(tiny.target_llm), "connector": MORE}, initialiser=kind, stages=[WARMUP]
    )
    source = source_of(recipe)
    train, validation = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
    prepared = prepare(recipe, device=torch.device("cpu"), source=source, train=train)
    assert prepared.context.visual_tokens.shape[1:] == (7, 16)
    start = begin(recipe, prepared, validation)
    assert start.vlm.vpg.tokens == start.vlm.splice.prompter.visual_tokens == 7


def test_all_arms_of_a_comparison_get_the_new_connector(tiny: Tiny, tmp_path: Path) -> None:
    target = {"llm": str(tiny.target_llm), "connector": MORE}
    stages = [{"name": "all", "trainable": {"connector": "full", "projector": "full"}, "budget": {"samples": 4}}]
    recipe = tiny.transfer_recipe(target=target, stages=stages, compare={"seeds": 1, "lr_factors": [1.0]})
    found = runs.compare(recipe, output=tmp_path / "compare", device="cpu")
    assert set(found["arms"]) == {"scratch", "inherit", "transfer"}
    assert load_recipe(tmp_path / "compare" / "recipe.yaml").target.connector.queries == 7


def test_tokens_of_another_width_need_a_new_projector(tiny: Tiny, tmp_path: Path) -> None:
    pool = {"kind": "cross-attention", "queries": 3, "standardised": True, "width": 8, "heads": 2}
    keys = source_keys(tiny.encoder, tiny.source_llm, tiny.data())
    keys["source"]["vpg"]["encoder"]["select"] = "patch"
    source = runs.train(parse_recipe(keys), output=tmp_path / "source", device="cpu")
    changes: dict[str, Any] = {"source": {"vpg": str(source)}, "stages": [WARMUP]}
    target = {"llm": str(tiny.target_llm), "connector": pool}
    recipe = tiny.transfer_recipe(target=target, **changes)
    for verb in (runs.validate, runs.data_stats):
        with pytest.raises(RecipeError, match=r"target\.connector: .*width 8, .*converter moves, takes 16; .*inherit"):
            verb(recipe)
    with pytest.raises(RecipeError, match=r"target\.connector"):
        runs.transfer(recipe, output=tmp_path / "refused", device="cpu")
    assert not (tmp_path / "refused").exists()
    inherit = tiny.transfer_recipe(target=target, initialiser="inherit", **changes)
    vision = load_vision(str(runs.transfer(inherit, output=tmp_path / "moved", device="cpu")))
    assert (vision.vpg.tokens, vision.projector.width_in) == (3, 8)
    assert vision.projector.config.norm  # of the source's kind
    assert vision.vpg.connector.mean.any()  # measured: the source's had none


def test_a_vpg_from_scratch_names_its_connector_itself(tiny: Tiny) -> None:
    keys = source_keys(tiny.encoder, tiny.source_llm, tiny.data())
    keys["target"]["connector"] = {"kind": "identity"}
    with pytest.raises(RecipeError, match="name the connector there"):
        parse_recipe(keys)


@pytest.mark.parametrize(
    ("make", "connector", "tokens", "new"),
    [
        (tiny_blip2, {"kind": "qformer", "queries": 6}, 6, False),
        (tiny_blip2, {"kind": "qformer", "limit": 2}, 2, False),
        (tiny_llava, {"kind": "identity", "limit": 1}, 1, False),
        (tiny_llava, {"kind": "pooled-queries", "tokens": 1, "width": 24, "heads": 2}, 1, True),
    ],
)
def test_other_peoples_vlms_get_another_connector_too(
    tiny: Tiny,
    tmp_path: Path,
    make: Callable[[Path], Path],
    connector: dict[str, Any],
    tokens: int,
    new: bool,
) -> None:
    path = make(tmp_path / "vlm")
    target = {"llm": str(tiny.target_llm), "connector": connector}
    recipe = tiny.transfer_recipe(source={"vpg": str(path)}, target=target)
    source = source_of(recipe)
    side = source.vpg.encoder.config.image.size
    assert source.vpg(torch.randn(1, 3, side, side)).shape == (1, tokens, source.projector.width_in)
    assert bool(source.taken.new) is new
    for file in path.glob("*.safetensors"):
        file.unlink()
    assert outline_of(recipe).visual_tokens == tokens
