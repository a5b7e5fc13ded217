"""People's own clients, each in its usual mode, against a server of tiny models.

Each test runs where its client is installed (the extra test-clients).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

DATA = Path(__file__).parents[1] / "data"
CHAT = [{"role": "user", "content": "hello"}]
# Each client warns of something of its own now and then.
pytestmark = pytest.mark.filterwarnings("ignore")


class Pick(BaseModel):
    """Pick a number."""

    n: Literal[1, 2]
    ok: bool


def output_of(command: list[str], **environment: str) -> str:
    """Return what a command prints."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=DATA / "lm_eval", check=False,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def key(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")


def test_openai_tools_parse_and_answer(roomy):
    """Chat with tools parsed into a class, and the answer to what the tool returned."""
    with openai.OpenAI(base_url=f"{roomy}/v1", api_key="any", max_retries=0) as client:
        tool = openai.pydantic_function_tool(Pick)
        chat = client.chat.completions.parse(
            model="any", messages=CHAT, tools=[tool], tool_choice="required", max_tokens=120,
            parallel_tool_calls=False,
        )  # fmt: skip
        message = chat.choices[0].message
        (call,) = message.tool_calls
        assert isinstance(call.function.parsed_arguments, Pick)
        result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
        told = [*CHAT, message.model_dump(exclude_none=True), result]
        again = client.chat.completions.create(model="any", messages=told, max_tokens=4)
        assert again.choices[0].message.content


def test_anthropic(roomy):
    anthropic = pytest.importorskip("anthropic")
    asked = {"model": "any", "max_tokens": 120, "messages": CHAT}
    tool = {"name": "Pick", "description": "d", "input_schema": Pick.model_json_schema()}
    choice = {"type": "tool", "name": "Pick", "disable_parallel_tool_use": True}
    with anthropic.Anthropic(base_url=roomy, api_key="any", max_retries=0) as client:
        message = client.messages.create(**asked)
        assert message.content[0].type == "text"
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == message.content[0].text
        used = client.messages.create(**asked, tools=[tool], tool_choice=choice)
        Pick.model_validate(used.content[0].input)
        with client.messages.stream(**asked, tools=[tool], tool_choice=choice) as stream:
            assert stream.get_final_message().content[0].input == used.content[0].input
        counted = client.messages.count_tokens(model="any", messages=CHAT)
        assert counted.input_tokens == message.usage.input_tokens
        with pytest.raises(anthropic.BadRequestError, match="the context holds 1536"):
            client.messages.create(**{**asked, "messages": [{**CHAT[0], "content": "a b " * 900}]})


def test_langchain(roomy, key):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        base_url=f"{roomy}/v1", model="any", max_retries=0, max_completion_tokens=120
    )
    assert model.invoke("hello").content
    assert "".join(str(chunk.content) for chunk in model.stream("hello"))
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Pick, method=method).invoke("hello"), Pick)
    bound = model.bind_tools([Pick], tool_choice="any", parallel_tool_calls=False)
    (call,) = bound.invoke("hello").tool_calls
    Pick.model_validate(call["args"])
    responses = langchain.ChatOpenAI(
        base_url=f"{roomy}/v1", model="any", max_retries=0, use_responses_api=True,
        max_completion_tokens=60,
    )  # fmt: skip
    assert responses.invoke("hello").content


def test_instructor(roomy):
    instructor = pytest.importorskip("instructor")
    with openai.OpenAI(base_url=f"{roomy}/v1", api_key="any", max_retries=0) as client:
        for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
            found = instructor.from_openai(client, mode=mode).chat.completions.create(
                model="any", messages=CHAT, response_model=Pick, max_retries=0, max_tokens=120
            )
            assert isinstance(found, Pick)


