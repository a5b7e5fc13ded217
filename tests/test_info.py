"""What `colm-edge info` and `bench --tune` print about files and settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from lib.random_model import SHAPES, shape_of

from colm_edge.bench import tune as tune_module
from colm_edge.bench.tune import tune
from colm_edge.cli import main
from colm_edge.errors import ModelError
from colm_edge.gguf_header import _Reader
from colm_edge.info import as_text, describe_files
from colm_edge.llama.costs import CostTable, seconds_per_token
from colm_edge.llama.model import Model
from colm_edge.llama.quantize import quantize
from colm_edge.switch.file import Switch


def info(*args: str, exit_code: int = 0):
    result = CliRunner().invoke(main, ["info", *args, "-o", "json"])
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def test_a_model_is_described(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing was measured yet
    (facts,) = info(tiny["template"])
    assert facts["architecture"] == "llama"
    assert facts["trained_context"] == 512
    assert facts["chat_template"] is True
    assert facts["n_vocab"] == 400
    n = SHAPES["tiny"].n_params + 64 * (1 + 2 * SHAPES["tiny"].n_layer)  # norms
    assert facts["parameters"] == n
    assert facts["bits_per_weight"] == 32.0
    assert facts["decode_costs"] is None
    assert "not measured (--costs)" in as_text([facts])


def test_costs_are_measured_on_request_and_cached(tiny):
    (facts,) = info(tiny["base"], "--costs", "-t", "1")
    assert facts["decode_costs"]["sizes"][0] == 1
    assert info(tiny["base"], "-t", "1")[0]["decode_costs"] == facts["decode_costs"]


def test_a_name_stands_for_all_of_its_files():
    base, expert, switch, pair = info("demo")
    assert [Path(one["model"]).name for one in (base, expert)] == ["base.gguf", "expert.gguf"]
    assert Path(switch["switch"]).name == "switch.gguf"
    assert pair["can_collaborate"].startswith("yes")


def test_a_switch_is_compared_with_the_models_beside_it(tiny, tmp_path):
    *_, switch, pair = info("demo")
    assert switch["fitted_for"] == ["base.gguf", "expert.gguf"]
    assert pair["switch"].endswith("switch.gguf, fits; it does not say which files it is for")
    foreign = CliRunner().invoke(main, ["info", tiny["base"], tiny["expert"], switch["switch"]])
    assert foreign.exit_code == 1
    assert "reads a hidden state of 160 numbers" in foreign.stderr
    base, expert = (one["model"] for one in info("demo") if "model" in one)
    other = tmp_path / "other.gguf"
    replace(Switch.load(switch["switch"]), info={"expert_fingerprint": "f" * 64}).save(other)
    *_, pair = info(base, expert, str(other))
    assert "was fitted for another expert than expert.gguf" in pair["switch"]
    *_, alone = info(expert, switch["switch"])
    assert alone["with_this_base"].startswith("no: ")
    *_, alone = info(base, switch["switch"])
    assert "fits" in alone["with_this_base"]
    *_, team = info(base, expert, expert, switch["switch"], exit_code=1)
    assert team["switch"].startswith("no: ")
    assert "predicted" not in team


def test_the_experts_of_a_switch_are_named():
    (facts,) = info(str(Path(__file__).parent / "data" / "team.gguf"))
    assert facts["expert_names"] == ["nature", "countries"]
    assert facts["fitted_for"] == ["base.gguf", "expert.gguf", "countries.gguf"]


def test_a_threshold_that_defers_is_not_shown_as_one():
    *_, switch, _ = info("demo")
    shown = as_text([switch]).split(" 10%: ")[1].split(",")[0]
    assert 0.999 < float(shown) < 1


def test_a_strangers_file_cannot_drive_the_terminal(tiny):
    facts, _ = describe_files([tiny["base"]])
    facts[0]["name"] = "\x1b]0;owned\x07\nmodel  fake.gguf"
    text = as_text(facts)
    assert "\x1b" not in text
    assert len(text.splitlines()) == len(as_text(describe_files([tiny["base"]])[0]).splitlines())


def test_two_models_are_compared(tiny):
    base, expert, pair = info(tiny["base"], tiny["expert"])
    assert base["vocabulary_hash"] == expert["vocabulary_hash"]
    assert pair["can_collaborate"] == "yes, over 400 shared tokens"


@pytest.mark.parametrize("output", ["md", "json"])
def test_models_that_cannot_collaborate_are_described_and_fail(tiny, output):
    args = ["info", tiny["base"], tiny["foreign"], "-o", output]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1
    reason = "the vocabularies of base.gguf and foreign.gguf"
    assert result.stderr.startswith(f"Error: {reason}")
    assert result.stderr.count("\n") == 1
    if output == "json":
        *_, pair = json.loads(result.stdout)
        assert pair["can_collaborate"].startswith(f"no: {reason}")
    else:
        assert f"can collaborate  no: {reason}" in result.stdout


def test_a_switch_is_described():
    from colm_edge.references import find_pair

    (facts,) = info(find_pair("demo").switch)
    assert "hidden" in facts["reads"]
    assert facts["experts"] == 1
    result = CliRunner().invoke(main, ["info", find_pair("demo").switch])
    assert "calibration" in result.stdout


def test_other_files_are_refused(tiny, tmp_path):
    (tmp_path / "text").write_text("hello")
    for ref, words in ((tmp_path / "text", "not a GGUF"), (tmp_path / "no", "No such file")):
        result = CliRunner().invoke(main, ["info", str(ref)])
        assert result.exit_code == 1
        assert words in result.stderr


SETTINGS = ("threads", "flash_attention", "cache_type", "ubatch")


def test_settings_are_tried_and_advised(tiny_pair, monkeypatch):
    monkeypatch.setattr(tune_module, "ROUNDS", 2)
    monkeypatch.setattr(tune_module, "_thread_counts", lambda: (1, 2))
    rows, advice = tune(tiny_pair, lambda text: None)
    for role in ("base", "expert"):
        tried = [row for row in rows if row["model"] == role]
        assert {row["threads"] for row in tried} == {1, 2}
        assert {row["flash_attention"] for row in tried} >= {"on", "off"}
        assert {row["cache_type"] for row in tried} == {"f16", "q8_0"}
        assert {row["ubatch"] for row in tried} >= {64, 128, 256, 512}
        assert sum(row["kept"] == "yes" for row in tried) == 4
        assert all(row["ms_1_token"] > 0 for row in tried)
        assert all(row["ms_prompt"] > 0 for row in tried)
        # Nothing is tried twice with one setting.
        settings = [tuple(row[x] for x in SETTINGS) for row in tried]
        assert len(set(settings)) == len(settings) - 3
    assert advice[0].startswith("base: -t ")
    assert advice[1].startswith("expert: -t ")
    assert len(advice) == 2


def test_a_setting_must_save_enough_and_slow_nothing_else():
    default, quicker, spoiling = (10.0, 16.0, 450.0), (9.6, 16.5, 460.0), (9.3, 20.0, 770.0)
    assert tune_module._best([default, quicker, spoiling], 0) == 1
    assert tune_module._best([default, (9.8, 15.0, 440.0)], 0) == 0  # noise
    assert tune_module._best([default, spoiling], 0) == 0
    assert tune_module._best([default, (10.0, 16.0, 400.0), (10.0, 16.0, 390.0)], 2) == 2


def test_shapes_have_about_the_requested_parameters():
    for name, count in (("360M", 360e6), ("1B", 1e9), ("3B", 3e9), ("30B", 30e9), ("70B", 70e9)):
        shape = shape_of(name)
        assert abs(shape.n_params / count - 1) < 0.1
        assert shape.n_embd % shape.n_head == 0
        assert shape.n_head % shape.n_head_kv == 0
    assert shape_of("1.1B") is SHAPES["1.1B"]


def test_a_description_reads_the_header_alone(tiny, monkeypatch):
    """Neither the weights nor, in Python, the vocabulary: seconds for a model of gigabytes."""
    from colm_edge.llama.model import Model

    def refuse(*args, **more):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(Model, "load", refuse)
    monkeypatch.setattr("gguf.GGUFReader", refuse)
    result = CliRunner().invoke(main, ["info", tiny["base"], tiny["expert"]])
    assert result.exit_code == 0, result.output
    assert "can collaborate" in result.stdout


def test_a_model_given_as_a_switch_is_not_read(tiny, monkeypatch):
    monkeypatch.setattr("gguf.GGUFReader", None)
    args = ["run", "-m", tiny["base"], "-me", tiny["expert"], "-sw", tiny["expert"], "hello"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1
    assert "this is a model, not a switch" in result.stderr


def test_of_a_base_and_several_experts_it_predicts_what_they_do_together(tiny, monkeypatch):
    tables = {"base.gguf": CostTable((1, 64), (0.001, 0.01))}
    monkeypatch.setattr(
        "colm_edge.info.cost_table",
        lambda session, note: tables.get(
            session.model.path.name, CostTable((1, 64), (0.004, 0.02))
        ),
    )
    models = [tiny["base"], tiny["expert"], tiny["template"]]
    facts = info(*models, "--costs", "-t", "1")
    team = facts[-1]
    assert [fact["can_collaborate"][:3] for fact in facts[3:5]] == ["yes", "yes"]
    assert team["experts_tokens_per_second"].keys() == {"expert.gguf", "template.gguf"}
    speeds = [row["tokens_per_second"] for row in team["predicted"]]
    assert speeds == sorted(speeds, reverse=True)
    assert "called equally often, together" in as_text(facts)
    foreign = CliRunner().invoke(main, ["info", *models, tiny["foreign"]])
    assert foreign.exit_code == 1


def test_experts_of_one_file_name_are_told_apart(tiny, tmp_path):
    """By their folders."""
    names = [str(tmp_path / folder / "expert.gguf") for folder in "ab"]
    for name, file in zip(names, (tiny["expert"], tiny["template"]), strict=True):
        Path(name).parent.mkdir()
        shutil.copy(file, name)
    facts = info(tiny["base"], *names, "--costs", "-t", "1")
    assert list(facts[-1]["experts_tokens_per_second"]) == names
    assert facts[-1]["team"] == f"base.gguf with {', '.join(names)}"
    pair = info(names[0], names[1])[-1]
    assert pair["pair"] == " with ".join(names)


def test_what_is_in_the_fastest_type_already_is_not_advised_to_become_so(tiny, tmp_path):
    files = [str(tmp_path / f"{name}.gguf") for name in ("base", "expert")]
    for name, file in zip(("base", "expert"), files, strict=True):
        quantize(tiny[name], file, "Q4_0", n_threads=1)
    for models, advised in ((files, False), ([files[0], tiny["expert"]], True)):
        facts = info(*models, "--costs", "-t", "1")
        assert facts[0]["quantisation"] == "Q4_0"
        for limit in (0, 0.3):
            text = as_text([facts[-1] | {"break_even": limit}])
            assert ("Q4_0" in text) is advised
            assert "a smaller base" in text


def test_a_vocabulary_is_read_once_and_compared_as_a_whole(tiny, monkeypatch):
    """It may have hundreds of thousands of tokens."""
    headers, header = [], _Reader.header
    monkeypatch.setattr(_Reader, "header", lambda self: headers.append(1) or header(self))
    monkeypatch.setattr(Model, "token_text", None)
    facts = info(tiny["base"], tiny["expert"])
    assert facts[-1]["can_collaborate"] == "yes, over 400 shared tokens"
    assert len(headers) == 2


def test_equal_experts_cost_what_one_costs_at_more_calls():
    """Two that take turns catch up with twice the gap each."""
    base, expert = CostTable((1, 64), (1.0, 8.0)), CostTable((1, 64), (4.0, 4.0))
    one = seconds_per_token(base, [expert], 0.1)
    assert seconds_per_token(base, [expert, expert], 0.1) == pytest.approx(one, rel=0.01)


def test_a_number_that_is_a_text_of_thousands_of_digits_is_none(tiny, monkeypatch):
    model = Model(tiny["base"])
    assert model.number("context_length") == 512
    monkeypatch.setattr(Model, "metadata", lambda model, key: "9" * 5000)
    assert model.number("context_length") == 0
    model.close()


def test_a_server_is_not_described():
    with pytest.raises(ModelError, match="http://a:1: a server is not described; give a GGUF file"):
        describe_files(["http://a:1"])
