"""Samples that share a row of the LLM and know nothing of each other.

Resetting positions alone isolates nothing: attention needs the samples' borders too. How they reach it depends on the
back end:

    blocks      every sample's attention is computed apart, samples of like length together; with torch's own sdpa or,
                of short samples in half precision on a CPU, with what is faster there (`short_attention`).
                No mask of the whole row exists: time and memory grow with the samples' lengths, not with the row's.
    varlen      torch.nn.attention.varlen, on a GPU
    sdpa, eager, flex_attention, flash_attention_2, _3, _4
                transformers' own, which find the borders where positions begin anew; there must be no mask and no cache

Whether a family is isolated is measured when training begins (`isolate`), not looked up: one that mixes words by other
means than attention is refused.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vpgtrans.errors import RecipeError
from vpgtrans.llm import LanguageModel, word_ids
from vpgtrans.segments import Segments
from vpgtrans.short_attention import is_short, short_attention

Backend = Literal[
    "blocks", "varlen", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
]
POSITION_AXES = (1, 4, 3)
"""Layouts of positions, by their leading axes: [B, L]; [4, B, L] and [3, B, L] (text, time, row, column): Qwen-VL."""
MANY = 1 << 30
"""More tokens than any sample has."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Between logits in a row and alone; elsewhere `_COARSE`, since other shapes round otherwise. In bf16 that comes to
.02 to .03 for real models, mixing samples to .5 and more."""
_COARSE = 0.1


# --- attention ----------------------------------------------------------------------------------------

BLOCKS, VARLEN, WRITING = "vpgtrans_blocks", "vpgtrans_varlen", "vpgtrans_writing"
"""Names in transformers' register. It makes no mask for the first two."""


@torch.compiler.disable
def _blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, H, L, d], key and value [B, H', L, d] -> [B, L, H, d], each sample by itself."""
    segments = _checked(segments, query, options)
    heads = query.shape[1] // key.shape[1]
    flat = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]  # [B · L, H, d]
    found: list[Tensor] = []
    for group in segments.groups:
        q, k, v = (each[group.index].transpose(1, 2) for each in flat)  # [k, H, l, d]
        one: Tensor
        if group.images is None and not dropout and is_short(q):
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            one = short_attention(q, k, v, scale=scale, window=sliding_window)
        else:
            if heads > 1:
                k, v = k.repeat_interleave(heads, dim=1), v.repeat_interleave(heads, dim=1)
            mask = group.mask(sliding_window)
            one = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        found.append(one.transpose(1, 2).flatten(0, 1))
    if not segments.whole:
        found.append(torch.zeros_like(found[0][:1]))
    return torch.cat(found)[segments.back].view(*segments.shape, *found[0].shape[1:]), None


