"""An expert on llama.cpp's RPC servers: its errors and, if servers are available, its text."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import llama_cpp
import pytest
from click.testing import CliRunner
from expert_servers import free_port

from colm_edge.cli import main
from colm_edge.errors import ModelError
from colm_edge.llama import rpc
from colm_edge.llama.rpc import check_servers
from colm_edge.options import Options
from colm_edge.pair import load


def test_a_build_without_rpc_says_so(tiny, monkeypatch):
    monkeypatch.setattr(llama_cpp, "llama_supports_rpc", lambda: False)
    args = ["run", "hello", "-m", tiny["base"], "-me", tiny["expert"], "--rpc", "127.0.0.1:1"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: this llama.cpp was built without its RPC backend; build it with "
        "CMAKE_ARGS=-DGGML_RPC=on, or leave --rpc out"
    )


@pytest.mark.parametrize(
    ("server", "told"),
    [
        ("nonsense", "'nonsense' is not the address of an RPC server; expected HOST:PORT"),
        ("host:", "'host:' is not the address of an RPC server"),
        ("127.0.0.1:²", "is not the address of an RPC server"),
        ("a..b:1", "a..b:1: no RPC server answers there"),
        ("127.0.0.1:99999", "127.0.0.1:99999: no RPC server answers there"),
        ("127.0.0.1:{port}", r"no RPC server answers there \(Connection refused\)"),
    ],
)
def test_servers_that_do_not_exist_are_named(monkeypatch, server, told):
    """They are checked at the start, because llama.cpp would abort at the first deferral."""
    monkeypatch.setattr(llama_cpp, "llama_supports_rpc", lambda: True)
    with pytest.raises(ModelError, match=told):
        check_servers([server.format(port=free_port())])


def test_a_server_of_another_kind_is_recognised(monkeypatch):
    """llama.cpp aborts the whole process after an unexpected greeting."""
    monkeypatch.setattr(llama_cpp, "llama_supports_rpc", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(64)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ModelError, match=r"its answer is not that of this llama.cpp"):
            check_servers([f"127.0.0.1:{listening.getsockname()[1]}"])
        thread.join(10)


def test_a_server_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(llama_cpp, "llama_supports_rpc", lambda: True)
    monkeypatch.setattr(rpc, "CONNECT_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ModelError, match="it may be serving another client, or is not an RPC"):
            check_servers([server])


def test_offline_does_not_ask_another_machine(tiny):
    runner, models = CliRunner(), ["-m", tiny["base"], "-me", tiny["expert"]]
    offline = runner.invoke(main, ["run", "hello", *models, "--rpc", "192.0.2.1:1", "--offline"])
    assert offline.exit_code == 1
    assert "192.0.2.1:1: --offline allows only servers" in offline.stderr


@contextmanager
def rpc_server():
    port = free_port()
    command = [os.environ["COLM_EDGE_RPC_SERVER"], "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.skipif(
    "COLM_EDGE_RPC_SERVER" not in os.environ or not llama_cpp.llama_supports_rpc(),
    reason="needs llama.cpp with RPC, and COLM_EDGE_RPC_SERVER, the path of a ggml-rpc-server",
)
def test_an_expert_on_several_servers_writes_the_same_text(tiny):
    options = Options(temperature=0.0, threshold=0.4, max_tokens=40)
    models = {"model": tiny["base"], "expert": tiny["expert"], "switch": "margin"}
    with load(**models, n_threads=1, n_ctx=256, defaults=options) as here:
        expected = here.generate("hello world")
    assert 0 < expected.stats.n_deferred < 40
    with (
        rpc_server() as one,
        rpc_server() as other,
        load(**models, n_threads=1, n_ctx=256, rpc=[one, other], defaults=options) as pair,
    ):
        answer = pair.generate("hello world")
        assert answer.text == expected.text
        assert [s.source for s in answer.steps] == [s.source for s in expected.steps]
