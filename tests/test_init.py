"""`vpgtrans init` writes a recipe that says what was asked for; `vpgtrans completion` completes in a real shell."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from commands import invoke
from hypothesis import given, settings
from hypothesis import strategies as st

from vpgtrans.cli.root import VERBS, cli
from vpgtrans.recipe import load_recipe
from vpgtrans.recipe_draft import TUNES, Draft, checked, draft_text, name_from
from vpgtrans.recipe_schema import FILE, MODELINE, schema_text

GIVEN = ("--vpg", "runs/eyes", "--target", "hf:Qwen/Qwen3-0.6B", "--train", "a.parquet", "--validation", "b.parquet")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- from options -------------------------------------------------------------------------------


def test_options_become_a_recipe_and_its_schema(tmp_path: Path) -> None:
    done = invoke("init", "new/mine.yaml", *GIVEN, "--caption", "text", "--samples", "6400", "--pack", "1024")
    assert done.exit_code == 0, done.output
    assert "next: vpgtrans validate new/mine.yaml" in done.stdout
    file = tmp_path / "new" / "mine.yaml"
    recipe = load_recipe(file)
    assert (recipe.name, recipe.source.vpg, recipe.target.llm) == ("mine", "runs/eyes", "hf:Qwen/Qwen3-0.6B")
    [train], [validation] = recipe.data.train, recipe.data.validation
    assert (train.dataset, train.caption, validation.dataset) == ("a.parquet", "text", "b.parquet")
    assert recipe.data.packing is not None
    assert recipe.data.packing.max_tokens == 1024
    warmup, finetune = recipe.stages
    assert warmup.rates == {"projector": 5e-4}
    assert finetune.rates.keys() == {"connector", "projector", "llm"}
    assert (warmup.budget.samples, finetune.budget.samples) == (640, 5760)
    assert file.read_text(encoding="utf-8").startswith(MODELINE)
    assert (file.parent / FILE).read_text(encoding="utf-8") == schema_text()


def test_a_split_goes_with_its_data_set() -> None:
    assert invoke("init", "m.yaml", *GIVEN[:4], "--train", "openmoji", "--validation", "openmoji:test").exit_code == 0
    recipe = load_recipe("m.yaml")
    assert (recipe.data.train[0].split, recipe.data.validation[0].split) == ("train", "test")


@pytest.mark.parametrize("llm", TUNES)
def test_the_llm_is_tuned_as_asked(llm: str) -> None:
    assert invoke("init", "m.yaml", *GIVEN, "--llm", llm).exit_code == 0
    recipe = load_recipe("m.yaml")
    assert recipe.stages[1].trainable["llm"] == {"qlora": "lora"}.get(llm, llm)
    assert recipe.target.quantise == ("nf4" if llm == "qlora" else None)


def test_without_a_schema_none_is_named(tmp_path: Path) -> None:
    assert invoke("init", "m.yaml", *GIVEN, "--no-schema").exit_code == 0
    assert not (tmp_path / FILE).exists()
    assert "$schema" not in Path("m.yaml").read_text(encoding="utf-8")


def test_what_is_there_is_kept_unless_told(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("mine", encoding="utf-8")
    refused = invoke("init", "m.yaml", *GIVEN)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert (tmp_path / "m.yaml").read_text(encoding="utf-8") == "mine"
    assert invoke("init", "m.yaml", *GIVEN, "--overwrite").exit_code == 0
    assert load_recipe("m.yaml").name == "m"


@pytest.mark.parametrize("missing", ["--vpg", "--target", "--train", "--validation"])
def test_what_is_needed_is_named_with_an_example(missing: str, tmp_path: Path) -> None:
    at = GIVEN.index(missing)
    refused = invoke("init", "m.yaml", *GIVEN[:at], *GIVEN[at + 2 :])
    assert refused.exit_code == 2
    assert f"{missing} is needed, such as" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_no_recipe_takes_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    refused = invoke("init", "m.yaml", *GIVEN, "--name", "a b")
    assert refused.exit_code == 2
    assert "m.yaml: name: is the text 'a b'" in refused.stderr
    assert list(tmp_path.iterdir()) == []


# --- from questions -----------------------------------------------------------------------------


def _answer(*answers: str, options: tuple[str, ...] = ()) -> Any:
    arguments = ["init", "m.yaml", "--ask", *options]
    return CliRunner().invoke(cli, arguments, input="\n".join([*answers, ""]), prog_name="vpgtrans")


def test_questions_are_asked_for_what_no_option_says() -> None:
    done = _answer("model.gguf", "a.csv", "b.csv", "path", "title", "", "qlora", options=("--vpg", "runs/eyes"))
    assert done.exit_code == 0, done.output
    recipe = load_recipe("m.yaml")
    [train] = recipe.data.train
    assert (recipe.source.vpg, recipe.target.llm, recipe.target.quantise) == ("runs/eyes", "model.gguf", "nf4")
    assert (train.dataset, train.image, train.caption) == ("a.csv", "path", "title")
    assert sum(stage.budget.samples or 0 for stage in recipe.stages) == 100_000
    assert "whose eyes are taken" not in done.output


def test_columns_are_not_asked_for_where_they_are_known() -> None:
    done = _answer("v", "t", "openmoji", "openmoji:validation", "", "")
    assert done.exit_code == 0, done.output
    assert "column" not in done.output
    assert load_recipe("m.yaml").data.validation[0].split == "validation"


# --- what is written ----------------------------------------------------------------------------


@settings(deadline=None)
@given(
    words=st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=4, max_size=4),
    samples=st.integers(128, 10**9),
    tune=st.sampled_from(TUNES),
)
def test_any_text_arrives_as_it_was_given(words: list[str], samples: int, tune: Any) -> None:
    source, target, train, column = words
    draft = Draft(
        name=name_from(Path("a recipe.yaml")),
        source=source,
        target=target,
        train=[{"dataset": train, "caption": column}],
        validation=[{"dataset": train, "caption": column}],
        samples=samples,
        tune=tune,
    )
    file = Path("a recipe.yaml")
    recipe = checked(draft_text(draft, file, schema=True), file)
    assert (recipe.name, recipe.source.vpg, recipe.target.llm) == ("a-recipe", source, target)
    assert (recipe.data.train[0].dataset, recipe.data.train[0].caption) == (train, column)
    assert sum(stage.budget.samples or 0 for stage in recipe.stages) == max(samples, draft.warmup + 64)


@pytest.mark.parametrize(
    "text", ["true", "null", "12", "1e5", "~", "a: b", "a #b", "- a", "[a]", "a,b", "hf:a/b@c", "é"]
)
def test_text_that_yaml_takes_for_something_else(text: str) -> None:
    draft = Draft(name="m", source=text, target=text, train=[{"dataset": text}], validation=[{"dataset": text}])
    recipe = checked(draft_text(draft, Path("m.yaml"), schema=False), Path("m.yaml"))
    assert recipe.source.vpg == recipe.target.llm == recipe.data.train[0].dataset == text


# --- shells -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shells_script_names_the_command(shell: str) -> None:
    script = invoke("completion", shell).stdout
    assert f"_VPGTRANS_COMPLETE={shell}_complete" in script.replace("env ", "")


def _complete(line: str, tmp_path: Path) -> list[str]:
    """What bash offers for the last word of a line."""
    script = tmp_path / "vpgtrans.bash"
    script.write_text(invoke("completion", "bash").stdout, encoding="utf-8")
    command = tmp_path / "bin" / "vpgtrans"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vpgtrans "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    asked = f"""
        PATH={command.parent}:$PATH; source {script}
        COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}
        _vpgtrans_completion vpgtrans; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    assert set(_complete("vpgtrans ", tmp_path)) == set(VERBS)
    assert _complete("vpgtrans tran", tmp_path) == ["transfer"]
    assert "--resume" in _complete("vpgtrans transfer --re", tmp_path)
    assert _complete("vpgtrans data pa", tmp_path) == ["pack"]
    assert _complete("vpgtrans init --llm q", tmp_path) == ["qlora"]
