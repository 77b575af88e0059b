"""What does everything around the model cost? Our training step beside a bare PyTorch loop of the same updates.

    python benchmarks/step.py            # about 4 minutes on two idle cores
    python benchmarks/step.py --quick    # to try it
    python benchmarks/step.py --same-loss --output FILE    # the bare loop with our loss, too

The quickstart's parts (SmolLM2's VPG, Gemma 3 270M) and its two stages, padded and packed:

ours    a stage as `vpgtrans transfer` runs it: drawing, loading, splicing, Lightning's loop, the log; checkpoints and
        validations are left out, and padded rows stay padded (`trainer.unpad: false`), as the bare loop's are
bare    the same batches as tensors that are ready, the same modules; forward, loss, backward, clip, AdamW: a loop that
        is written here in thirty lines

Both train in one process, an update each in turn, on copies of the same weights; a pair is one batch. Given are the
median of the pairs' ratios (bare's seconds ÷ ours: samples a second of ours over bare's) with a bootstrap interval of
95 %, and how far the two losses ever are apart. Run it on an idle machine: it measures wall seconds.

The bare loop takes its loss from all logits, ours a few rows at a time (`token_loss.head_nll`), which rounds the bf16
gradient at another place; a large learning rate carries that far within a few updates. `--same-loss` gives both the
same: then the weights are equal to the last bit, so that nothing else differs.
Writes benchmarks/results/step.json.
"""

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pair import QUICKSTART, Timeline
from torch import Tensor, nn

from vpgtrans.config import Part
from vpgtrans.data.mixture import open_mixture
from vpgtrans.prompts import VISUAL
from vpgtrans.recipe import Recipe, load_recipe
from vpgtrans.runs.parts import flushed_denormals, source_of
from vpgtrans.runs.start import begin, prepare
from vpgtrans.segments import Segments
from vpgtrans.token_loss import After, head_nll, token_nll
from vpgtrans.training.checkpoints import Progress
from vpgtrans.training.config import Stage
from vpgtrans.training.fit import StageRun
from vpgtrans.training.parts import changed_parts, set_trainable, trained_parameters
from vpgtrans.training.samples import BadSamples, Batch
from vpgtrans.vlm import VLM

RESULTS = Path(__file__).parent / "results" / "step.json"
WARMED = 2
"""Updates of each cell that are not counted: kernels are chosen, and the optimizer's state is made."""
UPDATES = {"warmup": 24, "finetune": 12}


# --- the bare loop --------------------------------------------------------------------------------


@dataclass
class Ready:
    """A batch in one piece, as tensors."""

    inputs: Tensor
    """What the frozen front made of the images."""
    tokens: Tensor
    """[B, L]; 0 where a visual token stands."""
    visual: Tensor
    """[B, L, 1], where visual tokens stand."""
    predicts: Tensor
    """[B, L], what the head runs on."""
    targets: Tensor
    mask: Tensor
    segments: Segments | None
    """Of a pack."""


def ready(batch: Batch) -> list[Ready]:
    """The parts of a batch that go through the model at once."""
    parts = []
    for part in batch.parts(None):
        ids, answers = [text.ids[:-1] for text in part.encoded], [text.answer[1:] for text in part.encoded]
        targets = np.concatenate([text.ids[1:][text.answer[1:]] for text in part.encoded])
        lengths = [len(row) for row in ids]
        if part.packs is not None:
            ids, answers = [np.concatenate(ids)], [np.concatenate(answers)]
        tokens, predicts = np.zeros((2, len(ids), max(map(len, ids))), dtype=np.int64)
        mask = np.zeros_like(tokens)
        for row, (own, answer) in enumerate(zip(ids, answers, strict=True)):
            tokens[row, : len(own)], predicts[row, : len(own)], mask[row, : len(own)] = own, answer, 1
        assert isinstance(part.inputs, Tensor)
        parts.append(
            Ready(
                part.inputs,
                torch.from_numpy(tokens.clip(min=0)),
                torch.from_numpy(tokens == VISUAL)[..., None],
                torch.from_numpy(predicts).bool(),
                torch.from_numpy(targets),
                torch.from_numpy(mask),
                Segments.in_a_row(lengths) if part.packs is not None else None,
            )
        )
    return parts


