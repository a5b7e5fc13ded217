"""References, pairs and models.txt."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from fetch_models import MODELS
from gguf import GGUFReader

from colm_edge import references
from colm_edge.errors import ModelError, WriteError
from colm_edge.files import fingerprint
from colm_edge.switch.file import Switch


def test_without_arguments_it_is_the_shipped_pair():
    files = references.choose_pair(None, None, None)
    assert files.is_demo
    for path in (files.base, files.experts[""], files.switch):
        assert Path(path).is_file()
        assert Path(path).parent.name == "data"
    assert references.choose_pair(None, None, "entropy").switch == "entropy"
    assert references.choose_pair(None, None, None, "demo") == files


def test_two_models_without_a_switch_use_margin():
    assert references.choose_pair("a", {"": "b"}, None) == references.PairFiles(
        "a", {"": "b"}, "margin"
    )
    assert references.choose_pair("a", {"": "b"}, "c").switch == "c"


def test_beside_two_models_a_pair_names_the_switch():
    files = references.choose_pair("a", {"": "b"}, None, "demo")
    assert (files.base, files.experts) == ("a", {"": "b"})
    assert files.switch == references.choose_pair(None, None, None).switch
    assert references.choose_pair("a", {"": "b"}, "c", "demo").switch == "c"
    assert references.choose_pair("a", {"": "b"}, "package:switch.gguf").switch == files.switch


def test_a_switch_is_named_in_the_ways_a_model_is(tmp_path, monkeypatch):
    shipped = references.choose_pair(None, None, None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(references, "fetch", lambda reference, **how: Path("/hub", reference))
    for name, file in {
        "~/mine.gguf": str(tmp_path / "mine.gguf"),
        "they/have:a.gguf": "/hub/they/have:a.gguf",
        "demo": shipped.switch,
        "entropy": "entropy",
    }.items():
        (tmp_path / "mine.gguf").touch()
        assert references.choose_pair("a", {"": "b"}, name).switch == file
        assert references.choose_pair(None, None, name, "demo").switch == file


def test_a_pair_s_own_switch_is_not_fetched_where_another_is_given(tmp_path, monkeypatch):
    listed = tmp_path / "models.txt"
    listed.write_text(
        "mine base a.gguf MIT\nmine expert b.gguf MIT\nmine switch they/have:s.gguf MIT\n"
    )
    monkeypatch.setattr(references, "_models_txt", lambda: listed)
    assert references.find_pair("mine", "entropy", offline=True).switch == "entropy"
    with pytest.raises(ModelError, match="not in the cache"):
        references.find_pair("mine", offline=True)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (("a", None, None, None), "-m without -me"),
        ((None, {"": "b"}, None, None), "-me without -m"),
        (("a", {"": "b"}, None, "nobody"), "no pair named 'nobody'"),
        (("a", {"": "b"}, "c", "nobody"), "no pair named 'nobody'"),
        ((None, None, None, ""), "no pair named ''"),
        ((None, None, None, "nobody"), r"no pair named 'nobody' in .*models.txt; known: demo"),
    ],
)
def test_contradictory_arguments_are_named(choice, words):
    with pytest.raises(ModelError, match=words):
        references.choose_pair(*choice)


def test_switches_that_ship_are_whole_and_say_what_they_are_for():
    shipped = [
        roles["switch"].reference
        for name, roles in references.known_pairs().items()
        if name != "demo" and "switch" in roles
    ]
    assert shipped
    hubs = {file.sha256 for file in MODELS["qwen2.5-coder"]}
    known = Switch.load(references.resolve("package:switches/qwen2.5-coder.gguf")).info
    assert hubs <= set(f"{known['base_sha256']} {known['expert_sha256']}".split())
    for reference in shipped:
        switch = Switch.load(references.resolve(reference))
        for role in ("base", "expert"):
            assert all(len(sha256) == 64 for sha256 in switch.info[f"{role}_sha256"].split())
            assert not switch.is_for(role, "another")
        assert 0 < switch.threshold_for(0.2) < switch.threshold_for(0.1) < 1


def test_a_bad_line_of_models_txt_is_named(tmp_path, monkeypatch):
    listing = tmp_path / "models.txt"
    listing.write_text("# fine\nmine base /a.gguf MIT\nmine uncle /b.gguf MIT\n")
    monkeypatch.setattr(references, "_models_txt", lambda: listing)
    with pytest.raises(ModelError, match="line 3: expected 'alias role reference licence note'"):
        references.find_pair("mine")


def test_a_pair_without_a_switch_uses_margin(tmp_path, monkeypatch):
    listing = tmp_path / "models.txt"
    listing.write_text("mine base /a.gguf MIT x y z\nmine expert /b.gguf MIT\n")
    monkeypatch.setattr(references, "_models_txt", lambda: listing)
    assert references.find_pair("mine") == references.PairFiles(
        "/a.gguf", {"": "/b.gguf"}, "margin"
    )


def test_the_model_of_a_listed_server_is_no_comment(tmp_path, monkeypatch):
    listing = tmp_path / "models.txt"
    listing.write_text("#all\nmine base /a.gguf MIT x # y\nmine expert http://h:1#m MIT\n")
    monkeypatch.setattr(references, "_models_txt", lambda: listing)
    assert references.listed_pair("mine") == ("/a.gguf", {"": "http://h:1#m"})
    assert references.known_pairs()["mine"]["base"].note == "x"


def test_offline_a_remote_server_is_refused():
    with pytest.raises(ModelError, match="--offline allows only servers on this machine"):
        references.resolve("http://10.1.2.3:8080", offline=True)
    with pytest.raises(ModelError, match="Invalid IPv6 URL; write it as"):
        references.resolve("http://[::1:8080", offline=True)
    for url in ("http://127.0.0.1:8080", "http://localhost:1/v1", "http://[::1]:80"):
        assert references.resolve(url, offline=True) == url


def test_cached_files_are_found_without_a_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert references.is_here("package:base.gguf")
    assert not references.is_here("package:nothing.gguf")
    assert references.is_here(str(tmp_path))
    assert not references.is_here("them/model:m.gguf")
    assert not references.is_here("them/model:Q4_0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe", "models.txt: cannot be read"),
        (b"a base a MIT\n", "a stands for a, a name of the list"),
        (b"a base b MIT\nb base a MIT\n", "a stands for b, a name of the list"),
    ],
)
def test_a_list_that_is_no_text_or_leads_to_itself_is_refused(tmp_path, monkeypatch, text, words):
    path = tmp_path / "models.txt"
    path.write_bytes(text)
    monkeypatch.setattr(references, "_models_txt", lambda: path)
    with pytest.raises(ModelError, match=words):
        references.resolve("a")


def test_a_name_that_no_file_can_have_is_returned_as_it_is():
    for name in ("x" * 5000, "a\0b"):
        assert references.resolve(name) == name


def types_of(path: str) -> tuple[str, str]:
    """Return the type of most of a model's weights, and that of its output matrix."""
    tensors = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    return tensors["blk.0.ffn_up.weight"], tensors["output.weight"]


