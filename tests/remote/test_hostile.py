"""Answers without end, byte by byte, packed, or nested are bounded in time and memory."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from expert_servers import faking

from colm_edge.errors import LONGEST, ColmError
from colm_edge.pair import Pair, load
from colm_edge.remote import http
from colm_edge.remote.greeting import DIALECTS
from colm_edge.remote.http import RequestError, Server

pytestmark = pytest.mark.usefixtures("no_back_off")

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def answering(answer: Answer, secured: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run a server whose every answer is written so; give its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):  # the client left
                answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if secured is not None:
        server.socket = secured.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http{'' if secured is None else 's'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def begin(handler: BaseHTTPRequestHandler, **headers: str) -> None:
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def refused(answer: Answer, timeout: float = 30.0) -> RequestError:
    with answering(answer) as url:
        server = Server(url, timeout)
        with pytest.raises(RequestError) as caught:
            server.request("/v1/models")
        server.close()
    return caught.value


def test_an_endless_answer_is_cut(monkeypatch):
    monkeypatch.setattr(http, "MOST_BYTES", 1 << 20)

    def endless(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        while True:
            handler.wfile.write(b" " * 65536)

    e = refused(endless)
    assert "more than 1 MB" in str(e)
    assert e.final


def test_an_answer_that_trickles_ends_at_the_deadline():
    stop = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        while not stop.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    e = refused(trickle, timeout=0.5)
    stop.set()
    assert "no answer in 0.5 seconds" in str(e)
    assert not e.final


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nX-Long: "])
def test_headers_that_trickle_end_at_the_deadline(begun):
    stop = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(begun)
        while not stop.wait(0.05):
            handler.wfile.write(b"H")
            handler.wfile.flush()

    e = refused(trickle, timeout=0.5)
    stop.set()
    assert "no answer in 0.5 seconds" in str(e)


def test_a_packed_answer_is_not_unpacked():
    def packed(handler: BaseHTTPRequestHandler) -> None:
        assert handler.headers["Accept-Encoding"] == "identity"
        begin(handler, Content_Encoding="gzip")
        handler.wfile.write(gzip.compress(bytes(1 << 20)))

    assert "compressed" in str(refused(packed))


def test_a_nested_answer_is_no_json():
    def nested(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        handler.wfile.write(b"[" * 200_000)

    assert "not valid JSON" in str(refused(nested))


def test_another_host_is_not_followed():
    def elsewhere(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", "http://other.example/")
        handler.end_headers()

    assert "HTTP 302" in str(refused(elsewhere))


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there

    def whole(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        handler.wfile.write(b'{"data": []}')

    with answering(whole) as url:
        server = Server(url, 30.0)
        assert server.request("/v1/models") == {"data": []}
        server.close()


@pytest.fixture
def alone(tiny) -> str:
    """What the base writes by itself."""
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        return pair.generate("hello", temperature=0.0, max_tokens=12, threshold=1.0).text


@contextmanager
def asking(tiny, url: str) -> Iterator[tuple[Pair, list[str]]]:
    """Load a pair whose expert is there; give it, and what it tells its user."""
    told: list[str] = []
    with load(tiny["base"], url, "margin", n_threads=1, n_ctx=255, note=told.append) as pair:
        yield pair, told


def goes_on(pair: Pair, told: list[str], alone: str) -> str:
    """Assert that the base writes alone, after one warning; return that."""
    answer = pair.generate("hello", temperature=0.0, max_tokens=12, threshold=0.4)
    assert answer.text == alone
    assert answer.stats.n_deferred == 0
    assert answer.stats.expert_failures > 1
    (warning,) = [line for line in told if "measuring" not in line]
    assert warning.isprintable()
    assert len(warning) <= LONGEST + 3
    assert warning.endswith("the base goes on alone")
    return warning


Tops = list[tuple[Any, Any]]
TOPS: dict[str, Tops] = {
    "negative ids": [(-1, -0.1), (-7, -3.0)],
    "huge ids": [(10**9, -0.1), (10**40, -0.2)],
    "an endless id": [("9" * 9000, -0.1)],
    "NaN": [(1, math.nan), (2, -1.0)],
    "a likelihood above 1": [(1, 2.0), (2, -1.0)],
    "1e999": [(1, math.inf)],
    "no ids": [("[]", -0.1)],
    "nothing": [],
    "no numbers": [(1, "\x1b[31m" + "x" * 100_000)],
}
BODIES = {
    "1e999 for all": b"1e999",
    "brackets": b"[" * 200_000,
    "a list": b"[]",
    "escapes": b'{"error": {"message": "\\u001b[2J\\u001b]0;owned\\u0007 no"}}',
    "no text": b"\xff\xfe\x00",
}


def with_tops(answer: dict, tops: Tops) -> dict:
    """Return an answer that tells of other tokens."""
    if "completion_probabilities" in answer:
        entries = [{"id": token, "logprob": x} for token, x in tops]
        answer["completion_probabilities"][0]["top_logprobs"] = entries
    else:
        told = {f"token_id:{token}": x for token, x in tops}
        answer["choices"][0]["logprobs"]["top_logprobs"] = [told]
    return answer


@pytest.mark.parametrize("owner", DIALECTS)
def test_the_base_goes_on_whatever_is_said_of_tokens(tiny, alone, owner):
    with faking(owner, tiny["expert"]) as (url, fake):
        for tops in TOPS.values():
            with asking(tiny, url) as (pair, told):
                fake.twist = lambda answer, tops=tops: with_tops(answer, tops)
                goes_on(pair, told, alone)
        for body in BODIES.values():
            with asking(tiny, url) as (pair, told):
                fake.twist = lambda _, body=body: body
                goes_on(pair, told, alone)


@pytest.mark.parametrize("owner", DIALECTS)
def test_counts_that_cannot_be_are_refused(tiny, alone, owner):
    def miscounted(answer: dict, n: Any) -> dict:
        if owner == "llamacpp":
            answer["timings"]["prompt_n"] = n
        elif owner == "vllm":
            answer["usage"]["prompt_tokens"] = n
        else:
            answer["colm"]["expert_tokens"] = n
        return answer

    with faking(owner, tiny["expert"]) as (url, fake):
        for n in (-(10**9), 10**30, math.inf, math.nan, "many"):
            with asking(tiny, url) as (pair, told):
                fake.twist = lambda answer, n=n: miscounted(answer, n)
                goes_on(pair, told, alone)


@pytest.mark.parametrize(
    "scores",
    [
        [None, {"1": {"logprob": math.nan, "rank": 1}}],
        [None, {"1": {"logprob": 3.0, "rank": 1}}],
        [None, {"1": {"logprob": math.inf, "rank": 1}}],
        [None, {"7": {"logprob": -1.0, "rank": 1}}],
        [None],
        1e999,
    ],
)
@pytest.mark.parametrize("owner", ["vllm", "colm-edge"])
def test_scores_that_cannot_be_are_an_error(tiny, owner, scores):
    import numpy as np

    with faking(owner, tiny["expert"]) as (url, fake), asking(tiny, url) as (pair, _):
        fake.twist = lambda _: {"choices": [{"index": 0, "prompt_logprobs": scores}]}
        remote = pair.expert.expert  # type: ignore[union-attr]
        with pytest.raises(ColmError, match="answer is not"):
            list(remote.score([np.array([1, 1], np.int32)], [1]))


LISTS: tuple[Any, ...] = (
    {"listed": 1},
    {"data": 1e999},
    {"data": [[]]},
    {"data": [{"id": [], "owned_by": []}]},
    {"data": [{"id": "\x1b[2J" * 9000, "owned_by": "vllm", "max_model_len": -5}]},
    {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": math.inf}]},
    {"data": [{"id": "m", "owned_by": "llamacpp", "meta": {"n_vocab": 10**40}}]},
    {"data": [{"id": "m", "owned_by": "llamacpp", "meta": "\x1b"}]},
    {"data": [{"id": f"\x1b{i}" * 99, "owned_by": "vllm"} for i in range(999)]},
)


@pytest.mark.parametrize("listed", LISTS, ids=range(len(LISTS)))
def test_a_list_of_models_that_cannot_be_is_told_in_one_line(tiny, listed):
    with faking("vllm", tiny["expert"]) as (url, fake):
        fake.listed = listed
        try:
            with asking(tiny, url) as (_, told):
                (line,) = told
        except ColmError as e:
            line = str(e)
    assert line.isprintable()
    assert len(line) <= LONGEST + 3


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
def test_a_certificate_that_nobody_signed_is_refused(tiny, alone, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out"]
    subprocess.run([*made, str(certificate)], check=True, capture_output=True)
    secured = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    secured.load_cert_chain(certificate, key)
    asked = []

    def whole(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)

    with answering(whole, secured) as url, asking(tiny, url) as (pair, told):
        assert "CERTIFICATE_VERIFY_FAILED" in goes_on(pair, told, alone)
    assert asked == []  # nothing was sent to it


def test_an_errors_own_words_cannot_drive_a_terminal(tiny, alone):
    message = json.dumps({"error": {"message": "\x1b]0;owned\x07\x1b[2J\r" + "x" * 10**6}})

    def failing(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(500)
        handler.end_headers()
        handler.wfile.write(message.encode())

    with answering(failing) as url, asking(tiny, url) as (pair, told):
        assert "HTTP 500" in goes_on(pair, told, alone)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost", "LOCALHOST"])
def test_this_machine_has_several_names(host):
    server = Server(f"http://{host}:1", 1.0)
    assert server.is_local
    assert not server._client.trust_env
    server.close()
