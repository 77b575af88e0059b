"""vpgtrans: move a visual prompt generator (encoder + connector) from one LLM to another.

    import vpgtrans as vt
    run = vt.transfer("recipes/quickstart.yaml", {"seed": 1})
    vt.load(run).generate(["cat.png"])

Public names are imported when they are first used: `import vpgtrans` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "Recipe",
    "VpgTransError",
    "__version__",
    "caption",
    "compare",
    "doctor",
    "evaluate",
    "load",
    "load_recipe",
    "probe",
    "train",
    "transfer",
    "validate",
]

_HOME = {
    "VLM": ("vpgtrans.vlm", "VLM"),
    "load": ("vpgtrans.vlm", "load_vlm"),
    "Recipe": ("vpgtrans.recipe", "Recipe"),
    "load_recipe": ("vpgtrans.recipe", "load_recipe"),
    "VpgTransError": ("vpgtrans.errors", "VpgTransError"),
    "doctor": ("vpgtrans.doctor", "doctor"),
} | {verb: ("vpgtrans.api", verb) for verb in ("transfer", "train", "compare", "probe", "validate", "evaluate", "caption")}

if TYPE_CHECKING:
    from vpgtrans.api import caption, compare, evaluate, probe, train, transfer, validate
    from vpgtrans.doctor import doctor
    from vpgtrans.errors import VpgTransError
    from vpgtrans.recipe import Recipe, load_recipe
    from vpgtrans.vlm import VLM
    from vpgtrans.vlm import load_vlm as load


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
