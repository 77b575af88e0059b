"""One YAML file says all of a run: load it, override it, check it, write it out with every default.

Paths inside a recipe are relative to the working directory. No torch here: `vpgtrans validate` and `--help` stay fast.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from vpgtrans import recipe_file
from vpgtrans.config import (
    AugmentConfig,
    Config,
    ConnectorConfig,
    InitialiserConfig,
    Part,
    ProjectorConfig,
    PromptConfig,
    Quantisation,
    ResolutionConfig,
    VPGConfig,
)
from vpgtrans.data.config import DataSource, PackingConfig
from vpgtrans.errors import DataError, RecipeError
from vpgtrans.explain import explain
from vpgtrans.training.config import Rate, Share, Stage, TrainerConfig, shape


class SourceConfig(Config):
    """Where the VPG comes from."""

    vpg: Annotated[Annotated[str, Tag("plain")] | Annotated[VPGConfig, Tag("parts")], Discriminator(shape)]
    """A reference to a VLM whose VPG is taken, or `{encoder, connector}` to build one from scratch."""
    trust_remote_code: bool = False
    """Run the code that the source's LLM brings along, to read its words."""
    force: bool = False
    """Read the source's words from an LLM that is not quite the one it was trained with; the lineage says so."""


class TargetConfig(Config):
    """The LLM that the VPG moves to, or trains with."""

    llm: str = Field(min_length=1)
    """A reference to a causal LLM: `hf:ORG/REPO[@REVISION]`, a directory, a `.gguf` file, `pip:DISTRIBUTION`."""
    projector: ProjectorConfig | None = None
    """null: the source's own projector's kind, or the default one where there is no source projector."""
    connector: ConnectorConfig | None = None
    """Another connector than the source's, which takes over of it what fits (see `transfer.connector`); of its own kind
    keys that are left out are the source's. null: the source's."""
    quantise: Quantisation | None = None
    """Keep the weights of the LLM's blocks in 4 bits (nf4) or 8 (int8) while it trains: QLoRA (arXiv 2305.14314), by
    bitsandbytes. Embeddings and head stay as they are. null: all as `trainer.precision` says."""
    trust_remote_code: bool = False
    """Run the code that the LLM's checkpoint brings along."""


