"""Turn a finished run into a checkpoint that ships with the repository, and print its registry entry.

    python tools/release_checkpoint.py runs/openmoji-source openmoji-qformer-smollm2-135m \
        --description "Q-Former over EfficientNet-Lite0, trained with SmolLM2 135M on emoji drawings"

Connector and projector are stored in bf16: half the size, and the validation loss is measured again so that the
rounding's cost is known. The encoder stays a reference with a hash.
"""

import argparse
import json
from pathlib import Path

import torch

from vpgtrans.registry.index import dump_entry, entry_from_vlm
from vpgtrans.runs import evaluate
from vpgtrans.vlm_directory import load_vlm, read_manifest, save_vlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("id")
    parser.add_argument("--version", default="1.0.0")
    parser.add_argument("--description", required=True)
    parser.add_argument("--measure", nargs="+", default=["openmoji:test", "openmoji:test-unseen"])
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    arguments = parser.parse_args()

    source = arguments.run / "vlm"
    manifest = read_manifest(source)
    vlm = load_vlm(str(source))
    vlm.vpg.connector.to(torch.bfloat16)
    vlm.projector.to(torch.bfloat16)
    target = save_vlm(
        vlm, arguments.checkpoints / arguments.id, lineage=manifest["lineage"], card=(source / "README.md").read_text()
    )
    metrics = evaluate(str(target), data=arguments.measure)
    print(json.dumps(metrics, indent=2))
    entry = entry_from_vlm(
        target,
        id=arguments.id,
        version=arguments.version,
        location=str(target),
        description=arguments.description,
        licence="CC-BY-SA-4.0",
        data="OpenMoji 17 (CC BY-SA 4.0), names from Unicode CLDR",
        kind="vpg",
        metrics={f"{name} {key}": value for name, scores in metrics.items() for key, value in scores.items()},
    )
    print(dump_entry(entry))


if __name__ == "__main__":
    main()
