"""Other people's VLMs as VPG + projector + prompt: a pure translation of config and tensors.

The kind of a checkpoint is the `model_type` of its config.json, exactly; nothing is read from a path or a name.
"""

from pathlib import Path

from vpgtrans.errors import ReferenceError_
from vpgtrans.parts import read_object
from vpgtrans.references import portable
from vpgtrans.vision.encoders import open_config
from vpgtrans.vision.importers import blip2, llava
from vpgtrans.vision.importers.source import ImportedSource, Outline

_IMPORTERS = {"blip-2": blip2, "llava": llava}

__all__ = ["ImportedSource", "Outline", "import_source", "importable", "outline_source"]


def importable(path: str | Path) -> str:
    """The model_type of a checkpoint directory, from its config alone.

    Raises:
        ReferenceError_: no such checkpoint, or of a kind that has no importer.
    """
    if not Path(path).is_dir():
        raise ReferenceError_(f"{path}: a VPG is imported from a directory in the Hugging Face layout, not from a file")
    model_type = read_object(Path(path) / "config.json", otherwise=ReferenceError_).get("model_type")
    if model_type not in _IMPORTERS:
        raise ReferenceError_(
            f"{path}: a VPG can't be imported from model_type {model_type!r}; known: {', '.join(_IMPORTERS)}, "
            "and VLM directories of ours"
        )
    return str(model_type)


def import_source(path: str | Path, *, reference: str | None = None) -> ImportedSource:
    """Read a BLIP-2 or LLaVA-1.5 directory in the Hugging Face layout. Its language model's weights are not read.

    Args:
        path: the directory. reference: how the user named it, kept as `source_llm` and as the
            encoder's reference; the path if None.

    Raises:
        ReferenceError_: no such checkpoint, or of a kind that has no importer. CheckpointError: tensors that are
        missing, extra or mis-shaped. TransferError: the checkpoint does something our parts have no words for.
    """
    directory = Path(path)
    reader = _IMPORTERS[importable(directory)].read
    return reader(directory, open_config(directory), reference=portable(reference or str(directory)))


def outline_source(path: str | Path, *, reference: str | None = None) -> Outline:
    """Visual tokens and prompt of what `import_source` reads, from the configs alone; errors as there."""
    directory = Path(path)
    outline = _IMPORTERS[importable(directory)].outline
    return outline(directory, open_config(directory), reference=portable(reference or str(directory)))