class DataConfig(Config):
    """The data of all stages."""

    train: list[DataSource] = Field(min_length=1)
    """What is learnt: several sources are mixed by their weights."""
    validation: list[DataSource] = Field(min_length=1)
    """What the loss is measured on, and whose captions are generated and scored at the end."""
    max_bad_fraction: Share = 0.01
    """Stop when more than this share of the samples is unreadable; below it they are skipped and listed."""
    workers: NonNegativeInt | Literal["auto"] = "auto"
    """Processes that read and decode, for each device; auto: none on a CPU, else as many as it has cores, at most 8."""
    packing: PackingConfig | None = None
    """Samples share rows without padding and without seeing each other; null: each has a row, padded."""
    augment: AugmentConfig | None = None
    """Random views of training images, in the stages whose `augment` is true; true: the defaults, null: none."""

    @field_validator("augment", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value


class EvaluationConfig(Config):
    """The captions that are generated and scored when training is done."""

    samples: PositiveInt = 256
    """Images that are captioned."""
    max_new_tokens: PositiveInt = 32
    """Of a caption."""


ARMS = ("scratch", "inherit", "transfer", "random", "converter", "caption-fit", "keep")


class CompareConfig(Config):
    """`vpgtrans compare`: the same target, data and budget from several starts."""

    arms: list[Literal["scratch", "inherit", "transfer", "random", "converter", "caption-fit", "keep"]] = Field(
        default=["scratch", "inherit", "transfer"], min_length=1
    )
    """scratch: connector and projector random. inherit: VPG kept, projector random, no warm-up. transfer: the recipe
    as it stands. The others are initialisers, trained like transfer."""
    seeds: PositiveInt = 3
    """Each arm runs with the recipe's seed, the next one, and so on."""
    lr_factors: list[Rate] = Field(default=[1.0, 2.0], min_length=1)
    """inherit fine-tunes at the recipe's rates times each of these; the better one counts."""


class Recipe(Config):
    """All of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's; its directory is `runs/NAME` unless `--output` says another one."""
    source: SourceConfig
    target: TargetConfig
    initialiser: InitialiserConfig = InitialiserConfig()
    """A bare string is short for `{kind: STRING}`."""
    resolution: ResolutionConfig = ResolutionConfig()
    """How finely images are seen, where it is to be another way than the VPG states; stages may differ."""
    prompt: PromptConfig | None = None
    """Keys that are left out are the source's own, or the defaults where it has none; a run writes all of them out."""
    data: DataConfig
    stages: list[Stage] = Field(min_length=1)
    """One after another; each begins with the best state of the one before."""
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    compare: CompareConfig = CompareConfig()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything that is drawn at random."""

    @field_validator("stages")
    @classmethod
    def _distinct_names(cls, stages: list[Stage]) -> list[Stage]:
        names = [stage.name for stage in stages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are called {', '.join(twice)}; every stage needs its own name")
        return stages

    def resolution_of(self, stage: Stage) -> ResolutionConfig:
        """How images are seen in a stage."""
        own = {"visual_tokens": stage.visual_tokens, "image_size": stage.image_size}
        return self.resolution.model_copy(update={key: value for key, value in own.items() if value is not None})

    def augmentation(self, stage: Stage) -> AugmentConfig | None:
        """How training images are augmented in a stage: both the data and the stage must say so."""
        return self.data.augment if stage.augment else None

    @model_validator(mode="after")
    def _packs_are_whole(self) -> "Recipe":
        for stage in self.stages:
            if self.data.packing is not None and stage.micro_batch_size is not None:
                raise ValueError(
                    f"stage {stage.name}: micro_batch_size: with data.packing a pack is what goes through at once; "
                    "leave micro_batch_size out, and set data.packing.max_tokens by the memory there is"
                )
        return self

    @model_validator(mode="after")
    def _one_connector(self) -> "Recipe":
        if self.target.connector is not None and isinstance(self.source.vpg, VPGConfig):
            raise ValueError("target.connector: source.vpg builds a VPG from scratch; name the connector there")
        return self

    @model_validator(mode="after")
    def _one_adapter(self) -> "Recipe":
        keys: list[tuple[Part, Literal["lora", "encoder_lora"]]] = [("llm", "lora"), ("encoder", "encoder_lora")]
        for part, key in keys:
            lora = [stage for stage in self.stages if stage.trainable[part] == "lora"]
            for stage in lora[1:]:
                if getattr(stage, key) != getattr(lora[0], key):
                    raise ValueError(
                        f"stage {stage.name}: its {key} differs from that of stage {lora[0].name}; both train one "
                        "adapter"
                    )
        return self

    @model_validator(mode="after")
    def _quantised_is_frozen(self) -> "Recipe":
        for stage in self.stages:
            if self.target.quantise is not None and stage.trainable["llm"] == "full":
                raise ValueError(
                    f"stage {stage.name}: trainable.llm: full: weights that target.quantise keeps in few bits can't "
                    "train; right would be llm: lora, or target.quantise: null"
                )
            if self.target.quantise == "int8" and stage.trainable["llm"] == "lora" and stage.lora.dora:
                raise ValueError(
                    f"stage {stage.name}: lora.dora: peft finds no norms of weights in int8; right would be "
                    "target.quantise: nf4, or dora: false"
                )
        return self

    @model_validator(mode="after")
    def _cacheable(self) -> "Recipe":
        for stage in self.stages:
            augmentation = self.augmentation(stage)
            if stage.cache_features is True and augmentation is not None and augmentation.views is None:
                raise ValueError(
                    f"stage {stage.name}: cache_features: true needs a fixed number of views of an image; give "
                    "data.augment.views, or augment: false"
                )
        return self


# --- load and write -----------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe, apply overrides, check it.

    overrides: `KEY=VALUE` strings whose value is YAML (`stages.0.lr=1e-3`, `stages.warmup.budget.samples=64`,
        `data.train=[{dataset: openmoji}]`), or a mapping from such keys to Python values.

    Raises:
        RecipeError: with every problem found, a line each: file and line or override, key path, what would be right.
    """
    document = recipe_file.read(Path(path))
    problems = recipe_file.override(document, overrides)
    document.data = _written_out(document.data)
    try:
        # by way of JSON, so that strict types still take a YAML list for a tuple and 1 for 1.0
        recipe = Recipe.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        problems += explain(error, root=Recipe, data=document.data, where=document.where, file=str(path))
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def _written_out(data: dict[str, Any]) -> dict[str, Any]:
    """Short forms as their long ones."""
    initialiser = data.get("initialiser")
    return data | {"initialiser": {"kind": initialiser}} if isinstance(initialiser, str) else data


def parse_recipe(data: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
    """A recipe from plain Python values.

    Raises:
        RecipeError: as `load_recipe`, with `name` in the file's place.
    """
    plain = _written_out(recipe_file.plain(data))
    try:
        return Recipe.model_validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, root=Recipe, data=plain, where={}, file=name))) from None


Settings = TypeVar("Settings", bound=Config)


def parse_settings(model: type[Settings], data: Mapping[str, Any], *, name: str) -> Settings:
    """One section of a recipe from plain Python values; `name` says in messages where they are from.

    Raises:
        RecipeError: a key is unknown or has a value that is not allowed.
    """
    try:
        return model.model_validate_json(json.dumps(recipe_file.plain(data)), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, root=model, data=dict(data), where={}, file=name))) from None


def parse_source(data: Mapping[str, Any]) -> DataSource:
    """A data source from plain Python values.

    Raises:
        DataError: a key is unknown or has a value that is not allowed.
    """
    try:
        return DataSource.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems = explain(error, root=DataSource, data=dict(data), where={}, file="data source")
        raise DataError("\n".join(problems)) from None


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load_recipe` reads it back to an equal one."""
    stream = StringIO()
    recipe_file.parser(typ="safe").dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def recipe_hash(recipe: Recipe) -> str:
    """sha256 over what the recipe says: all in which it differs from the defaults, and the kinds of its parts.

    Spelling a default out changes nothing, and neither does a later version's new key. A later version's other default
    doesn't show either, so it names a recipe, and is no key of results.
    """
    said = _kept(recipe.model_dump(mode="json"), recipe.model_dump(mode="json", exclude_defaults=True))
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_TELLING = ("kind", "image")
"""Keys that say something even at their default: a part's class, and a preprocessing that replaces the reference's."""


def _kept(everything: Any, said: Any) -> Any:
    """`said`, and from `everything` the keys that say something at their default."""
    if isinstance(everything, dict):
        kept = {key: value for key, value in everything.items() if key in said or key in _TELLING}
        return {key: _kept(value, said.get(key, value)) for key, value in kept.items()}
    if isinstance(everything, list):
        return [_kept(*pair) for pair in zip(everything, said, strict=True)]
    return said
