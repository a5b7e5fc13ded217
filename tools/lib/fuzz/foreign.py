"""Kinds that other programs write: checkpoints, ONNX heads, and chat templates."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np

from colm_edge.llama import template_sandbox
from colm_edge.llama.chat_template import ChatTemplate
from colm_edge.switch.file import Switch
from colm_edge.switch.onnx import load_onnx
from colm_edge.switch.rules import DEFER_TOKEN
from lib.co_llm import open_checkpoint, read_row, write_base
from lib.fuzz.kind import Files, Kind, Read
from lib.fuzz.mutate import COUNTS, TEXTS, mutated_bytes, mutated_files, mutated_json
from lib.fuzz.zip import bomb, members_of, zipped

ROWS, WIDTH = 11, 6
NAMES = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")


def _folder(weights: Files) -> Files:
    """Return a small Co-LLM checkpoint."""
    ids = {"<pad>": ROWS - 2, DEFER_TOKEN: ROWS - 1}
    added = [{"id": i, "content": text} for text, i in ids.items()]
    contents = {
        "config.json": {"vocab_size": ROWS, "pad_token_id": 9, "logit_scale": 0.5},
        "added_tokens.json": ids,
        "tokenizer.json": {"added_tokens": added, "padding": {"pad_token": "<pad>"}},
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(t["id"]): t for t in added},
            "additional_special_tokens": [DEFER_TOKEN],
        },
    }
    return {**weights, **{name: json.dumps(x).encode() for name, x in contents.items()}}


def _arrays() -> dict[str, bytes]:
    rng = np.random.default_rng(7)
    shapes = [(ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,)]
    return {
        name: rng.normal(size=shape).astype(np.float32).tobytes()
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def _shape(data: bytes) -> list[int]:
    return [ROWS, WIDTH] if len(data) > 4 * WIDTH else [WIDTH]


def _safetensors(_: Path) -> Sequence[Files]:
    header, body = {}, b""
    for name, data in _arrays().items():
        place = [len(body), len(body) + len(data)]
        header[name] = {"dtype": "F32", "shape": _shape(data), "data_offsets": place}
        body += data
    text = json.dumps(header).encode()
    return [_folder({"model.safetensors": struct.pack("<Q", len(text)) + text + body})]


def _mutated_safetensors(files: Files, rng: Random) -> dict[str, bytes]:
    name = "model.safetensors"
    if rng.random() < 0.4:
        return mutated_files(files, rng)
    data = files[name]
    end = 8 + int(struct.unpack_from("<Q", data)[0])
    text = mutated_json(data[8:end], rng)
    size = len(text) if rng.random() < 0.9 else rng.choice(COUNTS)
    return {**files, name: struct.pack("<Q", size) + text + data[end:]}


def _pickled(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _bin(_: Path) -> Sequence[Files]:
    """As torch.save writes it."""
    steps, members = b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(", []
    for i, (name, data) in enumerate(_arrays().items()):
        shape = _shape(data)
        numbers = [b"".join(b"K" + bytes([n]) for n in s) for s in (shape, [*shape[1:], 1])]
        end = b"t" if len(shape) > 2 else (b"\x86" if len(shape) == 2 else b"\x85")
        steps += (
            _pickled(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _pickled("storage")
            + b"ctorch\nFloatStorage\n" + _pickled(str(i)) + _pickled("cpu")
            + b"K" + bytes([len(data) // 4]) + b"tQK\x00" + numbers[0] + end + numbers[1] + end
            + b"\x89h\x00)RtR"
        )  # fmt: skip
        members.append((f"a/data/{i}", data))
    steps += b"u}" + _pickled("_metadata") + b"h\x00)Rsb."
    members = [("a/data.pkl", steps), ("a/byteorder", b"little"), *members]
    return [_folder({"pytorch_model.bin": zipped(members)})]


# Steps of pickles that are read, and others.
STEPS = (
    *(bytes([i]) for i in range(256)), b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"h\x01",
    b"q\x05", b"\x8a\x09" + b"\x00" * 8 + b"\x40",
    b"J\xff\xff\xff\xff", b"J\x00\x00\x00\x40", b"K\x00",
    b"\x8b\xff\xff\xff\x7f", b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"h\x01h\x01\x86",
    b"}X\x04\x00\x00\x00pathX\x0b\x00\x00\x00/etc/passwdsb",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\xff", b"\x95" + b"\xff" * 8, b"(((((((", b"ttttt",
)  # fmt: skip


def _mutated_bin(files: Files, rng: Random) -> dict[str, bytes]:
    if rng.random() < 0.2:
        return mutated_files(files, rng)
    name = "pytorch_model.bin"
    members = members_of(files[name])
    for _ in range(rng.choice((1, 1, 2, 4))):
        i = 0 if rng.random() < 0.7 else rng.randrange(len(members))
        key, data = members[i]
        what = rng.random()
        if what < 0.5 and i == 0:
            at = rng.randrange(len(data) + 1)
            cut = rng.choice((0, 0, 1, 2, 8))
            data = data[:at] + rng.choice(STEPS) * rng.choice((1, 1, 50)) + data[at + cut :]
        elif what < 0.9:
            data = mutated_bytes(data, rng)
        elif what < 0.92:
            return {**files, name: bomb(members, i)}
        elif what < 0.94:
            return {**files, name: zipped(members, packed=True)}
        else:
            key = rng.choice((*TEXTS[:6], members[-1][0], "a/data.pkl", "b/data.pkl"))
        members[i] = key, data
    return {**files, name: zipped(members)}


def _convert(_: Path) -> Read:
    def read(folder: Path) -> None:
        found = open_checkpoint(folder)
        base = folder.with_name(folder.name + "-base")
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        read_row(found).switch("s").save(base / "s.gguf")
        write_base(found, base)

    return read


def _heads(needs: Path) -> Sequence[Files]:
    from convert_switch import write_onnx

    weight = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None]
    write_onnx(Switch(("hidden",), weight, np.ones(1, np.float32), WIDTH), needs / "h.onnx")
    return [{"h.onnx": (needs / "h.onnx").read_bytes()}]


def _read_head(_: Path) -> Read:
    return lambda folder: load_onnx(folder / "h.onnx")


TEMPLATES = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m.content|trim }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'assistant' }}{%- endif -%}",
    "{% set ns = namespace(t='', n=0, l=[]) %}{% macro f(x, n=2) %}{{ x }}{% if n %}"
    "{{ f(x, n - 1) }}{% endif %}{% endmacro %}{% for m in messages %}"
    "{% set ns.t = ns.t ~ m.content %}{% set ns.l = ns.l + [m.role] %}{{ f(ns.t) }}{% endfor %}"
    "{{ tools | tojson }}"
    "{{ ns.l|join(' ') }}",
)
PIECES = (
    "{{ ns.t * 1000 }}",
    "{% set ns.t = ns.t ~ ns.t %}",
    "{% set ns.l = [ns.l, ns.l] %}",
    "{{ ns }}",
    "{% for a in range(99999) %}",
    "{% for a in ns.t %}",
    "{% endfor %}",
    "{% endif %}",
    "{% if a %}",
    "{% set ns.t %}{{ ns.t }}{{ ns.t }}{% endset %}",
    "{{ f(f(ns.t)) }}",
    "{{ f(ns.t, 99) }}",
    "{{ '%99999999d' % 1 }}",
    "{{ ns.t|center(999999999) }}",
    "{{ ns.t.replace('', ns.t) }}",
    "{{ ns.t.join(ns.l) }}",
    "{{ ns.l|join(ns.t) }}",
    "{{ ns.l|string }}",
    "{{ ns.l == ns.l[::-1] }}",
    "{{ '{0}{0}'.format(ns.t) }}",
    "{{ ns.l|tojson(indent=9) }}",
    "{% set ns.n = ns.n * 99 + 9 %}",
    "{{ 2 ** ns.n }}",
    "{{ ns.t|list|length }}",
    "{{ ns.t.split('a')|sort }}",
    "{{ loop(ns.l) }}",
    "{{ ns.t|indent(ns.n) }}",
    "{{ ns.t|batch(3, ns.t)|list }}",
    "{{ raise_exception(ns.t) }}",
    "{{ strftime_now(ns.t) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ ns.l|map('replace', 'a', ns.t)|list }}",
    "{{ messages[0].content.rfind(ns.t) }}",
    "{{ ns.t|int(0, 16) }}",
    "{{ dict(a=ns.l)|items|list }}",
    "{% set ns.l = messages|groupby('role')|list %}",
    "{{ ns.t|e|e|e }}",
    "{% include 'a' %}",
    "{% filter upper %}",
    "{% endfilter %}",
    "{% call f() %}",
    "{% endcall %}",
    "{% raw %}",
    "{#",
    "((",
)


def _templates(_: Path) -> Sequence[Files]:
    return [{"t.jinja": text.encode()} for text in TEMPLATES]


def _mutated_template(files: Files, rng: Random) -> dict[str, bytes]:
    ((name, data),) = files.items()
    for _ in range(rng.choice((1, 2, 4, 8))):
        if rng.random() < 0.2:
            data = mutated_bytes(data, rng)
            continue
        places = [i + 2 for i in range(len(data) - 1) if data[i : i + 2] in (b"%}", b"}}")]
        at = rng.choice(places or [0])
        data = data[:at] + rng.choice(PIECES).encode() * rng.choice((1, 1, 2, 30)) + data[at:]
    return {name: data}


def _render(_: Path) -> Read:
    # Less than the tries have, so that one that is not ended is told from one that is.
    template_sandbox.SECONDS = 1.0
    talk = [{"role": role, "content": role * 9} for role in ("system", "user", "assistant", "user")]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

    def read(folder: Path) -> str:
        text = (folder / "t.jinja").read_bytes().decode("utf-8", "replace")
        return ChatTemplate(text, "<s>", "</s>").render(talk, tools=tools)

    return read


KINDS = (
    Kind("safetensors", _safetensors, _convert, _mutated_safetensors),
    Kind("bin", _bin, _convert, _mutated_bin),
    Kind("onnx", _heads, _read_head, n_tests=400),
    Kind("template", _templates, _render, _mutated_template, n_tests=60),
)
