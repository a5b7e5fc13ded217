"""The small random pair with which files are read that belong to models."""

from __future__ import annotations

import json
from pathlib import Path

from colm_edge.pair import Pair, load
from lib.random_model import SHAPES, write_model

TEMPLATE = (
    "{%- for m in messages -%}{{ m['role'] + ': ' + m['content'] + '\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}assistant:{%- endif -%}"
)
N_LINES = 8
DATA = "".join(
    json.dumps({"prompt": f"p{i}", "completion": f"c{i} <<1+{i}={1 + i}>> and more {i}"}) + "\n"
    for i in range(N_LINES)
).encode()


def open_pair(folder: Path) -> Pair:
    """Return the pair in a folder, made first if it is not there."""
    base, expert = folder / "base.gguf", folder / "expert.gguf"
    if not expert.exists():
        write_model(base, SHAPES["tiny"], seed=0, gain=20.0, chat_template=TEMPLATE)
        write_model(expert, SHAPES["tiny"], seed=1, gain=20.0)
    return load(base, expert, "margin", n_threads=1, n_ctx=256, overlap=False)