# In a process of its own, because it leaves an event loop behind.
LITELLM = """
import json, sys, litellm
schema = {"type": "json_schema", "json_schema": {"name": "Pick", "schema": json.loads(sys.argv[2])}}
asked = {"model": "openai/any", "api_base": sys.argv[1], "api_key": "any", "max_tokens": 120}
asked["messages"] = [{"role": "user", "content": "hello"}]
whole = litellm.completion(**asked)
parsed = litellm.completion(**asked, response_format=schema)
pieces = litellm.completion(**asked, stream=True)
told = "".join(piece.choices[0].delta.content or "" for piece in pieces)
contents = [one.choices[0].message.content for one in (whole, parsed)]
print(json.dumps([*contents, told]))
"""


def test_litellm(roomy):
    pytest.importorskip("litellm")
    schema = json.dumps(Pick.model_json_schema())
    told = output_of([sys.executable, "-c", LITELLM, f"{roomy}/v1", schema])
    whole, parsed, streamed = json.loads(told.splitlines()[-1])
    assert whole == streamed != ""
    Pick.model_validate_json(parsed)


def test_pydantic_ai(roomy):
    agents = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    settings = {"max_tokens": 120, "parallel_tool_calls": False}

    async def ask(output) -> None:
        async with openai.AsyncOpenAI(base_url=f"{roomy}/v1", api_key="any") as client:
            model = OpenAIChatModel("any", provider=OpenAIProvider(openai_client=client))
            agent = agents.Agent(model, output_type=output, model_settings=settings)
            assert isinstance((await agent.run("hello")).output, Pick)

    for output in (Pick, agents.NativeOutput(Pick)):
        asyncio.run(ask(output))


def test_llm(roomy, tmp_path):
    """Simon Willison's command, with a model in its file of OpenAI-compatible ones."""
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: pair\n  model_name: any\n  api_base: {roomy}/v1\n  api_key_name: pair\n"
        "  supports_schema: true\n"
    )
    command = [sys.executable, "-m", "llm", "-m", "pair", "--key", "any", "-o", "max_tokens", "90"]
    for more in ([], ["--no-stream"], ["--schema", json.dumps(Pick.model_json_schema())]):
        told = output_of([*command, *more, "hello"], LLM_USER_PATH=str(tmp_path))
        assert told.strip()
    Pick.model_validate_json(told)


def test_ollamas_own_client(roomy):
    ollama = pytest.importorskip("ollama")
    with ollama.Client(host=roomy) as client:
        options = {"num_predict": 60, "temperature": 0}
        whole = client.chat(model="any", messages=CHAT, options=options)
        assert whole.message.content
        pieces = client.chat(model="any", messages=CHAT, options=options, stream=True)
        assert "".join(piece.message.content for piece in pieces) == whole.message.content
        schema = Pick.model_json_schema()
        formatted = client.generate(model="any", prompt="x", options=options, format=schema)
        Pick.model_validate_json(formatted.response)
        assert client.list().models[0].model == "tiny"


def test_lm_eval(roomy, tmp_path):
    """Generation, log-likelihood and rolling, with the server's own tokenizer."""
    pytest.importorskip("lm_eval")
    arguments = (
        f"base_url={roomy}/v1/completions,model=any,tokenizer_backend=remote,"
        "tokenized_requests=False,max_length=1024,num_concurrent=1,max_retries=1"
    )
    tasks = ("pair_generate", "pair_choose", "pair_roll")
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", arguments, "--tasks", ",".join(tasks)]
    command += ["--include_path", str(DATA / "lm_eval"), "--output_path", str(tmp_path)]
    output_of(
        command, OPENAI_API_KEY="any", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home")
    )
    (found,) = tmp_path.rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    assert set(results) == set(tasks)


def test_openais_client_for_node(roomy):
    """COLM_EDGE_NODE_MODULES: a folder where npm has installed openai."""
    modules = os.environ.get("COLM_EDGE_NODE_MODULES")
    if modules is None or shutil.which("node") is None:
        pytest.skip("needs node, and COLM_EDGE_NODE_MODULES")
    command = ["node", str(DATA / "responses.cjs"), f"{roomy}/v1"]
    told = json.loads(output_of(command, NODE_PATH=modules))
    assert told["text"] == told["streamed"] != ""
    Pick.model_validate(told["called"])
