"""A converter trained through the target LLM: random lists of shared words must be repeatable from converted words.

Not in the package: it needs minutes and the whole target LLM where the closed forms need a second and two tables.

    bos LIST newline LIST newline newline converted(list) newline list      the loss is on the last list

It starts from a closed form and moves in whitened source coordinates, where one learning rate fits all directions.
"""

import logging
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpgtrans.transfer.converters import AffineConverter, Moments, Rows
from vpgtrans.transfer.pairing import TokenPairs

log = logging.getLogger("converters")


def functional_fit(
    start: AffineConverter,
    found: Moments,
    rows: tuple[Rows, Rows],
    pairs: TokenPairs,
    llm: Any,
    *,
    steps: int,
    batch: int = 8,
    words: int = 12,
    lr: float = 1e-3,
) -> AffineConverter:
    """Adam on a correction of `start`; `lr` is in units of the target words' RMS, decayed by a cosine."""
    begin = time.perf_counter()
    X, Y = rows
    size = len(found.G)
    moment = found.G + 1e-3 * found.G.trace() / size * torch.eye(size, dtype=torch.float64)
    whiten = torch.linalg.inv(torch.linalg.cholesky(moment)).T.float()
    mean, scale = found.mean_x.float(), math.sqrt(found.H.trace().item() / len(found.H))
    D = torch.zeros(size, len(found.H), requires_grad=True)
    offset = torch.zeros(len(found.H), requires_grad=True)
    optimizer = torch.optim.Adam([D, offset], lr=lr * scale)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 5) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    whole = torch.tensor([text[:1] == b" " and text[1:].isalpha() for text in pairs.texts]).nonzero().flatten()[:20_000]
    generator = torch.Generator().manual_seed(0)
    tokenizer = llm.tokenizer
    dtype = llm.model.get_input_embeddings().weight.dtype

    def fixed(text: str) -> Tensor:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        return llm.embed(ids).expand(batch, -1, -1)

    bos = llm.embed(torch.tensor([tokenizer.bos_token_id])).expand(batch, -1, -1)
    line, gap = fixed("\n"), fixed("\n\n")
    losses = []
    for step in range(steps):
        drawn = whole[torch.randint(len(whole), (batch, words + words // 2), generator=generator)]
        example, asked = drawn[:, words:], drawn[:, :words]
        shown, wanted = llm.embed(Y.ids[example]), Y.ids[asked]
        x = X.table[X.ids[asked]].float()
        with torch.enable_grad():
            converted = start(x) + (x - mean) @ whiten @ D + offset
            parts = [bos, shown, line, shown, gap, converted.to(dtype), line, llm.embed(wanted)]
            logits = llm.model(inputs_embeds=torch.cat(parts, dim=1), use_cache=False, logits_to_keep=words + 1).logits[
                :, :-1
            ]
            loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 19:
            log.info("functional fit, step %d: loss %.3f", step + 1, sum(losses[-20:]) / 20)
    correction = whiten @ D.detach()
    return AffineConverter(
        weight=start.weight + correction.T,
        bias=start.bias + offset.detach() - mean @ correction,
        name=f"functional, {steps} steps from {start.name}",
        seconds=time.perf_counter() - begin,
    )
