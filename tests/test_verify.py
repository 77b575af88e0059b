"""`verify` and its neighbours: what is damaged, lies about itself or doesn't fit is found before it is opened."""

import hashlib
import json
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke
from indexes import listed, values, write_index
from safetensors.torch import load_file, save_file
from tiny import tiny_llm
from tiny_training import build_vlm, make_recipe

from vpgtrans.registry.ancestry import ancestry
from vpgtrans.registry.diff import diff
from vpgtrans.registry.entry import Entry
from vpgtrans.registry.verify import Check, passed, verify
from vpgtrans.training.parts import set_trainable
from vpgtrans.vlm_directory import save_vlm


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VLM directory with every part that may have weights, an adapter included."""
    vlm = build_vlm(root)
    stage = {"name": "s", "trainable": {"llm": "lora"}, "budget": {"samples": 4}}
    set_trainable(vlm, make_recipe([stage]).stages[0])
    card = "---\nlibrary_name: vpgtrans\n---\n# Eyes of an owl\n\n\x1b[2Jshe **sees** [here](https://example.org/a)\n"
    lineage = {"source_vpg": "registry:newt", "target_llm": str(root / "llm")}
    where = tmp_path_factory.mktemp("made") / "checkpoints" / "owl"
    where.parent.mkdir()
    save_vlm(vlm, where, lineage=lineage, encoder_trained=True)
    (where / "README.md").write_text(card)
    return where


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "checkpoints" / "owl"))


def entry_of(vlm: Path, **changes: Any) -> dict[str, Any]:
    """A right entry of a VLM directory."""
    manifest = json.loads((vlm / "manifest.json").read_text())
    parts = manifest["parts"]
    names = ("kind", "reference", "weights_sha256", "width", "patches")
    return values(
        files=[
            listed(path.relative_to(vlm).as_posix(), path.read_bytes()) for path in sorted(vlm.rglob("*.*"))
        ],
        base={
            "llm": {key: value for key, value in manifest["llm"].items() if key not in ("trained", "adapter")},
            "encoder": {name: parts["encoder"][name] for name in names},
        },
        interface={
            "visual_tokens": manifest["visual_tokens"],
            "width": parts["connector"]["width"],
            "projected": parts["projector"]["width_out"],
            "image_size": parts["encoder"]["image_size"],
            "prompt": manifest["prompt"]["template"],
        },
    ) | changes  # fmt: skip


def entry(vlm: Path, **changes: Any) -> Entry:
    return Entry.model_validate(entry_of(vlm, **changes))


def listed_again(vlm: Path) -> None:
    """The manifest says what lies there now, as whoever publishes a bad checkpoint would have it say."""
    path = vlm / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        data = (vlm / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


def problems(checks: list[Check], question: str) -> str:
    """What speaks against one question; against the others nothing does."""
    found = {check.question: check.problems for check in checks}
    assert [other for other, said in found.items() if said] == [question], found
    return "; ".join(found[question])


# --- right ones -------------------------------------------------------------------------------------


def test_a_right_one_passes_every_check(made: Path, root: Path) -> None:
    checks = verify(made, entry=entry(made), against=str(root / "llm"))
    assert passed(checks)
    assert all(check.fine for check in checks), checks
    assert [check.question for check in checks] == [
        "files are whole", "weights are safetensors", "tensors are those of the configs", "manifest and index agree",
        f"fits {root / 'llm'}",
    ]  # fmt: skip
    looked_at = [check.looked_at for check in checks]
    for part in ("encoder", "connector", "projector"):
        assert part in looked_at[2]
    assert "weights" in looked_at[4]
    assert "tensors of the adapter" in looked_at[4]
    assert passed(verify(made))


# --- damaged and hostile ones -------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("known", [True, False], ids=["entry", "directory"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda vlm: flip(vlm / "projector" / "model.safetensors"), "projector/model.safetensors"),
        (lambda vlm: (vlm / "connector" / "model.safetensors").unlink(), "connector/model.safetensors is missing"),
        (
            lambda vlm: (vlm / "connector" / "a.safetensors").write_bytes(b"x"),
            "connector/a.safetensors is not in",
        ),
        (lambda vlm: (vlm / "projector" / "config.json").write_bytes(b"{}"), "projector/config.json"),
    ],
)
def test_a_damaged_file_is_named(copy: Path, damage: Callable[[Path], Any], said: str, known: bool) -> None:
    right = entry(copy) if known else None
    damage(copy)
    checks = verify(copy, entry=right, against="nothing/is-opened")
    assert said in problems(checks, "files are whole")
    assert not any(check.asked for check in checks[1:])


def test_a_link_is_no_file_of_an_entry(copy: Path, tmp_path: Path) -> None:
    right = entry(copy)
    weights = copy / "projector" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    assert "is a link" in problems(verify(copy, entry=right), "files are whole")


class Opened:
    """Unpickling says so."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


