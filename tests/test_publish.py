"""Publishing: what comes out is what the run has, can be used by its name, and nothing half-done is ever named."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from commands import invoke
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from servers import OCI_REGISTRY, oci_registry, s3_server

import vpgtrans as vt
from vpgtrans import runs
from vpgtrans.errors import IntegrityError, ReferenceError_, RegistryError
from vpgtrans.llm import open_llm
from vpgtrans.registry.index import load_index
from vpgtrans.registry.stores import directory as directory_store
from vpgtrans.runs import publishing as verb
from vpgtrans.vlm_directory import load_vlm

IMAGE = Image.new("RGB", (40, 30), (220, 30, 30))


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    place = tmp_path / "checkpoints_registry.yaml"
    monkeypatch.setenv("VPGTRANS_REGISTRY", str(place))
    return place


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def publish(run: Path, place: Path, **options):
    values = {
        "to": place.parent / "out" / options.get("id", "tiny"),
        "index": place,
        "licence": ["MIT"],
        "device": "cpu",
    }
    return runs.publish(run, **values | options)


def logits(vlm) -> torch.Tensor:
    return vlm.splice.first_logits(vlm.prompts([IMAGE]), [vlm.question(None, [IMAGE.size])])


def test_what_is_published_is_used_by_its_name(finished, index):
    done = publish(finished, index, id="owl", description="sees squares")
    entry = load_index(str(index)).entry("owl")
    assert entry == done.entry
    assert entry.locations == ("out/owl",)
    assert done.difference == 0
    assert entry.kind == "vlm"
    assert entry.lineage.recipe == "tiny"
    assert {parent.relation for parent in entry.lineage.parents} == {"source", "target"}
    assert {file.path for file in entry.files} == {
        path.relative_to(index.parent / "out/owl").as_posix()
        for path in (index.parent / "out/owl").rglob("*")
        if path.is_file()
    }
    loaded = vt.load("registry:owl@1.0.0", device="cpu")
    assert torch.equal(logits(loaded), logits(vt.load(finished, device="cpu")))


def test_its_card_says_what_it_is_and_its_five_lines_run(finished, index, monkeypatch, tmp_path):
    publish(finished, index, id="owl", description="sees <b>squares</b> | and [more](http://x)")
    card = (index.parent / "out/owl/README.md").read_text()
    assert r"sees \<b\>squares\</b\> \| and \[more\](http\://x)" in card
    for heading in ("The bill", "How it learnt", "Examples", "On held-out images", "Use", "Licence and data"):
        assert f"\n## {heading}\n" in card
    assert "(card/curves.png)" in card
    for picture in re.findall(r"\]\((card/[^)]+)\)", card):
        Image.open(index.parent / "out/owl" / picture).verify()
    assert (finished / "recipe.yaml").read_text().strip() in card
    monkeypatch.chdir(tmp_path)
    IMAGE.save("picture.png")
    ours, peft = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(ours, {})
    names: dict = {}
    exec(peft.replace("path/to/this/directory", str(index.parent / "out/owl")), names)
    assert isinstance(names["llm"], PeftModel)


def test_an_id_with_its_version_is_published_once(finished, index):
    publish(finished, index)
    before = index.read_bytes()
    with pytest.raises(RegistryError, match=r"tiny@1\.0\.0 is there already"):
        publish(finished, index, to=index.parent / "elsewhere")
    assert index.read_bytes() == before
    assert not (index.parent / "elsewhere").exists()
    with pytest.raises(Exception, match="something else in it"):
        publish(finished, index, version="1.1.0", to=index.parent / "out/tiny")
    assert index.read_bytes() == before
    publish(finished, index, version="1.1.0", to=index.parent / "out/tiny-1.1.0")
    assert [entry.name for entry in load_index(str(index))] == ["tiny@1.0.0", "tiny@1.1.0"]


def test_a_dry_run_checks_everything_and_writes_nothing(finished, index):
    done = publish(finished, index, dry_run=True)
    assert done.entry.name == "tiny@1.0.0"
    assert done.difference == 0
    assert list(index.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["vpg", "projector", "adapter"])
def test_one_part_alone_goes_back_where_it_came_from(finished, index, kind):
    entry = publish(finished, index, id=kind, kind=kind).entry
    out = index.parent / "out" / kind
    folders = {path.name for path in out.iterdir() if path.is_dir()} - {"card"}
    assert folders == ({"encoder", "connector", "projector"} if kind == "vpg" else {kind})
    assert entry.kind == kind
    whole = logits(vt.load(finished, device="cpu"))
    if kind == "vpg":
        assert entry.metrics == ()  # the run's are of the LLM with its adapter
        alone = vt.load("registry:vpg", device="cpu")
        plain = vt.load(finished, device="cpu")
        with plain.llm.model.disable_adapter():
            assert torch.equal(logits(alone), logits(plain))
        return
    with pytest.raises(ReferenceError_, match=f"is {kind} alone"):
        vt.load(f"registry:{kind}", device="cpu")
    assert torch.equal(logits(vt.load(finished, device="cpu", **{kind: f"registry:{kind}"})), whole)


def test_a_part_of_another_llm_is_refused(finished, tiny, index):
    publish(finished, index, id="lora", kind="adapter")
    with pytest.raises(IntegrityError, match="belongs to another LLM"):
        vt.load(tiny.source, device="cpu", adapter="registry:lora")
    with pytest.raises(ReferenceError_, match="holds no projector"):
        vt.load(finished, device="cpu", projector="registry:lora")


def test_an_adapter_loads_by_peft_alone(finished, tiny, index):
    publish(finished, index, id="lora", kind="adapter")
    base = open_llm(str(tiny.target_llm), dtype=torch.float32).model
    ids = torch.arange(4, 20)[None]
    before = base(ids).logits
    alone = PeftModel.from_pretrained(base, str(index.parent / "out/lora/adapter"))(ids).logits
    ours = load_vlm(str(finished), dtype=torch.float32).llm.model(ids).logits
    assert torch.equal(alone, ours)
    assert not torch.equal(alone, before)


def test_half_is_smaller_and_says_what_it_costs(finished, index):
    whole = publish(finished, index, id="whole").entry
    done = publish(finished, index, id="half", half=True)
    sizes = [{file.path: file.size for file in entry.files} for entry in (whole, done.entry)]
    assert sizes[1]["connector/model.safetensors"] < 0.6 * sizes[0]["connector/model.safetensors"]
    assert 0 < done.difference < 0.5
    assert load_file(index.parent / "out/half/projector/model.safetensors")["layers.0.weight"].dtype == torch.bfloat16


def test_metrics_have_counts_and_intervals(finished, tiny, index):
    entry = publish(finished, index, id="run").entry
    assert {metric.name for metric in entry.metrics} == {"exact_match", "token_f1", "cider"}
    assert all(metric.count == 4 and metric.interval for metric in entry.metrics)
    entry = publish(finished, index, id="measured", measure=[str(tiny.validation)]).entry
    loss = next(metric for metric in entry.metrics if metric.name == "val_loss")
    assert loss.count == 8
    assert loss.data == str(tiny.validation)
    assert loss.interval[0] < loss.value < loss.interval[1]
    assert (
        f"| loss, nats a token | {tiny.validation}".replace("_", r"\_")
        in (index.parent / "out/measured/README.md").read_text()
    )


def test_a_licence_that_is_not_known_must_be_stated(finished, tiny, index):
    with pytest.raises(RegistryError, match=rf"the licence of {re.escape(str(tiny.train))}.*--licence SPDX"):
        publish(finished, index, licence=[])
    with pytest.raises(RegistryError, match="no SPDX licence"):
        publish(finished, index, licence=["free as in beer"])
    with pytest.raises(RegistryError, match="it does not stand on cats"):
        publish(finished, index, licence=["MIT", "cats=MIT"])
    with pytest.raises(RegistryError, match="MIT and apache-2"):
        publish(finished, index, licence=["MIT", "apache-2.0"])
    assert not (index.parent / "out").exists()
    stated = [str(tiny.train), str(tiny.source), str(tiny.target_llm), str(tiny.encoder)]
    entry = publish(finished, index, licence=[f"{name}=cc0-1.0" for name in stated]).entry
    assert entry.licence.spdx == "CC0-1.0"
    assert {base.licence for base in entry.licence.bases} == {"CC0-1.0"}
    assert entry.data[0].licence == "CC0-1.0"


@pytest.mark.parametrize(
    "secret", ["hf_" + "a1B2" * 8, "https://me:hunter22@data.example/x.tar", "correct-horse-battery"]
)
def test_a_token_is_not_published(copied, index, monkeypatch, secret, caplog):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text() + f"# {secret}\n")
    with pytest.raises(RegistryError, match=r"README\.md, line \d+, holds") as caught:
        publish(copied, index)
    assert secret not in str(caught.value) + caplog.text
    assert list(index.parent.glob("out*")) == []
    with pytest.raises(RegistryError, match="holds"):
        publish(copied, index, description=f"by {secret}")


def test_what_does_not_say_what_the_run_says_is_not_published(finished, index, monkeypatch):
    stage = verb.stage

    def altered(source: Path, staging: Path, **options):
        manifest = stage(source, staging, **options)
        weights = staging / "projector/model.safetensors"
        state = {name: tensor * 1.1 for name, tensor in load_file(weights).items()}
        weights.unlink()
        save_file(state, weights)
        written = {"size": weights.stat().st_size, "sha256": verb.hashlib.sha256(weights.read_bytes()).hexdigest()}
        manifest["files"]["projector/model.safetensors"] = written
        (staging / "manifest.json").write_text(json.dumps(manifest))
        return manifest

    monkeypatch.setattr(verb, "stage", altered)
    with pytest.raises(IntegrityError, match="its logits are off"):
        publish(finished, index)
    assert list(index.parent.iterdir()) == []


def test_what_reads_back_otherwise_is_not_named(finished, index, monkeypatch):
    read = directory_store.DirectoryStore.read

    def flipped(self, file, *, start=0):
        for chunk in read(self, file, start=start):
            yield chunk if file.path != "projector/config.json" else chunk.replace(b"linear", b"lineaR")

    monkeypatch.setattr(directory_store.DirectoryStore, "read", flipped)
    with pytest.raises(IntegrityError, match=r"projector/config\.json reads back"):
        publish(finished, index)
    assert not index.exists()


def test_a_damaged_run_is_not_published(copied, index):
    weights = copied / "vlm/projector/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError, match="was altered"):
        publish(copied, index)
    (copied / "vlm/manifest.json").unlink()
    with pytest.raises(ReferenceError_, match="has not finished"):
        publish(copied, index)


def test_a_part_that_is_not_there_or_fits_nothing(tiny, copied, index):
    with pytest.raises(RegistryError, match="has no adapter"):
        publish(tiny.source, index, kind="adapter")
    manifest = json.loads((copied / "vlm/manifest.json").read_text())
    manifest["llm"]["trained"] = True
    (copied / "vlm/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RegistryError, match="trained in full"):
        publish(copied, index, kind="vpg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": "Owl Eyes"}, "id: "),
        ({"version": "one"}, "version: "),
        ({"to": "s3://key:secret@bucket/x"}, "carries credentials"),
        ({"to": "oci:nothing"}, "has the form oci:"),
        ({"base_model": "gemma"}, "ORG/REPO"),
        ({"index": "https://x.example/index.yaml"}, "can't be changed"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_opened(finished, index, options, message, monkeypatch):
    monkeypatch.setattr(verb, "open_vlm", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(RegistryError, match=message) as caught:
        publish(finished, index, **options)
    assert "secret" not in str(caught.value)


def test_a_directory_without_its_run_keeps_no_run(finished, index, tmp_path):
    vlm = Path(shutil.copytree(finished / "vlm", tmp_path / "only"))
    with pytest.raises(RegistryError, match="no recipe here"):
        publish(vlm, index, licence=[])
    entry = publish(vlm, index, id="only").entry
    card = (index.parent / "out/only/README.md").read_text()
    assert entry.data == () or entry.metrics == ()
    assert "The bill" not in card
    assert "## Use" in card


@pytest.mark.parametrize("where", ["write", "rename", "append"])
def test_a_kill_in_the_midst_leaves_nothing_that_hinders(finished, index, monkeypatch, where):
    child = os.fork()
    if not child:

        def killed(*arguments, **options):
            os.kill(os.getpid(), signal.SIGKILL)

        place = {"write": (directory_store, "_rename"), "rename": (verb, "_read_back"), "append": (verb.edit, "_write")}
        monkeypatch.setattr(*place[where], killed)
        publish(finished, index)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not index.exists()
    publish(finished, index)
    assert [entry.name for entry in load_index(str(index))] == ["tiny@1.0.0"]
    assert {path.name for path in (index.parent / "out").iterdir()} == {"tiny"}
    vt.load("registry:tiny", device="cpu")


class Folder:
    """Stands for the hub, which these tests can't reach: keeps the folder that would be uploaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def write(self, directory: Path, files) -> str:
        shutil.copytree(directory, self.place)
        assert {file.path for file in files} == {
            path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
        }
        return "hf:ORG/owl@" + "a" * 40

    def read(self, file, *, start: int = 0):
        yield (self.place / file.path).read_bytes()[start:]


