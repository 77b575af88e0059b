"""The hub's front matter of a model card: YAML that it searches and shows by."""

import re
from typing import TYPE_CHECKING, Any

from vpgtrans.report import format as fmt

if TYPE_CHECKING:
    from vpgtrans.report.card import Publication

_HUB_LICENCES = {
    "apache-2.0", "mit", "openrail", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "eupl-1.2", "agpl-3.0", "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "isc", "lppl-1.3c", "ms-pl", "mpl-2.0",
    "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "gemma",
}  # fmt: skip
"""The hub's own names (https://huggingface.co/docs/hub/repositories-licenses); all others are `other`."""
_REPO = re.compile(r"(?:hf:)?(?P<repo>[\w.-]+/[\w.-]+)(?:@[\w./-]+)?")


def front_matter(manifest: dict[str, Any], *, title: str, published: "Publication | None") -> str:
    """Between two lines of `---`. What isn't known is left out: the hub refuses a base_model that it can't look up."""
    from huggingface_hub import EvalResult, ModelCardData  # it takes a moment

    kind = published.kind if published else "vlm"
    base = (published and published.base_model) or hub_name(manifest["llm"]["reference"])
    values: dict[str, Any] = {
        "library_name": "vpgtrans",
        "pipeline_tag": "image-to-text",
        "tags": _tags(manifest, kind),
    }
    if base:
        values |= {"base_model": base, "base_model_relation": "finetune" if manifest["llm"]["trained"] else "adapter"}
    if published is not None:
        values |= _licence(published.licence.spdx)
        on_hub = [use.name for use in published.data if use.name.startswith("hf:")]
        values["datasets"] = [name for data in on_hub if (name := hub_name(data))] or None
        results = [
            EvalResult(
                task_type="image-to-text",
                dataset_type=metric.data,
                dataset_name=f"{metric.data} ({metric.split})" if metric.split else metric.data,
                dataset_split=metric.split,
                metric_type=metric.name,
                metric_name=fmt.metric_name(metric.name),
                metric_value=round(metric.value, 6),
            )
            for metric in published.metrics
        ]
        values |= {"model_name": title, "eval_results": results} if results else {}
    return f"---\n{ModelCardData(**values).to_yaml().strip()}\n---"


def hub_name(reference: str) -> str | None:
    """ORG/REPO of a `portable` reference to the hub; None of others."""
    match = _REPO.fullmatch(reference)
    return match["repo"] if match else None


def _tags(manifest: dict[str, Any], kind: str) -> list[str]:
    tags = ["vpgtrans", "visual-prompt-generator", kind, manifest["parts"]["connector"]["kind"]]
    tags.append(manifest["parts"]["encoder"]["kind"])
    if manifest["llm"]["adapter"]:
        tags += ["peft", "lora"]
    if manifest["lineage"].get("source_vpg"):
        tags.append("transferred")
    return list(dict.fromkeys(tags))


def _licence(spdx: str) -> dict[str, str]:
    """A licence by the hub's name, or as another one by its own."""
    name = spdx.removeprefix("LicenseRef-").lower().removesuffix("-only").removesuffix("-or-later")
    if name in _HUB_LICENCES:
        return {"license": name}
    return {"license": "other", "license_name": spdx}