HOSTILE = {
    "pickle": (pickle.dumps(Opened()), "a pickle"),
    "header of 2 GB": (struct.pack("<Q", 2 << 30) + b"{}", "claims a header of 2,147,483,648 bytes"),
    "nothing": (b"", "it has 0 bytes"),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("file", ["projector/model.safetensors", "adapter/adapter_model.safetensors"])
def test_what_only_has_the_name_of_weights_is_not_opened(
    copy: Path, what: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, said = HOSTILE[what]
    (copy / file).write_bytes(data)
    listed_again(copy)
    monkeypatch.setattr("vpgtrans.parts.load_file", lambda path: pytest.fail(f"opened {path}"))
    checks = verify(copy, entry=entry(copy), against="nothing/is-opened")
    assert f"{file}: is no whole safetensors file" in problems(checks, "weights are safetensors")
    assert said in problems(checks, "weights are safetensors")


def change(vlm: Path, part: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = vlm / part / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)
    listed_again(vlm)


def widen(state: dict[str, torch.Tensor]) -> None:
    name = next(name for name, tensor in state.items() if tensor.dim() == 2)
    state[name] = torch.zeros(len(state[name]), state[name].shape[1] + 1)


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda state: state.pop(next(iter(state))), "missing "),
    "extra": (lambda state: state.update(more=torch.zeros(3)), "unexpected more [3]"),
    "shape": (widen, ", must be ["),
    "dtype": (
        lambda state: state.update({name: tensor.to(torch.int32) for name, tensor in state.items()}),
        "is I32, must be one of F64, F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("part", ["encoder", "connector", "projector"])
def test_tensors_that_the_configs_dont_ask_for(copy: Path, part: str, what: str) -> None:
    edit, said = CHANGES[what]
    change(copy, part, edit)
    found = problems(verify(copy, entry=entry(copy)), "tensors are those of the configs")
    assert said in found
    if what != "dtype":
        assert found.startswith(f"{part}: the weights do not fit")


@pytest.mark.parametrize("part", ["encoder", "connector", "projector"])
@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"encoder": 1, "connector": 1, "projector": 1}'])
def test_a_config_that_is_none(copy: Path, part: str, text: str) -> None:
    (copy / part / "config.json").write_text(text)
    listed_again(copy)
    assert part in problems(verify(copy, entry=entry(copy)), "tensors are those of the configs")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("base", "llm", "width"), 48, "base.llm.width is 48 in the index, 32 in the manifest"),
        (("base", "llm", "weights_sha256"), "f" * 64, "base.llm.weights_sha256"),
        (("base", "encoder", "patches"), 77, "base.encoder.patches is 77"),
        (("interface", "visual_tokens"), 99, "interface.visual_tokens is 99"),
        (("interface", "prompt"), "Say:", "interface.prompt is 'Say:'"),
    ],
)
def test_an_index_that_says_otherwise(made: Path, path: tuple[str, ...], value: Any, said: str) -> None:
    right = entry_of(made)
    holder = right
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    assert said in problems(verify(made, entry=Entry.model_validate(right)), "manifest and index agree")


# --- does it fit? -----------------------------------------------------------------------------------


def test_an_llm_that_it_doesnt_fit_and_why(made: Path, root: Path, tmp_path: Path) -> None:
    for name, options, said in (
        ("same shape", {"seed": 9}, "other word embeddings"),
        ("other vocabulary", {"vocabulary": 600}, "another number of words: 600, must be 512"),
        ("other width", {"width": 48}, "another width: 48, must be 32"),
    ):
        llm = str(tiny_llm("llama", tmp_path / name, **options))
        assert said in problems(verify(made, against=llm), f"fits {llm}")


