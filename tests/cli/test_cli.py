"""The command line as a user meets it: outputs whole, and errors in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from lib.rows import write_rows

from colm_edge.cli import main
from colm_edge.cli.common import progress
from colm_edge.switch.file import Switch


def invoke(*args: str, **kwargs):
    return CliRunner().invoke(main, [str(a) for a in args], **kwargs)


def models_of(tiny) -> list[str]:
    return ["-m", tiny["base"], "-me", tiny["expert"], "-t", "1"]


def test_run_prints_the_answer_and_a_summary(tiny):
    result = invoke("run", "hello", *models_of(tiny), "-sw", "margin", "--temp", "0", "-n", "9")
    assert result.exit_code == 0
    assert "\x1b[" not in result.stdout  # piped: no colour
    assert re.fullmatch(
        r"(measuring \w+\.gguf on this machine, once …\n){0,2}"
        r"9 tokens, \d+% deferred, \d+ expert calls? \(\d+ tokens\); tok/s: "
        r"base [\d,]+, expert [\d,-]+, overall [\d,]+; cut: the limit of tokens \(-n\)\n",
        result.stderr,
    )


def test_the_prompt_comes_from_any_of_its_places(tiny):
    options = [*models_of(tiny), "--temp", "0", "-n", "9"]
    texts = {
        invoke("run", "hello you", *options).stdout,
        invoke("run", *options, "hello", "you").stdout,
        invoke("run", "-p", "hello you", *options).stdout,
        invoke("run", *options, input="hello you").stdout,
        invoke("run", "-", *options, input="hello you\n").stdout,
        invoke("run", "-p", "-", *options, input="hello you").stdout,
    }
    assert len(texts) == 1
    assert invoke("run", "a", "-p", "b", *options).exit_code == 2


@pytest.mark.parametrize(
    ("environment", "codes"),
    [
        ({}, set()),
        ({"FORCE_COLOR": ""}, set()),
        ({"FORCE_COLOR": "1"}, {"36", "4", "0"}),
        ({"FORCE_COLOR": "1", "NO_COLOR": ""}, {"36", "4", "0"}),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, set()),
    ],
)
def test_a_pipe_gets_marks_if_they_are_forced(tiny, environment, codes):
    options = [*models_of(tiny), "--temp", "0", "-n", "9", "--threshold", "0"]
    plain = invoke("run", "hello", *options).stdout
    text = invoke("run", "hello", *options, env=environment).stdout
    assert set(re.findall(r"\x1b\[(\d+)m", text)) == codes
    assert re.sub(r"\x1b\[\d+m", "", text) == plain


def test_without_a_switch_one_line_says_margin(tiny):
    result = invoke("run", "hello", *models_of(tiny), "-n", "1")
    assert "using margin, an untrained rule" in result.stderr.splitlines()[0]


def test_json_has_the_documented_shape(tiny):
    result = invoke("run", "hello", *models_of(tiny), "--temp", "0", "-n", "9", "--json",
                    "--threshold", "0.5")  # fmt: skip
    answer = json.loads(result.stdout)
    assert set(answer) == {
        "model", "expert", "switch", "threshold", "prompt_tokens", "text", "finish_reason",
        "tokens", "withdrawn", "stats",
    }  # fmt: skip
    assert set(answer["stats"]) == {
        "n_prompt", "n_generated", "n_deferred", "n_reviewed", "n_undone", "defer_rate",
        "base_tokens", "expert_calls", "expert_tokens", "expert_failures",
        "base_seconds", "expert_seconds", "expert_load_seconds", "first_token_seconds",
        "total_seconds", "tokens_per_second",
    }  # fmt: skip
    assert all(set(t) == {"id", "text", "source", "p_defer"} for t in answer["tokens"])
    assert "".join(t["text"] for t in answer["tokens"]) == answer["text"]
    assert answer["switch"] == "margin"
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["n_generated"] == len(answer["tokens"]) == 9
    deferred = sum(t["source"] == "expert" for t in answer["tokens"])
    assert answer["stats"]["n_deferred"] == deferred
    assert all((t["p_defer"] > 0.5) == (t["source"] == "expert") for t in answer["tokens"])


def test_errors_are_one_line_and_exit_1(tiny, tmp_path):
    content = Path(tiny["expert"]).read_bytes()
    (tmp_path / "half.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.gguf").write_text("not a model")
    zeros, one = np.zeros((1, 48), np.float32), np.zeros(1, np.float32)
    Switch(("hidden",), zeros, one, 48).save(tmp_path / "narrow.gguf")
    good = tmp_path / "good.gguf"
    Switch(("p1",), np.ones((1, 1), np.float32), one, 64).save(good)
    poisoned = good.read_bytes()[:-64] + np.full(16, np.nan, np.float32).tobytes()
    (tmp_path / "nan.gguf").write_bytes(poisoned)
    base, expert = tiny["base"], tiny["expert"]
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 6)
    cases = [
        (["run", "hi", "-m", base, "-me", tmp_path / "no.gguf"], "No such file"),
        (["run", "hi", "-m", base, "-me", tmp_path / "half.gguf"], "ends beyond the file"),
        (["run", "hi", "-m", tmp_path / "text.gguf", "-me", expert], "not a GGUF file"),
        (["run", "hi", "-m", base, "-me", expert, "-sw", tmp_path / "narrow.gguf"], "48 numbers"),
        (["run", "hi", "-m", base, "-me", expert, "-sw", tmp_path / "nan.gguf"], "NaN"),
        (["run", "hi", "-m", base, "-me", expert, "-sw", base], "a model, not a switch"),
        (["run", "hi", "-m", base, "-me", tiny["foreign"]], "vocabularies .* differ"),
        (["run", "hi", "-m", base, "-me", tiny["recurrent"]], "recurrent model cannot roll back"),
        (["run", "hi " * 40, "-m", base, "-me", expert, "-c", "32"], "the context holds 32"),
        (["run", "", "-m", base, "-me", expert], "the prompt is empty"),
        (["run", "hi", "-m", base], "-m without -me"),
        (["train", "--data", data, "-m", base, "-me", expert, "--outfile", tmp_path / "no" / "s"],
         "no such folder"),
        (["train", "--data", data, "-m", base, "-me", expert, "--outfile", tmp_path], "a folder"),
        (["train", "--data", tmp_path / "no", "-m", base, "-me", expert, "--outfile",
          tmp_path / "s"], "No such file"),
    ]  # fmt: skip
    for args, words in cases:
        result = invoke(*args)
        last = result.stderr.splitlines()[-1]
        assert result.exit_code == 1, (args, result.output)
        assert last.startswith("Error: "), (args, result.stderr)
        assert re.search(words, last), (args, last)
        assert result.stdout == ""
        assert sum(line.startswith("Error") for line in result.stderr.splitlines()) == 1


def test_odd_surroundings_are_no_traceback(tiny):
    """No standard input, input that is not UTF-8, an output encoding that lacks the answer's
    characters, an implementation that does not exist."""
    command = [sys.executable, "-P", "-m", "colm_edge", "run", *models_of(tiny), "-n", "20"]
    cases = [
        ({"stdin": subprocess.DEVNULL}, {}, 1, "Error: the prompt is empty"),
        ({"input": b"caf\xe9 and more"}, {}, 0, "tok/s"),
        ({"input": b"hello"}, {"PYTHONIOENCODING": "ascii"}, 0, "tok/s"),
        ({"input": b"hello"}, {"COLM_EDGE_NATIVE": "abacus"}, 1, "Error: COLM_EDGE_NATIVE: exp"),
    ]
    for source, environment, code, words in cases:
        result = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, check=False, **source
        )
        assert result.returncode == code, result.stderr
        last = result.stderr.decode(errors="replace").splitlines()[-1]
        assert words in last
        assert last.startswith("Error: ") == (code == 1)


def test_ctrl_c_exits_130(tiny, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("colm_edge.info.describe_files", interrupted)
    result = invoke("info", tiny["base"])
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "\n")


def test_wrong_usage_exits_2():
    for args in (
        ["run", "--threshold", "7", "x"],
        ["run", "--nonsense"],
        ["run", "-t", "513", "x"],
        ["serve", "--expert-idle-unload", "nan"],
        ["train"],
        ["walk"],
    ):
        assert invoke(*args).exit_code == 2


def test_a_prompt_cache_of_several_experts_is_refused_before_the_answer(models, tmp_path):
    team, switch = models
    experts = [f"{name}={path}" for name, path in team["expert"].items()]
    args = ["run", "x", "-m", team["model"], "-me", experts[0], "-me", experts[1], "-sw", switch]
    result = invoke(*args, "-t", "1", "-n", "3", "--prompt-cache", tmp_path / "c")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "a prompt cache works with one expert" in result.stderr


def test_a_folder_that_cannot_be_made_is_one_line(tiny, tmp_path):
    (tmp_path / "file").touch()
    script = Path(__file__).parents[2] / "tools" / "make_random_pair.py"
    ran = subprocess.run(
        [sys.executable, script, "--out", tmp_path / "file" / "x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith(f"Error: {tmp_path / 'file' / 'x'}: ")


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 200])
def test_a_progress_bar_fits_its_terminal(monkeypatch, columns):
    """One that is wrapped would be written anew at each step."""
    monkeypatch.setattr(os, "get_terminal_size", lambda file: os.terminal_size((columns, 24)))
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(fileno=lambda: 2, isatty=lambda: True))
    bar = progress("base", 768)
    bar.pos, bar.start = 500, 0.0
    assert len(bar.format_progress_line()) < max(columns, 46)
    if columns >= 80:
        assert bar.width == 36


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "--temp", "nan", "x"], "'nan' is not a number"),
        (["run", "--review", "foo", "x"], "'foo' is not a valid number; expected a number or off"),
        (["run", "-n", "x", "x"], "'x' is not a valid integer"),
        (["train", "--data", "d", "--outfile", "o", "--review", "nan"], "'nan' is not a number"),
        (["eval", "--data", "d", "--alpha", "nan"], "'nan' is not a number"),
        (["serve", "--expert-timeout", "nan"], "'nan' is not a number"),
        (["run", "-j", "nosuch", "x"], "nosuch: No such file or directory; expected a text"),
    ],
)
def test_what_is_not_a_number_or_a_file_is_refused_at_the_start(args, words):
    result = invoke(*args)
    assert result.exit_code == 2
    assert words in result.stderr


def test_an_empty_file_is_not_a_grammar(tmp_path):
    (tmp_path / "empty").touch()
    result = invoke("run", "--grammar-file", tmp_path / "empty", "-t", "1", "x")
    assert result.exit_code == 1
    assert "it has no root" in result.stderr


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_folder_is_not_a_model(path):
    for args in (["info", path], ["run", "-m", path, "-me", path, "x"]):
        result = invoke(*args)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1


def test_every_command_has_help():
    assert invoke("-h").exit_code == 0
    for name in main.commands:
        result = invoke(name, "-h")
        assert result.exit_code == 0
        assert main.commands[name].help


def test_choices_are_what_the_code_knows():
    """They are written out in the command line, which must not import numpy for its help."""
    from colm_edge.evaluate.metrics import METRICS
    from colm_edge.switch.file import FEATURE_SETS
    from colm_edge.train.objectives import OBJECTIVES

    def choices(command: str, flag: str) -> list[str]:
        parameters = (p for p in main.commands[command].params if flag in p.opts)
        return list(next(parameters).type.choices)

    assert choices("train", "--threshold-by") == list(METRICS)
    assert choices("eval", "--metric") == ["nll", *METRICS]
    assert choices("train", "--features") == list(FEATURE_SETS)
    assert set(choices("train", "--objective")) == {"best", *OBJECTIVES}


def test_train_writes_a_switch_that_runs(tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"p{i}", "completion": f"c{i} and more"} for i in range(10)]
    write_rows(data, lines)
    switch = tmp_path / "s.gguf"
    result = invoke("train", "--data", data, "--outfile", switch, *models_of(tiny))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert {"nll_base", "nll_expert", "nll_joint", "n_train", "n_valid", "threshold"} <= set(report)
    assert Switch.load(switch).features[0] == "hidden"
    run = invoke("run", "hello", *models_of(tiny), "-sw", switch, "--defer-rate", "0.5", "-n", "5")
    assert run.exit_code == 0


def test_expert_scores_come_from_elsewhere(tiny, tmp_path, monkeypatch):
    """`score` where the expert is, `train` where it is not: the same switch."""
    monkeypatch.setattr("colm_edge.train.scoring.PACK_TOKENS", 40)
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"p{i}", "completion": f"c{i} and more"} for i in range(10)]
    write_rows(data, lines)
    scores, switches = tmp_path / "scores.npz", [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    result = invoke("score", "--data", data, "--outfile", scores, *models_of(tiny))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["n_documents"] == 10
    invoke("train", "--data", data, "--outfile", switches[0], *models_of(tiny))
    apart = ["train", "--data", data, "--outfile", switches[1], "--expert-scores", scores]
    result = invoke(*apart, "-m", tiny["base"], "-t", "1")
    assert result.exit_code == 0, result.output
    one, other = (Switch.load(path) for path in switches)
    assert np.array_equal(one.weight, other.weight)
    parts = [tmp_path / f"part{k}.npz" for k in (1, 2)]
    for k, part in enumerate(parts, 1):
        options = ["--data", data, "--outfile", part, "--shard", f"{k}/2", *models_of(tiny)]
        assert invoke("score", *options).exit_code == 0
    refused = invoke("score", "--data", data, "--outfile", parts[0], "--shard", "3/2")
    assert "expected K/N, with K from 1 to N" in refused.stderr
    both = [parts[0], "--expert-scores", parts[1]]
    assert invoke(*apart[:-1], *both, "-m", tiny["base"], "-t", "1").exit_code == 0
    result = invoke(*apart[:-1], *parts, "-m", tiny["base"], "-t", "1")
    assert result.exit_code == 0, result.output
    assert np.array_equal(Switch.load(switches[1]).weight, one.weight)
    write_rows(data, lines[1:])
    result = invoke(*apart, "-m", tiny["base"], "-t", "1")
    assert result.exit_code == 1
    assert "holds scores of other data" in result.stderr.splitlines()[-1]


def test_help_and_import_load_nothing_heavy():
    heavy = ["numpy", "llama_cpp", "onnxruntime", "matplotlib", "torch", "starlette", "fastapi",
             "pydantic", "gguf", "huggingface_hub", "prompt_toolkit", "wcwidth",
             "platformdirs"]  # fmt: skip
    code = (
        "import sys, colm_edge\nfrom click.testing import CliRunner\n"
        "from colm_edge.cli import main\n"
        "for command in ([], *([name] for name in main.commands)):\n"
        "    assert CliRunner().invoke(main, [*command, '-h']).exit_code == 0\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_the_version_tells_of_llama_cpp_and_the_devices():
    out = invoke("--version").stdout
    assert re.search(r"^colm-edge \d+\.\d+\.\d+, the switch read by \w+$", out, re.MULTILINE)
    assert re.search(r"^llama-cpp-python \d.*CPU", out, re.MULTILINE)
    assert re.search(r"^device CPU: .+$", out, re.MULTILINE)


OFFLINE = """
import sys
from colm_edge.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_offline_works_without_any_network():
    """In a network namespace of its own, which has no interface but a loopback that is down."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs unshare -rn (Linux, and the right to it)")

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = ["unshare", "-rn", sys.executable, "-c", OFFLINE, *args]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    done = run("run", "--offline", "--temp", "0", "What is the symbol of tungsten?")
    assert done.returncode == 0, done.stderr
    assert "W" in done.stdout
    done = run("run", "--offline", "--pair", "smollm2", "hello")
    assert done.returncode == 1
    assert "nothing is downloaded offline" in done.stderr


@pytest.mark.parametrize(
    ("flags", "name", "expected"),
    [
        ([], "overlap", None),
        (["--overlap"], "overlap", True),
        (["--no-overlap"], "overlap", False),
        ([], "threads_auto", False),
        (["--threads-auto"], "threads_auto", True),
    ],
)
def test_a_flag_of_the_models_can_be_given_or_left_out(tiny, monkeypatch, flags, name, expected):
    from colm_edge import pair

    seen = []
    load = pair.load

    def spy(*args, **options):
        seen.append(options.get(name))
        return load(*args, **options)

    monkeypatch.setattr(pair, "load", spy)
    assert invoke("run", "hello", *models_of(tiny), "-n", "2", *flags).exit_code == 0
    assert seen == [expected]
