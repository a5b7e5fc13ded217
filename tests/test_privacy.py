"""What commands open and leave behind with local files: no socket but a server's own, no look-up of
a name, and on the disk what docs/trust.md says. Nothing is `--offline` here."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
from lib.rows import write_rows

import colm_edge
from colm_edge.llama.model import Model
from colm_edge.switch.file import Switch

SECRET = "Xylophon-7731"  # in every prompt
HAS_SERVER = find_spec("uvicorn") is not None
QUESTION = f"What is the symbol of tungsten, {SECRET}?"
# A namespace whose network has no interface but a loopback that is down.
APART = ["unshare", "-rn"]


def works(*command: str) -> bool:
    return (
        shutil.which(command[0]) is not None
        and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    )


pytestmark = pytest.mark.skipif(
    not works("strace", "-o", os.devnull), reason="needs strace (Linux), and the right to use it"
)


@dataclass
class Ran:
    """A command that ran in a home of its own. calls: the system calls that were traced."""

    home: Path
    calls: list[str]

    @property
    def network(self) -> list[str]:
        """The calls that open a socket or reach another one."""
        return [c for c in self.calls if re.match(r"(socket|connect|send\w+|bind)\(", c)]

    @property
    def names_read(self) -> list[str]:
        """The files of whoever looks names up, as far as they were opened."""
        found = re.compile(r'"/etc/(resolv\.conf|hosts|nsswitch\.conf|gai\.conf)"|nscd')
        return [call for call in self.calls if found.search(call)]

    @property
    def left(self) -> dict[str, int]:
        """The files and folders that the command left, and their permissions; what holds costs is
        one entry."""
        found = {}
        for path in sorted(self.home.rglob("*")):
            name = str(path.relative_to(self.home))
            if not re.match(r"given|\.cache/colm-edge/costs/", name):
                found[name] = stat.S_IMODE(path.lstat().st_mode)
        return found

    def files_with(self, text: str) -> set[str]:
        return {
            str(path.relative_to(self.home))
            for path in self.home.rglob("*")
            if path.is_file() and "given" not in path.parts and text.encode() in path.read_bytes()
        }


def environment(home: Path) -> dict[str, str]:
    kept = {"PATH", "PYTHONPATH", "LANG", "OMP_NUM_THREADS", "VIRTUAL_ENV"}
    return {**{k: v for k, v in os.environ.items() if k in kept}, "HOME": str(home)}


def traced(home: Path, *args: str, apart: bool) -> list[str]:
    trace = ["strace", "-f", "-qq", "-e", "trace=network,openat", "-o", str(home.parent / "calls")]
    command = [*trace, sys.executable, "-P", "-m", "colm_edge", *args]
    return [*APART, *command] if apart and works(*APART) else command


def calls_of(home: Path) -> list[str]:
    lines = (home.parent / "calls").read_text(errors="replace").splitlines()
    return [re.sub(r"^\d+\s+", "", line) for line in lines]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A new home, with what the commands are given."""
    given = tmp_path / "home" / "given"
    given.mkdir(parents=True)
    rows = [{"prompt": f"{i}: {QUESTION}", "completion": "W, of course"} for i in range(8)]
    write_rows(given / "d.jsonl", rows)
    return given.parent


def ran(home: Path, *args: str, typed: str = "") -> Ran:
    done = subprocess.run(
        traced(home, *args, apart=True), input=typed, capture_output=True, text=True, check=False,
        cwd=home, env=environment(home), umask=0o022,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Ran(home, calls_of(home))


COSTS = {".cache": 0o755, ".cache/colm-edge": 0o755, ".cache/colm-edge/costs": 0o755}
BASE = str(Path(colm_edge.__file__).parent / "data" / "base.gguf")
ANSWER = ("--temp", "0", "-n", "4", "-t", "1")
DATA = ("--data", "given/d.jsonl", "-t", "1")
PROMPTS = ("--prompts", "given/d.jsonl", "-t", "1", "-n", "4")
# What each command leaves besides the costs of decodes.
COMMANDS: dict[tuple[str, ...], dict[str, int]] = {
    ("run", QUESTION, *ANSWER): {},
    ("run", QUESTION, *ANSWER, "--prompt-cache", "c"): {"c": 0o600},
    ("run", QUESTION, *ANSWER, "-sw", "given/head.onnx"): {},
    ("chat", *ANSWER): {},
    ("train", *DATA, "--outfile", "s.gguf"): {"s.gguf": 0o644},
    ("train", *PROMPTS, "--outfile", "s.gguf"): {"s.gguf": 0o644, "s.gguf.work": 0o700},
    ("score", *DATA, "--outfile", "s.npz"): {"s.npz": 0o644},
    ("eval", *DATA, "--metric", "exact", "-n", "4"): {},
    ("eval", *DATA, "--work-dir", "w"): {"w": 0o700},
    ("bench", "--rounds", "1", "-n", "8", "-t", "1"): {},
    ("info", BASE, "--costs"): {},
}


@pytest.mark.parametrize("args", COMMANDS, ids=lambda args: " ".join((args[0], *args[-2:])))
def test_a_command_with_local_files_opens_no_socket(home, args):
    if "given/head.onnx" in args:
        write_head(home / "given" / "head.onnx")
    one = ran(home, *args, typed=f"{QUESTION}\n")
    assert one.calls  # they were traced
    assert one.network == one.names_read == []
    left = {name: mode for name, mode in one.left.items() if "/" not in name or name in COSTS}
    assert left.items() <= (COSTS | COMMANDS[args]).items()
    assert COMMANDS[args].items() <= left.items()
    # What was asked is nowhere but where only its owner reads.
    private = {name for name, mode in left.items() if not mode & 0o077}
    assert {name.split("/")[0] for name in one.files_with(SECRET)} <= private


def write_head(path: Path) -> None:
    """Write an ONNX head for the base that ships."""
    pytest.importorskip("onnx", reason="writes a head with the onnx package: pip install onnx")
    from convert_switch import write_onnx

    base = Model(BASE)
    rows = np.full((1, base.n_embd), 0.1, np.float32)
    write_onnx(Switch(("hidden",), rows, np.zeros(1, np.float32), base.n_embd), path)
    base.close()


@pytest.mark.skipif(not HAS_SERVER, reason="needs the extra [server]")
def test_a_server_opens_its_own_socket_alone(home):
    with subprocess.Popen(
        traced(home, "serve", "--port", "0", *ANSWER, apart=False),
        stderr=subprocess.PIPE, text=True, cwd=home, env=environment(home),
    ) as server:  # fmt: skip
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        url = next(line for line in lines if "listening on" in line).split()[-1]
        asked = {"messages": [{"role": "user", "content": QUESTION}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGINT)
        server.stderr.read()
    assert answer.status_code == 200
    one = Ran(home, calls_of(home))
    opened, bound, *rest = [c for c in one.network if not c.startswith("send")]
    assert opened.startswith("socket(AF_INET, SOCK_STREAM")
    assert 'sin_port=htons(0), sin_addr=inet_addr("127.0.0.1")' in bound
    assert rest == []
    assert not [c for c in one.network if "sa_family" in c and not c.startswith("bind")]
    assert one.names_read == []
    assert one.files_with(SECRET) == set()