def test_an_index_knows_what_an_older_manifest_doesnt_say(copy: Path, root: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    right = manifest["llm"].pop("weights_sha256")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    base = entry_of(copy)["base"]
    llm = str(root / "llm")
    fine = entry(copy, base=base | {"llm": base["llm"] | {"weights_sha256": right}})
    assert passed(verify(copy, entry=fine, against=llm))
    wrong = entry(copy, base=base | {"llm": base["llm"] | {"weights_sha256": "0" * 64}})
    assert "other weights" in problems(verify(copy, entry=wrong, against=llm), f"fits {llm}")


def test_an_adapter_for_layers_that_the_llm_hasnt(copy: Path, root: Path) -> None:
    path = copy / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    save_file({name.replace("layers.1.", "layers.9."): tensor for name, tensor in state.items()}, path)
    listed_again(copy)
    llm = str(root / "llm")
    found = problems(verify(copy, against=llm), f"fits {llm}")
    assert "do not fit the adapter" in found
    assert "missing base_model.model.model.layers.1.self_attn" in found


def test_an_llm_that_isnt_there(made: Path) -> None:
    assert "nowhere" in problems(verify(made, against="./nowhere"), "fits ./nowhere")


# --- on the command line ------------------------------------------------------------------------------


@pytest.fixture
def published(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that has owl in two versions, and newt."""
    owl = entry_of(copy, lineage={"parents": [{"relation": "source", "reference": "registry:newt"}], "seed": 0})
    newt = values("newt", description="[bold]Eyes[/bold] of a newt", status="yanked", reason="blind", kind="vpg")
    metric = {"name": "cider", "value": 3.5, "data": "openmoji", "interval": [3.25, 3.75]}
    older = values(version="0.9", metrics=[metric])
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write_index(tmp_path, owl, newt, older)


def test_verify_says_yes_and_no_by_its_exit_code(published: Path, root: Path, tmp_path: Path) -> None:
    right = invoke("registry", "verify", "registry:owl", "--against", root / "llm")
    assert right.exit_code == 0, right.output
    assert right.stdout.count("yes") == 5
    other = tiny_llm("llama", tmp_path / "other", seed=9)
    for checkpoint in ("owl@1.0", "checkpoints/owl"):
        wrong = invoke("registry", "verify", checkpoint, "--against", other, "--json")
        assert wrong.exit_code == 4
        said = json.loads(wrong.stdout)
        assert said["ok"] is False
        assert [check["ok"] for check in said["checks"]] == [True] * (len(said["checks"]) - 1) + [False]
        assert "other word embeddings" in said["checks"][-1]["problems"][0]
    flip(tmp_path / "checkpoints" / "owl" / "projector" / "model.safetensors")
    damaged = invoke("registry", "verify", "checkpoints/owl")
    assert damaged.exit_code == 4
    assert "projector/model.safetensors was altered" in " ".join(damaged.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere"], "no entry 'nowhere'"), (["."], "holds none of"), (["owl@7"], "no version '7'")],
)
def test_verify_of_nothing_is_wrong_input(published: Path, arguments: list[str], words: str) -> None:
    result = invoke("registry", "verify", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_list_filters(published: Path) -> None:
    def ids(*arguments: str) -> list[str]:
        result = invoke("registry", "list", "--index", published, "--json", *arguments)
        assert result.exit_code == 0, result.output
        return [f"{entry['id']}@{entry['version']}" for entry in json.loads(result.stdout)]

    assert ids() == ["owl@1.0", "newt@1.0", "owl@0.9"]
    assert ids("--kind", "vpg") == ["newt@1.0"]
    assert ids("--status", "active", "--encoder", "lite0") == ["owl@0.9"]
    assert ids("--base", "smollm2") == ["newt@1.0", "owl@0.9"]
    assert "no checkpoint is so" in invoke("registry", "list", "--index", published, "--base", "gpt").stdout
    everywhere = json.loads(invoke("registry", "list", "--json").stdout)
    assert {entry["index"] for entry in everywhere} > {str(published)}
    assert "openmoji-qformer-smollm2-135m" in {entry["id"] for entry in everywhere}
    assert "openmoji-qformer-smollm2-135m" in invoke("registry", "list").stdout


def test_show_has_facts_lineage_and_card(published: Path) -> None:
    shown = invoke("registry", "show", "registry:owl")
    assert shown.exit_code == 0, shown.output
    for words in ("owl@1.0", "LlamaForCausalLM", "visual tokens", "Apache-2.0", "projector/model.safetensors"):
        assert words in shown.stdout
    tree = shown.stdout[shown.stdout.index("owl@1.0 (vlm)") :]
    assert "├── seed 0\n" in tree
    assert "└── source: registry:newt (in no index at hand)" in tree  # every version of it was yanked
    assert "Eyes of an owl" in tree
    assert "she sees here" in tree
    assert "https://example.org/a" in tree
    assert "library_name" not in tree
    assert "\x1b" not in shown.stdout
    yanked = invoke("registry", "show", "newt@1.0")
    assert "yanked: blind" in yanked.stdout
    assert "[bold]Eyes[/bold]" in yanked.stdout
    assert "vpgtrans registry pull newt@1.0" in yanked.stdout
    older = invoke("registry", "show", "owl@0.9")
    assert "3.25 to 3.75" in older.stdout
    assert json.loads(invoke("registry", "show", "owl@0.9", "--json").stdout)["metrics"][0]["value"] == 3.5


def test_a_card_that_is_not_the_published_one_is_not_shown(published: Path, copy: Path) -> None:
    (copy / "README.md").write_text("# Pay here\n")
    shown = invoke("registry", "show", "owl")
    assert "Pay here" not in shown.stdout
    assert "its card is not at hand" in shown.stdout


def test_diff_of_two_entries(published: Path) -> None:
    said = json.loads(invoke("registry", "diff", "owl@0.9", "owl", "--json").stdout)
    found = {each["what"]: (each["a"], each["b"]) for each in said}
    assert found["version"] == ("0.9", "1.0")
    assert found["lineage.seed"] == (None, 0)
    assert found["metrics[openmoji cider].value"] == (3.5, None)
    assert found["lineage.parents[source registry:newt]"] == (None, True)
    assert "file README.md" in found
    assert found["file README.md"][0] is None
    assert "id" not in found
    assert "say the same" in invoke("registry", "diff", "owl", "owl@1.0").stdout
    table = invoke("registry", "diff", "owl@0.9", "owl").stdout
    assert "owl@0.9" in table
    assert "base.llm.width" in table


# --- pieces -------------------------------------------------------------------------------------------


def test_what_differs_is_told_by_name_not_by_place() -> None:
    metrics = [{"name": name, "value": value, "data": "openmoji"} for name, value in (("cider", 3.0), ("f1", 0.5))]
    a = Entry.model_validate(values(metrics=metrics))
    b = Entry.model_validate(values(metrics=[metrics[1], metrics[0] | {"value": 4.0}]))
    (found,) = diff(a, b)
    assert (found.what, found.a, found.b) == ("metrics[openmoji cider].value", 3.0, 4.0)
    assert diff(a, a) == []


def test_parents_that_are_each_others_end() -> None:
    def child(id: str, of: str) -> Entry:
        return Entry.model_validate(
            values(id, lineage={"parents": [{"relation": "parent", "reference": f"registry:{of}"}]})
        )

    known = {"owl": child("owl", "newt"), "newt": child("newt", "owl")}
    line, below = ancestry(known["owl"], lambda name: known[name])
    assert line == "owl@1.0 (vlm)"
    assert below == [("parent: registry:newt = newt@1.0", [("parent: registry:owl (above)", ())])]
    chain = {f"e{n}": child(f"e{n}", f"e{n + 1}") for n in range(100)}
    line, below = ancestry(chain["e0"], lambda name: chain[name])
    depth = 0
    while below:
        depth, (_, below) = depth + 1, below[0]
    assert depth < 20


def test_what_was_forced_is_in_the_tree() -> None:
    forced = Entry.model_validate(values(lineage={"forced": ["other weights"], "recipe": "r", "seed": 1}))
    assert ancestry(forced, lambda name: forced)[1] == [("recipe r, seed 1", ()), ("forced: other weights", ())]


def test_a_card_of_nothing_but_brackets_is_shown_soon(copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("[" * 1_000_000)
    index = write_index(tmp_path, entry_of(copy))
    began = time.monotonic()
    shown = invoke("registry", "show", "owl", "--index", index)
    assert shown.exit_code == 0
    assert "[[[" in shown.stdout
    assert time.monotonic() - began < 60  # seconds; all of it would take ten minutes and more
