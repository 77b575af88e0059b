"""Initialisers, calibration, scores and the choice of `auto`, on made-up tables and tiny models.

Random tables share no geometry, so nothing here says how good a converter is: benchmarks/converters.py does.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.tiny import SENTENCES, tiny_llm, tiny_tokenizer
from vpgtrans.config import InitialiserConfig, ProjectorConfig
from vpgtrans.errors import TransferError
from vpgtrans.llm import open_llm, word_ids
from vpgtrans.projector import Projector
from vpgtrans.transfer.calibration import calibration_factor, rms, scale_prompts
from vpgtrans.transfer.converters import Rows, fit
from vpgtrans.transfer.initialisers import Context, initialise
from vpgtrans.transfer.probe import NO_SIGNAL, Scoring, choose, default_candidates, probe
from vpgtrans.transfer.scores import CopyTest, copy_captions, image_gap, word_scores

D_VPG, D_S, D_T, TOKENS = 24, 20, 16, 6
LINEAR = ProjectorConfig(norm=False)
NORMED = ProjectorConfig()
MLP = ProjectorConfig(kind="mlp", hidden=30, norm=False)


@dataclass
class Table:
    matrix: torch.Tensor
    tokenizer: Any = field(default_factory=lambda: TOKENIZER)

    @property
    def word_rms(self) -> float:
        return rms(self.matrix)


TOKENIZER = tiny_tokenizer("bytes")


def tables() -> tuple[Table, Table]:
    """Two tables of one vocabulary that share a linear structure; the target's words are three times as long."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(len(TOKENIZER), D_S, generator=generator)
    mix = torch.randn(D_S, D_T, generator=generator) / D_S**0.5
    target = 3 * (source @ mix + 0.3 * torch.randn(len(TOKENIZER), D_T, generator=generator))
    return Table(source), Table(target)


def context(config: ProjectorConfig = LINEAR, *, images: int = 40, captions: bool = True, **changes: Any) -> Context:
    source, target = tables()
    torch.manual_seed(1)
    projector = Projector(config, D_VPG, D_S, word_rms=source.word_rms).requires_grad_(False)
    values: dict[str, Any] = {
        "source": source,
        "target": target,
        "projector": projector,
        "projector_config": config,
        "width_in": D_VPG,
        "visual_tokens": torch.randn(images, TOKENS, D_VPG),
        "captions": [SENTENCES[i % len(SENTENCES)] for i in range(images)] if captions else None,
    }
    return Context(**(values | changes))


def config(kind: str, **changes: Any) -> InitialiserConfig:
    return InitialiserConfig(kind=kind, **changes)  # type: ignore[arg-type]


# --- initialisers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "inherit"])
@pytest.mark.parametrize("projector", [LINEAR, NORMED, MLP, ProjectorConfig(tail=True)])
def test_random_prompts_are_as_long_as_the_targets_words(kind, projector):
    setting = context(projector)
    made = initialise(config(kind), setting).projector
    assert made.width_out == D_T
    assert made.tail is None
    assert rms(made(setting.visual_tokens)) == pytest.approx(setting.target.word_rms, rel=1e-3)


def test_random_depends_on_the_seed_and_on_nothing_else():
    first, again = (initialise(config("random"), context()).projector for _ in range(2))
    torch.testing.assert_close(first.last_linear.weight, again.last_linear.weight, rtol=0, atol=0)
    other = initialise(config("random"), context(seed=1)).projector
    assert not torch.equal(first.last_linear.weight, other.last_linear.weight)


@pytest.mark.parametrize("projector", [LINEAR, NORMED, MLP])
@pytest.mark.parametrize("name", ["ridge", "procrustes", "cca", "omp"])
def test_converter_prompts_are_the_scaled_conversion_of_the_sources(projector, name):
    setting = context(projector)
    made = initialise(config("converter", fit=name), setting)
    pairs = setting.pairs()
    prompts = setting.source_prompts()
    converter = fit(config("converter", fit=name), *setting.rows(pairs), anchors=prompts)
    wanted = made.report["calibration"] * converter(prompts)
    torch.testing.assert_close(made.projector(setting.visual_tokens), wanted, rtol=1e-3, atol=1e-3)
    # the ratio of prompt length to word length is the source's own
    source_ratio = rms(prompts) / setting.source.word_rms
    assert made.report["prompt_norm_ratio"] == pytest.approx(source_ratio, rel=1e-3)


