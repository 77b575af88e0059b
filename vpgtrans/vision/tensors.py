"""Loading the vision models of `transformers` out of larger checkpoints, of whatever version of it they are."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from vpgtrans.checkpoint_files import CheckpointFiles
from vpgtrans.parts import load_strict


def load_vision_model(
    model: nn.Module, tensors: CheckpointFiles, *, prefixes: Iterable[str], unused: tuple[str, ...] = ()
) -> None:
    """Load a `transformers` vision model from below one of `prefixes`, without the submodules named in `unused`.

    Checkpoints of transformers 4 have a level `vision_model.` inside CLIP's and SigLIP's towers, those of later
    versions need not, and neither need the classes of the installed version: the level is set to what `model` has.
    """
    level = "vision_model."
    state = tensors.under([prefix + inner for prefix in prefixes for inner in (level, "")])
    state = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in unused}
    expected = model.state_dict()
    if all(name.startswith(level) for name in expected):
        state = {level + name: tensor for name, tensor in state.items()}
    drop_obsolete(state, expected)
    load_strict(model, state, where=str(tensors.directory))


def drop_obsolete(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Forget `position_ids`: a constant that old versions of transformers saved and new ones recompute."""
    for name in [name for name in state if name.split(".")[-1] == "position_ids" and name not in expected]:
        del state[name]
