"""Is the loader ever the bottleneck? Images a second beside a bare loop, and beside the loaders of others.

    python benchmarks/loader.py                            # about 10 minutes on two idle cores
    python benchmarks/loader.py --images 64 --rounds 1     # to try it

Synthetic photographs (640 x 480 JPEGs of quality 90: smooth fields, noise, OpenMoji drawings; about 100 KB each) lie
as parquet (row groups of 100), as tar shards (written by webdataset) and as JSON lines with paths. Every side reads
as many images as there are, `--passes` times, in batches of 32; rounds alternate between all sides:

bare        one loop of one process: Pillow's decoding and bicubic resizing to 224 x 224 of bytes in memory, no more
ours        read, decode, resize, tokenise, batch in 1 and in 2 processes, and scale; from each of the containers
webdataset  its WebDataset and WebLoader on the same shards, with the same resizing, scaling, tokens and processes
datasets    its parquet data set with a transform, in torch's DataLoader, with the same too

Wall seconds hold the start and end of the processes. CPU seconds are user and system time, of ended child processes
too: they say what a side costs where other work shares the cores. Ratios are of medians over rounds. Writes
benchmarks/results/loader.json.
"""

import argparse
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import webdataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader

from vpgtrans.config import ImageConfig, PromptConfig
from vpgtrans.data.config import DataSource
from vpgtrans.data.mixture import Mixture, open_mixture
from vpgtrans.prompts import Prompter
from vpgtrans.training.config import Stage
from vpgtrans.training.draws import SampleDraws
from vpgtrans.training.features import FrozenFront
from vpgtrans.training.loading import Updates
from vpgtrans.training.samples import BadSamples, Samples
from vpgtrans.training.workers import AHEAD
from vpgtrans.vision.preprocess import ImageTransform, open_image

RESULTS = Path(__file__).parent / "results" / "loader.json"
SIZE = 224
BATCH = 32
GROUP = 100
"""Rows of a parquet row group, and images of a shard."""
WORKERS = (1, 2)
WORDS = ("a", "photo", "of", "red", "green", "blue", "old", "small", "dog", "house", "street", "sky", "two", "people")


def photograph(random: np.random.Generator, drawings: Sequence[Image.Image]) -> bytes:
    """A JPEG of 60 to 150 KB that decodes as slowly as a photograph of its size."""
    field = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(field).resize((640, 480), Image.Resampling.BICUBIC)
    for _ in range(3):
        drawing = drawings[int(random.integers(len(drawings)))]
        side = int(random.integers(80, 240))
        drawing = drawing.convert("RGBA").resize((side, side))
        picture.paste(drawing, (int(random.integers(640 - side)), int(random.integers(480 - side))), drawing)
    noisy = np.asarray(picture, dtype=np.float32) + random.normal(0, random.uniform(3, 12), (480, 640, 3))
    stream = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make(folder: Path, count: int) -> tuple[list[bytes], list[str]]:
    """The images and their captions; and in `folder` the three containers."""
    random = np.random.default_rng(0)
    emoji = open_mixture([DataSource(dataset="openmoji", split="validation", limit=40)])
    drawings = [emoji.image(row) for row in range(len(emoji))]
    images = [photograph(random, drawings) for _ in range(count)]
    captions = [" ".join(random.choice(WORDS, 12)) for _ in range(count)]
    pq.write_table(pa.table({"image": images, "caption": captions}), folder / "train.parquet", row_group_size=GROUP)
    with webdataset.ShardWriter(str(folder / "%04d.tar"), maxcount=GROUP, verbose=0) as shards:
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            shards.write({"__key__": f"{number:06d}", "jpg": image, "txt": caption})
    (folder / "images").mkdir()
    with (folder / "train.jsonl").open("w") as lines:
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            (folder / f"images/{number}.jpg").write_bytes(image)
            lines.write(json.dumps({"image": f"images/{number}.jpg", "caption": caption}) + "\n")
    return images, captions