class Bare:
    """A VLM, its optimizer, and nothing else."""

    def __init__(self, vlm: VLM, stage: Stage, level: str, *, same_loss: bool):
        """level: of what the batches hold, `tokens` or `patches`."""
        self.vlm, self.clip, self.same_loss = vlm, stage.clip, same_loss
        self.connector: Callable[[Tensor], Tensor] = vlm.vpg.connector if level == "patches" else nn.Identity()
        model = vlm.llm.model
        self.head = model.get_output_embeddings()
        self.body = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
        self.parameters_in_order = [parameter for *_, parameter in trained_parameters(vlm, stage)]
        groups: dict[tuple[Part, bool], list[nn.Parameter]] = {}
        for part, _, parameter in trained_parameters(vlm, stage):
            groups.setdefault((part, parameter.ndim >= 2), []).append(parameter)
        self.parameters = [parameter for group in groups.values() for parameter in group]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": group, "lr": stage.rates[part], "weight_decay": stage.weight_decay if decays else 0.0}
                for (part, decays), group in groups.items()
            ],
            betas=(0.9, 0.98),
        )

    def update(self, parts: Sequence[Ready]) -> float:
        """Returns the loss."""
        terms, loss = sum(len(part.targets) for part in parts), 0.0
        for part in parts:
            prompts = self.vlm.projector(self.connector(part.inputs.float()))
            words = self.vlm.llm.embed(part.tokens)
            embeddings = words.masked_scatter(part.visual, prompts.to(words.dtype))
            nll = self.nll(self.hidden(embeddings, part), part.targets).sum() / terms
            nll.backward()
            loss += nll.item()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.same_loss:
            return head_nll(hidden, self.head.weight, self.head.bias, targets, After())
        return token_nll(self.head(hidden), targets)

    def hidden(self, embeddings: Tensor, part: Ready) -> Tensor:
        """What the head takes, of the positions that predict."""
        if part.segments is None:
            hidden = self.body(inputs_embeds=embeddings, attention_mask=part.mask, use_cache=False)
        else:
            isolation = self.vlm.splice.isolation
            assert isolation is not None
            hidden = isolation.run(self.body, embeddings, part.segments)
        return hidden.last_hidden_state[part.predicts]


# --- both in turn ---------------------------------------------------------------------------------


@dataclass
class Cell:
    """One stage, padded or packed: (wall, processor) seconds and losses of every update."""

    samples: list[int]
    ours: list[tuple[float, float]]
    bare: list[tuple[float, float]]
    losses: list[tuple[float, float]]
    apart: float = 0.0
    """How far a weight of one side was at most from the other's, after any update."""


def alternate(vlm: VLM, recipe: Recipe, index: int, *, features: Path | None = None, same_loss: bool = False) -> Cell:
    """A stage our way, with an update of the bare loop after each of its own."""
    stage = recipe.stages[index]
    log = Timeline()
    train, validation = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        set_trainable(vlm, stage)
    other = copy.deepcopy(vlm)
    run = StageRun(
        vlm,
        recipe,
        index,
        train=train,
        validation=validation,
        bad=BadSamples(recipe.data.max_bad_fraction),
        log=log,
        checkpoints=None,
        progress=Progress(),
        changed=changed_parts([stage]),
        features=features,
    )
    other.splice.isolation = vlm.splice.isolation
    bare = Bare(other, stage, run.module.front.level, same_loss=same_loss)
    cell = Cell([], [], [], [])
    ours, resumed = run.module.training_step, (0.0, 0.0)

    def step(batch: Batch, batch_idx: int) -> None:
        """Ours, then bare's. What Lightning does between two steps lies between `resumed` and `paused`."""
        nonlocal resumed
        ours(batch, batch_idx)
        paused = _clocks()
        parts = ready(batch)
        torch.manual_seed(torch.initial_seed())  # the same dropout
        begun = _clocks()
        loss = bare.update(parts)
        done = _clocks()
        if cell.losses:  # before the first one stand the stage's start and a validation
            cell.samples.append(len(batch))
            cell.ours.append((paused[0] - resumed[0], paused[1] - resumed[1]))
            cell.bare.append((done[0] - begun[0], done[1] - begun[1]))
        cell.losses.append((run.module.last["loss"], loss))
        weights = zip(trained_parameters(vlm, stage), bare.parameters_in_order, strict=True)
        apart = max((own - others).abs().max().item() for (*_, own), others in weights)
        cell.apart = max(cell.apart, apart)
        del parts
        resumed = _clocks()

    with patch.object(run.module, "training_step", step):
        run.run()
    return cell


def _clocks() -> tuple[float, float]:
    """Wall and processor seconds."""
    return time.perf_counter(), time.process_time()


