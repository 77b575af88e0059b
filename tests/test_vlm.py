"""The splice against stock `transformers` models: losses, positions, padding, greedy text."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tiny import FAMILIES, sharp_llm, tiny_llm
from torch import Tensor, nn

from vpgtrans.config import (
    HuggingFaceEncoderConfig,
    ImageConfig,
    ProjectorConfig,
    PromptConfig,
    ResamplerConnectorConfig,
)
from vpgtrans.errors import DataError, TransferError
from vpgtrans.llm import LanguageModel, open_llm
from vpgtrans.projector import Projector
from vpgtrans.token_loss import After
from vpgtrans.vision import connectors, encoders
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm import VLM, Splice, after_head, head_only_at

ANSWERS = ["a cat", "two clocks on the wall show half past eleven", "x", "flag: Japan 🙂"]
TEMPLATES = ["<image>\n", "What is in the picture?<image> It is", "<image>"]


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory) -> Path:
    return sharp_llm(request.param, tmp_path_factory.mktemp(request.param) / "llm")


def random_prompts(llm: LanguageModel, count: int = len(ANSWERS), *, tokens: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return llm.word_rms * torch.randn(count, tokens, llm.width, generator=generator)


def reference_nll(path: Path, prompts: Tensor, answers: list[str], template: str, *, end: bool = True) -> list[Tensor]:
    """NLL of each answer token, sample by sample, unpadded, from the stock model's full logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    before, after = template.split("<image>")
    space = {"<image>\n": "", "What is in the picture?<image> It is": " ", "<image>": ""}[template]
    result = []
    for prompt, answer in zip(prompts, answers, strict=True):
        first = [tokenizer.bos_token_id, *tokenizer.encode(before, add_special_tokens=False)]
        middle = tokenizer.encode(after, add_special_tokens=False)
        target = tokenizer.encode(space + answer, add_special_tokens=False) + [tokenizer.eos_token_id] * end
        table = model.get_input_embeddings()
        with torch.no_grad():
            words = [table(torch.tensor(ids, dtype=torch.long)) for ids in (first, middle, target)]
            logits = model(inputs_embeds=torch.cat([words[0], prompt, words[1], words[2]])[None]).logits[0].double()
        start = len(first) + len(prompt) + len(middle)
        nll = [
            torch.log(torch.exp(logits[position - 1]).sum()) - logits[position - 1, token]
            for position, token in enumerate(target, start=start)
        ]
        result.append(torch.stack(nll).float())
    return result


@pytest.mark.parametrize("template", TEMPLATES)
def test_token_nll_equals_the_stock_models(path, template):
    llm = open_llm(str(path), dtype=torch.float32)
    prompts = random_prompts(llm)
    expected = reference_nll(path, prompts, ANSWERS, template)
    nll, rows = Splice(llm, PromptConfig(template=template), visual_tokens=3).token_nll(prompts, ANSWERS)
    assert rows.tolist() == [row for row, values in enumerate(expected) for _ in values]
    torch.testing.assert_close(nll, torch.cat(expected), atol=1e-4, rtol=0)
    # the prompts matter, or all of the above could hold without them
    other, _ = Splice(llm, PromptConfig(template=template), visual_tokens=3).token_nll(prompts.flip(0), ANSWERS)
    assert (other - nll).abs().max() > 0.1


def test_padding_changes_nothing(path):
    llm = open_llm(str(path), dtype=torch.float32)
    splice, prompts = Splice(llm, PromptConfig(), visual_tokens=3), random_prompts(llm)
    together, rows = splice.token_nll(prompts, ANSWERS)
    for row, answer in enumerate(ANSWERS):
        alone, _ = splice.token_nll(prompts[row : row + 1], [answer])
        assert len(alone) == splice.prompter.encode(answer).answers
        torch.testing.assert_close(together[rows == row], alone, atol=2e-5, rtol=0)


def test_caption_nll_sums_tokens_whatever_the_batch_size(path):
    llm = open_llm(str(path), dtype=torch.float32)
    splice, prompts = Splice(llm, PromptConfig(end=False), visual_tokens=3), random_prompts(llm)
    expected = reference_nll(path, prompts, ANSWERS, "<image>\n", end=False)
    for batch_size in (1, 3, 32):
        sums, counts = splice.caption_nll(prompts, ANSWERS, batch_size=batch_size)
        torch.testing.assert_close(sums, torch.stack([values.sum() for values in expected]), atol=2e-4, rtol=0)
        assert counts.tolist() == [len(values) for values in expected]