def prompter(captions: Sequence[str]) -> Prompter:
    """With a small real tokenizer; what it is trained on does not matter for speed."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(captions, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    return Prompter(tokenizer, PromptConfig(), visual_tokens=32)


class Sides:
    """Each side as a function that goes through `count` images and returns how many it saw."""

    def __init__(self, folder: Path, images: list[bytes], captions: list[str], *, count: int):
        assert len(images) >= BATCH, "a pass without a batch would never end"
        self.folder = folder
        self.images = images
        self.count = count
        self.prompter = prompter(captions)
        self.transform = ImageTransform(ImageConfig(size=SIZE))
        sources = {"parquet": "train.parquet", "tar": f"{{0000..{-(-len(images) // GROUP) - 1:04d}}}.tar"}
        sources["jsonl"] = "train.jsonl"
        self.mixtures = {name: open_mixture([DataSource(dataset=str(folder / file))]) for name, file in sources.items()}
        self.shards = str(folder / sources["tar"])
        table = datasets.load_dataset(
            "parquet", data_files=str(folder / "train.parquet"), split="train", cache_dir=str(folder / "cache")
        )
        self.table = table.cast_column("image", datasets.Image()).with_transform(self._of_table)

    def all(self) -> dict[str, Callable[[], int]]:
        """Name -> side; `ours parquet 2` is with two processes."""
        sides: dict[str, Callable[[], int]] = {"bare": self.bare}
        for workers in WORKERS:
            for name, mixture in self.mixtures.items():
                sides[f"ours {name} {workers}"] = partial(self.ours, mixture, workers)
            sides[f"webdataset tar {workers}"] = partial(self.webdataset, workers)
            sides[f"datasets parquet {workers}"] = partial(self.datasets, workers)
        return sides

    def bare(self) -> int:
        for number in range(self.count):
            with Image.open(io.BytesIO(self.images[number % len(self.images)])) as image:
                image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return self.count

    def ours(self, mixture: Mixture, workers: int) -> int:
        vpg: Any = SimpleNamespace(transform=self.transform)
        samples = Samples(mixture, FrozenFront(vpg, "pixels"), self.prompter, bad=BadSamples(0.0), cached=False)
        stage = Stage(name="s", trainable={"projector": "full"}, batch_size=BATCH, budget={"samples": self.count})  # type: ignore[arg-type]
        draws, stop = SampleDraws(mixture, seed=0, stage=stage), -(-self.count // BATCH)
        seen = 0
        for batch in Updates(samples, draws, start=0, stop=stop, workers=workers):
            seen += self._taken(self.transform.scaled(batch.inputs), batch.encoded)
        return seen

    def webdataset(self, workers: int) -> int:
        data = (
            webdataset.WebDataset(self.shards, shardshuffle=False, repeat=True)
            .shuffle(2 * GROUP)
            .decode("pil")
            .to_tuple("jpg", "txt")
            .map(self._pair)
            .batched(BATCH, collation_fn=_collated, partial=False)
            .with_epoch(self.count // BATCH // workers)
        )
        loader = webdataset.WebLoader(data, batch_size=None, num_workers=workers, prefetch_factor=AHEAD)
        return sum(self._taken(*batch) for batch in loader)

    def datasets(self, workers: int) -> int:
        loader: Any = DataLoader(
            self.table, batch_size=BATCH, shuffle=True, collate_fn=_of_rows, num_workers=workers,
            prefetch_factor=AHEAD, drop_last=True,
        )  # fmt: skip
        return sum(self._taken(*batch) for batch in _until(loader, self.count // BATCH))

    def _pair(self, sample: tuple[Image.Image, str]) -> tuple[torch.Tensor, Any]:
        return self.transform(sample[0]), self.prompter.encode(sample[1])

    def _of_table(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            "pixels": [self.transform(open_image(image)) for image in rows["image"]],
            "encoded": [self.prompter.encode(caption) for caption in rows["caption"]],
        }

    @staticmethod
    def _taken(pixels: torch.Tensor, encoded: Sequence[Any]) -> int:
        assert pixels.dtype == torch.float32
        assert pixels.shape == (len(encoded), 3, SIZE, SIZE)
        return len(encoded)


def _collated(samples: Sequence[tuple[torch.Tensor, Any]]) -> tuple[torch.Tensor, list[Any]]:
    return torch.stack([pixels for pixels, _ in samples]), [encoded for _, encoded in samples]


def _of_rows(rows: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, list[Any]]:
    return torch.stack([row["pixels"] for row in rows]), [row["encoded"] for row in rows]


def _until(loader: Any, batches: int) -> Iterator[Any]:
    """As many batches, over several passes; each pass but the last is a whole one."""
    left = batches
    while left > 0:
        for batch in loader:
            yield batch
            left -= 1
            if not left:
                return


def timed(side: Callable[[], int]) -> dict[str, float]:
    """Wall and CPU seconds of one side, and how many images it went through."""
    before, start = os.times(), time.perf_counter()
    images = side()
    wall, after = time.perf_counter() - start, os.times()
    cpu = sum(after[:4]) - sum(before[:4])  # user and system, of this process and of children that have ended
    return {"images": images, "wall": wall, "cpu": cpu}


def summarise(rounds: dict[str, list[dict[str, float]]], *, cores: int) -> dict[str, Any]:
    """Medians of each side, what they are of the bare loop, and ours beside the faster of the others."""
    sides: dict[str, Any] = {}
    for name, played in rounds.items():
        sides[name] = {
            "images_per_second": median(entry["images"] / entry["wall"] for entry in played),
            "cpu_ms_per_image": median(1000 * entry["cpu"] / entry["images"] for entry in played),
        }
    bare = sides["bare"]
    for name, found in sides.items():
        workers = 1 if name == "bare" else min(int(name.split()[-1]), cores)
        found["of_bare_times_workers"] = found["images_per_second"] / (bare["images_per_second"] * workers)
        found["bare_cpu_share"] = bare["cpu_ms_per_image"] / found["cpu_ms_per_image"]
    beside: dict[str, Any] = {}
    for workers in WORKERS:
        others = [sides[f"{name} {workers}"] for name in ("webdataset tar", "datasets parquet")]
        for container in ("parquet", "tar", "jsonl"):
            ours = sides[f"ours {container} {workers}"]
            fastest = max(other["images_per_second"] for other in others)
            cheapest = min(other["cpu_ms_per_image"] for other in others)
            beside[f"{container} {workers}"] = {
                "speed": ours["images_per_second"] / fastest,
                "cpu": cheapest / ours["cpu_ms_per_image"],
            }
    return {"sides": sides, "ours_beside_the_best_other": beside}


def table(report: dict[str, Any]) -> str:
    """As markdown."""
    lines = ["| side, processes | images a second | of bare × processes | CPU ms an image | bare's CPU ÷ its own |"]
    lines.append("|---|---|---|---|---|")
    for name, found in report["sides"].items():
        lines.append(
            f"| {name} | {found['images_per_second']:.0f} | {found['of_bare_times_workers']:.2f} | "
            f"{found['cpu_ms_per_image']:.2f} | {found['bare_cpu_share']:.2f} |"
        )
    lines += ["", "| ours beside the best other | speed | its CPU ÷ ours |", "|---|---|---|"]
    for name, found in report["ours_beside_the_best_other"].items():
        lines.append(f"| {name} | {found['speed']:.2f} | {found['cpu']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--passes", type=int, default=4, help="of each side over the images, in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images, captions = make(folder, args.images)
        made = Sides(folder, images, captions, count=args.images * args.passes)
        sides = made.all()
        for side in Sides(folder, images, captions, count=2 * BATCH).all().values():
            side()  # nothing is first then
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        loads = []
        for number in range(args.rounds):
            loads.append(os.getloadavg()[0])
            for name in sides if number % 2 == 0 else reversed(list(sides)):
                rounds[name].append(timed(sides[name]))
    report: dict[str, Any] = {
        "command": f"python benchmarks/loader.py --images {args.images} --passes {args.passes} --rounds {args.rounds}",
        "machine": f"{platform.machine()}, {cores} cores, Pillow {PIL.__version__}, torch {torch.__version__}",
        "others": {"webdataset": webdataset.__version__, "datasets": datasets.__version__},
        "load_before_rounds": loads,
        "mean_image_bytes": sum(map(len, images)) / len(images),
    }
    report |= summarise(rounds, cores=cores) | {"rounds": rounds}
    print(table(report))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