def summarise(cell: Cell) -> dict[str, Any]:
    """Medians, the ratio with its interval, and how far losses are apart."""
    ours, bare = np.array(cell.ours[WARMED:]), np.array(cell.bare[WARMED:])
    samples = np.array(cell.samples[WARMED:])
    ratios, cpu = (bare / ours).T
    random = np.random.default_rng(0)
    drawn = np.median(random.choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "updates": len(ratios),
        "samples_an_update": float(samples.mean()),
        "ours_samples_a_second": float(np.median(samples / ours[:, 0])),
        "bare_samples_a_second": float(np.median(samples / bare[:, 0])),
        "ratio": float(np.median(ratios)),
        "interval": [float(low), float(high)],
        "ratio_of_sums": float(bare[:, 0].sum() / ours[:, 0].sum()),
        "ratio_of_processor_seconds": float(np.median(cpu)),
        "extra_milliseconds_an_update": 1000 * float(np.median((ours - bare)[:, 0])),
        "largest_weight_difference": cell.apart,
        "largest_loss_difference": max(abs(a - b) for a, b in cell.losses),
        "first_loss": cell.losses[0],
        "last_loss": cell.losses[-1],
    }


def recipe_of(*, packed: bool, updates: dict[str, int], base: Path = QUICKSTART) -> Recipe:
    """The quickstart with constant rates, so many updates a stage, and one image to validate on."""
    recipe = load_recipe(base, {"trainer.validate_samples": 1, "trainer.unpad": False, "initialiser": "inherit"})
    return shortened(recipe, packed=packed, updates=updates)


def shortened(recipe: Recipe, *, packed: bool, updates: dict[str, int]) -> Recipe:
    """The stages at constant rates, as long as said."""
    stages = []
    for stage in recipe.stages:
        samples = (WARMED + 1 + updates[stage.name]) * stage.batch_size
        change = {"budget": {"samples": samples}, "validate_every": samples, "augment": False}
        change |= {"lr_schedule": "constant", "warmup_fraction": 0}
        stages.append(Stage.model_validate(stage.model_dump(exclude_unset=True) | change))
    data = recipe.data if packed else recipe.data.model_copy(update={"packing": None})
    return recipe.model_copy(update={"stages": stages, "data": data})


def opened(recipe: Recipe) -> VLM:
    """The recipe's VLM before its first update."""
    train, validation = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
    prepared = prepare(recipe, device=torch.device("cpu"), source=source_of(recipe), train=train)
    return begin(recipe, prepared, validation).vlm


HEADER = (
    "| stage | rows | ours, samples a second | bare | ratio | processor time alone | losses differ by at most | "
    "largest difference of a weight |\n|---|---|---|---|---|---|---|---|"
)


def line(name: str, rows: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    low, high = found["interval"]
    return (
        f"| {name} | {rows} | {found['ours_samples_a_second']:.2f} | {found['bare_samples_a_second']:.2f} | "
        f"**{found['ratio']:.3f}** [{low:.3f} - {high:.3f}] | {found['ratio_of_processor_seconds']:.3f} | "
        f"{found['largest_loss_difference']:.0e} | {found['largest_weight_difference']:.0e} |"
    )


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few updates of each")
    parser.add_argument("--only", choices=[f"{stage} {rows}" for stage in UPDATES for rows in ("padded", "packed")])
    parser.add_argument("--same-loss", action="store_true", help="the bare loop takes its loss as ours does")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    updates = dict.fromkeys(UPDATES, 3) if arguments.quick else UPDATES
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "load_before": os.getloadavg()[0],
        "cells": {},
    }
    print(HEADER, flush=True)
    with flushed_denormals():
        vlm = opened(recipe_of(packed=True, updates=updates))
        for rows in ("padded", "packed"):
            recipe = recipe_of(packed=rows == "packed", updates=updates)
            for index, stage in enumerate(recipe.stages):
                name = f"{stage.name} {rows}"
                if arguments.only not in (None, name):
                    continue
                cell = alternate(copy.deepcopy(vlm), recipe, index, same_loss=arguments.same_loss)
                report["cells"][name] = found = summarise(cell)
                print(line(stage.name, rows, found), flush=True)
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    worst = min(report["cells"].values(), key=lambda found: found["ratio"])
    print(f"least ratio {worst['ratio']:.3f}; median of all {median(c['ratio'] for c in report['cells'].values()):.3f}")


if __name__ == "__main__":
    main()
