"""FLOPs of an update by the shapes of its modules alone: nothing is computed, so weights on the meta device do.

Counted is what the update needs, in the way of PaLM (arXiv 2204.02311, appendix B): two FLOPs a weight and position
forward, as many for the gradient of what comes in, where anything before it trains, and as many for the weight's own,
where it trains. Norms, activations and the words' look-up are left out. What is computed twice (gradient checkpoints,
the scores in a fused attention's backward pass) is no need of the update; `checkpointed` counts the former after all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from vpgtrans.config import Mode, Part
from vpgtrans.projector import Projector
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm import VLM


def update_flops(
    vlm: VLM,
    trainable: Mapping[Part, Mode],
    *,
    lengths: Sequence[int],
    targets: int,
    images: int,
    encoded: int,
    checkpointed: bool = False,
) -> float:
    """FLOPs of the forward and backward passes of one update, see `StageFlops.update`."""
    counted = StageFlops(vlm, trainable)
    return counted.update(lengths=lengths, targets=targets, images=images, encoded=encoded, checkpointed=checkpointed)


class StageFlops:
    """FLOPs of updates in which the parts of a VLM train as stated: shapes are looked at once, then it is arithmetic.

    Attributes:
        encoder, connector, projector: FLOPs of one image (of each of its pieces), forward and backward.
    """

    def __init__(self, vlm: VLM, trainable: Mapping[Part, Mode]):
        """trainable: the modes of the parts; one that is not named is frozen. Adapters are in place already."""
        modes: dict[Part, Mode] = {part: trainable.get(part, "frozen") for part in _PARTS}
        self.modes = modes
        self.encoder, self.connector, self.projector = _front(vlm.vpg, vlm.projector, modes)
        self.llm = _LLM.of(vlm.language_model, modes)

    def update(
        self, *, lengths: Sequence[int], targets: int, images: int, encoded: int, checkpointed: bool = False
    ) -> float:
        """FLOPs of one update.

        Args:
            lengths: tokens of each sample, visual ones included. targets: tokens that the loss counts.
            images: images, or their tiles, in all samples. encoded: those of them that pass the encoder in this update,
                0 where its features are cached; then the tokens of a frozen connector are, too.
            checkpointed: count the second forward pass of the LLM's blocks.
        """
        of = self.parts(lengths=lengths, targets=targets, images=images, encoded=encoded, checkpointed=checkpointed)
        return sum(of.values())

    def parts(
        self, *, lengths: Sequence[int], targets: int, images: int, encoded: int, checkpointed: bool = False
    ) -> dict[Part, float]:
        """As `update`, of each part."""
        connected = encoded if self.modes["connector"] == "frozen" else images
        return {
            "encoder": float(self.encoder * encoded),
            "connector": float(self.connector * connected),
            "projector": float(self.projector * images),
            "llm": self.llm.cost(lengths, targets=targets, checkpointed=checkpointed),
        }


_PARTS: tuple[Part, ...] = ("encoder", "connector", "projector", "llm")


# --- the front ----------------------------------------------------------------------------------


def _front(vpg: VPG, projector: Projector, modes: Mapping[Part, Mode]) -> tuple[int, int, int]:
    """FLOPs of encoder, connector and projector for one square, backward passes as `modes` need them.

    Their passes are run on the meta device, where a convolution's or a cross-attention's shapes come by themselves.
    """
    side = vpg.encoder.config.image.size
    seen, own = _module_flops(vpg.encoder, modes["encoder"], torch.empty(1, 3, side, side, device="meta"))
    tokens, connected = _module_flops(_Connected(vpg), modes["connector"], seen)
    given = tokens.to(next(projector.parameters()).dtype).detach().requires_grad_(tokens.requires_grad)
    _, projected = _module_flops(projector, modes["projector"], given)
    return own, connected, projected


class _Connected(nn.Module):
    """The connector of a VPG, called as the VPG calls it."""

    def __init__(self, vpg: VPG):
        super().__init__()
        self.connector = vpg.connector
        self._vpg = [vpg]  # in a list, so that it is no module of this one

    def forward(self, features: Tensor) -> Tensor:
        return self._vpg[0].connect(features)


def _module_flops(module: nn.Module, mode: Mode, given: Tensor) -> tuple[Tensor, int]:
    """What a module gives for one input on the meta device, and its FLOPs forward and, if needed, backward.

    Either one requires a gradient where something before its end trains.
    """
    shapes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").requires_grad_(
            mode == "full" or (mode == "lora" and tensor.requires_grad)
        )
        if tensor.is_floating_point()
        else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.enable_grad():
        found: Tensor = functional_call(module, shapes, (given,))
        if found.grad_fn is not None:
            found.sum().backward()
    return found.detach().requires_grad_(found.grad_fn is not None), int(counter.get_total_flops())


# --- the LLM ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LLM:
    """What an LLM costs.

    Attributes:
        frozen, trained: weights that every position meets. head, head_trains: of the output head.
        attention: of each layer the FLOPs of a pair of words that see each other, forward, and its window.
        passes: whether gradients pass through it.
    """

    frozen: float
    trained: float
    head: int
    head_trains: bool
    attention: tuple[tuple[int, int | None], ...]
    passes: bool

    @classmethod
    def of(cls, model: Any, modes: Mapping[Part, Mode]) -> "_LLM":
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        frozen = trained = 0.0
        for module in model.modules():
            if module is head:
                continue
            weights, trains = _weights(module, config)
            if modes["llm"] == "full" or (modes["llm"] == "lora" and trains):
                trained += weights
            else:
                frozen += weights
        return cls(
            frozen,
            trained,
            0 if head is None else int(_weights(head, config)[0]),
            modes["llm"] == "full",
            _attention(config),
            any(mode != "frozen" for mode in modes.values()),
        )

    def cost(self, lengths: Sequence[int], *, targets: int, checkpointed: bool = False) -> float:
        """FLOPs of samples of these lengths."""
        through = 4 if self.passes else 2
        positions = sum(lengths)
        scores = sum(each * _pairs(length, window) for each, window in self.attention for length in lengths)
        total = positions * (through * self.frozen + 6 * self.trained) + scores * (3 if self.passes else 1)
        if checkpointed and self.passes:
            total += positions * 2 * (self.frozen + self.trained) + scores
        return total + targets * self.head * (6 if self.head_trains else through)


def _weights(module: nn.Module, config: Any) -> tuple[float, bool]:
    """Weights of this module itself that a position meets, and whether they train now.

    Of experts in one tensor [experts, …] it meets as many as its router picks.
    """
    if isinstance(module, nn.Linear):  # its widths, because a quantised one's weight has another shape
        return module.in_features * module.out_features, module.weight.requires_grad
    if isinstance(module, Conv1D | nn.Conv1d):
        return module.weight.numel(), module.weight.requires_grad
    stacks = [tensor for tensor in module.parameters(recurse=False) if tensor.ndim == 3]
    picked = getattr(config, "num_experts_per_tok", None)
    if not stacks or picked is None:
        return 0, False
    return sum(tensor.numel() * picked / len(tensor) for tensor in stacks), any(
        tensor.requires_grad for tensor in stacks
    )


def _attention(config: Any) -> tuple[tuple[int, int | None], ...]:
    """Of each layer with attention the FLOPs of a pair: 2 for its score and 2 for its share, a head and channel."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    windows = {"full_attention": None, "sliding_attention": window}
    return tuple((4 * heads * width, windows[kind]) for kind in kinds if kind in windows)


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a word and one that it sees, itself included: about half of length²."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen
