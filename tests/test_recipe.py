"""Recipes: what loads, what is refused and with which words, overrides, and writing out."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vpgtrans.config import AugmentConfig
from vpgtrans.errors import RecipeError
from vpgtrans.recipe import Recipe, dump, load_recipe, parse_recipe, recipe_hash

RECIPES = Path(__file__).parent.parent / "recipes"

GOOD = """\
name: small
source: {vpg: "registry:some-vpg"}
target:
  llm: path/to/llm
data:
  train: [{dataset: openmoji}]
  validation: [{dataset: openmoji, split: validation}]
stages:
  - {name: warmup, trainable: {projector: full}, budget: {samples: 64}}
  - name: finetune
    trainable: {connector: full, projector: full, llm: lora}
    budget: {samples: 128}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides or [])
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path, GOOD)


# --- what loads ---------------------------------------------------------------------------------


def test_defaults_depend_on_what_trains(good: Path) -> None:
    warmup, finetune = load_recipe(good).stages
    assert (warmup.lr, warmup.lr_schedule, warmup.augment) == (5e-4, "constant", False)
    assert (finetune.lr, finetune.lr_schedule, finetune.augment) == (1e-4, "cosine", True)
    assert warmup.trainable == {"encoder": "frozen", "connector": "frozen", "projector": "full", "llm": "frozen"}
    assert finetune.rates == {"connector": 1e-4, "projector": 1e-4, "llm": 1e-4}


def test_a_bare_initialiser_is_short_for_its_kind(good: Path) -> None:
    assert load_recipe(good, ["initialiser=inherit"]).initialiser.kind == "inherit"
    both = load_recipe(good, ["initialiser=converter", "initialiser.fit=ridge"]).initialiser
    assert (both.kind, both.fit) == ("converter", "ridge")


def test_a_vpg_may_be_built_from_parts(good: Path) -> None:
    vpg = "{encoder: {kind: efficientnet-lite0}, connector: {kind: qformer, queries: 8}}"
    recipe = load_recipe(good, [f"source.vpg={vpg}", "source.vpg.encoder.image.mean=[0.5, 0, 1]"])
    assert not isinstance(recipe.source.vpg, str)
    assert recipe.source.vpg.connector.kind == "qformer"
    assert recipe.source.vpg.encoder.image.mean == (0.5, 0.0, 1.0)


def test_augmentation_needs_both_the_data_and_the_stage(good: Path) -> None:
    recipe = load_recipe(good, ["data.augment=true"])
    assert [recipe.augmentation(stage) for stage in recipe.stages] == [None, AugmentConfig()]
    recipe = load_recipe(good, ["data.augment={views: 4, colour: 0}"])
    assert recipe.augmentation(recipe.stages[1]) == AugmentConfig(views=4, colour=0)
    for none in ([], ["data.augment=false"], ["data.augment=null"]):
        recipe = load_recipe(good, none)
        assert [recipe.augmentation(stage) for stage in recipe.stages] == [None, None]


def test_features_of_a_fixed_number_of_views_can_be_cached(good: Path) -> None:
    load_recipe(good, ["stages.1.cache_features=true", "data.augment={views: 4}"])
    with pytest.raises(RecipeError, match=r"stage finetune: cache_features: true .* data.augment.views"):
        load_recipe(good, ["stages.1.cache_features=true", "data.augment=true"])


