"""Tiny random language models of the supported families, each with a small real tokenizer, saved to a directory.

Not a test file: every test that needs an LLM takes it from here. Random LLMs share no geometry, so nothing that
measures the quality of a converter may use them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A woman construction worker with a medium skin tone holds a yellow helmet.",
    "Two clocks on the wall show half past eleven and a quarter to three.",
    "The flag of France is blue, white and red; the flag of Japan is white with a red sun.",
    "A cat sleeps on a red sofa while it rains outside the window.",
    "What is in the picture? A man is riding a bicycle on the beach.",
    "Der Hund läuft über die Straße, und das Café schließt um 22 Uhr.",
    "Ein rotes Auto fährt schnell durch die kleine Stadt am Fluss.",
    "A smiling face with heart-shaped eyes, a waving hand and a birthday cake.",
    "def add(a, b):\n    return a + b\n",
)

Style = Literal["bytes", "metaspace", "wordpiece"]


def tiny_tokenizer(
    style: Style = "bytes", *, vocabulary: int = 500, add_bos: bool = False, sentences: tuple[str, ...] = SENTENCES
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer trained on `sentences`: GPT-2's byte map, SentencePiece's `▁` with byte fallback, or WordPiece.

    Specials: `<pad>` 0, `<s>` 1 (bos), `</s>` 2 (eos), `<unk>` 3. With `add_bos` every encoding begins with `<s>`.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if style == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif style == "metaspace":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        # the byte pieces come first, as in SentencePiece; they are ordinary tokens, not special ones
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[*special, *(AddedToken(f"<0x{b:02X}>", special=False) for b in range(256))],
            show_progress=False,
        )
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    backend.train_from_iterator(sentences, trainer)
    if style == "metaspace":
        backend = _unadd_bytes(backend, special)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _unadd_bytes(backend: Tokenizer, special: list[str]) -> Tokenizer:
    """The trainer turned `<0xNN>` into added tokens; a SentencePiece model has them in its vocabulary alone."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(state))


def _opt(width: int, vocabulary: int, *, hidden: int | None = None) -> transformers.OPTConfig:
    return transformers.OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden or width,
        word_embed_proj_dim=width,
        ffn_dim=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        # OPT-350M, the one OPT with project_in, normalises after its blocks and has no final norm
        do_layer_norm_before=hidden is None,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=2,
    )


def _gpt2(width: int, vocabulary: int) -> transformers.GPT2Config:
    return transformers.GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=2,
        n_head=4,
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=2,
        eos_token_id=2,
    )


def _decoder(config_class: type[transformers.PretrainedConfig], width: int, vocabulary: int, **extra):
    return config_class(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **extra,
    )


# family -> (config of (width, vocabulary), tokenizer style, whether its tokenizer writes a bos)
_FAMILIES: dict[str, tuple[Callable[[int, int], transformers.PretrainedConfig], Style, bool]] = {
    "opt": (lambda d, v: _opt(d, v), "bytes", True),
    "opt-project-in": (lambda d, v: _opt(d, v, hidden=2 * d), "bytes", True),
    "gpt2": (lambda d, v: _gpt2(d, v), "bytes", False),
    "llama": (lambda d, v: _decoder(transformers.LlamaConfig, d, v, tie_word_embeddings=True), "bytes", False),
    "llama-untied": (lambda d, v: _decoder(transformers.LlamaConfig, d, v), "bytes", False),
    "qwen2": (lambda d, v: _decoder(transformers.Qwen2Config, d, v), "bytes", False),
    "qwen3": (lambda d, v: _decoder(transformers.Qwen3Config, d, v, head_dim=d // 4), "bytes", False),
    "gemma3": (
        lambda d, v: _decoder(
            transformers.Gemma3TextConfig, d, v, head_dim=d // 4, query_pre_attn_scalar=d // 4, sliding_window=64
        ),
        "metaspace",
        True,
    ),
    "mistral": (lambda d, v: _decoder(transformers.MistralConfig, d, v, sliding_window=None), "metaspace", True),
    "phi3": (lambda d, v: _decoder(transformers.Phi3Config, d, v), "metaspace", False),
    "granite": (lambda d, v: _decoder(transformers.GraniteConfig, d, v, embedding_multiplier=12.0), "bytes", False),
}
FAMILIES = tuple(_FAMILIES)
"""One of each kind; `falcon-h1` (the model scales ids' embeddings outside the layer) is slow and stands apart."""


def _falcon_h1(width: int, vocabulary: int) -> transformers.FalconH1Config:
    return _decoder(
        transformers.FalconH1Config,
        width,
        vocabulary,
        mamba_d_ssm=width,
        mamba_n_heads=4,
        mamba_d_head=width // 4,
        mamba_d_state=8,
        mamba_n_groups=1,
        embedding_multiplier=5.0,
    )


_FAMILIES["falcon-h1"] = (_falcon_h1, "bytes", False)


def tiny_config(family: str, *, width: int = 32, vocabulary: int = 512) -> transformers.PretrainedConfig:
    """The configuration of a tiny model; `width` is that of `inputs_embeds` (OPT with project_in is wider inside)."""
    return _FAMILIES[family][0](width, vocabulary)


def tiny_llm(
    family: str,
    directory: str | Path,
    *,
    width: int = 32,
    vocabulary: int = 512,
    seed: int = 0,
    sentences: tuple[str, ...] = SENTENCES,
    max_shard_size: str = "1GB",
) -> Path:
    """Save a random two-block LLM of `family` (see `FAMILIES`) and its tokenizer; return the directory.

    `vocabulary` is the number of rows of the embedding table; the tokenizer has some fewer, as real ones do.
    """
    _, style, add_bos = _FAMILIES[family]
    directory = Path(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, width=width, vocabulary=vocabulary))
    model.eval().save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer = tiny_tokenizer(style, vocabulary=vocabulary - 12, add_bos=add_bos, sentences=sentences)
    tokenizer.save_pretrained(directory)
    return directory


def sharp_llm(family: str, directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A tiny LLM with large random weights: its predictions are far from uniform and hang on every input.

    changes: of its config, e.g. a sliding window.
    """
    tiny_llm(family, directory)
    generator = torch.Generator().manual_seed(seed)
    state = load_file(directory / "model.safetensors")
    for name, tensor in sorted(state.items()):
        state[name] = (tensor if tensor.ndim == 1 else 0) + 0.2 * torch.randn(tensor.shape, generator=generator)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def tiny_gguf(path: str | Path, *, width: int = 32, vocabulary: int = 512, seed: int = 0) -> Path:
    """Write a two-block Llama as a GGUF file: Q8_0 tables and matrices, byte-level tokenizer."""
    import gguf
    import numpy as np

    tokenizer = tiny_tokenizer("bytes", vocabulary=vocabulary)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // 4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 4 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    random = np.random.default_rng(seed)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for block in (f"blk.{i}" for i in range(2)):
        shapes |= {f"{block}.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"{block}.{name}": (2 * width, width) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"{block}.ffn_down": (width, 2 * width)}
        shapes |= {f"{block}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        values = random.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values + 1)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
