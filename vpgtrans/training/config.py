"""Everything a user can write about training: stages and the machine's side of it (no torch here)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from vpgtrans.config import Config, LoRAConfig, Mode, Part

Rate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]

NORMAL_RATE = 1e-4
"""The method's fine-tuning rate; the warm-up's is five times as high."""
WARMUP_FACTOR = 5


def shape(value: Any) -> str:
    return "parts" if isinstance(value, Mapping | Config) else "plain"


def _listed(value: Any) -> str:
    return "parts" if isinstance(value, list) else "plain"


def _shape_of_rate(value: Any) -> str:
    return "auto" if isinstance(value, str) else shape(value)


class Budget(Config):
    """How long a stage trains, in samples or in text tokens: the same for every world size and accumulation."""

    samples: PositiveInt | None = None
    """Images with their texts, counted each time that they are seen."""
    tokens: PositiveInt | None = None
    """Text tokens that are learnt."""

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if (self.samples is None) == (self.tokens is None):
            raise ValueError("give samples or tokens, one of them")
        return self


class EarlyStopping(Config):
    """When a stage ends before its budget is spent: its best state is what remains either way."""

    patience: PositiveInt
    """So many validations in a row without an improvement end it."""
    min_delta: NonNegativeFloat = 0.0
    """Nats by which the validation loss must fall below the best so far to count as one."""


def _trained(stage: Mapping[str, Any]) -> set[str]:
    """The parts that a stage, as far as it is validated, trains."""
    return {part for part, mode in stage.get("trainable", {}).items() if mode != "frozen"}


def _projector_only(stage: Mapping[str, Any]) -> bool:
    return _trained(stage) == {"projector"}


class Stage(Config):
    """One stretch of training: what trains, how fast, for how long."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    """In logs and in overrides: `stages.NAME.lr=1e-3`."""
    trainable: dict[Part, Mode]
    """Part -> frozen, full or lora; a part that is not named is frozen."""
    lr: Annotated[
        Annotated[Rate, Tag("plain")]
        | Annotated[dict[Part, Rate], Tag("parts")]
        | Annotated[Literal["auto"], Tag("auto")],
        Discriminator(_shape_of_rate),
    ] = Field(default_factory=lambda stage: NORMAL_RATE * (WARMUP_FACTOR if _projector_only(stage) else 1))
    """One rate, or a rate for each part that trains. Default: 1e-4; 5e-4 where only the projector trains. auto: one
    rate that a range test picks on the stage's own data before its first update, see `training.rates`."""
    lr_schedule: Literal["constant", "cosine"] = Field(
        default_factory=lambda stage: "constant" if _projector_only(stage) else "cosine"
    )
    """Default: cosine; constant where only the projector trains."""
    warmup_fraction: Share = 0.02
    """Share of the stage over which the rate rises from zero."""
    losses: dict[Literal["caption", "words"], Annotated[float, Field(gt=0)]] = Field(
        default={"caption": 1.0}, min_length=1
    )
    """Loss -> weight. caption: the LLM's loss on the answer. words: prompts are to lie on the caption's words."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's."""
    budget: Budget
    """How long it trains: `{samples: N}` or `{tokens: N}`."""
    batch_size: PositiveInt = 16
    """Samples per optimizer update, over all devices."""
    micro_batch_size: PositiveInt | None = None
    """Samples that go through the model at once; null: the whole batch."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null switches clipping off."""
    lora: LoRAConfig = LoRAConfig()
    """Of the LLM, where it trains so."""
    encoder_lora: LoRAConfig = LoRAConfig()
    """Of the encoder, where it trains so: on the blocks of a vision transformer."""
    cache_features: Literal["auto"] | bool = "auto"
    """Compute the frozen VPG's output once and keep it on disk; auto: where it is frozen."""
    augment: bool = Field(default_factory=lambda stage: bool(_trained(stage) & {"encoder", "connector"}))
    """Whether `data.augment` holds in this stage. Default: true where encoder or connector train."""
    visual_tokens: PositiveInt | None = None
    """Of an image, or of each of its tiles, in this stage; null: as `resolution` says, else as many as the VPG gives.
    First few, then many: a cheap warm-up and a sharp fine-tune. What is saved sees as the last stage did."""
    image_size: PositiveInt | None = None
    """Side in pixels of what the encoder sees in this stage; null: as `resolution` says, else the VPG's own."""
    validate_every: PositiveInt | None = None
    """Samples between validations; null: ten times in the stage."""
    early_stopping: EarlyStopping | None = None
    """`{patience, min_delta}`: end the stage when its validation loss no longer falls; null: spend the budget."""

    @field_validator("trainable")
    @classmethod
    def _something_trains(cls, trainable: dict[str, str]) -> dict[str, str]:
        if all(mode == "frozen" for mode in trainable.values()):
            raise ValueError("this stage trains nothing; give at least one part the mode full or lora")
        for part, mode in trainable.items():
            if mode == "lora" and part not in ("encoder", "llm"):
                raise ValueError(f"{part}: lora is possible for llm and encoder; {part} can be frozen or full")
        return {part: trainable.get(part, "frozen") for part in ("encoder", "connector", "projector", "llm")}

    @model_validator(mode="after")
    def _fits_together(self) -> "Stage":
        if isinstance(self.lr, dict):
            trains = [part for part, mode in self.trainable.items() if mode != "frozen"]
            if missing := [part for part in trains if part not in self.lr]:
                raise ValueError(f"lr names no rate for {', '.join(missing)}, which trains; add it or give one rate")
            if idle := [part for part in self.lr if part not in trains]:
                raise ValueError(f"lr names a rate for {', '.join(idle)}, which is frozen in this stage")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.cache_features is True and self.trainable["encoder"] != "frozen":
            raise ValueError("cache_features: true needs a frozen encoder; features that train can't be kept")
        return self

    @property
    def rates(self) -> dict[Part, float]:
        """The learning rate of each part that trains; empty where a range test has not picked it yet."""
        if self.lr == "auto":
            return {}
        trains: list[Part] = [part for part, mode in self.trainable.items() if mode != "frozen"]
        return {part: self.lr[part] if isinstance(self.lr, dict) else self.lr for part in trains}


