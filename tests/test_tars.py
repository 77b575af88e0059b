"""Tar shards that webdataset wrote: patterns, URLs, and every way in which one can be damaged."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest
import webdataset
from data_files import (
    CAPTIONS,
    COLORS,
    COUNT,
    IMAGES,
    check_squares,
    counts,
    opened,
    write_tar,
)

from vpgtrans.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


def shards(folder: Path, count: int = 2) -> list[Path]:
    """The squares in so many shards, by webdataset's ShardWriter."""
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=-(-COUNT // count), verbose=0) as sink:
        for number in range(COUNT):
            said = {"caption": CAPTIONS[number], "width": 4}
            sink.write({"__key__": f"k{number:03d}", "png": IMAGES[number], "json": said})
    return sorted(folder.glob("*.tar"))


def test_tar_shards_by_pattern_directory_and_list(tmp_path: Path):
    files = shards(tmp_path / "set")
    assert len(files) == 2
    for dataset in (tmp_path / "set/{000..001}.tar", tmp_path / "set", "::".join(map(str, files))):
        check_squares(opened(dataset))
    source = opened(tmp_path / "set")
    assert source.rows.read(1)["width"] == 4
    assert source.rows.where(2) == f"{files[1]}, sample 'k002'"
    check_squares(pickle.loads(pickle.dumps(source)))
    assert [sample["__key__"] for sample in webdataset.WebDataset([str(f) for f in files], shardshuffle=False)] == [
        source.rows.read(row)["__key__"] for row in range(COUNT)
    ]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_tar_shards_by_url(tmp_path: Path, scheme: str, memory: fsspec.AbstractFileSystem):
    for file in shards(tmp_path / "set"):
        memory.pipe(f"/set/{file.name}", file.read_bytes())
    base = "memory://set" if scheme == "memory" else (tmp_path / "set").as_uri()
    source = opened(f"{base}/{{000..001}}.tar")
    check_squares(source)
    check_squares(pickle.loads(pickle.dumps(source)))


def test_a_rewritten_shard_is_scanned_again(tmp_path: Path, memory: fsspec.AbstractFileSystem):
    for said in ("old", "new"):
        file = write_tar(tmp_path / "a.tar", {"__key__": f"k{said}", "png": IMAGES[0], "txt": said})
        memory.pipe("/a.tar", file.read_bytes())
        for dataset in (file, "memory://a.tar"):
            assert opened(dataset).rows.read(0)["__key__"] == f"k{said}"


def test_a_shard_whose_mode_changes_is_the_same(tmp_path: Path, memory: fsspec.AbstractFileSystem):
    file = shards(tmp_path / "a", 1)[0]
    before = opened(file).fingerprint
    file.chmod(0o600)
    assert opened(file).fingerprint == before
    os.utime(file, (1, 1))
    assert opened(file).fingerprint != before
    # in a file system without times of change, `created` says when a file was written
    memory.pipe_file("/a.tar", file.read_bytes())
    before = opened("memory://a.tar").fingerprint
    memory.pipe_file("/a.tar", file.read_bytes())
    assert opened("memory://a.tar").fingerprint != before


def test_texts_and_several_members_of_a_sample(tmp_path: Path):
    sample = {"__key__": "a/k", "left.png": IMAGES[0], "right.png": IMAGES[1], "txt": "both", "cls": 3}
    file = write_tar(tmp_path / "a.tar", sample)
    source = opened(file, image="right.png", caption="txt")
    assert source.caption(0) == "both"
    assert source.image(0).getpixel((0, 0)) == COLORS[1]
    assert opened(file, caption="txt").image(0).getpixel((0, 0)) == COLORS[0]


def test_members_that_are_no_samples(tmp_path: Path):
    (tmp_path / "k.png").write_bytes(IMAGES[0])
    (tmp_path / "k.txt").write_text("said")
    (tmp_path / "._k.png").write_text("of another system")
    (tmp_path / "readme").write_text("x")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("._k.png", "k.png", "k.txt", "readme"):
            archive.add(tmp_path / name, name)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = opened(tmp_path / "a.tar")
    assert [source.rows.read(row)["__key__"] for row in range(len(source))] == ["k"]


def test_two_samples_of_one_name_in_a_shard(tmp_path: Path):
    samples = [{"__key__": key, "png": IMAGES[0], "txt": "x"} for key in ("a", "b", "a")]
    source = opened(write_tar(tmp_path / "a.tar", *samples))
    with pytest.raises(DataError, match=r"a\.tar, sample 'a': more than one \.png"):
        source.sample(0)
    assert counts(source) == (1, 1, 0)


def test_a_tar_that_ends_early_wherever_it_is_cut(tmp_path: Path):
    whole = shards(tmp_path / "set", count=1)[0].read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # behind the last member
    cut = tmp_path / "cut.tar"
    for length in [*range(1, end, 97), *range(512, end, 512), end, end + 1, end + 511]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar: the shard ends early or is damaged after \d members"):
            opened(cut)
    cut.write_bytes(whole[: end + 512])
    check_squares(opened(cut))


@pytest.mark.parametrize("name", ["/etc/k.png", "../k.png", "a/../../k.png"])
def test_a_tar_with_names_that_lead_out_of_it(tmp_path: Path, name: str):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for member in ("fine.png", name):
            info = tarfile.TarInfo(member)
            info.size = len(IMAGES[0])
            archive.addfile(info, io.BytesIO(IMAGES[0]))
    with pytest.raises(DataError, match=rf"a\.tar: member '{name}' has an absolute path or `\.\.`"):
        opened(tmp_path / "a.tar")


@pytest.mark.parametrize(("form", "size"), [(tarfile.GNU_FORMAT, -512), (tarfile.PAX_FORMAT, -1536)])
def test_a_tar_that_leads_back_to_where_it_was(tmp_path: Path, form: int, size: int):
    info = tarfile.TarInfo("k.png")
    if form == tarfile.GNU_FORMAT:
        info.size = size
    else:
        info.pax_headers = {"size": str(size)}
    (tmp_path / "a.tar").write_bytes(tarfile.TarInfo("first.png").tobuf() + info.tobuf(form) + bytes(2048))
    with pytest.raises(DataError, match=r"a\.tar: the shard ends early or is damaged after 2 .*negative size"):
        opened(tmp_path / "a.tar")


def test_members_that_are_damaged_cost_their_sample_only(tmp_path: Path):
    samples = [{"__key__": f"k{n}", "png": IMAGES[0], "json": {"caption": "x"}} for n in range(3)]
    content = write_tar(tmp_path / "a.tar", *samples).read_bytes()
    (tmp_path / "a.tar").write_bytes(content.replace(b'{"caption"', b'#"caption"', 1))
    source = opened(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar, sample 'k0': \.json is no valid JSON"):
        source.sample(0)
    assert counts(source) == (2, 1, 0)


def test_shards_that_are_missing(tmp_path: Path):
    shards(tmp_path / "set")
    for dataset, message in [
        (tmp_path / "set/{000..002}.tar", r"002\.tar: no such file"),
        ("memory://absent.tar", r"memory://absent\.tar: no such file"),
        ("nosuchprotocol://a.tar", r"nosuchprotocol://a\.tar: Protocol not known"),
        (tmp_path / "{0..x}{.tar", "right would be"),
    ]:
        with pytest.raises(DataError, match=message):
            opened(dataset, format="webdataset")


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path):
    file = shards(tmp_path / "set", count=1)[0]
    source = opened(file)
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(DataError, match="shorter than when it was opened"):
        source.sample(2)