def test_converter_without_images_or_calibration_is_the_plain_composition():
    setting = context(visual_tokens=None)
    made = initialise(config("converter"), setting)
    assert made.report["calibration"] is None
    other = initialise(config("converter", calibrate=False), context())
    torch.testing.assert_close(made.projector.last_linear.weight, other.projector.last_linear.weight)


def test_keep_takes_the_projector_as_it_is_or_refuses():
    setting = context()
    same = context(target=setting.source, source=setting.source)
    made = initialise(config("keep"), same).projector
    torch.testing.assert_close(made(same.visual_tokens), same.projector(same.visual_tokens), rtol=0, atol=0)
    assert made is not same.projector
    with pytest.raises(TransferError, match="don't share an embedding table"):
        initialise(config("keep"), setting)


def test_a_projector_of_another_llm_is_refused():
    setting = context(projector=Projector(LINEAR, D_VPG, D_S + 1))
    with pytest.raises(TransferError, match="don't belong together"):
        initialise(config("converter"), setting)


@pytest.mark.parametrize("kind", ["converter", "caption-fit", "keep"])
def test_kinds_that_need_a_source_say_so(kind):
    with pytest.raises(TransferError, match="no projector"):
        initialise(config(kind), context(projector=None))


def test_caption_fit_needs_captions():
    with pytest.raises(TransferError, match="images with captions"):
        initialise(config("caption-fit"), context(captions=False))


@pytest.mark.parametrize("projector", [LINEAR, NORMED, MLP])
def test_caption_fit_moves_prompts_to_their_words_when_tokens_tell_them(projector):
    setting = context(projector, images=200)
    words = torch.stack([_words(setting, caption) for caption in setting.captions])
    # Visual tokens that hold the word: a fixed map of its embedding, and noise.
    spread = torch.randn(D_T, D_VPG, generator=torch.Generator().manual_seed(3))
    setting.visual_tokens = words @ spread + 0.1 * torch.randn(200, TOKENS, D_VPG)
    before = initialise(config("converter"), setting)
    after = initialise(config("caption-fit"), setting)
    assert after.report["error_after"] < 0.8 * after.report["error_before"]
    assert _distance(after, setting, words) < _distance(before, setting, words)


def test_caption_fit_leaves_the_converter_alone_when_tokens_tell_nothing():
    setting = context(images=30)
    made = initialise(config("caption-fit", calibrate=False), setting)
    before = initialise(config("converter", calibrate=False), setting)
    if made.report["shrinkage"] is None:
        torch.testing.assert_close(made.projector.last_linear.weight, before.projector.last_linear.weight)
    assert made.report["error_after"] <= made.report["error_before"]


def _words(setting: Context, caption: str) -> torch.Tensor:
    ids = TOKENIZER(" " + caption, add_special_tokens=False).input_ids[:TOKENS]
    return setting.target.matrix[ids]


def _distance(made: Any, setting: Context, words: torch.Tensor) -> float:
    prompts = made.projector(setting.visual_tokens)
    prompts = prompts * (words.norm() / prompts.norm())
    return (prompts - words).norm().item()


# --- calibration --------------------------------------------------------------------------------


def test_calibration_factor_by_hand():
    ones = torch.ones(2, 3, 4)
    assert calibration_factor(6 * ones, 2 * ones, source_rms=3, target_rms=1) == pytest.approx(1.0)
    assert calibration_factor(6 * ones, 2 * ones, source_rms=1, target_rms=1) == pytest.approx(3.0)
    with pytest.raises(TransferError, match="can't be calibrated"):
        calibration_factor(ones, 0 * ones, source_rms=1, target_rms=1)