def test_gradients_reach_the_prompts(path):
    llm = open_llm(str(path), dtype=torch.float32)
    prompts = random_prompts(llm).requires_grad_()
    Splice(llm, PromptConfig(), visual_tokens=3).token_nll(prompts, ANSWERS)[0].sum().backward()
    assert prompts.grad is not None
    assert (prompts.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert all(parameter.grad is None for parameter in llm.model.parameters())


def test_the_head_runs_at_answer_positions_only(path):
    llm = open_llm(str(path), dtype=torch.float32)
    splice = Splice(llm, PromptConfig(), visual_tokens=3)
    seen: list[torch.Size] = []
    head = llm.model.get_output_embeddings()
    head.weight.requires_grad_(True)  # of a frozen one there are no logits
    before = dict(head._forward_pre_hooks)
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    nll, _ = splice.token_nll(random_prompts(llm), ANSWERS)
    handle.remove()
    tokens = sum(splice.prompter.encode(answer).answers for answer in ANSWERS)
    assert seen == [torch.Size([1, tokens, head.out_features])]
    assert len(nll) == tokens
    assert head._forward_pre_hooks == before  # nothing stays behind


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_a_frozen_head_gives_no_logits_a_trained_one_does_and_the_loss_is_the_same(path, trained):
    llm = open_llm(str(path), dtype=torch.float32)
    prompts = random_prompts(llm)
    splice = Splice(llm, PromptConfig(), visual_tokens=3)
    head = llm.model.get_output_embeddings()
    seen: list[int] = []
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    plain, other = (each.clone().requires_grad_() for each in (prompts, prompts))
    head.weight.requires_grad_(True)
    expected, _ = splice.token_nll(plain, ANSWERS)
    head.weight.requires_grad_(trained)
    found, _ = splice.token_nll(other, ANSWERS)
    handle.remove()
    assert seen[0] == head.out_features
    assert seen[-1] == (head.out_features if trained else 1)
    torch.testing.assert_close(found, expected)
    for nll in (found, expected):
        nll.sum().backward()
    torch.testing.assert_close(other.grad, plain.grad)
    assert "forward" not in vars(head)


@pytest.mark.parametrize(
    ("family", "changes", "after"),
    [
        ("llama", {}, After()),
        ("gemma3", {}, After()),
        ("gemma3", {"final_logit_softcapping": 0.3}, After(cap=0.3)),
        ("granite", {"logits_scaling": 8.0}, After(scale=1 / 8)),
    ],
)
def test_what_a_family_does_after_its_head_is_measured(tmp_path, family, changes, after):
    llm = open_llm(str(sharp_llm(family, tmp_path / "llm", **changes)))
    assert after_head(llm) == after


def test_a_head_whose_logits_become_something_else_is_run_as_it_is(path, monkeypatch):
    llm = open_llm(str(path), dtype=torch.float32)
    forward = type(llm.model).forward

    def masked(self, *arguments, **named):
        output = forward(self, *arguments, **named)
        output.logits = output.logits - 0.1 * torch.arange(output.logits.shape[-1])
        return output

    plain, _ = Splice(llm, PromptConfig(), visual_tokens=3).token_nll(prompts := random_prompts(llm), ANSWERS)
    monkeypatch.setattr(type(llm.model), "forward", masked)
    assert after_head(llm) is None
    nll, _ = Splice(llm, PromptConfig(), visual_tokens=3).token_nll(prompts, ANSWERS)
    assert not torch.allclose(nll, plain)


def test_head_only_at_is_undone_after_an_error(path):
    llm = open_llm(str(path), dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(RuntimeError, match="inside"), head_only_at(llm.model, torch.ones(1, 3, dtype=torch.bool)):
        raise RuntimeError("inside")
    assert llm.model(input_ids=ids).logits.shape[:2] == (1, 3)


@pytest.mark.parametrize(("family", "field", "value"), [("gemma3", "final_logit_softcapping", 0.3),
                                                        ("granite", "logits_scaling", 7.0)])  # fmt: skip
def test_what_a_model_does_to_its_logits_is_kept(tmp_path, family, field, value):
    path = sharp_llm(family, tmp_path / "llm")
    plain, _ = Splice(llm := open_llm(str(path), dtype=torch.float32), PromptConfig(), visual_tokens=3).token_nll(
        prompts := random_prompts(llm), ANSWERS
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {field: value}))
    changed = open_llm(str(path), dtype=torch.float32)
    nll, _ = Splice(changed, PromptConfig(), visual_tokens=3).token_nll(prompts, ANSWERS)
    torch.testing.assert_close(nll, torch.cat(reference_nll(path, prompts, ANSWERS, "<image>\n")), atol=1e-4, rtol=0)
    assert (nll - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("template", "apart"),
    [("Name:<image>", ""), ("<image>\n", ""), ("<image> ", ""), ("<image>\nName:", " "), ("<image> is a", " ")],
)
def test_a_space_stands_before_the_answer_where_the_template_ends_in_a_word(tmp_path, template, apart):
    llm = open_llm(str(sharp_llm("qwen2", tmp_path / "llm")), dtype=torch.float32)
    splice = Splice(llm, PromptConfig(template=template), visual_tokens=3)
    batch = splice.join(random_prompts(llm, 1), ["a red sofa"])
    tokenizer = llm.tokenizer
    assert batch.targets.tolist() == [*tokenizer.encode(apart + "a red sofa"), tokenizer.eos_token_id]
    assert tokenizer.decode(batch.targets[:-1]) == apart + "a red sofa"


def embedded_template(splice: Splice, template: str, prompts: Tensor) -> Tensor:
    return splice._embed(torch.from_numpy(splice.prompter.template(template))[None], prompts)


def with_dummy_prefix(directory: Path) -> Path:
    """Make the tokenizer put `▁` before every text, as Llama 2's and Mistral's do."""
    state = json.loads((directory / "tokenizer.json").read_text())
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, state["normalizer"]],
    }
    (directory / "tokenizer.json").write_text(json.dumps(state))
    return directory


