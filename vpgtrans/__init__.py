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
    "Recipe",
    "VpgTransError",
    "__version__",
    "caption",
    "compare",
    "evaluate",
    "load",
    "load_recipe",
    "probe",
    "publish",
    "train",
    "transfer",
    "validate",
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
}
"""Public name -> module and name there."""

if TYPE_CHECKING:
    from vpgtrans.api import caption, compare, evaluate, load, probe, publish, train, transfer, validate, yank
    from vpgtrans.errors import VpgTransError
    from vpgtrans.recipe import Recipe, load_recipe
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
