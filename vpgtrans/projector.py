"""The projector: the last map from visual tokens into one LLM's embedding space, and composing it with a converter.

    visual tokens [..., T, d_vpg] -> layers (the last one linear) -> norm, if any -> tail, if any -> [..., T, d_llm]

The norm brings every prompt to the RMS of the LLM's word embeddings times a learned gain. It is not linear, so a word
converter can't be merged into the layers before it: the converter becomes the tail, and later ones merge into the tail.
"""

from itertools import pairwise
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vpgtrans.config import ProjectorConfig
from vpgtrans.errors import CheckpointError, RecipeError, TransferError
from vpgtrans.parts import load_strict, read_config, read_weights, save_part, stored_dtype

NORM_EPSILON = 1e-6
"""Added to the mean square, so that a zero vector stays finite."""


class Projector(nn.Module):
    """Visual tokens -> visual prompts.

    Attributes:
        width_in: d_vpg. width_out: d_llm.
        norm_width: width of the layers' output, where the norm acts (the source LLM's width if a tail follows).
        layers: the linear maps, with the activation between them.
        gain: learned scalar of the norm, None without a norm. word_rms: buffer, RMS of the normed space's words.
        tail: `nn.Linear(norm_width, width_out)` or None.
    """

    word_rms: Tensor

    def __init__(
        self,
        config: ProjectorConfig,
        width_in: int,
        width_out: int,
        *,
        word_rms: float = 1.0,
        norm_width: int | None = None,
    ):
        super().__init__()
        if norm_width is not None and norm_width != width_out and not config.tail:
            raise TransferError(
                f"a projector without a tail ends in its normed space: norm_width must be {width_out}, is {norm_width}"
            )
        self.width_in = width_in
        self.width_out = width_out
        self.norm_width = norm_width or width_out
        # Written out, because a composed projector keeps the hidden width of the LLM that it came from.
        self.config = config.model_copy(update={"hidden": _hidden_width(config, self.norm_width)})
        depth = config.depth if config.kind == "mlp" else 1
        widths = [width_in, *[self.config.hidden or 0] * (depth - 1), self.norm_width]
        self.layers = nn.ModuleList(nn.Linear(before, after, bias=config.bias) for before, after in pairwise(widths))
        if config.activation not in ACT2FN:
            raise RecipeError(f"projector.activation: {config.activation!r} is not one of {', '.join(sorted(ACT2FN))}")
        self.activation: nn.Module = ACT2FN[config.activation]
        self.gain = nn.Parameter(torch.ones(())) if config.norm else None
        if config.norm:
            self.register_buffer("word_rms", torch.tensor(float(word_rms)))
        self.tail = nn.Linear(self.norm_width, width_out) if config.tail else None
        if self.tail is not None:
            # Semi-orthogonal, so that an unset tail does not change the prompts' scale.
            nn.init.orthogonal_(self.tail.weight)
            nn.init.zeros_(self.tail.bias)

    @property
    def last_linear(self) -> nn.Linear:
        """The linear map that a converter composes into: the tail, or the last layer where there is no norm."""
        last = self.layers[-1] if self.tail is None else self.tail
        assert isinstance(last, nn.Linear)
        return last

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the last layer sees: tokens [..., d_vpg] -> [..., d_in of the last layer] (the tokens if linear)."""
        for layer in self.layers[:-1]:
            tokens = self.activation(layer(tokens))
        return tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [..., T, d_vpg] -> prompts [..., T, d_llm]."""
        prompts: Tensor = self.layers[-1](self.hidden(tokens))
        if self.gain is not None:
            # The mean square in float32: in half precision a long vector's sum of squares overflows or rounds away.
            wide = prompts.float() if prompts.dtype in (torch.float16, torch.bfloat16) else prompts
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPSILON)
            prompts = (wide * self.word_rms * self.gain).to(prompts.dtype)
        return prompts if self.tail is None else self.tail(prompts)

    def save(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `directory`."""
        config = {
            "projector": self.config.model_dump(mode="json"),
            "width_in": self.width_in,
            "width_out": self.width_out,
            "norm_width": self.norm_width,
        }
        save_part(directory, config, state=self.state_dict())

    @classmethod
    def load(cls, directory: str | Path, *, dtype: torch.dtype | None = None) -> "Projector":
        """Read what `save` wrote, in its stored dtype unless `dtype` is given.

        Raises:
            CheckpointError: the config is malformed, or a tensor is missing, extra or mis-shaped.
        """
        projector = cls.described(directory)
        state = read_weights(directory)
        projector.to(dtype or stored_dtype(state))
        load_strict(projector, state, where=str(directory))
        return projector.eval()

    @classmethod
    def described(cls, directory: str | Path) -> "Projector":
        """One with random weights, as the config that `save` wrote says. Raises CheckpointError: it is malformed."""
        written = read_config(directory)
        try:
            config = ProjectorConfig.model_validate(written["projector"])
            widths = {key: int(written[key]) for key in ("width_in", "width_out", "norm_width")}
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise CheckpointError(f"{directory}/config.json is no projector's config: {error}") from error
        return cls(config, widths["width_in"], widths["width_out"], norm_width=widths["norm_width"])


def load_projector(directory: str | Path, *, dtype: torch.dtype | None = None) -> Projector:
    """`Projector.load` as a function."""
    return Projector.load(directory, dtype=dtype)


@torch.no_grad()
def compose(projector: Projector, weight: Tensor, bias: Tensor) -> Projector:
    """A new projector whose prompts are `weight @ prompt + bias` for every prompt of `projector`.

    `weight [d_out, d_in]`, `bias [d_out]` with d_in = projector.width_out. Linear and MLP projectors without a norm:
    merged into the last layer (VPGTrans, arXiv 2305.01278). With a norm: a tail after it, or merged into the tail
    that is there. The product is taken in float64; `projector` is not changed.

    Raises:
        TransferError: the converter's shape does not fit the projector.
    """
    if weight.ndim != 2 or weight.shape[1] != projector.width_out or bias.shape != weight.shape[:1]:
        raise TransferError(
            f"a converter of weight {list(weight.shape)} and bias {list(bias.shape)} can't follow a projector into "
            f"{projector.width_out} dimensions: weight must be [d_out, {projector.width_out}] and bias [d_out]"
        )
    width_out = weight.shape[0]
    becomes_tail = projector.config.norm and projector.tail is None
    config = projector.config.model_copy(update={"tail": True} if projector.config.norm else {"bias": True})
    composed = Projector(
        config,
        projector.width_in,
        width_out,
        norm_width=projector.norm_width if config.tail else None,
    )
    first = next(projector.parameters())
    composed.to(dtype=first.dtype, device=first.device).train(projector.training)

    state = projector.state_dict()
    for name, tensor in composed.state_dict().items():
        if name in state and tensor.shape == state[name].shape:
            tensor.copy_(state[name])
        else:
            tensor.zero_()  # biases that the source lacked; the last linear map is written below
    converter, offset = weight.to(first.device).double(), bias.to(first.device).double()
    last = composed.last_linear
    if becomes_tail:
        last.weight.copy_(converter)
        last.bias.copy_(offset)
    else:
        before = projector.last_linear
        last.weight.copy_(converter @ before.weight.double())
        last.bias.copy_(offset if before.bias is None else converter @ before.bias.double() + offset)
    return composed


def _hidden_width(config: ProjectorConfig, norm_width: int) -> int | None:
    return config.hidden or norm_width if config.kind == "mlp" else config.hidden