class GuardConfig(Config):
    """Updates that would harm what was learnt are skipped; too many of them stop the run."""

    max_skipped: NonNegativeInt = 10
    """Of a run; one more stops it. 0: the first one does."""
    spike: Annotated[float, Field(ge=3)] | None = 10.0
    """Skip an update whose loss is so many running deviations above the running median; null: only what is not
    finite. Healthy losses of small batches stay below 5."""


class TrainerConfig(Config):
    """The machine's side of training."""

    devices: PositiveInt | Literal["auto"] = "auto"
    """Of one machine; auto: all GPUs there are, else the CPU."""
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed-2", "deepspeed-3"] = "auto"
    """How several devices share the work; auto: ddp. See docs/scaling.md."""
    attention: Literal[
        "auto", "blocks", "varlen", "sdpa", "eager", "flex_attention",
        "flash_attention_2", "flash_attention_3", "flash_attention_4",
    ] = "auto"  # fmt: skip
    """How samples that share a row are kept apart; auto: varlen on a GPU in half precision, else blocks."""
    unpad: bool = True
    """Without `data.packing`: put the samples of a micro-batch behind each other too, so that no padding is computed;
    they stay apart, and the losses are the same up to rounding. Not with `compile`, nor where the LLM can't."""
    precision: Literal["auto", "bf16-true", "bf16-mixed", "fp32"] = "auto"
    """auto: bf16-true where the processor has bf16, fp32 elsewhere."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    """8bit: the moments in 8 bits (arXiv 2110.02861). paged: moments move to the CPU's memory when the GPU's is full.
    Both by bitsandbytes."""
    gradient_checkpointing: Annotated[
        Annotated[bool, Tag("plain")] | Annotated[list[Literal["llm", "encoder"]], Tag("parts")], Discriminator(_listed)
    ] = False
    """Keep only the input of each block of these parts, and compute the rest anew on the way back: less memory for
    more time. true: of both, as far as they are trained or gradients pass through them."""
    compile: bool = False
    """Compile the LLM's blocks (`torch.compile`): slow to begin, then faster, mostly on a GPU."""
    validate_samples: PositiveInt | None = None
    """Validate on this many samples; null: all."""
    guard: GuardConfig = GuardConfig()
    """Which updates are skipped, and when too many were."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """What else is told what metrics.jsonl and metrics.csv hold."""
    threads: PositiveInt | None = None
    """CPU threads; null: torch's own choice."""
    checkpoint_every: PositiveInt | None = 100
    """Optimizer updates between checkpoints, beside those at validations; null: at validations alone."""
