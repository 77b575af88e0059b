"""The model card of a VLM directory."""

from typing import Any

from vpgtrans.recipe import Recipe, dump


def model_card(recipe: Recipe, summary: dict[str, Any], lineage: dict[str, Any]) -> str:
    """Markdown: what it is, where it comes from, the bill, how to use it, how to make it again."""
    made = f"moved from {lineage['source_llm']}" if lineage.get("source_vpg") else "trained from scratch"
    stages = "\n".join(
        f"| {stage['name']} | {stage['samples']:,} | {stage['updates']:,} | {stage['seconds'] / 60:.1f} min "
        f"| {stage['val_loss']:.3f} |"
        for stage in summary["stages"]
    )
    metrics = "\n".join(
        f"- {name.replace('_', ' ')}: {value:.3f}" if isinstance(value, float) else f"- {name}: {value}"
        for name, value in summary["metrics"].items()
    )
    data = ", ".join(f"{source.dataset} ({source.split})" for source in recipe.data.train)
    return f"""# {recipe.name}

A visual prompt generator and projector for `{recipe.target.llm}`, {made}.

| part | |
|---|---|
| source VPG | {lineage.get("source_vpg") or "built by the recipe below"} |
| target LLM | {recipe.target.llm} |
| visual tokens | {lineage["visual_tokens"]} of width {lineage["width_visual"]}, projected to {lineage["width_llm"]} |
| first projector | {summary["initialiser"]} |
| data | {data} |

## The bill

| stage | samples | updates | time | validation loss |
|---|---|---|---|---|
{stages}

## On held-out images

{metrics}

## Use

```python
import vpgtrans as vt

vlm = vt.load("path/to/this/directory")
vlm.generate(["image.png"])
```

## Make it again

```yaml
{dump(recipe).strip()}
```
"""