@pytest.mark.parametrize("template", ["See:<image>\nIt is", "<image>", "<image>x", "See<image>\n"])
def test_no_spurious_space_stands_inside_a_sentencepiece_prompt(tmp_path, template):
    llm = open_llm(str(with_dummy_prefix(sharp_llm("mistral", tmp_path / "llm"))), dtype=torch.float32)
    tokenizer = llm.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("\n", add_special_tokens=False))[0] == "▁"
    splice = Splice(llm, PromptConfig(template=template), visual_tokens=3)
    prompts = random_prompts(llm, 1)
    before, after = template.split("<image>")
    apart = "" if template.endswith(("\n", "<image>")) else " "
    # a comma merges with nothing here: what stands behind it is tokenised as inside a text
    head = tokenizer.encode(",", add_special_tokens=False)
    inside = [tokenizer.encode("," + text, add_special_tokens=False) for text in (after, apart + "a red sofa")]
    assert all(ids[: len(head)] == head for ids in inside)
    middle, answer = (ids[len(head) :] for ids in inside)
    assert splice.join(prompts, ["a red sofa"]).targets.tolist() == [*answer, tokenizer.eos_token_id]
    first = [tokenizer.bos_token_id, *tokenizer.encode(before, add_special_tokens=False)]
    embedded = [llm.embed(torch.tensor([ids], dtype=torch.long)) for ids in (first, middle)]
    torch.testing.assert_close(
        embedded_template(splice, template, prompts),
        torch.cat([embedded[0], prompts, embedded[1]], dim=1),
        atol=0,
        rtol=0,
    )


def test_a_template_that_begins_with_the_bos_token_gets_no_second_one(tmp_path):
    llm = open_llm(str(sharp_llm("llama", tmp_path / "llm")), dtype=torch.float32)
    splice, prompts = Splice(llm, PromptConfig(), visual_tokens=3), random_prompts(llm, 1)
    plain, given = (embedded_template(splice, template, prompts) for template in ("See:<image>", "<s>See:<image>"))
    torch.testing.assert_close(given, plain, atol=0, rtol=0)


def tiny_vlm(path: Path, *, prompt: PromptConfig, dtype: torch.dtype = torch.float32) -> VLM:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    torch.manual_seed(3)
    encoder = encoders.build(
        HuggingFaceEncoderConfig(architecture=vision.to_dict(), image=ImageConfig(size=28)), load_weights=False
    )
    connector = connectors.build(
        ResamplerConnectorConfig(queries=3, width=16, layers=1, heads=2, hidden=32), width_in=16, patches=5
    )
    llm = open_llm(str(path), dtype=dtype)
    projector = Projector(ProjectorConfig(), 16, llm.width, word_rms=llm.word_rms)
    return VLM(VPG(encoder, connector), projector, llm, prompt=prompt).eval()


IMAGES = [Image.new("RGB", (30, 40), color) for color in ("red", "green", "white")]


