"""Scale, calibrated on real visual prompts: prompts stay as long, against the words, as the source's were.

A converter is fitted on words, but visual prompts are longer than words and lie elsewhere, so the words' RMS match does
not hold for them. One factor κ on the whole prompt repairs it: κ = (source prompts / source words) ÷ (target prompts /
target words), all as RMS over entries.
"""

import copy

import torch
from torch import Tensor

from vpgtrans.errors import TransferError
from vpgtrans.projector import Projector


def rms(x: Tensor) -> float:
    """Root mean square over all entries, in float64."""
    return x.detach().double().square().mean().sqrt().item()


def calibration_factor(
    source_prompts: Tensor, target_prompts: Tensor, *, source_rms: float, target_rms: float
) -> float:
    """κ from prompts of the same images: [n, T, d_s] in the source's space and [n, T, d_t] in the target's.

    Raises:
        TransferError: a set of prompts is zero or not finite.
    """
    wanted, got = rms(source_prompts) / source_rms, rms(target_prompts) / target_rms
    if not (wanted > 0 and got > 0 and wanted < float("inf") and got < float("inf")):
        raise TransferError(
            f"visual prompts can't be calibrated: their RMS is {wanted:.3g} of the words' in the source and "
            f"{got:.3g} in the target; both must be finite and above zero"
        )
    return wanted / got


@torch.no_grad()
def scale_prompts(projector: Projector, factor: float) -> Projector:
    """A copy whose prompts are `factor` times as long: through the norm's gain where it ends in one, else through the
    last linear map (weight and bias)."""
    scaled = copy.deepcopy(projector)
    if scaled.gain is not None and scaled.tail is None:
        scaled.gain.mul_(factor)
        return scaled
    last = scaled.last_linear
    last.weight.mul_(factor)
    if last.bias is not None:
        last.bias.mul_(factor)
    return scaled
