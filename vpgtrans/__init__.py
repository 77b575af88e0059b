"""vpgtrans: move a visual prompt generator (encoder + connector) from one LLM to another.

    import vpgtrans as vt
    run = vt.transfer("recipes/quickstart.yaml", {"seed": 1})
    vt.load(run).generate(["cat.png"])

Public names are imported when they are first used: `import vpgtrans` loads no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "CopyTest",
    "Recipe",
    "VpgTransError",
    "__version__",
    "caption",
    "compare",
    "compose",
    "evaluate",
    "fit_converter",
    "import_source",
    "load",
    "load_index",
    "load_recipe",
    "open_data",
    "open_llm",
    "pair_tokens",
    "probe",
    "publish",
    "pull",
    "quieten",
    "read_embeddings",
    "read_run",
    "train",
    "transfer",
    "validate",
    "verify",
    "yank",
]

_HOME = {
    "VLM": ("vpgtrans.vlm", "VLM"),
    "load": ("vpgtrans.api", "load"),
    "Recipe": ("vpgtrans.recipe", "Recipe"),
    "load_recipe": ("vpgtrans.recipe", "load_recipe"),
    "VpgTransError": ("vpgtrans.errors", "VpgTransError"),
    "caption": ("vpgtrans.api", "caption"),
    "compare": ("vpgtrans.api", "compare"),
    "evaluate": ("vpgtrans.api", "evaluate"),
    "probe": ("vpgtrans.api", "probe"),
    "publish": ("vpgtrans.api", "publish"),
    "train": ("vpgtrans.api", "train"),
    "validate": ("vpgtrans.api", "validate"),
    "yank": ("vpgtrans.api", "yank"),
    "CopyTest": ("vpgtrans.transfer.scores", "CopyTest"),
    "compose": ("vpgtrans.projector", "compose"),
    "fit_converter": ("vpgtrans.api", "fit_converter"),
    "import_source": ("vpgtrans.vision.importers", "import_source"),
    "load_index": ("vpgtrans.registry.index", "load_index"),
    "open_data": ("vpgtrans.api", "open_data"),
    "open_llm": ("vpgtrans.llm", "open_llm"),
    "pair_tokens": ("vpgtrans.transfer.pairing", "pair_tokens"),
    "pull": ("vpgtrans.api", "pull"),
    "quieten": ("vpgtrans.api", "quieten"),
    "read_embeddings": ("vpgtrans.llm", "read_embeddings"),
    "read_run": ("vpgtrans.api", "read_run"),
    "verify": ("vpgtrans.api", "verify"),
}
"""Public name -> module and name there."""

if TYPE_CHECKING:
    from vpgtrans.api import (
        caption,
        compare,
        evaluate,
        fit_converter,
        load,
        open_data,
        probe,
        publish,
        pull,
        quieten,
        read_run,
        train,
        transfer,
        validate,
        verify,
        yank,
    )
    from vpgtrans.errors import VpgTransError
    from vpgtrans.llm import open_llm, read_embeddings
    from vpgtrans.projector import compose
    from vpgtrans.recipe import Recipe, load_recipe
    from vpgtrans.registry.index import load_index
    from vpgtrans.transfer.pairing import pair_tokens
    from vpgtrans.transfer.scores import CopyTest
    from vpgtrans.vision.importers import import_source
    from vpgtrans.vlm import VLM


class _TransferPackage(ModuleType):
    """`vpgtrans.transfer` is a subpackage and a verb: calling the package runs the verb."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from vpgtrans.api import transfer

        return transfer(*arguments, **options)


class _Package(ModuleType):
    """Makes the subpackage `transfer` callable at the moment that the import system binds it here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "transfer" and type(value) is ModuleType:
            value.__class__ = _TransferPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "transfer":
        return import_module("vpgtrans.transfer")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