def test_the_folder_that_would_be_uploaded_to_the_hub(finished, tiny, index, monkeypatch):
    folder = index.parent / "folder"
    monkeypatch.setattr(verb, "open_store", lambda location, index: Folder(folder))
    entry = publish(finished, index, to="hf:ORG/owl", base_model="ORG/tiny-llm").entry
    assert entry.locations == ("hf:ORG/owl@" + "a" * 40,)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "vpgtrans"
    assert card.data.pipeline_tag == "image-to-text"
    assert card.data.base_model == "ORG/tiny-llm"
    assert card.data.license == "mit"
    assert {result.metric_type for result in card.data.eval_results} == {"exact_match", "token_f1", "cider"}
    assert 'vt.load("hf:ORG/owl")' in card.text
    for path in folder.rglob("*"):
        assert not path.is_symlink()
        assert path.suffix not in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    assert torch.equal(logits(vt.load(folder, device="cpu")), logits(vt.load(finished, device="cpu")))
    base = open_llm(str(tiny.target_llm), dtype=torch.float32).model
    PeftModel.from_pretrained(base, str(folder), subfolder="adapter")


def test_the_command_says_what_it_did(finished, index):
    place = str(index.parent / "out")
    options = ["--to", place, "--index", str(index), "--licence", "MIT", "--device", "cpu"]
    dry = invoke("registry", "publish", str(finished), *options, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    said = json.loads(dry.stdout)
    assert (said["name"], said["dry_run"], said["logits"]) == ("tiny@1.0.0", True, 0)
    assert not index.exists()
    done = invoke("registry", "publish", str(finished), *options)
    assert done.exit_code == 0, done.output
    assert "the same as the run's" in done.stdout
    assert "try it: vpgtrans caption registry:tiny@1.0.0 IMAGE" in done.stdout
    again = invoke("registry", "publish", str(finished), *options)
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    assert "Traceback" not in again.output
    yanked = invoke("registry", "yank", "tiny@1.0.0", "--reason", "blind", "--json")
    assert json.loads(yanked.stdout)["status"] == "yanked"
    assert invoke("registry", "yank", "tiny@1.0.0", "--reason", "blind").exit_code == 2


@pytest.fixture(params=["s3", "oci"])
def elsewhere(request, tmp_path, monkeypatch) -> Iterator[str]:
    """A place on a server of its own."""
    (tmp_path / "server").mkdir()
    if request.param == "oci":
        if OCI_REGISTRY is None:
            pytest.skip("needs docker-registry: apt-get install docker-registry")
        with oci_registry(tmp_path / "server") as host:
            yield f"oci:{host}/eyes/owl:1.0.0"
        return
    pytest.importorskip("s3fs", reason="needs the extra [s3]")
    with s3_server(tmp_path / "server") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecretkeyofthetest")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        assert requests.put(f"{endpoint}/checkpoints", timeout=5).ok
        yield "s3://checkpoints/owl/1.0.0"


def test_published_to_a_server_it_is_pulled_on_a_clean_cache(finished, index, elsewhere, monkeypatch, tmp_path):
    entry = publish(finished, index, to=elsewhere, id="owl").entry
    assert entry.locations[0].partition("@")[0] == elsewhere.removesuffix(":1.0.0" if "@" in entry.locations[0] else "")
    assert "verysecret" not in index.read_text()
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "clean"))
    loaded = vt.load("registry:owl", device="cpu")
    assert torch.equal(logits(loaded), logits(vt.load(finished, device="cpu")))


@pytest.mark.parametrize("kind", ["vlm", "vpg", "projector", "adapter"])
def test_what_is_published_stands_up_to_verify(finished, tiny, index, kind):
    publish(finished, index, id=kind, kind=kind)
    done = invoke("registry", "verify", kind, "--against", str(tiny.target_llm), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ok"] is True
    if kind != "vpg":
        other = invoke("registry", "verify", kind, "--against", str(tiny.source_llm), "--json")
        assert other.exit_code == 4
    assert invoke("registry", "show", kind).exit_code == 0