@pytest.mark.parametrize(
    "name", ["blip2-opt-2.7b-to-qwen3-8b", "blip2-opt-2.7b-to-llama-3.2-3b", "llava-1.5-7b-to-qwen3-4b"]
)
def test_recipes_for_the_real_world_load(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    recipe = load_recipe(path)
    assert recipe.name == name
    warmup, finetune = recipe.stages
    # the method: the projector alone at five times the normal rate, constant; then more than the projector
    assert warmup.rates == {"projector": 5e-4}
    assert warmup.lr_schedule == "constant"
    assert finetune.rates.keys() > {"projector"}
    assert set(finetune.rates.values()) == {1e-4}
    head = path.read_text(encoding="utf-8")
    assert f"vpgtrans transfer recipes/{name}.yaml" in head
    assert "NOT run" in head


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    load_recipe(path)
    assert re.search(rf"^#.*vpgtrans \w+ recipes/{re.escape(path.name)}", path.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_overrides_that_a_recipe_offers_are_accepted(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"#   ('[^']+=[^']*'|[a-z_.]+=\S+)(\s|$)", line):
            load_recipe(path, [found[1].strip("'")])


# --- what is refused ----------------------------------------------------------------------------


def test_every_problem_is_named_at_once_with_file_line_path_and_what_would_be_right(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
name: bad
source: {vpg: {encoder: {kind: efficientnet-lite0, image: {fit: pat}}, connector: {kind: qformr}}}
target: {llm: 3, trust_remote_cod: true}
initialiser: autoo
data:
  train: [{dataset: openmoji, weigth: 1.0}]
  validation: []
stages:
  - {name: warmup, trainable: {projector: frozen}, budget: {samples: "4"}}
  - {name: finetune, trainable: {conector: full, projector: ful}, budget: {samples: 8}}
seed: 1.5
""",
    )
    problems = refusal(path)
    wanted = [
        (2, "source.vpg.encoder.image.fit", "the text 'pat' (did you mean pad?)", "one of squash, crop, pad"),
        (
            2,
            "source.vpg.connector",
            "unknown kind qformr (did you mean qformer?)",
            "qformer, resampler, cross-attention, identity",
        ),
        (3, "target.llm", "is 3", "text"),
        (3, "target", "unknown key trust_remote_cod (did you mean trust_remote_code?)", "llm, projector"),
        (4, "initialiser.kind", "'autoo' (did you mean auto?)", "one of auto, random, inherit"),
        (6, "data.train.0", "unknown key weigth (did you mean weight?)", "dataset, format, split, weight"),
        (7, "data.validation", "at least 1", "a list"),
        (9, "stages.0.trainable", "trains nothing", "full or lora"),
        (9, "stages.0.budget.samples", "the text '4'", "a whole number above 0"),
        (10, "stages.1.trainable", "unknown key conector (did you mean connector?)", "encoder, connector"),
        (10, "stages.1.trainable.projector", "'ful' (did you mean full?)", "frozen, full, lora"),
        (11, "seed", "1.5", "a whole number"),
    ]
    assert len(problems) == len(wanted), problems
    for line, key, what, right in wanted:
        start = f"{path}:{line}: {key}: "
        matching = [p for p in problems if p.startswith(start)]
        assert len(matching) == 1, (start, problems)
        assert what in matching[0]
        assert right in matching[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=true", ["is true", "a whole number"]),
        ("seed=-1", ["is -1", "at least 0"]),
        ("stages.0.lr=0", ["is 0", "above 0"]),
        ("data.train=[{dataset: a, weight: 0}]", ["data.train.0.weight: is 0", "above 0"]),
        ("data.train=[{dataset: a, weight: -1}]", ["data.train.0.weight: is -1", "above 0"]),
        ("data.train=[{dataset: a, weight: .inf}]", ["data.train.0.weight: is inf", "above 0"]),
        ("stages.0.lr=.nan", ["is nan", "above 0"]),
        ("stages.0.lr=.inf", ["is inf", "at most 10"]),
        ("stages.0.lr={llm: 1e-4}", ["no rate for projector"]),
        ("stages.1.lr={connector: 1, projector: 1, llm: 1, encoder: 1}", ["encoder", "frozen in this stage"]),
        ("stages.0.lr={lmm: 1e-4}", ["unknown key lmm", "did you mean llm?"]),
        ("stages.0.budget={}", ["samples or tokens"]),
        ("stages.0.budget={samples: 1, tokens: 2}", ["samples or tokens"]),
        ("stages.0.micro_batch_size=5", ["16 is not a multiple of micro_batch_size 5"]),
        ("data.augment={scale: [1.2, 0.9]}", ["data.augment", "smallest zoom 1.2 is above the largest 0.9"]),
        ("data.augment={turn: 3}", ["unknown key turn"]),
        ("stages.0.cache_features=maybe", ["'maybe'", "auto", "true or false"]),
        ("stages.0.trainable={connector: lora, projector: full}", ["connector: lora is possible for llm and encoder"]),
        ("target.quantise=nf5", ["the text 'nf5' (did you mean nf4?)", "one of nf4, int8, or null"]),
        ("trainer.optimizer=adam8", ["the text 'adam8'", "one of adamw, adamw-8bit, paged-adamw, paged-adamw-8bit"]),
        (
            "trainer.gradient_checkpointing=[connector]",
            ["the text 'connector'", "right would be one of llm, encoder"],
        ),
        ("trainer.compile=yes please", ["the text 'yes please'", "right would be true or false"]),
        ("stages.1.lora.dora=1", ["is 1; right would be true or false"]),
        ("stages.1.name=warmup", ["two stages are called warmup"]),
        ("stages=[]", ["at least 1"]),
        ("trainer.devices=0", ["is 0", "a whole number above 0", "auto"]),
        ("trainer.strategy=dp", ["'dp'", "auto, ddp", "deepspeed-3"]),
        ("compare.arms=[scrach]", ["'scrach' (did you mean scratch?)"]),
        ("prompt.template=hello", ["<image> exactly once"]),
        ("data.train=openmoji", ["the text 'openmoji'", "a list"]),
        ("data.max_bad_fraction=1.5", ["is 1.5", "at most 1"]),
        ("source.vpg={encoder: {kind: huggingface}}", ["source.vpg.connector", "is missing"]),
        ("source.vpg={encoder: {}, connector: {kind: identity}}", ["has no kind", "huggingface, efficientnet-lite0"]),
        ("target.llm=null", ["null (nothing)", "text"]),
        ("name=a/b", ["'a/b'", "text of the form"]),
        ("target.projector={tail: true, norm: false}", ["tail: true needs norm: true"]),
        ("tarin.x=1", ["unknown key tarin", "did you mean trainer?"]),
        ("data.tarin=[]", ["data: unknown key tarin", "did you mean train?"]),
        ("stages.wramup.lr=1", ["stages has no item wramup", "did you mean warmup?"]),
        ("stages.7.lr=1", ["stages has no item 7", "0 to 1"]),
        ("seed.x=1", ["is a mapping with the keys x", "a whole number"]),
        ("foo", ["is not KEY=VALUE"]),
        ("=3", ["is not KEY=VALUE"]),
        ("a..b=3", ["empty part"]),
        ("source.vpg=[", ["not valid YAML"]),
    ],
)
def test_each_wrong_value_gets_one_message_that_names_the_override(good: Path, override: str, words: list[str]) -> None:
    problems = refusal(good, [override])
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"override {override}: ")
    for word in words:
        assert word in problems[0]


def test_problems_of_overrides_and_file_come_together(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "sed: 3\n")
    problems = refusal(path, ["foo", "seed=x"])
    assert len(problems) == 3
    assert any(
        p.startswith(f"{path}:{GOOD.count(chr(10)) + 1}: unknown key sed (did you mean seed?)") for p in problems
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", [":2: ", "the key name stands twice"]),
        ("", ["is empty"]),
        ("- a\n", ["holds a list"]),
        ("just text", ["holds a single value"]),
        ("name: [a\n", ["not valid YAML"]),
        ("a: !!python/object:os.system {}\n", ["unknown key a"]),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, words: list[str]) -> None:
    message = "\n".join(refusal(write(tmp_path, text)))
    for word in words:
        assert word in message
    assert str(tmp_path / "recipe.yaml") in message


def test_a_file_that_is_not_there(good: Path) -> None:
    assert "did you mean" in refusal(good.with_name("recpie.yaml"))[0]
    assert "is a directory" in refusal(good.parent)[0]
    good.write_bytes(b"\xff\xfe\x00name")
    assert "can't be read as text" in refusal(good)[0]


# --- overrides and writing out ------------------------------------------------------------------


def test_list_items_are_named_by_number_or_by_stage_name(good: Path) -> None:
    for key in ("stages.0.budget.samples", "stages[0].budget.samples", "stages.warmup.budget.samples"):
        assert load_recipe(good, [f"{key}=32"]).stages[0].budget.samples == 32
    assert load_recipe(good, ["data.validation.0.limit=5"]).data.validation[0].limit == 5


def test_overrides_may_be_a_mapping_of_python_values(good: Path) -> None:
    recipe = load_recipe(good, {"seed": 7, "stages.warmup.budget": {"samples": 3}, "trainer.threads": None})
    assert (recipe.seed, recipe.stages[0].budget.samples) == (7, 3)
    with pytest.raises(RecipeError, match="override seed=x: seed"):
        load_recipe(good, {"seed": "x"})


def test_a_later_override_wins_and_the_file_stays_as_it_is(good: Path) -> None:
    before = good.read_bytes()
    assert load_recipe(good, ["seed=1", "seed=2"]).seed == 2
    assert good.read_bytes() == before


def test_anchors_and_merge_keys_keep_working(tmp_path: Path) -> None:
    text = GOOD.replace(
        "stages:\n  - {name: warmup, trainable: {projector: full}, budget: {samples: 64}}",
        "stages:\n  - &w {name: warmup, trainable: {projector: full}, budget: {samples: 64}}\n"
        "  - {<<: *w, name: again, batch_size: 8}",
    )
    stages = load_recipe(write(tmp_path, text)).stages
    assert (stages[1].name, stages[1].batch_size, stages[1].budget.samples) == ("again", 8, 64)


RATES = st.floats(min_value=1e-8, max_value=10, allow_nan=False)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lr=RATES | st.fixed_dictionaries({"connector": RATES, "projector": RATES, "llm": RATES}),
    template=st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda t: "<image>" not in t),
    clip=st.none() | st.floats(1e-3, 1e3),
    cache=st.sampled_from(["auto", False]),
    targets=st.none() | st.lists(st.sampled_from(["q_proj", "v_proj"]), max_size=2),
)
@example(seed=0, lr=1.0, template="a\x85b\u2028", clip=None, cache="auto", targets=None)  # line breaks of old YAML
def test_what_is_dumped_loads_as_an_equal_recipe_with_an_equal_hash(
    tmp_path_factory: pytest.TempPathFactory, **values: object
) -> None:
    folder = tmp_path_factory.mktemp("dump")
    recipe = load_recipe(
        write(folder, GOOD),
        {
            "seed": values["seed"],
            "stages.1.lr": values["lr"],
            "prompt.template": f"<image>{values['template']}",
            "stages.1.clip": values["clip"],
            "stages.0.cache_features": values["cache"],
            "stages.1.lora.targets": values["targets"],
        },
    )
    again = load_recipe(write(folder, dump(recipe)))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)
    assert dump(again) == dump(recipe)


def test_a_dump_writes_every_default_in_the_schemas_order(good: Path) -> None:
    text = dump(load_recipe(good))
    for key in ("max_bad_fraction: 0.01", "weight_decay: 0.05", "fit: cca", "precision: auto", "encoder: frozen"):
        assert key in text
    keys = [line.split(":")[0] for line in text.splitlines() if line[0].isalpha()]
    assert keys == list(Recipe.model_fields)


def test_the_hash_depends_on_what_is_said_and_not_on_how(tmp_path: Path) -> None:
    plain = load_recipe(write(tmp_path, GOOD))
    spelt = load_recipe(write(tmp_path, "# a comment\nseed: 0\n" + GOOD))
    assert recipe_hash(plain) == recipe_hash(spelt)
    assert recipe_hash(load_recipe(write(tmp_path, GOOD), ["seed=1"])) != recipe_hash(plain)


def test_the_hash_tells_parts_of_the_same_settings_apart_and_survives_new_keys(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"queries": 4, "width": 16, "heads": 2}
    hashes = set()
    for kind in ("qformer", "resampler"):
        vpg = {"encoder": {"kind": "efficientnet-lite0"}, "connector": {"kind": kind, **settings}}
        hashes.add(recipe_hash(load_recipe(good, {"source.vpg": vpg})))
    assert len(hashes) == 2
    # stated, even at its default, a preprocessing replaces that of the reference
    for image in ({}, {"image": {}}):
        encoder = {"kind": "huggingface", "reference": "org/repo", **image}
        vpg = {"encoder": encoder, "connector": {"kind": "qformer", **settings}}
        hashes.add(recipe_hash(load_recipe(good, {"source.vpg": vpg})))
    assert len(hashes) == 4

    recipe = load_recipe(good)
    before = recipe_hash(recipe)
    dumped = Recipe.model_dump

    def later(self: Recipe, **options: Any) -> dict[str, Any]:
        return dumped(self, **options) | ({} if options.get("exclude_defaults") else {"new_key": 7})

    monkeypatch.setattr(Recipe, "model_dump", later)
    assert recipe_hash(recipe) == before


def test_plain_values_make_a_recipe(good: Path) -> None:
    recipe = load_recipe(good)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    with pytest.raises(RecipeError, match=r"run 7: .*unknown key sed"):
        parse_recipe({**recipe.model_dump(mode="json"), "sed": 1}, name="run 7")


def test_reading_recipes_imports_no_torch() -> None:
    code = "import sys, vpgtrans.recipe; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "source",
    [
        {"dataset": "a.parquet", "caption": "text"},
        {"dataset": "a.parquet", "question": "q", "answer": "a"},
        {"dataset": "a.jsonl", "conversation": "said"},
        {"dataset": "a.jsonl", "document": "texts", "image": "pictures"},
        {"dataset": "a.jsonl", "text": "body"},
        {"dataset": "a.json", "format": "llava", "folder": "images"},
        {"dataset": "q.json", "format": "vqa", "annotations": "a.json", "image": "{image_id:012d}.jpg"},
        {"dataset": "hf:org/name", "streaming": True},
        {"dataset": "a.parquet", "filter": "kept.parquet"},
    ],
    ids=lambda source: "-".join(source),
)
def test_every_kind_of_source_is_written_out_so_that_it_loads_again(tmp_path: Path, source: dict[str, object]) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), {"data.train": [source]})
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe
