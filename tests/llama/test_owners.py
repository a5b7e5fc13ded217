"""A pair belongs to the process that loaded it, and a context to one thread at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from colm_edge.decode.background import Background
from colm_edge.errors import ModelError
from colm_edge.evaluate.proxy_tuning import Proxy
from colm_edge.llama import owners
from colm_edge.llama.chat_template import ChatTemplate
from colm_edge.llama.context import Context, ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session
from colm_edge.options import Options
from colm_edge.pair import load

# The parent forks while another thread of it evaluates a long prompt and holds every lock there is.
# The child ends by itself, or is ended by the alarm.
FORKED = """
import os, signal, sys, threading
import colm_edge
from colm_edge import ColmError

base, expert, overlap = sys.argv[1:]
inside, go_on = threading.Event(), threading.Event()
go_on.set()

def progress(what, share):
    inside.set()
    go_on.wait()

pair = colm_edge.load(
    base, expert, "margin", n_threads=1, n_ctx=2048, progress=progress, overlap=overlap == "True"
)
options = dict(temperature=0.0, max_tokens=4, threshold=0.5)
begun = pair.stream("hello there", **options)
next(begun)
pair.generate("hello there, this is a prompt", **options | {"threshold": 0.0})
go_on.clear(), inside.clear()
thread = threading.Thread(target=pair.generate, args=("a " * 700,), kwargs=options)
thread.start()
inside.wait()
child = os.fork()
if not child:
    signal.alarm(120)
    for use in (
        lambda: next(begun),
        lambda: pair.generate("hello", **options),
        lambda: pair.stream("hello", **options),
        lambda: pair.base.tokenize("hello"),
        lambda: pair.base_session.sync([1, 2, 3]),
        lambda: pair.expert_session.sync([1, 2, 3]),
        pair.cost_tables,
        pair.unload_expert,
        lambda: pair.save_prompts("never"),
    ):
        try:
            use()
        except ColmError as e:
            assert "forked" in str(e), e
        else:
            raise AssertionError("no error")
    pair.close()
    sys.exit(7)
_, status = os.waitpid(child, 0)
go_on.set()
thread.join()
assert pair.generate("hello", **options).steps  # the parent goes on
pair.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("overlap", [False, True])
def test_a_child_of_fork_gets_an_error_and_does_not_hang(tiny, overlap, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", FORKED, tiny["base"], tiny["expert"], str(overlap)],
        cwd=tmp_path, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 7, ended.stderr
    assert ended.stderr == ""


def test_a_chat_template_is_its_process_own_too(monkeypatch):
    template = ChatTemplate("{{ messages[0].content }}", "", "")
    message = [{"role": "user", "content": "hello"}]
    assert template.render(message) == "hello"
    monkeypatch.setattr(owners, "_forks", owners._forks + 1)
    with pytest.raises(ModelError, match="was forked"):
        template.render(message)


def test_a_second_thread_in_one_context_gets_an_error(tiny, monkeypatch):
    import llama_cpp

    model = Model(tiny["base"])
    context = Context(model, ContextOptions(n_threads=1), 64, 64)
    context.open()
    inside, go_on = threading.Event(), threading.Event()
    decode = llama_cpp.llama_decode

    def slow(*args):
        inside.set()
        go_on.wait()
        return decode(*args)

    monkeypatch.setattr(llama_cpp, "llama_decode", slow)
    thread = threading.Thread(target=context.decode, args=(1,))
    thread.start()
    inside.wait()
    for use in (lambda: context.decode(1), context.clear, lambda: context.save(0), context.close):
        with pytest.raises(ModelError, match="two threads use one context"):
            use()
    go_on.set()
    thread.join()
    context.clear()
    context.close()
    model.close()


def test_what_reads_the_experts_context_waits_for_its_catching_up(tiny, monkeypatch):
    """Proxy Tuning, the bench and prompt caches take the session from the pair, which waits."""
    with (
        load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=128, overlap=True) as pair,
        Proxy(pair, tiny["base"], n_threads=1) as proxy,
    ):
        pair.generate("hello", temperature=0.0, max_tokens=2, threshold=0.0)
        go_on, order = threading.Event(), list[str]()
        sync = Session.sync

        def noted(session, *args):
            if threading.current_thread() is not threading.main_thread():
                go_on.wait()
                order.append("behind")
            elif session is pair.members[0].here:
                order.append("front")
            return sync(session, *args)

        wait = Background.wait
        monkeypatch.setattr(Session, "sync", noted)
        pair.expert.begin(pair.base.tokenize("hello, some more text"))
        monkeypatch.setattr(Background, "wait", lambda expert: (go_on.set(), wait(expert)))
        tokens = pair.base.tokenize("hi")
        try:
            for _ in proxy.stream_tokens(tokens, Options(temperature=0.0, max_tokens=2)):
                pass
        finally:
            go_on.set()
        assert order[:2] == ["behind", "front"]
