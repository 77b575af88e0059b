"""A stage of training: what changes and what does not, batches, losses, rates, bad images, the frozen front's cache."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import (
    FINETUNE,
    WARMUP,
    Pictures,
    all_tensors,
    build_vlm,
    lines,
    make_recipe,
    mixtures,
    train,
)

from vpgtrans.data.config import PackingConfig
from vpgtrans.data.mixture import Mixture
from vpgtrans.data.packs import measure
from vpgtrans.errors import RecipeError, TrainingError
from vpgtrans.llm import block_linears
from vpgtrans.runs.directory import RunDirectory
from vpgtrans.runs.training import run_stages
from vpgtrans.training.config import TrainerConfig
from vpgtrans.training.draws import SampleDraws, pack_draws
from vpgtrans.training.features import FrozenFront
from vpgtrans.training.fit import StageRun, count_updates
from vpgtrans.training.loading import Updates, Validator
from vpgtrans.training.module import StageModule
from vpgtrans.training.objectives import CaptionObjective, WordObjective, build_objectives
from vpgtrans.training.parts import part_module, put_state, set_trainable, table, take_state
from vpgtrans.training.samples import BadSamples, Batch, Samples
from vpgtrans.vlm import VLM

SMALL = {"lr": 1e-2, "budget": {"samples": 12}, "batch_size": 4, "validate_every": 8, "augment": False}


def one_stage(**changes):
    return make_recipe([{"name": "only", "trainable": {"projector": "full"}, **SMALL, **changes}])


def module_for(vlm: VLM, stage, *, updates: int = 10) -> StageModule:
    set_trainable(vlm, stage)
    front = FrozenFront(vlm.vpg, "tokens")
    goals = build_objectives(list(stage.losses), vlm, ["a red cat"])
    return StageModule(vlm, stage, front=front, objectives=goals, updates=updates)


def texts(vlm: VLM, captions: Sequence[str]) -> Batch:
    """Captions as a batch without images."""
    return Batch([*captions], [*captions], [vlm.splice.prompter.encode(text) for text in captions], torch.empty(0))


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- frozen and trained -------------------------------------------------------------------------

TRAINED = [
    {"projector": "full"},
    {"connector": "full", "projector": "full"},
    {"encoder": "full", "projector": "full"},
    {"llm": "lora"},
    {"connector": "full", "projector": "full", "llm": "lora"},
    {"llm": "full"},
]


@pytest.mark.parametrize("trainable", TRAINED, ids=lambda trainable: "+".join(trainable))
def test_frozen_parts_keep_every_bit_and_stay_in_eval_mode(root, tmp_path, monkeypatch, trainable):
    vlm = build_vlm(root)
    recipe = one_stage(trainable=trainable, lora={"dropout": 0.1})
    frozen = [part for part in ("encoder", "connector", "projector", "llm") if part not in trainable]
    before = {part: {k: v.clone() for k, v in part_module(vlm, part).state_dict().items()} for part in [*frozen, "llm"]}
    modes: list[dict[str, set[bool]]] = []
    compute = StageModule.losses

    def losses(self, batch):
        if torch.is_grad_enabled():  # a training step, no validation
            modes.append(
                {part: {m.training for m in part_module(vlm, part).modules()} for part in recipe.stages[0].trainable}
            )
        else:
            assert not any(module.training for module in vlm.modules())
        return compute(self, batch)

    monkeypatch.setattr(StageModule, "losses", losses)
    train(vlm, recipe, tmp_path)
    assert len(modes) == 3
    for seen in modes:
        for part in frozen:
            assert seen[part] == {False}, f"{part} was in train mode"
        for part in trainable:
            assert seen[part] == {True}, f"{part} was in eval mode"
    for part in frozen:
        assert differing(before[part], part_module(vlm, part).state_dict()) == set()
    if trainable.get("llm") == "lora":
        base = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
            for name, tensor in vlm.language_model.state_dict().items()
            if "lora_" not in name
        }
        assert base.keys() == before["llm"].keys()
        assert differing(before["llm"], base) == set()
    start = all_tensors(build_vlm(root))
    changed = {part for part in trainable if part != "llm" or trainable["llm"] == "full"}
    now = all_tensors(vlm)
    names = {
        "encoder": "vpg.encoder.",
        "connector": "vpg.connector.",
        "projector": "projector.",
        "llm": "language_model.",
    }
    for part in changed:
        assert any(
            name.startswith(names[part]) for name in start if name in now and not torch.equal(start[name], now[name])
        )
    if "lora" in trainable.values():
        assert all(t.abs().max() > 0 for name, t in now.items() if "lora_B" in name)


def test_train_mode_does_not_reach_frozen_parts(root):
    vlm = build_vlm(root)
    module = module_for(vlm, one_stage(trainable={"connector": "full"}).stages[0])
    for mode in (True, False, True):
        module.train(mode)
        assert {m.training for m in vlm.vpg.connector.modules()} == {mode}
        assert not any(m.training for part in ("encoder", "projector", "llm") for m in part_module(vlm, part).modules())
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in vlm.vpg.encoder.modules())


def test_the_adapter_is_on_the_blocks_linear_layers_only_and_in_float32(root):
    vlm = build_vlm(root, dtype=torch.bfloat16)
    linears = block_linears(vlm.language_model)
    stage = one_stage(trainable={"llm": "lora"}, lora={"rank": 4}).stages[0]
    set_trainable(vlm, stage)
    adapted = [name for name, module in vlm.named_modules() if hasattr(module, "lora_A")]
    assert sorted(adapted) == sorted(f"language_model.base_model.model.{name}" for name in linears)
    for name, parameter in vlm.named_parameters():
        is_adapter = "lora_" in name
        assert parameter.requires_grad == is_adapter
        assert parameter.dtype == (
            torch.float32 if is_adapter or not name.startswith("language_model.") else torch.bfloat16
        )
    rows = {row["part"]: row for row in table(vlm, stage)}
    model = vlm.language_model.get_base_model()
    sizes = [(m.in_features, m.out_features) for m in map(model.get_submodule, linears)]
    assert rows["llm"]["trained"] == sum(4 * (width_in + width_out) for width_in, width_out in sizes)


def test_adapter_targets_can_be_chosen(root):
    vlm = build_vlm(root)
    set_trainable(vlm, one_stage(trainable={"llm": "lora"}, lora={"targets": ["q_proj"]}).stages[0])
    adapted = {name.rsplit(".", 1)[-1] for name, module in vlm.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj"}


def test_the_trainable_table(root):
    vlm = build_vlm(root)
    counts = {
        part: sum(p.numel() for p in part_module(vlm, part).parameters()) for part in ("encoder", "connector", "llm")
    }
    stage = one_stage(
        trainable={"connector": "full", "projector": "full"}, lr={"connector": 1e-3, "projector": 1e-2}
    ).stages[0]
    set_trainable(vlm, stage)
    projector = 16 * 32 + 32 + 1
    assert table(vlm, stage) == [
        {"stage": "only", "part": part, "mode": mode, "parameters": parameters, "trained": trained, "lr": rate}
        for part, mode, parameters, trained, rate in [
            ("encoder", "frozen", counts["encoder"], 0, None),
            ("connector", "full", counts["connector"], counts["connector"], 1e-3),
            ("projector", "full", projector, projector, 1e-2),
            ("llm", "frozen", counts["llm"], 0, None),
        ]
    ]


def test_state_of_the_changed_parts_comes_back(root):
    vlm = build_vlm(root)
    set_trainable(vlm, one_stage(trainable={"projector": "full", "llm": "lora"}).stages[0])
    state = take_state(vlm, {"projector": "full", "llm": "lora"})
    assert {name.split("/")[0] for name in state} == {"projector", "llm"}
    assert all("lora_" in name for name in state if name.startswith("llm/"))
    before = all_tensors(vlm)
    with torch.no_grad():
        for parameter in vlm.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert differing(before, all_tensors(vlm))
    put_state(vlm, state, {"projector": "full", "llm": "lora"}, where="here")
    assert differing(before, all_tensors(vlm)) == set()


# --- updates ------------------------------------------------------------------------------------


def test_accumulation_changes_nothing(root, tmp_path):
    ends, logs = [], []
    for size in (None, 1, 2):
        vlm = build_vlm(root, dropout=0.0)
        recipe = one_stage(trainable={"connector": "full", "projector": "full", "llm": "lora"}, micro_batch_size=size,
                           losses={"caption": 1.0, "words": 0.3})  # fmt: skip
        results = train(vlm, recipe, tmp_path / str(size))
        assert results[0].updates == 3
        ends.append(all_tensors(vlm))
        logs.append([line["loss"] for line in lines(tmp_path / str(size) / "metrics.jsonl") if "loss" in line])
    assert len(logs[0]) == 3
    for end, log in zip(ends[1:], logs[1:], strict=True):
        assert log == pytest.approx(logs[0], rel=1e-5)
        for name, tensor in ends[0].items():
            torch.testing.assert_close(end[name], tensor, atol=2e-5, rtol=1e-4)


def test_the_logged_loss_is_the_mean_over_the_batchs_answer_tokens(root, tmp_path):
    vlm = build_vlm(root)
    recipe = one_stage(lr=1e-3)
    mixture = mixtures()["train"]
    rows = [int(row) for row in mixture.draws(0, 0, 4)]
    front = FrozenFront(vlm.vpg.eval(), "tokens")
    with torch.no_grad():
        prompts = vlm.prompts_from(front([mixture.image(row) for row in rows]).float())
        nll, _ = vlm.splice.token_nll(prompts, [mixture.caption(row) for row in rows])
    train(vlm, recipe, tmp_path)
    first = next(line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line)
    assert first["loss"] == pytest.approx(nll.mean().item(), rel=1e-4)
    assert first["text_tokens"] == len(nll)
    assert (first["update"], first["samples"]) == (1, 4)


def test_the_word_objective_is_smallest_on_the_captions_words(root):
    vlm = build_vlm(root)
    captions = ["a red cat", "a clock on the wall"]
    goal = WordObjective(vlm, captions)
    tokens = [vlm.llm.tokenizer.encode(" " + caption, add_special_tokens=False) for caption in captions]
    ids = [[*own[:2], own[-1]] for own in tokens]  # of three prompts two are for the beginning, one for the end
    right = vlm.llm.embed(torch.tensor(ids))
    batch = texts(vlm, captions)
    at_words, count = goal(vlm, right, batch)
    assert count == 6
    assert at_words < goal(vlm, right.flip(1), batch)[0]
    assert at_words < goal(vlm, right + 0.3 * torch.randn_like(right) * right.std(), batch)[0]
    halves = [goal(vlm, right[row : row + 1], batch.part(row, row + 1))[0] for row in range(2)]
    torch.testing.assert_close(sum(halves), at_words)


def test_words_lie_at_both_ends_of_the_prompts(root):
    vlm = build_vlm(root)
    caption = "one two three four five six seven eight nine"
    goal = WordObjective(vlm, [caption])
    tokens = vlm.llm.tokenizer.encode(" " + caption, add_special_tokens=False)
    row = {token: goal.rows[token] for token in tokens}
    long = [row[token] for token in [*tokens[:3], *tokens[-2:]]]
    assert goal._targets([caption], 5)[0].tolist() == [long]

    short = vlm.llm.tokenizer.decode(tokens[:2]).strip()
    pair = [goal.rows[token] for token in vlm.llm.tokenizer.encode(" " + short, add_special_tokens=False)]
    assert len(pair) == 2
    blank = goal.rows[goal.filler]
    targets, weights = goal._targets([short], 8)
    assert targets.tolist() == [[*pair, blank, blank, blank, blank, *pair]]
    assert weights.tolist() == [pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 1, 1])]


def test_biases_and_norms_do_not_decay(root):
    vlm = build_vlm(root)
    stage = one_stage(trainable={"connector": "full", "projector": "full"}, weight_decay=0.1,
                      lr={"connector": 1e-4, "projector": 1e-3}).stages[0]  # fmt: skip
    groups = module_for(vlm, stage).configure_optimizers().param_groups
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [
        (1e-4, 0.0), (1e-4, 0.1), (1e-3, 0.0), (1e-3, 0.1),
    ]  # fmt: skip
    for group in groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in vlm.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1.0] * 8),
        ("constant", 0.5, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * update / 8)) / 2 for update in range(8)]),
        ("cosine", 0.25, [0.5, 1, *((1 + math.cos(math.pi * update / 6)) / 2 for update in range(6))]),
        ("cosine", 1.0, [(update + 1) / 8 for update in range(8)]),
    ],
)
def test_the_rate_over_a_stage(root, schedule, warmup, expected):
    stage = one_stage(lr_schedule=schedule, warmup_fraction=warmup).stages[0]
    module = module_for(build_vlm(root), stage, updates=8)
    assert [module.rate_factor(update) for update in range(8)] == pytest.approx(expected)


def test_the_rate_reaches_the_optimizer(root, tmp_path):
    train(build_vlm(root), one_stage(lr_schedule="constant", warmup_fraction=0.6, lr=0.01), tmp_path)
    rates = [line["lr"] for line in lines(tmp_path / "metrics.jsonl") if "lr" in line]
    assert rates == pytest.approx([0.005, 0.01, 0.01])


def test_clipping_bounds_an_update(root, tmp_path):
    """Without momentum's memory: the first Adam update does not depend on the gradient's length, so look at norms."""
    logs = {}
    for clip in (None, 1e-3):
        vlm = build_vlm(root)
        seen: list[float] = []
        step = torch.optim.AdamW.step

        def spy(self, *arguments, seen=seen, step=step, **options):
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            seen.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])).item())
            return step(self, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", spy)
            train(vlm, one_stage(clip=clip), tmp_path / str(clip))
        logged = [line["grad_norm"] for line in lines(tmp_path / str(clip) / "metrics.jsonl") if "loss" in line]
        logs[clip] = (seen, logged)
    seen, logged = logs[None]
    assert seen == pytest.approx(logged, rel=1e-4)
    seen, logged = logs[1e-3]
    assert max(seen) <= 1.001e-3 < min(logged)


def test_a_loss_that_is_not_finite_stops_before_anything_is_updated(root, tmp_path, monkeypatch):
    stage = {"name": "only", "trainable": {"connector": "full", "projector": "full"}, **SMALL}
    strict = {"precision": "fp32", "devices": 1, "guard": {"max_skipped": 0}}
    recipe = make_recipe([{**stage, "budget": {"samples": 16}, "validate_every": 4}], trainer=strict)
    compute, vlm, before = CaptionObjective.forward, build_vlm(root), {}
    calls: list[list[str]] = []

    def forward(self, vlm_, prompts, batch):
        summed, count = compute(self, vlm_, prompts, batch)
        if torch.is_grad_enabled():
            calls.append(batch.ids)
            if len(calls) == 3:
                before.update(all_tensors(vlm))
                return summed * float("nan"), count
        return summed, count

    monkeypatch.setattr(CaptionObjective, "forward", forward)
    with pytest.raises(TrainingError) as caught:
        train(vlm, recipe, tmp_path)
    assert differing(before, all_tensors(vlm)) == set()
    message = str(caught.value)
    assert "stage only, update 3: the loss is nan" in message
    mixture = mixtures()["train"]
    rows = list(mixture.draws(0, 8, 12))
    assert all(mixture.id(int(row)) in message for row in rows)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # the last good ones


def test_the_best_validation_is_what_remains(root, tmp_path, monkeypatch):
    vlm, states = build_vlm(root), []
    values = iter([5.0, 4.0, math.nan, 3.0, 6.0, 3.5])

    def validate(self, module, **_):
        states.append(all_tensors(vlm))
        return next(values)

    monkeypatch.setattr(Validator, "__call__", validate)
    (result,) = train(vlm, one_stage(budget={"samples": 20}, validate_every=4), tmp_path)
    assert (result.val_loss, result.best_samples, len(states)) == (3.0, 12, 6)
    assert differing(states[3], all_tensors(vlm)) == set()
    assert all(differing(states[3], state) for state in states[:3] + states[4:])


def test_the_validation_loss_is_the_mean_over_the_sets_answer_tokens(root):
    vlm = build_vlm(root)
    module = module_for(vlm, one_stage(losses={"caption": 2.0, "words": 1.0}).stages[0])
    mixture = mixtures()["validation"]
    samples = Samples(mixture, module.front, vlm.splice.prompter, bad=BadSamples(0.0), cached=False)
    with torch.no_grad():
        prompts = vlm.prompts_from(module.front([mixture.image(row) for row in range(5)]).float())
        nll, _ = vlm.splice.token_nll(prompts, [mixture.caption(row) for row in range(5)])
    for batch_size in (2, 32):
        assert Validator(samples, range(5), batch_size=batch_size)(module) == pytest.approx(nll.mean().item(), rel=1e-5)
    assert vlm.projector.training  # back in the stage's modes
    assert not vlm.language_model.training


@pytest.mark.parametrize("world", [2, 7])
def test_devices_share_the_validation_set(root, monkeypatch, world):
    """Of seven devices two have no sample; they count as nothing, and add up what the others have like the others."""
    vlm = build_vlm(root)
    module = module_for(vlm, one_stage(losses={"caption": 2.0, "words": 1.0}).stages[0])
    samples = Samples(mixtures()["validation"], module.front, vlm.splice.prompter, bad=BadSamples(0.0), cached=False)
    expected = Validator(samples, range(5))(module)
    taken: list[list[float]] = []
    monkeypatch.setattr(StageModule, "world", property(lambda self: world))
    monkeypatch.setattr(StageModule, "over_devices", lambda self, figures: taken.append(list(figures)) or [1.0, 1.0])
    for rank in range(world):
        monkeypatch.setattr(StageModule, "rank", property(lambda self, own=rank: own))
        Validator(samples, range(5), batch_size=2)(module)
    assert len(taken) == 2 * world  # sums and weights, of every device
    sums, weights = np.sum(taken[::2], axis=0), np.sum(taken[1::2], axis=0)
    assert sums[0] / weights[0] == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_which_nothing_is_left_changes_nothing_and_the_run_goes_on(root, tmp_path):
    entry = [{"dataset": "unused"}]
    lenient = {"data": {"train": entry, "validation": entry, "max_bad_fraction": 1.0}}
    stage = {**WARMUP, "cache_features": False}
    first = [int(row) for row in mixtures()["train"].draws(0, 0, 4)]
    vlm = build_vlm(root)
    with pytest.MonkeyPatch.context() as patch:
        states = []
        step = StageModule.training_step

        def watched(self, batch, batch_idx):
            before = {name: tensor.clone() for name, tensor in all_tensors(vlm).items()}
            step(self, batch, batch_idx)
            states.append((len(batch), bool(differing(before, all_tensors(vlm)))))

        patch.setattr(StageModule, "training_step", watched)
        (result,) = train(vlm, make_recipe([stage], **lenient), tmp_path / "train", unreadable=first)
    assert states[0] == (0, False)
    assert all(changed for size, changed in states if size)
    assert result.updates == len(states) == 6
    counts = json.loads((tmp_path / "train" / "data.json").read_text())
    assert (counts["quarantined"], counts["used"]) == (4, counts["seen"] - 4)


def test_a_validation_set_without_a_readable_image_stops_the_run(root, tmp_path):
    entry = [{"dataset": "unused"}]
    lenient = {"data": {"train": entry, "validation": entry, "max_bad_fraction": 1.0}}
    blind = Mixture([(Pictures(2, seed=1, unreadable=[0, 1]), 1.0)])
    with pytest.raises(TrainingError, match="no validation sample is readable"):
        run_stages(build_vlm(root), make_recipe([{**WARMUP, "cache_features": False}], **lenient),
                   RunDirectory(tmp_path), train=mixtures()["train"], validation=blind, resume=False)  # fmt: skip


# --- budgets and order --------------------------------------------------------------------------


def test_budgets_in_samples_and_in_tokens(root):
    vlm, mixture = build_vlm(root), mixtures()["train"]
    prompter = vlm.splice.prompter

    def counted(**changes: Any) -> int:
        stage = one_stage(**changes).stages[0]
        return count_updates(stage, SampleDraws(mixture, seed=0, stage=stage), prompter)

    assert counted(budget={"samples": 13}) == 4
    lengths = [len(vlm.llm.tokenizer.encode(caption)) + 1 for caption in [mixture.caption(row) for row in range(14)]]
    mean = sum(lengths) / len(lengths)
    assert min(lengths) < mean < max(lengths)
    assert counted(budget={"tokens": 500}) == math.ceil(math.ceil(500 / mean) / 4)
    assert counted(budget={"tokens": 500}, micro_batch_size=2) == counted(budget={"tokens": 500})


@pytest.mark.parametrize("most", [30, 12])
def test_budgets_of_packs_are_met_by_the_nearest_number(root, most):
    """Also where samples that no pack holds have the longest answers."""
    vlm, mixture = build_vlm(root), mixtures()["train"]
    prompter, limits = vlm.splice.prompter, PackingConfig(max_tokens=most)
    lengths = measure(mixture, prompter)
    fit = np.flatnonzero(lengths.tokens <= most)
    assert len(fit) == len(mixture) if most == 30 else 0 < len(fit) < len(mixture)
    answers = [prompter.encode(mixture.sample(row).text).answers for row in fit.tolist()]
    for budget, samples in (("samples", 40), ("tokens", 40 * sum(answers) / len(answers))):
        stage = one_stage(budget={budget: int(samples)}).stages[0]
        draws = pack_draws(mixture, lengths, limits, stage, seed=0, index=0)
        wanted = max(1, round(40 / draws.per_update))
        assert count_updates(stage, draws, prompter) == wanted
        assert abs(wanted * draws.per_update - 40) <= draws.per_update / 2
    one = one_stage(budget={"samples": 1}).stages[0]
    assert count_updates(one, pack_draws(mixture, lengths, limits, one, seed=0, index=0), prompter) == 1


def updates(seed: int, *, start: int = 0, first_sample: int = 0, stop: int = 9) -> list[list[int]]:
    samples = Samples(mixtures()["train"], None, None, bad=BadSamples(0.0), cached=False)  # type: ignore[arg-type]
    data = Updates(
        samples,
        SampleDraws(samples.mixture, seed=seed, stage=one_stage().stages[0], first_sample=first_sample),
        start=start,
        stop=stop,
    )
    return [data.draws.update(update).rows.tolist() for update in range(start, stop)]


def test_the_order_depends_on_the_seed_and_the_position_alone():
    assert updates(1) == updates(1)
    assert updates(1) != updates(2)
    assert updates(1, start=4) == updates(1)[4:]
    assert updates(1, first_sample=16, stop=5) == updates(1)[4:]
    epoch = np.concatenate(updates(1))[:14]
    assert sorted(epoch) == list(range(14))  # every sample once before any comes again


def test_devices_share_each_batch():
    vlm_free = Samples(mixtures()["train"], None, None, bad=BadSamples(0.0), cached=False)  # type: ignore[arg-type]
    taken: dict[int, list[list[int]]] = {}
    for rank in (0, 1, 2):
        draws = SampleDraws(vlm_free.mixture, seed=1, stage=one_stage().stages[0])
        data = Updates(vlm_free, draws, start=0, stop=3)
        data.rank, data.world = rank, 3
        taken[rank] = [data._own(number).rows.tolist() for number in range(3)]
    for update, rows in enumerate(updates(1, stop=3)):
        assert sorted(row for rank in taken for row in taken[rank][update]) == sorted(rows)


def test_more_devices_than_samples_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.Trainer.world_size", property(lambda self: 5))
    with pytest.raises(RecipeError, match="batch_size 4 is for all devices together, and there are 5"):
        train(build_vlm(root), one_stage(), tmp_path)


def test_validation_may_take_a_part_of_the_set(root, tmp_path):
    recipe = one_stage().model_copy(update={"trainer": TrainerConfig(devices=1, precision="fp32", validate_samples=3)})
    rows = []
    for seed in (0, 1):
        vlm = build_vlm(root)
        set_trainable(vlm, recipe.stages[0])
        run = StageRun(vlm, recipe.model_copy(update={"seed": seed}), 0, **mixtures(), bad=BadSamples(0.0), log=None,
                       checkpoints=None, progress=progress(), changed={})  # fmt: skip
        rows.append(run.validator.rows)
    assert rows[0] == rows[1]  # the same samples for every seed
    assert len(rows[0]) == 3


def progress():
    from vpgtrans.training.checkpoints import Progress

    return Progress()


# --- the whole ----------------------------------------------------------------------------------


def test_equal_seeds_give_equal_runs_and_others_do_not(root, tmp_path):
    ends = []
    for number, seed in enumerate((1, 1, 2)):
        vlm = build_vlm(root)
        train(vlm, make_recipe([FINETUNE], seed=seed), tmp_path / str(number))
        ends.append(all_tensors(vlm))
    assert differing(ends[0], ends[1]) == set()
    assert differing(ends[0], ends[2])
