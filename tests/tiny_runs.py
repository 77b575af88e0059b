"""What a whole run needs, tiny: images with captions in a parquet file, a vision encoder, LLMs, a trained source VLM.

Not a test file. Everything is drawn from fixed seeds.
"""

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from tiny import tiny_llm
from tiny_vlms import CLIP_STATISTICS, PATCH, SIDE

from vpgtrans import runs
from vpgtrans.recipe import Recipe, parse_recipe

COLOURS = {"red": (220, 30, 30), "white": (250, 250, 250), "blue": (30, 40, 220), "yellow": (240, 220, 40)}
THINGS = ("cat", "clock", "flag", "helmet", "sofa", "bicycle", "window", "sun")
QFORMER = {"kind": "qformer", "queries": 4, "width": 16, "layers": 2, "heads": 2, "hidden": 32}
WARMUP = {"name": "warmup", "trainable": {"projector": "full"}, "lr": 1e-3, "budget": {"samples": 4}, "batch_size": 4}
"""The shortest stage: one update."""


def write_captions(path: Path, *, count: int = 24, unreadable: Collection[int] = (), side: int = 32) -> Path:
    """A parquet file of `count` one-coloured squares with names; rows in `unreadable` hold no image."""
    random = np.random.default_rng(7)
    rows: dict[str, list[Any]] = {"id": [], "image": [], "caption": []}
    for row in range(count):
        name, colour = list(COLOURS.items())[row % len(COLOURS)]
        pixels = np.clip(np.array(colour) + random.integers(-20, 20, (side, side, 3)), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        rows["id"].append(f"s{row:03d}")
        rows["image"].append(b"no image at all" if row in unreadable else stream.getvalue())
        rows["caption"].append(f"a {name} {THINGS[row // len(COLOURS) % len(THINGS)]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


def tiny_vit(directory: Path, *, seed: int = 0) -> Path:
    """A random ViT in the Hugging Face layout: 4 patches and a class token, width 24."""
    config = transformers.ViTConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(directory)
    processor = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}, **CLIP_STATISTICS)
    processor.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Tiny:
    """Paths of everything a tiny run needs."""

    root: Path
    train: Path
    validation: Path
    encoder: Path
    source_llm: Path
    target_llm: Path
    source: Path
    """The run that `source_recipe` gave; its vlm/ is the source VLM."""

    def data(self) -> dict[str, Any]:
        return {"train": [{"dataset": str(self.train)}], "validation": [{"dataset": str(self.validation)}]}

    def transfer_recipe(self, **changes: Any) -> Recipe:
        """A short transfer: 4 updates of warm-up, 4 of fine-tune with LoRA. Top-level keys may be replaced."""
        return parse_recipe(self.transfer_keys(**changes))

    def transfer_keys(self, **changes: Any) -> dict[str, Any]:
        return {
            "name": "tiny",
            "source": {"vpg": str(self.source)},
            "target": {"llm": str(self.target_llm)},
            "initialiser": {"kind": "converter", "fit": "ridge"},
            "data": self.data(),
            "stages": [
                {"name": "warmup", "trainable": {"projector": "full"}, "lr": 5e-3, "budget": {"samples": 16},
                 "batch_size": 4, "validate_every": 8},
                {"name": "finetune", "trainable": {"connector": "full", "projector": "full", "llm": "lora"},
                 "lr": 1e-3, "budget": {"samples": 16}, "batch_size": 4, "validate_every": 8, "augment": False},
            ],
            "trainer": {"precision": "fp32", "devices": 1},
            "evaluation": {"samples": 4, "max_new_tokens": 4},
        } | changes  # fmt: skip


def source_keys(encoder: Path, llm: Path, data: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe that trains a VPG from scratch for two updates."""
    return {
        "name": "tiny-source",
        "source": {"vpg": {"encoder": {"kind": "huggingface", "reference": str(encoder)}, "connector": QFORMER}},
        "target": {"llm": str(llm), "projector": {"kind": "linear", "norm": True}},
        "initialiser": "random",
        "data": dict(data),
        "stages": [
            {"name": "all", "trainable": {"connector": "full", "projector": "full"}, "lr": 1e-3, "batch_size": 4,
             "budget": {"samples": 8}, "augment": False},
        ],
        "trainer": {"precision": "fp32", "devices": 1},
        "evaluation": {"samples": 2, "max_new_tokens": 3},
    } | changes  # fmt: skip


def build_tiny(root: Path, *, source_family: str = "llama", target_family: str = "qwen3") -> Tiny:
    """Make it all under `root`; takes a few seconds."""
    made = Tiny(
        root=root,
        train=write_captions(root / "train.parquet", count=24),
        validation=write_captions(root / "validation.parquet", count=8),
        encoder=tiny_vit(root / "encoder"),
        source_llm=tiny_llm(source_family, root / "source-llm", seed=1),
        target_llm=tiny_llm(target_family, root / "target-llm", width=48, seed=2),
        source=root / "source",
    )
    keys = source_keys(made.encoder, made.source_llm, made.data())
    runs.train(parse_recipe(keys), output=made.source, device="cpu")
    return made
