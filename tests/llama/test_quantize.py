"""Quantising models with llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from split_models import split_into

from colm_edge.cli import main
from colm_edge.errors import ModelError, WriteError
from colm_edge.llama.model import Model
from colm_edge.llama.quantize import TYPES, file_type, quantize
from colm_edge.pair import load


def type_of(path: Path) -> str:
    model = Model(path)
    try:
        return file_type(model)
    finally:
        model.close()


def test_a_quantised_model_is_smaller_and_answers(tiny, tmp_path):
    out = tmp_path / "q8.gguf"
    result = CliRunner().invoke(main, ["quantize", tiny["base"], str(out), "q8_0", "-t", "1"])
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(f"{out}: written")
    assert type_of(out) == "Q8_0"
    assert out.stat().st_size < Path(tiny["base"]).stat().st_size
    with load(str(out), tiny["expert"], "margin", n_threads=1, n_ctx=64) as pair:
        assert pair.generate("hello", temperature=0.0, max_tokens=5).steps


def test_what_is_quantised_already_is_quantised_again_only_if_asked(tiny, tmp_path):
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    quantize(tiny["base"], once, "Q8_0", n_threads=1)
    with pytest.raises(ModelError, match=r"quantised already \(Q8_0\).*--allow-requantize"):
        quantize(once, twice, "Q4_0", n_threads=1)
    assert not twice.exists()
    args = ["quantize", str(once), str(twice), "Q4_0", "-t", "1", "--allow-requantize"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert "loses quality" in result.stderr
    assert type_of(twice) == "Q4_0"


def test_no_part_of_a_model_is_written_over(tiny, tmp_path):
    first, *_, last = split_into(tmp_path, tiny["base"])
    before = last.read_bytes()
    with pytest.raises(WriteError, match="is used by this command already"):
        quantize(first, last, "Q8_0", n_threads=1)
    assert last.read_bytes() == before


@pytest.mark.parametrize(
    ("source", "type_name", "words"),
    [
        ("base", "Q9_Z", "'Q9_Z' is not a type; expected one of .*Q4_0"),
        ("nothing.gguf", "Q4_0", "No such file"),
    ],
)
def test_what_cannot_be_quantised_is_said_and_leaves_nothing(
    tiny, tmp_path, source, type_name, words
):
    out = tmp_path / "out.gguf"
    with pytest.raises(ModelError, match=words):
        quantize(tiny.get(source, source), out, type_name)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_quantised_onto_itself(tiny):
    before = Path(tiny["base"]).read_bytes()
    result = CliRunner().invoke(main, ["quantize", tiny["base"], tiny["base"], "Q8_0"])
    assert result.exit_code == 1
    assert "give the result another name" in result.stderr
    assert Path(tiny["base"]).read_bytes() == before


def test_the_output_matrix_takes_a_type_of_its_own(tiny, tmp_path):
    """llama.cpp keeps it in a larger type than the rest."""
    from gguf import GGUFReader

    types = {}
    for output_type in (None, "q4_0"):
        out = tmp_path / f"{output_type}.gguf"
        quantize(tiny["base"], out, "Q4_0", output_type=output_type, n_threads=1)
        tensors = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out).tensors}
        types[output_type] = tensors["output.weight"]
    assert types["q4_0"] == "Q4_0" != types[None]
    with pytest.raises(ModelError, match=r"'Q4_K_M' is not a type; expected one of .*Q4_K"):
        quantize(tiny["base"], tmp_path / "x.gguf", "Q4_0", output_type="Q4_K_M")


def test_the_types_of_products_are_not_offered(tiny, tmp_path):
    """llama.cpp would end the process at one of them."""
    for name in ("Q8_1", "Q8_K"):
        with pytest.raises(ModelError, match=f"'{name}' is not a type"):
            quantize(tiny["base"], tmp_path / "x.gguf", "Q4_0", output_type=name)


def test_types_have_the_names_that_people_write():
    assert {"F16", "BF16", "Q4_0", "Q4_K_M", "Q8_0", "IQ4_XS"} <= TYPES.keys()