@torch.compiler.disable
def _varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `_blocks`, of samples in one row, by torch's kernel for ragged batches; it has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    segments = _checked(segments, query, options)
    if dropout:
        options |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return _blocks(module, query, key, value, attention_mask, segments=segments, **options)
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    longest = max(segments.lengths)
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    found: Any = varlen_attn(
        q,
        k,
        v,
        segments.borders,
        segments.borders,
        longest,
        longest,
        scale=scaling,
        window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return found[None], None


def _writing(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """While text is written: the question by `_blocks`, every later word by transformers' own sdpa."""
    if segments is not None and query.shape[2] == segments.shape[1] == key.shape[2]:
        return _blocks(module, query, key, value, None, segments=segments, **options)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(BLOCKS, _blocks)
AttentionInterface.register(VARLEN, _varlen)
AttentionInterface.register(WRITING, _writing)
AttentionMaskInterface.register(WRITING, sdpa_mask)

Seen = list[tuple[int, int | None]]
"""Index of a layer, and the window of its attention."""


def _looking(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    seen: Seen | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """No attention: notes what a layer asks of it."""
    if seen is not None:
        seen.append((getattr(module, "layer_idx", len(seen)), sliding_window))
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None


LOOKING = "vpgtrans_looking"
AttentionInterface.register(LOOKING, _looking)

_REGISTERED: dict[str, str] = {"blocks": BLOCKS, "varlen": VARLEN}
_BEYOND = ("softcap", "s_aux", "position_bias")
"""What some families' attention does besides, and `_blocks` does not."""


class _Unsuited(Exception):
    """This attention is none that `_blocks` could stand for."""


def _checked(segments: Segments | None, query: Tensor, options: dict[str, Any]) -> Segments:
    if segments is None or (query.shape[0], query.shape[2]) != segments.shape:
        raise _Unsuited("the borders of samples don't reach its attention")
    if more := [name for name in _BEYOND if options.get(name) is not None]:
        raise _Unsuited(f"its attention has {', '.join(more)}")
    if options.get("is_causal") is False:
        raise _Unsuited("its attention is not causal")
    return segments


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Within the block the LLM's attention is what `transformers` knows by that name.

    Gradient checkpoints that are made within it are recomputed with it too: that happens in the backward pass, after
    the block.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
                stack.enter_context(_replaced(module, "_gradient_checkpointing_func", partial(_again, model, name)))
        stack.enter_context(_replaced(model.config.get_text_config(), "_attn_implementation", lambda _: name))
        yield


def attention_as_now(model: Any) -> AbstractContextManager[None]:
    """A block within which the LLM's attention is what it is now, whenever it is entered."""
    name = model.config.get_text_config()._attn_implementation
    return _replaced(model.config.get_text_config(), "_attn_implementation", lambda _: name)


@contextmanager
def _replaced(owner: Any, attribute: str, change: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(owner, attribute)
    setattr(owner, attribute, change(before))
    try:
        yield
    finally:
        setattr(owner, attribute, before)


def _again(model: Any, name: str, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Of what checkpoints a layer: the same, with this attention whenever the layer runs."""

    def under(layer: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with _replaced(model.config.get_text_config(), "_attn_implementation", lambda _: name):
            return layer(*arguments, **named)

    return lambda layer, *arguments, **named: checkpoint(partial(under, layer), *arguments, **named)


@contextmanager
def writing(model: Any, segments: Segments) -> Iterator[None]:
    """Within the block `model.generate` reads its question [B, L] as segments, whose images see in both directions."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # what peft's `generate` calls

    several = segments

    def add(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal several
        question = named.get("inputs_embeds")
        if question is not None and len(question) != several.shape[0]:  # several beams or answers of each
            several = segments.repeated(len(question) // segments.shape[0])
        return arguments, named | {"segments": several}

    handle = inner.register_forward_pre_hook(add, with_kwargs=True)  # `generate` takes no names that it doesn't know
    try:
        with attention(model, WRITING):
            yield
    finally:
        handle.remove()


# --- choosing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Isolation:
    """How samples in a row are kept apart in one LLM."""

    backend: Backend
    axes: int = 1
    """Leading axes of the positions that this family takes, see `POSITION_AXES`."""

    @property
    def maskless(self) -> bool:
        """Whether time and memory grow with the samples' lengths, not with the square of the row's."""
        return self.backend in _REGISTERED or self.backend.startswith("flash")

    def run(self, model: Any, embeddings: Tensor, segments: Segments, **options: Any) -> Any:
        """The LLM's output on embeddings [B, L, d] of samples that don't see each other."""
        positions = segments.positions
        arguments: dict[str, Any] = {
            "inputs_embeds": embeddings,
            "position_ids": positions if self.axes == 1 else positions.expand(self.axes, -1, -1),
            "use_cache": False,
            **options,
        }
        if self.backend in _REGISTERED:
            with attention(model, _REGISTERED[self.backend]):
                return model(**arguments, segments=segments)
        if self.backend.startswith("flash"):
            longest = max(segments.lengths)
            arguments |= {"cu_seq_lens_q": segments.borders, "cu_seq_lens_k": segments.borders}
            arguments |= {"max_length_q": longest, "max_length_k": longest}
        with attention(model, self.backend):
            return model(**arguments)


def isolate(
    llm: LanguageModel,
    wanted: Backend | Literal["auto"] = "auto",
    *,
    longest: int | None = None,
    both_ways: bool = False,
) -> Isolation:
    """The back end that keeps samples of at most `longest` tokens (None: any) apart in an LLM, measured on some words.

    `auto` is varlen on a GPU in half precision and blocks elsewhere; then whatever else of transformers isolates.

    Args:
        both_ways: whether an image's visual tokens see each other in both directions, which `blocks` alone can.

    Raises:
        RecipeError: the back end is not there; or no layout of positions isolates samples, so that packing would train
            something else than the samples.
    """
    if longest is not None:
        _check_rotary(llm, longest)
    if both_ways and wanted not in ("auto", "blocks"):
        raise RecipeError(
            f"trainer.attention: {wanted} knows no images that see in both directions (prompt.image_attention); right "
            "would be auto or blocks"
        )
    candidates: Sequence[Backend] = _candidates(llm.model) if wanted == "auto" else [wanted]
    if both_ways:
        candidates = ["blocks"]
    with in_eval_mode(llm.model):
        return _measured(llm, candidates, longest=longest, both_ways=both_ways)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block nothing is dropped at random, and no random number is drawn."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _measured(llm: LanguageModel, candidates: Sequence[Backend], *, longest: int | None, both_ways: bool) -> Isolation:
    """The first of the back ends that isolates, see `isolate`."""
    problems: list[str] = []
    measured: list[str] = []
    for backend in candidates:
        if problem := _missing(backend, llm.model):
            raise RecipeError(f"trainer.attention: {backend} {problem}; right would be auto, blocks or sdpa")
        for axes in POSITION_AXES:
            found = Isolation(backend, axes)
            try:
                if backend in _REGISTERED:
                    _check_windows(llm, longest or MANY)
                difference, leak = isolation_error(llm, found)
            except Exception as error:  # a family raises what it likes at what it does not know
                problems.append(
                    f"{backend}: {error if isinstance(error, _Unsuited) else repr(error)}".partition("\n")[0]
                )
                continue
            if leak == 0 and difference < TOLERANCE.get(llm.model.dtype, _COARSE):
                return found
            measured.append(
                f"{backend}: a neighbour changes a sample's logits by {leak:.2g} of their deviation, and sharing a row "
                f"by {difference:.2g}"
            )
    why = (measured + problems)[0]
    raise RecipeError(
        f"{llm.reference}: samples of {llm.fingerprint.architecture} can't be isolated in one row ({why}), so packing "
        "would mix them; right would be to leave out data.packing"
        + (" and prompt.image_attention: bidirectional" if both_ways else "")
    )


@torch.no_grad()
def isolation_error(llm: LanguageModel, isolation: Isolation) -> tuple[float, float]:
    """Over the logits' deviation: how much samples in a row differ from the samples alone (root mean square), and at
    most from themselves when all words of the samples around them are others."""
    words = word_ids(llm.tokenizer, llm.fingerprint.vocabulary)
    words = words[10:64].to(llm.model.get_input_embeddings().weight.device)
    samples = [words[:7], words[7:12], words[12:21]]
    others = [words[21:28], samples[1], words[30:39]]
    segments = Segments.in_a_row([len(sample) for sample in samples], device=words.device)
    together, beside = (
        isolation.run(llm.model, llm.embed(torch.cat(row)[None]), segments).logits[0].float()
        for row in (samples, others)
    )
    alone = torch.cat(
        [llm.model(inputs_embeds=llm.embed(sample[None]), use_cache=False).logits[0] for sample in samples]
    )
    scale = alone.float().std()
    middle = slice(7, 12)
    difference = (together - alone.float()).square().mean().sqrt() / scale
    leak = (together[middle] - beside[middle]).abs().max() / scale
    return difference.item(), leak.item()


def _candidates(model: Any) -> list[Backend]:
    if _missing("varlen", model) is None:
        return ["varlen", "blocks", "sdpa", "eager"]
    return ["blocks", "sdpa", "eager"]


def missing_here(backend: Backend | Literal["auto"]) -> str | None:
    """Why a back end can't run on this machine, whatever the LLM."""
    if backend in ("auto", "blocks", "sdpa", "eager"):
        return None
    return _not_installed(backend) or (None if torch.cuda.is_available() else "needs a GPU, and there is none")


def _missing(backend: Backend, model: Any) -> str | None:
    """Why a back end can't run this LLM here."""
    if backend in ("blocks", "sdpa", "eager"):
        return None
    if problem := _not_installed(backend):
        return problem
    device = model.get_input_embeddings().weight.device
    if device.type != "cuda":
        return f"needs a GPU (the LLM is on {device.type})"
    if backend != "flex_attention" and model.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16 (the LLM is in {str(model.dtype).removeprefix('torch.')})"
    return None


def _not_installed(backend: str) -> str | None:
    if backend == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"needs torch 2.10 or later (this is {torch.__version__})"
    if backend.startswith("flash"):
        from transformers.utils import import_utils

        test = getattr(import_utils, f"is_flash_attn_{backend[-1]}_available", None)
        if test is None or not test():
            return f"needs flash-attn {backend[-1]}, which is not installed"
    return None


def _check_rotary(llm: LanguageModel, longest: int) -> None:
    """Refuse positions that turn by another angle as soon as one sample of the row is long."""
    config = llm.model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    per_layer = [values for values in rotary.values() if isinstance(values, dict)]
    for values in per_layer or [rotary]:
        kind = values.get("rope_type", "default")
        if kind != "longrope" and "dynamic" not in kind:
            continue
        limit = values.get("original_max_position_embeddings") or config.max_position_embeddings
        if longest > limit:
            raise RecipeError(
                f"data.packing.max_tokens: {llm.reference} turns its positions otherwise ({kind}) as soon as a sample "
                f"of the row is longer than {limit:,} tokens, so that a long one would change its neighbours; right "
                f"would be at most {limit}, here or in prompt.max_tokens"
            )


@torch.no_grad()
def _check_windows(llm: LanguageModel, longest: int) -> None:
    """Raises _Unsuited where a layer's window does not reach our attention: in short samples nobody would notice."""
    config = llm.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise _Unsuited(f"it has layers of {', '.join(unknown)}")
    seen: Seen = []
    words = word_ids(llm.tokenizer, llm.fingerprint.vocabulary)[None, 10:14]
    with attention(llm.model, LOOKING):
        embeddings = llm.embed(words.to(llm.model.get_input_embeddings().weight.device))
        llm.model(inputs_embeds=embeddings, use_cache=False, seen=seen)
    if len(seen) != config.num_hidden_layers:
        raise _Unsuited("its attention is not that of transformers' register")
    window = getattr(config, "sliding_window", None)
    for layer, heard in seen:
        slides = kinds[layer] == "sliding_attention" if kinds else window is not None
        right = window if slides else None
        if heard != right and min(heard or longest, right or longest) < longest:
            raise _Unsuited(f"layer {layer} has a window of {right}, and asks for {heard}")