def greedy(vlm: VLM, image: Image.Image, template: str, steps: int) -> list[int]:
    """Token after token by the argmax of a full pass."""
    model, tokenizer = vlm.llm.model, vlm.llm.tokenizer
    before, after = template.split("<image>")
    table = model.get_input_embeddings()
    with torch.no_grad():
        prompt = vlm.projector(vlm.vpg(vlm.vpg.transform(image)[None]))[0]
        first = table(torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(before, add_special_tokens=False)]))
        last = table(torch.tensor(tokenizer.encode(after, add_special_tokens=False), dtype=torch.long))
        sequence, written = torch.cat([first, prompt, last]), []
        for _ in range(steps):
            written.append(int(model(inputs_embeds=sequence[None]).logits[0, -1].argmax()))
            sequence = torch.cat([sequence, table(torch.tensor(written[-1:]))])
    return written


def test_generate_equals_stepwise_argmax(path):
    vlm = tiny_vlm(path, prompt=PromptConfig(template="See:<image>\nIt is"))
    tokenizer = vlm.llm.tokenizer
    for prompt, template in [
        (None, "See:<image>\nIt is"),
        ("What?", "<image>Question: What?\nAnswer:"),
        ("Q <image>:", "Q <image>:"),
    ]:
        written = [greedy(vlm, image, template, 6) for image in IMAGES]
        ended = [ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids for ids in written]
        expected = [text.strip() for text in tokenizer.batch_decode(ended, skip_special_tokens=True)]
        assert vlm.generate(IMAGES, prompt, max_new_tokens=6) == expected
        assert vlm.generate(IMAGES, prompt, max_new_tokens=6, batch_size=1) == expected


def test_generation_of_a_chat_ends_with_its_turn_too(tmp_path, monkeypatch):
    # as Gemma's: an answer ends with a token that is not the tokenizer's end of a text
    llm = open_llm(str(tiny_llm("gemma3", tmp_path / "llm")), dtype=torch.float32)
    llm.tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    llm.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] }}<end_of_turn>{% endfor %}"
    )
    asked = {}

    def generate(**options):
        asked.update(options)
        return torch.zeros(1, 1, dtype=torch.long)

    monkeypatch.setattr(llm.model, "generate", generate)
    splice = Splice(llm, PromptConfig(), visual_tokens=3)
    splice.write(random_prompts(llm, 1), [splice.prompter.template("<image>")], max_new_tokens=2)
    ends = [llm.tokenizer.eos_token_id, llm.tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    assert asked["eos_token_id"] == ends


def test_generation_ends_with_the_end_token(tmp_path):
    vlm = tiny_vlm(sharp_llm("opt", tmp_path / "llm", seed=2), prompt=PromptConfig())
    written = greedy(vlm, IMAGES[0], "<image>\n", 8)
    position = next(place for place in range(1, 8) if written[place] not in written[:place])
    expected = vlm.llm.tokenizer.decode(written[:position], skip_special_tokens=True).strip()
    vlm.llm.tokenizer.eos_token = vlm.llm.tokenizer.convert_ids_to_tokens(written[position])
    assert vlm.generate(IMAGES[:1], max_new_tokens=8) == [expected]


def test_images_may_be_paths_and_unreadable_ones_are_named(tmp_path):
    vlm = tiny_vlm(sharp_llm("llama", tmp_path / "llm"), prompt=PromptConfig())
    IMAGES[0].save(tmp_path / "red.png")
    assert vlm.generate([tmp_path / "red.png", str(tmp_path / "red.png")]) == vlm.generate(IMAGES[:1]) * 2
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png"):
        vlm.generate([tmp_path / "bad.png"])


def test_parts_that_do_not_fit_are_refused(tmp_path):
    vlm = tiny_vlm(sharp_llm("llama", tmp_path / "llm"), prompt=PromptConfig())
    with pytest.raises(TransferError, match=r"width 16.*takes 12"):
        VLM(vlm.vpg, Projector(ProjectorConfig(), 12, 32), vlm.llm, prompt=vlm.prompt)
    with pytest.raises(TransferError, match=r"width 48.*embeds in 32.*vpgtrans transfer"):
        VLM(vlm.vpg, Projector(ProjectorConfig(), 16, 48), vlm.llm, prompt=vlm.prompt)


def test_a_vlm_registers_its_parts_once(tmp_path):
    vlm = tiny_vlm(sharp_llm("llama", tmp_path / "llm"), prompt=PromptConfig())
    assert isinstance(vlm, nn.Module)
    assert [name for name, _ in vlm.named_children()] == ["vpg", "projector", "language_model"]
    assert vlm.device == torch.device("cpu")
