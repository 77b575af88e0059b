"""Ways to get the target's first projector, one function each; `transfer.probe` scores them and picks for `auto`.

random, inherit   a new projector, its prompts on real visual tokens as long as the target's words. (The two differ
                  in the VPG before it: random or trained.)
converter         the source's projector composed with a word converter (VPGTrans), scaled on real visual prompts
caption-fit       the converter's last layer, moved by ridge towards the target's words for real captions
keep              the source's projector as it is, where both LLMs share one embedding table
"""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vpgtrans.config import InitialiserConfig, ProjectorConfig
from vpgtrans.errors import TransferError
from vpgtrans.projector import Projector, compose
from vpgtrans.transfer.calibration import calibration_factor, rms, scale_prompts
from vpgtrans.transfer.converters import AffineConverter, Moments, Rows, fit
from vpgtrans.transfer.pairing import TokenPairs, pair_tokens, same_table

log = logging.getLogger(__name__)

FILLER_WEIGHT = 0.1
"""Weight in the caption fit of prompts beyond the caption's end; they are drawn to the line break."""


class WordTable(Protocol):
    """`llm.WordEmbeddings`: table [V, d], tokenizer, and RMS over the words' entries."""

    matrix: Tensor
    tokenizer: Any

    @property
    def word_rms(self) -> float: ...


@dataclass
class Context:
    """What an initialiser may use.

    Attributes:
        source, target: word embeddings of the two LLMs.
        projector: the source's projector; None where the VPG has none (then only `random`).
        width_in: d_vpg. projector_config: of a new projector.
        visual_tokens: [n, T, d_vpg] of real images, and their captions; without them nothing is calibrated.
        seed: of random projectors.
    """

    source: WordTable | None
    target: WordTable
    projector: Projector | None
    projector_config: ProjectorConfig
    width_in: int
    visual_tokens: Tensor | None = None
    captions: Sequence[str] | None = None
    seed: int = 0
    _pairs: TokenPairs | None = field(default=None, repr=False)

    def pairs(self) -> TokenPairs:
        """Shared tokens, found once."""
        if self.source is None:
            raise TransferError("a converter needs the source LLM's word embeddings: name it as source.llm")
        if self._pairs is None:
            self._pairs = pair_tokens(self.source, self.target)
        return self._pairs

    def rows(self, pairs: TokenPairs) -> tuple[Rows, Rows]:
        """The paired rows of both tables."""
        assert self.source is not None
        return Rows(self.source.matrix, pairs.source_ids), Rows(self.target.matrix, pairs.target_ids)

    def require_projector(self) -> Projector:
        if self.projector is None:
            raise TransferError("the source has no projector to move: only random and inherit can start without one")
        return self.projector

    @torch.no_grad()
    def source_prompts(self) -> Tensor | None:
        """Visual prompts [n, T, d_s] of the sample in the source's space."""
        if self.visual_tokens is None or self.projector is None:
            return None
        weight = next(self.projector.parameters())
        return self.projector(self.visual_tokens.to(weight.dtype)).float()


@dataclass
class Initialisation:
    """A first projector and how it came about; `report` holds plain JSON values."""

    projector: Projector
    kind: str
    name: str
    report: dict[str, Any] = field(default_factory=dict)
    config: InitialiserConfig = field(default_factory=InitialiserConfig)
    """What it was made by; never `auto`."""


def initialise(
    config: InitialiserConfig,
    context: Context,
    *,
    pairs: TokenPairs | None = None,
    found: Moments | None = None,
) -> Initialisation:
    """Make the target's first projector (for `auto` see `transfer.probe.choose`).

    Args:
        pairs: fit on these instead of all shared tokens. found: their moments, if known.

    Raises:
        TransferError: the kind needs what the context lacks, or the tokenizers share too little.
    """
    start = time.perf_counter()
    if config.kind == "auto":
        from vpgtrans.transfer.probe import choose

        return choose(config, context).initialisation
    if config.kind in ("random", "inherit"):
        result = _random(config, context)
    elif config.kind == "keep":
        result = _keep(context)
    else:
        result = _converted(config, context, pairs=pairs, found=found)
        if config.kind == "caption-fit":
            result = _caption_fit(config, context, result)
    prompts = _prompts(result.projector, context)
    if prompts is not None:
        result.report["prompt_norm_ratio"] = rms(prompts) / context.target.word_rms
    result.report["seconds"] = time.perf_counter() - start
    result.config = config
    log.debug("%s: %.1f s", result.name, result.report["seconds"])  # who asked for it says so to the user
    return result


@torch.no_grad()
def _prompts(projector: Projector, context: Context) -> Tensor | None:
    if context.visual_tokens is None:
        return None
    weight = next(projector.parameters())
    return projector(context.visual_tokens.to(weight.dtype)).float()


def _random(config: InitialiserConfig, context: Context) -> Initialisation:
    """A new projector whose prompts have the words' RMS: by its norm, or scaled on real visual tokens."""
    settings = context.projector_config.model_copy(update={"tail": False})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        projector = Projector(
            settings, context.width_in, context.target.matrix.shape[1], word_rms=context.target.word_rms
        )
    prompts = _prompts(projector, context)
    if prompts is not None and not settings.norm:
        projector = scale_prompts(projector, context.target.word_rms / rms(prompts))
    return Initialisation(projector, config.kind, config.kind)


def _keep(context: Context) -> Initialisation:
    projector = context.require_projector()
    if context.source is None or not same_table(context.source, context.target):
        raise TransferError(
            "initialiser keep: the two LLMs don't share an embedding table, so the projector's prompts mean nothing to "
            "the target; use initialiser: converter (or auto)"
        )
    return Initialisation(copy.deepcopy(projector), "keep", "keep")


