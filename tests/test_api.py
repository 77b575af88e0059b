"""What a notebook uses of the package: recipes as mappings, data, words and converters, checkpoints by name."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

import vpgtrans as vt
from vpgtrans.errors import DataError, RecipeError, RegistryError
from vpgtrans.libraries import quieten
from vpgtrans.report.plots import compare_plot

CURVES = {"arms": {"transfer": {"val_loss": [1.0], "curve": [[0, 2.0], [8, 1.0]]},
                   "scratch": {"val_loss": [2.0], "curve": [[0, 3.0], [8, 2.0]]}}}  # fmt: skip


@pytest.fixture(scope="module")
def words(tiny):
    return vt.read_embeddings(str(tiny.source_llm)), vt.read_embeddings(str(tiny.target_llm))


@pytest.fixture
def index(finished, tmp_path) -> Path:
    """One that names the run's result as `owl`."""
    place = tmp_path / "checkpoints_registry.yaml"
    vt.publish(finished, to=tmp_path / "out", index=place, id="owl", licence="MIT", device="cpu")
    return place


def test_every_public_name_is_there_and_none_loads_torch():
    for name in vt.__all__:
        assert getattr(vt, name) is not None
    code = "import sys, vpgtrans as vt; vt.transfer; dir(vt); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_recipe_may_be_a_mapping(tiny):
    keys = tiny.transfer_keys()
    assert vt.validate(keys)["train_samples"] == 24
    with pytest.raises(RecipeError, match="did you mean converter"):
        vt.validate(keys | {"initialiser": "convertor"})
    with pytest.raises(RecipeError, match="overrides go with a recipe's path"):
        vt.validate(keys, {"seed": 1})


def test_data_is_a_sequence_of_images_with_captions(tiny):
    data = vt.open_data(str(tiny.validation))
    assert len(data) == 8
    assert data.image(1).size == (32, 32)
    assert data.caption(1) == "a white cat"
    assert len(vt.open_data(str(tiny.validation), {"limit": 3})) == 3
    with pytest.raises(DataError, match="captoin"):
        vt.open_data(str(tiny.validation), {"captoin": "text"})


def test_a_run_as_plain_data(finished):
    run = vt.read_run(str(finished))
    assert run.summary["name"] == "tiny"
    assert [line["samples"] for line in run.metrics if "val_loss" in line][-1] == 32


def test_a_converter_between_two_tables(words):
    pairs = vt.pair_tokens(*words)
    converter = vt.fit_converter(*words, fit="ridge")
    converted = converter(words[0].matrix[pairs.source_ids])
    truth = words[1].matrix[pairs.target_ids]
    assert converted.shape == truth.shape
    # what the RMS match promises of the words that it was fitted on
    spread = [(table - table.mean(dim=0)).square().sum().item() for table in (converted, truth)]
    assert spread[0] == pytest.approx(spread[1], rel=1e-3)
    fewer, _ = pairs.split()
    assert not torch.allclose(vt.fit_converter(*words, pairs=fewer, fit="ridge").weight, converter.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"alpa": 0.5}, "fit_converter: unknown key alpa .did you mean alpha"), ({"alpha": 2}, "at most 1")],
)
def test_a_converters_settings_are_checked(words, settings, message):
    with pytest.raises(RecipeError, match=message):
        vt.fit_converter(*words, **settings)


def test_pulled_and_verified_by_its_name(index, tiny, own_cache):
    pulled = vt.pull("owl", index=index)
    assert pulled.is_relative_to(own_cache)
    assert vt.pull("registry:owl@1.0.0", index=index) == pulled
    assert all(check.fine for check in vt.verify("owl", index=index, against=str(tiny.target_llm)))
    *whole, fits = vt.verify("owl", index=index, against=str(tiny.source_llm))
    assert all(check.fine for check in whole)
    assert any("width" in problem for problem in fits.problems)
    with pytest.raises(RegistryError, match="owl"):
        vt.pull("owls", index=index)


def test_a_directory_is_verified_without_an_index(finished):
    assert [check.fine for check in vt.verify(finished)] == [True, True, True]


def test_libraries_are_quiet_and_we_are_not(monkeypatch):
    chatty, ours = logging.getLogger("lightning.pytorch.utilities.rank_zero"), logging.getLogger("vpgtrans")
    monkeypatch.setattr(chatty, "level", logging.INFO)
    level = ours.level
    quieten()
    assert chatty.level == logging.ERROR
    assert ours.level == level


def test_charts_look_the_same_in_anybodys_style(tmp_path):
    plain = compare_plot(CURVES, tmp_path / "plain.png").read_bytes()
    with plt.rc_context({"figure.constrained_layout.use": True, "lines.linewidth": 9, "axes.grid": True}):
        assert compare_plot(CURVES, tmp_path / "styled.png").read_bytes() == plain
        assert plt.rcParams["lines.linewidth"] == 9
