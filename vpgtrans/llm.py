"""Language models: open one from a reference, or read its word embeddings alone.

The input-embedding space is that of `inputs_embeds`: what the embedding layer returns, family quirks included, before
anything the model does to `inputs_embeds` itself (OPT's `project_in`, Granite's multiplier).
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vpgtrans import gguf_files
from vpgtrans.blocks import find_blocks, linears_in
from vpgtrans.checkpoint_files import CheckpointFiles
from vpgtrans.config import Quantisation
from vpgtrans.errors import CheckpointError, ReferenceError_, TransferError
from vpgtrans.fingerprint import Fingerprint, config_sha256, embeddings_sha256, tokenizer_sha256, weights_sha256
from vpgtrans.quantise import check_bitsandbytes, check_quantisation, keep_trainable, quantisation_config
from vpgtrans.references import Resolved, portable, resolve

log = logging.getLogger(__name__)

# --- family quirks, all of them ---------------------------------------------------------------

_SCALE_OUTSIDE_LAYER = {"falcon_h1": "embedding_multiplier"}
"""model_type -> config field: the model multiplies the layer's output by it, but not `inputs_embeds`."""

_VERIFIED = frozenset({"opt", "gpt2", "llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "granite"})
"""model_types whose `model(ids) == model(inputs_embeds=embed(ids))` has a test; others are checked when opened."""

_COMPOSITE_PREFIXES = ("", "language_model.", "model.language_model.", "text_model.", "model.text_model.")
"""Where a checkpoint with more than a language model keeps it: BLIP-2, LLaVA on disk, in memory, Idefics3."""

_TEXT_KEYS = {
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Names in a composite checkpoint -> those of its text model alone."""


# --- an LLM -----------------------------------------------------------------------------------


@dataclass
class LanguageModel:
    """A frozen causal LLM in eval mode, with its tokenizer."""

    model: Any
    """transformers.PreTrainedModel, or what peft makes of it."""
    tokenizer: Any
    reference: str
    fingerprint: Fingerprint
    """Of the weights as the reference has them, also where they are quantised."""
    quantised: Quantisation | None = None

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that its positions were made for, where its config says so."""
        return max_tokens_of(self.model.config)

    @property
    def width(self) -> int:
        """Width of `inputs_embeds`."""
        return self.fingerprint.width

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings as the model takes them: ids LongTensor[...] -> Tensor[..., d], scaling included."""
        return _embed(self.model.get_input_embeddings(), ids, self.model.config)

    @functools.cached_property
    def word_rms(self) -> float:
        """Root mean square over the entries of all words' embeddings (specials and unused rows left out)."""
        ids = word_ids(self.tokenizer, self.fingerprint.vocabulary)
        with torch.no_grad():
            device = self.model.get_input_embeddings().weight.device
            return _rms(self.embed(chunk.to(device)) for chunk in ids.split(16384))


@dataclass
class WordEmbeddings:
    """The table that `LanguageModel.embed` looks up, without the model."""

    matrix: Tensor
    """float32 [V, d], as fed to the blocks: layer called, scaling included."""
    tokenizer: Any
    reference: str
    fingerprint: Fingerprint

    @functools.cached_property
    def word_rms(self) -> float:
        """As LanguageModel.word_rms."""
        ids = word_ids(self.tokenizer, len(self.matrix))
        return _rms(self.matrix[chunk] for chunk in ids.split(16384))


def _embed(layer: nn.Module, ids: Tensor, config: Any) -> Tensor:
    vectors = layer(ids)
    field = _SCALE_OUTSIDE_LAYER.get(config.get_text_config().model_type)
    return vectors if field is None else vectors * getattr(config.get_text_config(), field)


def word_ids(tokenizer: Any, rows: int) -> Tensor:
    """Ids LongTensor[n] of the words among `rows` rows of a table: no specials, no added tokens, no unused rows."""
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(min(len(tokenizer), rows)) if i not in added])


def _rms(chunks: Iterator[Tensor]) -> float:
    total, count = 0.0, 0
    for chunk in chunks:
        total += chunk.float().square().sum(dtype=torch.float64).item()
        count += chunk.numel()
    return math.sqrt(total / count)


# --- opening ----------------------------------------------------------------------------------


def open_llm(
    reference: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    quantise: Quantisation | None = None,
) -> LanguageModel:
    """Open a causal LLM, frozen and in eval mode; `dtype` is bf16 if None, `quantise` is of its blocks' weights.

    Raises ReferenceError_ where the reference is no causal LLM, CheckpointError where its weights don't fill the model,
    RecipeError where it can't be quantised so.
    """
    found = _resolve_llm(reference)
    directory = gguf_files.dequantised(found.path) if found.kind == "gguf" else found.path
    config = _config(reference, directory, trust_remote_code=trust_remote_code)
    text = _causal_config(reference, config)
    options: dict[str, Any] = {}
    if quantise is not None:
        check_bitsandbytes(f"target.quantise: {quantise}")
        blocks, leave = _linears(reference, text, trust_remote_code=trust_remote_code)
        check_quantisation(quantise, blocks)
        packed = quantisation_config(quantise, dtype=dtype or torch.bfloat16, leave=leave)
        options = {"quantization_config": packed, "device_map": {"": torch.device(device)}}
    try:
        with _no_bar():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                config=text,
                key_mapping=None if text is config else _TEXT_KEYS,
                dtype=dtype or torch.bfloat16,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{reference}: the model in {directory} can't be loaded: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise CheckpointError(f"{reference}: the weights in {directory} lack {len(info['missing_keys'])}: {missing}")
    if info["unexpected_keys"]:
        unexpected = sorted(info["unexpected_keys"])
        log.warning("%s: %d tensors that the model doesn't use, e.g. %s", reference, len(unexpected), unexpected[0])
    if quantise is not None:
        keep_trainable(model)
    else:
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    _fold_head(model)
    tokenizer = _tokenizer(reference, directory, trust_remote_code=trust_remote_code)
    weight = model.get_input_embeddings().weight
    fingerprint = _fingerprint(found, type(model).__name__, text, tokenizer, weight)
    if quantise is None:
        fingerprint = replace(fingerprint, weights_sha256=weights_sha256(model))
    llm = LanguageModel(model, tokenizer, reference, fingerprint, quantise)
    if text.get_text_config().model_type not in _VERIFIED:
        _verify_causal(llm)
        _verify_inputs_embeds(llm)
    return llm


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Within the block transformers shows no progress of reading tensors: it is done before one can look."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _fold_head(model: Any) -> None:
    """Have the output head's input contiguous.

    `logits_to_keep`, which `generate` uses too, hands the head a slice [B, n, d]. Torch multiplies one that is not
    contiguous as a batch, for which it repeats the head's weight B times on a CPU: gigabytes and most of the time where
    a vocabulary is large.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, arguments: (arguments[0].contiguous(), *arguments[1:]))


def open_config(reference: str, *, trust_remote_code: bool = False) -> Any:
    """The `transformers` config of an LLM (of a composite such as Gemma 3: its text model's).

    No weights are read (a GGUF's header is). Raises ReferenceError_ where the reference is no causal LLM.
    """
    found = _resolve_llm(reference, weights=False)
    if found.kind == "gguf":
        return gguf_files.open_config(found.path)
    config = _config(reference, found.path, trust_remote_code=trust_remote_code)
    return _causal_config(reference, config)


def max_tokens_of(config: Any) -> int | None:
    """The longest sequence that an LLM's positions were made for, where its config says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def open_skeleton(reference: str, *, trust_remote_code: bool = False) -> Any:
    """A causal LLM whose parameters have shapes and no values: they are on the meta device. No weights are read."""
    config = open_config(reference, trust_remote_code=trust_remote_code)
    return _skeleton(reference, config, trust_remote_code=trust_remote_code).requires_grad_(False)


def linears_of(reference: str, *, trust_remote_code: bool = False) -> tuple[list[tuple[str, int]], list[str]]:
    """Names and input widths of the linear layers of an LLM's blocks; names of the others. No weights are read."""
    config = open_config(reference, trust_remote_code=trust_remote_code)
    return _linears(reference, config, trust_remote_code=trust_remote_code)


def open_tokenizer(reference: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of an LLM (or of a composite checkpoint); no weights are read."""
    found = _resolve_llm(reference, weights=False)
    directory = gguf_files.tokenizer_directory(found.path) if found.kind == "gguf" else found.path
    return _tokenizer(reference, directory, trust_remote_code=trust_remote_code)


def read_embeddings(reference: str, *, trust_remote_code: bool = False) -> WordEmbeddings:
    """Read an LLM's input-embedding table and nothing else of its weights.

    Takes composite checkpoints too (BLIP-2, LLaVA, Idefics3): the table of their text model. Raises ReferenceError_
    where there is no language model, CheckpointError where the file lacks the table or it has another shape.
    """
    found = _resolve_llm(reference)
    made = gguf_files.cached_model(found.path) if found.kind == "gguf" else found.path
    if made is None:
        tokenizer_home = gguf_files.tokenizer_directory(found.path)
        config = gguf_files.open_config(found.path)
    else:
        tokenizer_home = made
        config = _config(reference, made, trust_remote_code=trust_remote_code)
    tokenizer = _tokenizer(reference, tokenizer_home, trust_remote_code=trust_remote_code)
    skeleton = _skeleton(reference, config.get_text_config(), trust_remote_code=trust_remote_code)
    layer = skeleton.get_input_embeddings()
    if made is None:
        weight = gguf_files.read_token_embeddings(found.path)
    else:
        weight = CheckpointFiles(made).first_of(_table_names(skeleton, layer))
    if weight.shape != layer.weight.shape:
        raise CheckpointError(
            f"{reference}: the embedding table is {list(weight.shape)}, its config says {list(layer.weight.shape)}"
        )
    fingerprint = _fingerprint(found, type(skeleton).__name__, config, tokenizer, weight)
    return WordEmbeddings(_looked_up(layer, weight, config), tokenizer, reference, fingerprint)


def embeddings_of(llm: LanguageModel, *, trust_remote_code: bool = False) -> WordEmbeddings:
    """What `read_embeddings` gives, from an LLM that is open already (its tokenizer is shared, not copied)."""
    config = llm.model.config.get_text_config()
    layer = _skeleton(llm.reference, config, trust_remote_code=trust_remote_code).get_input_embeddings()
    weight = llm.model.get_input_embeddings().weight.detach().cpu()
    return WordEmbeddings(_looked_up(layer, weight, config), llm.tokenizer, llm.reference, llm.fingerprint)


def _looked_up(layer: nn.Module, weight: Tensor, config: Any) -> Tensor:
    """Every row through the layer: weight [V, d] -> float32 [V, d], the weight itself where it is that already."""
    kind = config.get_text_config().model_type
    if type(layer) is nn.Embedding and layer.max_norm is None and kind not in _SCALE_OUTSIDE_LAYER:
        return weight.to(torch.float32)
    # a copy, then in place: every row depends on itself alone, and a table may take gigabytes
    matrix = weight.to(torch.float32, copy=True)
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    for start in range(0, len(matrix), 16384):
        ids = torch.arange(start, min(start + 16384, len(matrix)))
        matrix[ids] = _embed(layer, ids, config)
    return matrix


def _resolve_llm(reference: str, *, weights: bool = True) -> Resolved:
    found = resolve(reference, weights=weights)
    if found.kind == "vlm":
        raise ReferenceError_(
            f"{reference}: {found.path} is a VLM directory, not an LLM. Name the LLM itself "
            "(manifest.json says which one it was made for), or use the directory as source.vpg"
        )
    if found.kind == "file":
        raise ReferenceError_(f"{reference}: {found.path} is no LLM; name a Hugging Face directory or a .gguf file")
    if found.kind == "directory" and not (found.path / "config.json").is_file():
        raise ReferenceError_(f"{reference}: {found.path} holds no config.json, so it is no Hugging Face model")
    return found


def _config(reference: str, directory: Path, *, trust_remote_code: bool) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ReferenceError_(f"{reference}: {directory / 'config.json'} can't be read: {error}") from error


def _causal_config(reference: str, config: Any) -> Any:
    """The config to open a causal LLM with: a composite that `transformers` can open as text alone gives its text's.

    Raises ReferenceError_ for encoders, encoder-decoders and other vision-language checkpoints. The library's own
    mapping is no answer: BERT, BART and Gemma 3 with its vision tower are in it.
    """
    if "AutoModelForCausalLM" in _auto_map(config):
        return config
    text = config.get_text_config()
    mapped = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if getattr(config, "is_encoder_decoder", False):
        raise ReferenceError_(
            f"{reference}: {config.model_type} is an encoder-decoder, which reads no visual prompts between its words; "
            "name a decoder-only LLM"
        )
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ReferenceError_(
            f"{reference}: {config.model_type} is no causal language model (its config lacks is_decoder, so every word "
            "sees the later ones); name a decoder-only LLM"
        )
    if type(config) in mapped and (text is config or type(text) in mapped):
        return text
    if text is not config:
        raise ReferenceError_(
            f"{reference}: a {config.model_type} checkpoint holds an LLM but is none; name the LLM it was built on, "
            "or use this reference as source.vpg"
        )
    raise ReferenceError_(f"{reference}: {config.model_type} is no causal language model (AutoModelForCausalLM)")


def _auto_map(config: Any) -> dict[str, str]:
    return getattr(config, "auto_map", None) or {}


def _tokenizer(reference: str, directory: Path, *, trust_remote_code: bool) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ReferenceError_(f"{reference}: {directory} holds no tokenizer that opens: {error}") from error


def _fingerprint(found: Resolved, architecture: str, config: Any, tokenizer: Any, weight: Tensor) -> Fingerprint:
    rows, width = weight.shape
    if len(tokenizer) > rows:
        log.warning("%s: the tokenizer has %d tokens, the table %d rows", found.reference, len(tokenizer), rows)
    return Fingerprint(
        reference=portable(found.reference),
        revision=found.revision,
        architecture=architecture,
        width=width,
        layers=config.get_text_config().num_hidden_layers,
        vocabulary=rows,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        embeddings_sha256=embeddings_sha256(weight),
        config_sha256=config_sha256(config),
    )


def _skeleton(reference: str, config: Any, *, trust_remote_code: bool) -> Any:
    """The text model with its parameters on the meta device; buffers (Gemma's scale) are real."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in _auto_map(config):
        maker = transformers.AutoModelForCausalLM
    elif type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        maker = transformers.AutoModelForSeq2SeqLM
    else:
        raise ReferenceError_(f"{reference}: {config.model_type} is no language model with word embeddings")
    with init_empty_weights(include_buffers=False):
        # float32, or the buffers would take the checkpoint's dtype and round the scale
        return maker.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def _linears(reference: str, config: Any, *, trust_remote_code: bool) -> tuple[list[tuple[str, int]], list[str]]:
    """As `linears_of`."""
    skeleton = _skeleton(reference, config, trust_remote_code=trust_remote_code)
    blocks = block_linears(skeleton)
    linears = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    widths = [(name, module.weight.shape[isinstance(module, nn.Linear)]) for name, module in linears.items()]
    return [(name, width) for name, width in widths if name in blocks], [name for name in linears if name not in blocks]


def _table_names(skeleton: Any, layer: nn.Module) -> list[str]:
    """The names a checkpoint may give the table: with and without the base model's prefix, alone or in a composite."""
    full = next(f"{name}.weight" for name, module in skeleton.named_modules() if module is layer)
    bare = full.removeprefix(f"{skeleton.base_model_prefix}.")
    return [prefix + name for prefix in _COMPOSITE_PREFIXES for name in dict.fromkeys((full, bare))]


# --- checks and names -------------------------------------------------------------------------


def inputs_embeds_error(llm: LanguageModel, ids: Tensor | None = None) -> float:
    """Largest difference between `model(ids)` and `model(inputs_embeds=embed(ids))`, over the logits' deviation."""
    device = llm.model.get_input_embeddings().weight.device
    if ids is None:
        ids = word_ids(llm.tokenizer, llm.fingerprint.vocabulary)[None, 10:16]
    ids = ids.to(device)
    with torch.no_grad():
        expected = llm.model(input_ids=ids, use_cache=False).logits.float()
        actual = llm.model(inputs_embeds=llm.embed(ids), use_cache=False).logits.float()
    return ((actual - expected).abs().max() / expected.std()).item()


def _verify_causal(llm: LanguageModel) -> None:
    """Refuse a model whose logits change with the words that follow."""
    ids = word_ids(llm.tokenizer, llm.fingerprint.vocabulary)[None, 10:17].to(llm.model.device)
    with torch.no_grad():
        before = llm.model(input_ids=ids[:, :-1], use_cache=False).logits[:, :-1].float()
        after = llm.model(input_ids=ids[:, [0, 1, 2, 3, 4, 6]], use_cache=False).logits[:, :-1].float()
    error = ((after - before).abs().max() / before.std()).item()
    if not error < 0.02:
        raise ReferenceError_(
            f"{llm.reference}: {llm.fingerprint.architecture} is no causal language model: its logits change with "
            f"later words (by {error:.3g} of their deviation); name a decoder-only LLM"
        )


def _verify_inputs_embeds(llm: LanguageModel) -> None:
    error = inputs_embeds_error(llm)
    if not error < 0.02:
        raise TransferError(
            f"{llm.reference}: {llm.fingerprint.architecture} treats inputs_embeds unlike ids (logits differ by "
            f"{error:.3g} of their deviation), so visual prompts can't stand beside its words; use another LLM"
        )


def blocks_name(model: Any) -> str:
    """The name of the list of decoder blocks. Raises TransferError where they can't be told."""
    decoder = model.get_decoder()
    layers = model.config.get_text_config().num_hidden_layers
    home = find_blocks(decoder, layers)
    if home is None:
        raise TransferError(f"{type(model).__name__}: found no list of {layers} decoder blocks")
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return ".".join(filter(None, (prefix, home)))


def block_linears(model: Any) -> list[str]:
    """Full names of the linear layers inside the decoder blocks, for peft's `target_modules`.

    Embeddings, `lm_head` and OPT's projections stand outside the blocks. Raises TransferError where the blocks can't be
    told.
    """
    return linears_in(model, blocks_name(model))