def test_a_model_is_quantised_once_and_kept(tiny):
    said: list[str] = []
    path = references.resolve(f"{tiny['base']}@q8_0", note=said.append)
    assert types_of(path) == ("Q8_0", "Q8_0")
    assert said == ["quantising base.gguf to Q8_0, once …"]
    made = Path(path).stat()
    assert references.resolve(f"{tiny['base']}@Q8_0", note=said.append) == path
    assert (Path(path).stat().st_mtime_ns, len(said)) == (made.st_mtime_ns, 1)
    other = references.resolve(f"{tiny['base']}@Q8_0+F16")
    assert types_of(other) == ("Q8_0", "F16")
    again = references.resolve(f"{path}@Q4_0")  # that loses more, which the user asked for
    assert types_of(again)[0] == "Q4_0"


def test_another_file_of_the_same_name_is_quantised_for_itself(tiny, tmp_path):
    model, found = tmp_path / "model.gguf", set[str]()
    for name in ("base", "expert"):
        model.write_bytes(Path(tiny[name]).read_bytes())
        found.add(references.resolve(f"{model}@Q8_0"))
    assert len(found) == 2


def test_a_file_whose_metadata_were_changed_is_quantised_anew(tmp_path):
    """In place, where a fingerprint of samples does not see it."""
    model = tmp_path / "model.gguf"
    content = bytearray((files("colm_edge") / "data/expert.gguf").read_bytes())
    model.write_bytes(content)
    before = fingerprint(model), references.resolve(f"{model}@Q4_0")
    key = b"tokenizer.ggml.eos_token_id"
    content[content.index(key) + len(key) + 4] ^= 1  # behind its type
    model.write_bytes(content)
    after = fingerprint(model), references.resolve(f"{model}@Q4_0")
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_file_may_have_a_name_like_that(tiny, tmp_path):
    model = tmp_path / "model.gguf@Q8_0"
    model.write_bytes(Path(tiny["base"]).read_bytes())
    assert references.resolve(str(model)) == str(model)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("them/model:m.gguf@Q9", "'Q9' is not a type"),  # nothing is downloaded for that
        ("them/model:m.gguf@Q4_0+Q9", "'Q9' is not a type"),
        ("nothing.gguf@Q4_0", "nothing.gguf: cannot be read"),
        ("them/model:m.gguf@Q4_0", "not in the cache, and nothing is downloaded offline"),
    ],
)
def test_what_cannot_be_quantised_is_told(reference, words):
    with pytest.raises(ModelError, match=words):
        references.resolve(reference, offline=True)


def test_a_folder_that_cannot_be_written_is_told(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(WriteError, match=r"quantized.*: cannot be made"):
        references.resolve(f"{tiny['base']}@Q8_0")