def _converted(
    config: InitialiserConfig, context: Context, *, pairs: TokenPairs | None, found: Moments | None
) -> Initialisation:
    projector = context.require_projector()
    pairs = context.pairs() if pairs is None else pairs
    X, Y = context.rows(pairs)
    if X.width != projector.width_out:
        raise TransferError(
            f"the projector gives prompts of width {projector.width_out}, but the source LLM embeds in {X.width}: "
            "they don't belong together; source.llm must be the LLM that the VPG was trained with"
        )
    prompts = context.source_prompts()
    converter = fit(config, X, Y, anchors=prompts, found=found)
    composed = compose(projector, converter.weight, converter.bias)
    report: dict[str, Any] = {
        "pairs": len(pairs),
        "coverage": pairs.target_coverage,
        "converter_seconds": converter.seconds,
        "calibration": None,
    }
    if config.calibrate and prompts is not None:
        composed, report["calibration"] = _calibrated(composed, prompts, context)
    result = Initialisation(composed, "converter", converter.name, report)
    result.report["converter"] = converter.name
    return result


def _calibrated(projector: Projector, source_prompts: Tensor, context: Context) -> tuple[Projector, float]:
    assert context.source is not None
    prompts = _prompts(projector, context)
    assert prompts is not None
    factor = calibration_factor(
        source_prompts, prompts, source_rms=context.source.word_rms, target_rms=context.target.word_rms
    )
    return scale_prompts(projector, factor), factor


# --- from image-caption pairs -------------------------------------------------------------------


@torch.no_grad()
def _caption_fit(config: InitialiserConfig, context: Context, prior: Initialisation) -> Initialisation:
    """Move the last layer of the converted projector towards the target's words for the captions.

    Prompt t is to lie where the t-th word token of its caption lies (after the last: the line break, weakly). With h
    the last layer's input, the converted layer W₀, b₀ is corrected by ridge regression of the rest e − (W₀h + b₀) on h:
    no pairs, no correction. The strength is the best of a grid on held-out images, "no correction" among it.
    """
    if context.visual_tokens is None or not context.captions:
        raise TransferError("initialiser caption-fit needs images with captions: name data.train in the recipe")
    projector = prior.projector
    last = projector.last_linear
    inputs = _last_inputs(projector, context.visual_tokens.to(last.weight.dtype)).double()
    n, T, width = inputs.shape
    wanted, weights = _word_targets(context, T)
    rest = wanted - (inputs @ last.weight.double().T + (0 if last.bias is None else last.bias.double()))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(context.seed))
    test, train = order[: n // 5], order[n // 5 :]
    ones = torch.cat([inputs, inputs.new_ones(n, T, 1)], dim=2)

    def normal(index: Tensor) -> tuple[Tensor, Tensor]:
        h, r, w = ones[index].flatten(0, 1), rest[index].flatten(0, 1), weights[index].flatten().unsqueeze(1)
        return h.T @ (h * w) / w.sum(), h.T @ (r * w) / w.sum()

    def correction(moment: Tensor, cross: Tensor, strength: float) -> Tensor:
        scale = moment.diagonal()[:width].mean()
        return torch.linalg.solve(moment + strength * scale * torch.eye(width + 1, dtype=moment.dtype), cross)

    def error(delta: Tensor | None) -> float:
        left = rest[test] if delta is None else rest[test] - ones[test] @ delta
        return (left.square().mean(dim=2) * weights[test]).sum().item() / weights[test].sum().item()

    before, best, strength = error(None), error(None), None
    if len(test) and len(train):
        moments_ = normal(train)
        for candidate in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
            after = error(correction(*moments_, candidate))
            if after < best:
                best, strength = after, candidate
    report = prior.report | {"shrinkage": strength, "error_before": before, "error_after": best, "images": n}
    if strength is None:
        log.warning("caption-fit: no correction helps on held-out images; the converter stays as it is")
        return Initialisation(projector, "caption-fit", f"caption-fit over {prior.name}", report)
    delta = correction(*normal(order), strength)
    fitted = copy.deepcopy(projector)
    layer = fitted.last_linear
    layer.weight.add_(delta[:width].T.to(layer.weight.dtype))
    if layer.bias is not None:
        layer.bias.add_(delta[width].to(layer.bias.dtype))
    prompts = context.source_prompts()
    if config.calibrate and prompts is not None:
        # A regression's prompts are shrunk, as a converter's are.
        fitted, report["calibration"] = _calibrated(fitted, prompts, context)
    return Initialisation(fitted, "caption-fit", f"caption-fit over {prior.name}", report)


def _last_inputs(projector: Projector, tokens: Tensor) -> Tensor:
    """What the last linear map sees: tokens [n, T, d_vpg] -> [n, T, d_in] (after the norm, where a tail follows)."""
    hidden = projector.hidden(tokens)
    if projector.tail is None:
        return hidden
    captured: list[Tensor] = []
    handle = projector.tail.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    try:
        projector(tokens)
    finally:
        handle.remove()
    return captured[0]


def _word_targets(context: Context, tokens: int) -> tuple[Tensor, Tensor]:
    """The target's words at each place: [n, T, d_t] in float64, and weights [n, T]."""
    assert context.captions is not None
    tokenizer = context.target.tokenizer
    filler = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    ids = torch.full((len(context.captions), tokens), filler)
    weights = torch.full(ids.shape, FILLER_WEIGHT, dtype=torch.float64)
    for row, caption in enumerate(context.captions):
        words = tokenizer(" " + caption, add_special_tokens=False).input_ids[:tokens]
        ids[row, : len(words)] = torch.tensor(words)
        weights[row, : len(words)] = 1.0
    return context.target.matrix[ids].double(), weights


__all__ = ["AffineConverter", "Context", "Initialisation", "initialise"]