@pytest.mark.parametrize("projector", [LINEAR, NORMED, MLP, ProjectorConfig(tail=True)])
def test_scale_prompts_scales_the_prompts_and_not_the_original(projector):
    torch.manual_seed(0)
    original = Projector(projector, D_VPG, D_S).requires_grad_(False)
    tokens = torch.randn(2, TOKENS, D_VPG)
    before = original(tokens)
    torch.testing.assert_close(scale_prompts(original, 2.5)(tokens), 2.5 * before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(original(tokens), before, rtol=0, atol=0)


# --- scores -------------------------------------------------------------------------------------


def test_word_scores_of_the_truth_and_of_noise():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(300, 10, generator=generator) + 2
    rows = Rows(y, torch.arange(300))
    truth = word_scores(lambda x: x, rows, rows, chunk=64)
    assert truth.centred_cosine == pytest.approx(1.0, abs=1e-4)
    assert truth.recall_at_1 == 1.0
    assert truth.norm_ratio == pytest.approx(1.0, abs=1e-4)
    half = word_scores(lambda x: 0.5 * x, rows, rows)
    assert half.norm_ratio == pytest.approx(0.5, abs=1e-4)
    noise = word_scores(lambda x: torch.randn(x.shape, generator=generator) + 2, rows, rows)
    assert noise.cosine > 0.5  # the shared mean alone
    assert abs(noise.centred_cosine) < 0.1
    assert noise.recall_at_1 < 0.05


@pytest.fixture(scope="module")
def tiny_target(tmp_path_factory) -> Any:
    return open_llm(str(tiny_llm("llama", tmp_path_factory.mktemp("llm"), width=32)), dtype=torch.float32)


def test_copy_test_equals_one_caption_at_a_time(tiny_target):
    """Padding, batching and the cut before the head change nothing: against ids through the model, loss by hand."""
    words = Table(torch.randn(len(TOKENIZER), D_S), TOKENIZER)
    captions = ["A cat sleeps.", "The quick brown fox jumps over the lazy dog.", "A man is riding"]
    test = CopyTest(words, tiny_target, captions, batch_size=2)
    tokenizer, total, count = tiny_target.tokenizer, 0.0, 0
    for caption in captions:
        ids = tokenizer(caption, add_special_tokens=False).input_ids
        head = tokenizer("A cat sits on a mat.\nA cat sits on a mat.\n\n", add_special_tokens=False).input_ids
        line = tokenizer("\n", add_special_tokens=False).input_ids
        whole = torch.tensor([[tokenizer.bos_token_id, *head, *ids, *line, *ids]])
        with torch.no_grad():
            logits = tiny_target.model(whole).logits[0].log_softmax(dim=-1)
        for place in range(whole.shape[1] - len(ids), whole.shape[1]):
            total -= logits[place - 1, whole[0, place]].item()
            count += 1
    assert test.native == pytest.approx(total / count, rel=1e-4)


def test_copy_test_ends_and_gap(tiny_target):
    words = Table(tiny_target.embed(torch.arange(len(tiny_target.tokenizer))).detach(), tiny_target.tokenizer)
    test = CopyTest(words, tiny_target, SENTENCES[:5])
    assert test.nll(lambda x: x) == pytest.approx(test.native, rel=1e-5)
    mean = words.matrix[word_ids(words.tokenizer, len(words.matrix))].mean(dim=0)  # specials are no words
    assert test.nll(lambda x: mean.expand(len(x), -1)) == pytest.approx(test.mean, rel=1e-5)
    assert test.gap_recovered(test.native) == pytest.approx(1.0)
    assert test.gap_recovered(test.mean) == pytest.approx(0.0)


def test_copy_test_takes_a_tokenizer_with_more_tokens_than_the_table_has_rows(tmp_path):
    """Gemma 3's text models: 262,144 rows, and one token more for images."""
    path = tiny_llm("llama", tmp_path)
    tokenizer = tiny_tokenizer("bytes", vocabulary=512)
    tokenizer.add_tokens([f"<more {i}>" for i in range(520 - len(tokenizer))])
    tokenizer.save_pretrained(path)
    llm = open_llm(str(path), dtype=torch.float32)
    assert len(llm.tokenizer) == 520
    words = Table(llm.embed(torch.arange(512)).detach(), llm.tokenizer)
    assert CopyTest(words, llm, SENTENCES[:2]).mean > 0


def test_copy_test_keeps_its_captions_words_out(tiny_target):
    setting = context()
    test = CopyTest(setting.source, tiny_target, ["A cat sleeps"])
    kept = test.kept_out(setting.pairs())
    texts = {text.strip().lower() for text in kept.texts}
    assert b"a" not in texts
    assert 0 < len(kept) < len(setting.pairs())


def test_copy_captions_are_many_and_differ():
    assert len(copy_captions()) == len(set(copy_captions())) == 96


def _reader(wanted: torch.Tensor) -> Any:
    """A caption loss that is low where the prompts are those of the caption's own image."""

    def caption_nll(prompts: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        losses = (prompts - wanted).square().mean(dim=(1, 2)).sqrt()
        return losses * 5, torch.full((len(captions),), 5.0)

    return caption_nll


def test_image_gap_sees_images_and_only_images():
    prompts = torch.randn(60, TOKENS, D_T, generator=torch.Generator().manual_seed(0))
    captions = [f"caption {i}" for i in range(60)]
    seen = image_gap(_reader(prompts), prompts, captions)
    assert seen.loss == pytest.approx(0.0)
    assert seen.low > 0
    assert seen.signal
    assert seen.low <= seen.gap <= seen.high
    blind = image_gap(_reader(torch.zeros_like(prompts)), prompts, captions)
    assert not blind.signal
    assert blind.low <= 0 <= blind.high


def test_image_gap_never_pairs_equal_captions():
    calls: list[torch.Tensor] = []

    def caption_nll(prompts: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(prompts)
        return torch.zeros(len(captions)), torch.ones(len(captions))

    captions = ["a", "a", "a", "b", "a", "c"]
    image_gap(caption_nll, torch.arange(6.0)[:, None, None], captions)
    for i, j in enumerate(calls[1].flatten().long().tolist()):
        assert captions[i] != captions[j]
    with pytest.raises(TransferError, match="different captions"):
        image_gap(caption_nll, torch.zeros(3, 1, 1), ["a", "a", "a"])


# --- probe and auto -----------------------------------------------------------------------------


def test_probe_fills_the_table():
    setting = context(images=60)
    rows = [row for row, _ in probe(default_candidates(config("auto"), setting), setting)]
    kinds = [row.kind for row in rows]
    assert kinds == ["converter", "converter", "converter", "converter", "caption-fit", "inherit"]
    for row in rows[:5]:
        assert row.pairs == len(setting.pairs())
        assert 0 < row.coverage <= 1
        assert row.centred_cosine > 0.3
        assert row.recall_at_1 is not None
        assert row.norm_ratio > 0
        assert row.prompt_norm_ratio > 0
        assert row.seconds > 0
    assert rows[-1].pairs is None
    assert rows[-1].centred_cosine is None


def test_auto_takes_the_best_image_gap():
    setting = context(images=60)
    wanted = initialise(config("converter", fit="procrustes"), setting)
    with torch.no_grad():
        truth = wanted.projector(setting.visual_tokens)
    setting.captions = [f"caption {i}" for i in range(60)]
    scoring = Scoring(caption_nll=_reader(truth), visual_tokens=setting.visual_tokens, captions=setting.captions)
    choice = choose(config("auto"), setting, scoring=scoring)
    assert choice.signal
    assert [row.name for row in choice.rows if row.chosen] == [wanted.name]
    with torch.no_grad():
        torch.testing.assert_close(choice.initialisation.projector(setting.visual_tokens), truth)


def test_auto_says_when_nothing_carries_a_signal(tiny_target, caplog):
    setting = context(images=40)

    def blind(prompts: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(captions)), torch.ones(len(captions))

    scoring = Scoring(caption_nll=blind, visual_tokens=setting.visual_tokens, captions=setting.captions)
    choice = choose(config("auto"), setting, scoring=scoring)
    assert not choice.signal
    chosen = next(row for row in choice.rows if row.chosen)
    assert NO_SIGNAL in chosen.note
    assert NO_SIGNAL in caplog.text


class Copy(CopyTest):
    """A copy test whose outcome is given: the NLL of every converter, between a native 1 and a mean 3."""

    native, mean = 1.0, 3.0

    def __init__(self, nll: float):
        self.given = nll

    def kept_out(self, pairs: Any) -> Any:
        return pairs

    def nll(self, convert: Any) -> float:
        return self.given


@pytest.mark.parametrize(("nll", "signal"), [(2.0, True), (3.5, False)])
def test_without_images_the_copy_gap_tells_whether_there_is_a_signal(nll, signal, caplog):
    choice = choose(config("auto"), context(), scoring=Scoring(copy_test=Copy(nll)))
    assert choice.signal is signal
    chosen = next(row for row in choice.rows if row.chosen)
    assert (NO_SIGNAL in chosen.note) is not signal
    assert (NO_SIGNAL in caplog.text) is not signal


def test_a_candidate_that_cannot_be_scored_is_a_row_with_its_reason():
    class Broken(Copy):
        def nll(self, convert: Any) -> float:
            raise TransferError("no caption can be copied")

    choice = choose(config("auto"), context(), scoring=Scoring(copy_test=Broken(0.0)))
    failed = [row for row in choice.rows if row.note == "no caption can be copied"]
    assert len(failed) == 4
    assert not any(row.chosen for row in failed)
    assert [row.chosen for row in choice.rows].count(True) == 1


def test_each_initialiser_is_reported_once(caplog):
    """A candidate's scores are one line; the projector that a run starts from is its caller's to report."""
    with caplog.at_level("INFO", logger="vpgtrans"):
        made = initialise(config("converter", fit="ridge"), context())
        assert not [record for record in caplog.records if made.name in record.getMessage()]
        rows = [row for row, _ in probe([config("converter", fit="ridge"), config("inherit")], context())]
    for row in rows:
        assert sum(record.getMessage().startswith(f"{row.name}:") for record in caplog.records) == 1


def test_auto_without_images_takes_the_best_copy_gap(tmp_path):
    target_llm = open_llm(str(tiny_llm("llama", tmp_path, width=D_T)), dtype=torch.float32)
    source, _ = tables()
    target = Table(target_llm.embed(torch.arange(len(target_llm.tokenizer))).detach(), target_llm.tokenizer)
    setting = context(visual_tokens=None, captions=False, target=target)
    scoring = Scoring(copy_test=CopyTest(source, target_llm, SENTENCES[:3]))
    choice = choose(config("auto"), setting, scoring=scoring)
    scores = {row.name: row.copy_gap_recovered for row in choice.rows if row.copy_gap_recovered is not None}
    chosen = next(row for row in choice.rows if row.chosen)
    assert len(scores) == 4
    assert chosen.copy_gap_recovered == max(scores.values())
    assert chosen.note.startswith("best copy gap")


def test_auto_keeps_the_projector_of_a_shared_table():
    source, _ = tables()
    setting = context(target=source)
    choice = choose(config("auto"), setting)
    assert choice.initialisation.kind == "keep"


def test_auto_without_a_source_starts_at_random():
    setting = context(source=None, projector=None)
    assert choose(config("auto"), setting).initialisation.kind == "inherit"
    assert initialise(config("auto"), setting).kind == "inherit"


def test_a_candidate_that_cannot_be_made_is_a_row_with_its_reason():
    setting = context(captions=False)
    rows = probe([config("caption-fit"), config("inherit")], setting)
    assert rows[0][1] is None
    assert "images with captions" in rows[0][0].note
    assert rows[1][1] is not None
