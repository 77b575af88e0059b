"""GGUF files: de-quantised once into the cache as a Hugging Face directory; one table read without the rest.

A model that transformers opens from a GGUF file keeps a quantisation config and refuses to be saved, so its state is
copied into a fresh model of the same configuration. The cache is keyed by the file's sha256 and by the version of
transformers, whose conversion made it.
"""

import copy
import json
import logging
import shutil
import struct
import time
from pathlib import Path

import torch
import transformers

from vpgtrans.errors import IntegrityError, ReferenceError_
from vpgtrans.references import cache_dir, cached, digest

log = logging.getLogger(__name__)

_LAYOUT = 1
"""Part of the cache's key: raise it when what is written below changes."""

_UNREADABLE = (ValueError, OSError, KeyError, IndexError, RuntimeError, struct.error)
"""What transformers and gguf raise for a file that is cut off, or of an architecture they don't know."""


def _home(gguf: Path) -> Path:
    return cache_dir() / "gguf" / f"{digest(gguf).hex()}-transformers{transformers.__version__}-{_LAYOUT}"


def dequantised(gguf: Path) -> Path:
    """A directory with the model as bf16 safetensors and its tokenizer, made on first use (a minute or so)."""
    return cached(_home(gguf) / "model", lambda directory: _write_model(gguf, directory))


def cached_model(gguf: Path) -> Path | None:
    """The directory `dequantised` made before, or None."""
    directory = _home(gguf) / "model"
    return directory if directory.exists() else None


def tokenizer_directory(gguf: Path) -> Path:
    """A directory with the tokenizer alone: opening it needs no weights."""
    return cached(_home(gguf) / "tokenizer", lambda directory: _write_tokenizer(gguf, directory))


def open_config(gguf: Path) -> transformers.PretrainedConfig:
    """The model's configuration, without the quantisation config.

    Raises ReferenceError_ for an architecture that transformers can't convert.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except _UNREADABLE as error:
        raise ReferenceError_(f"{gguf}: transformers can't open this GGUF file: {error}") from error
    return _without_quantisation(config)


def _without_quantisation(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def _write_tokenizer(gguf: Path, directory: Path) -> None:
    start = time.perf_counter()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except _UNREADABLE as error:
        raise ReferenceError_(f"{gguf}: transformers can't build its tokenizer: {error}") from error
    tokenizer.save_pretrained(directory)
    # transformers' base class may add its own default specials, as ids past the end of the embedding table
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = open_config(gguf).get_text_config().vocab_size
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocabulary]
    # without indentation: a third of the size, and each opening parses it several times
    text = json.dumps(state, ensure_ascii=False, separators=(",", ":"))
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    log.info("%s: tokenizer converted in %.1f s", gguf.name, time.perf_counter() - start)


def _write_model(gguf: Path, directory: Path) -> None:
    log.info("%s: de-quantising once into %s (a minute or so)", gguf.name, _home(gguf) / "model")
    start = time.perf_counter()
    try:
        quantised = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            # without this a machine that has the matching kernels would keep the blocks packed
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    except _UNREADABLE as error:
        raise ReferenceError_(f"{gguf}: transformers can't open this GGUF file: {error}") from error
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(_without_quantisation(quantised.config))
    state = {name: tensor.to(torch.bfloat16) for name, tensor in quantised.state_dict().items()}
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.config.dtype = torch.bfloat16
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(directory)
    shutil.copytree(tokenizer_directory(gguf), directory, dirs_exist_ok=True)
    log.info("%s: de-quantised in %.1f s", gguf.name, time.perf_counter() - start)


def read_token_embeddings(gguf: Path) -> torch.Tensor:
    """The embedding table [V, d], de-quantised and rounded to bf16 as `dequantised` stores it; nothing else is read."""
    import gguf as reader
    from gguf.quants import dequantize

    try:
        tensors = [tensor for tensor in reader.GGUFReader(gguf).tensors if tensor.name == "token_embd.weight"]
    except _UNREADABLE as error:
        raise IntegrityError(f"{gguf}: damaged: {error}") from error
    if not tensors:
        raise IntegrityError(f"{gguf}: the file has no tensor token_embd.weight")
    values = dequantize(tensors[0].data, tensors[0].tensor_type)
    return torch.from_numpy(values).to(torch.bfloat16)
