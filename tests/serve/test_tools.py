"""Tools: what a model is told of them, what it may write, and how its calls are reported."""

from __future__ import annotations

import json

import httpx
import jsonschema
import openai
import pytest
from grammars import accepts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lib.random_model import SHAPES, write_model
from serving import GREEDY, serving

from colm_edge.errors import ColmError
from colm_edge.llama.model import Model
from colm_edge.pair import load
from colm_edge.serve.call_grammar import grammar_for
from colm_edge.serve.chat import ChatRequest
from colm_edge.serve.messages import CountRequest
from colm_edge.serve.responses import ResponsesRequest
from colm_edge.serve.tools import (
    GENERIC,
    HERMES,
    LLAMA,
    Tool,
    ToolUse,
    form_of,
    plain_messages,
    use_of,
)

TURNS = r"{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}"
HERMES_TEMPLATE = (
    r"{% for tool in tools or [] %}{{ (tool | tojson) + '\n' }}{% endfor %}"
    + TURNS
    + r"""
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\n</tool_call>\n' }}
{%- endfor %}
{%- endfor %}
{%- if enable_thinking %}{{ '(think)\n' }}{% endif %}
{%- if add_generation_prompt %}assistant:{% endif -%}
"""
)
LLAMA_TEMPLATE = (
    r"""{% if tools %}{{ 'Environment: ipython. {"name": …, "parameters": …}\n' }}{% endif %}
{%- for tool in tools or [] %}{{ (tool | tojson) + '\n' }}{% endfor %}"""
    + TURNS + "{% endfor %}assistant:"
)  # fmt: skip
PLAIN_TEMPLATE = TURNS + "{% endfor %}assistant:"
THINKING_TEMPLATE = PLAIN_TEMPLATE + "{# <think></think> #}"
OPEN_TEMPLATE = PLAIN_TEMPLATE + "<think>\n{# </think> #}"
TEMPLATES = {
    "hermes": HERMES_TEMPLATE,
    "llama": LLAMA_TEMPLATE,
    "plain": PLAIN_TEMPLATE,
    "thinking": THINKING_TEMPLATE,
    "open": OPEN_TEMPLATE,
}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"$ref": "#/$defs/Days"}},
    "required": ["city", "days"],
    "$defs": {"Days": {"enum": [1, 2]}},
}
# Its definition has the other one's name.
MOVE = {
    "type": "object",
    "properties": {"to": {"$ref": "#/$defs/Days"}},
    "required": ["to"],
    "$defs": {"Days": {"enum": ["monday", "friday"]}},
}
SCHEMAS = {"get_weather": CITY, "move-to": MOVE}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def urls(tiny, tmp_path_factory):
    """Where pairs with each of the templates are served, by its name."""
    folder = tmp_path_factory.mktemp("templates")
    found, opened = {}, []
    for name, template in TEMPLATES.items():
        path = folder / f"{name}.gguf"
        write_model(path, SHAPES["tiny"], seed=0, gain=20.0, chat_template=template)
        pair = load(path, tiny["expert"], "margin", n_threads=1, n_ctx=1536, defaults=GREEDY)
        server = serving(pair, n_slots=2)
        found[name] = server.__enter__()[0]
        opened += [(server, pair)]
    yield found
    for server, pair in opened:
        server.__exit__(None, None, None)
        pair.close()


def asked(url: str, **more) -> httpx.Response:
    body = {"messages": CHAT, "tools": TOOLS, "max_tokens": 250, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def choice_of(url: str, **more):
    response = asked(url, **more)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def check(calls, finish: str = "tool_calls") -> None:
    """Check whole calls: the last one may be cut."""
    for call in calls[: -1 if finish == "length" else None]:
        assert call["type"] == "function"
        function = call["function"]
        jsonschema.validate(json.loads(function["arguments"]), SCHEMAS[function["name"]])


NATIVE = ("hermes", "llama", "plain")


@pytest.mark.parametrize("template", NATIVE)
@pytest.mark.parametrize(
    "way", [{}, {"temperature": 1, "seed": 4}, {"colm": {"threshold": 0.5, "review": 1.0}}]
)
def test_a_required_call_keeps_to_the_schema(urls, template, way):
    choice = choice_of(urls[template], tool_choice="required", **way)
    assert choice["message"]["content"] is None
    calls, finish = choice["message"]["tool_calls"], choice["finish_reason"]
    assert finish in ("tool_calls", "length")
    assert len(calls) > (finish == "length")
    check(calls, finish)


@pytest.mark.parametrize("template", NATIVE)
def test_one_tool_alone_may_be_named(urls, template):
    named = {"type": "function", "function": {"name": "move-to"}}
    choice = choice_of(urls[template], tool_choice=named)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "move-to"
    check([call])
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("template", NATIVE)
def test_a_stream_tells_the_same_calls(urls, template):
    body = {"messages": CHAT, "tools": TOOLS, "max_tokens": 250, "tool_choice": "required"}
    body["parallel_tool_calls"] = False
    with openai.OpenAI(base_url=f"{urls[template]}/v1", api_key="any", max_retries=0) as client:
        whole = client.chat.completions.create(model="any", **body)
        with client.chat.completions.stream(model="any", **body) as stream:
            streamed = stream.get_final_completion()
    expected, found = (
        [
            (call.function.name, call.function.arguments)
            for call in one.choices[0].message.tool_calls
        ]
        for one in (whole, streamed)
    )
    assert found == expected
    assert streamed.choices[0].finish_reason == whole.choices[0].finish_reason


def test_text_is_as_free_as_without_tools():
    """With tool_choice auto a text is the model's own, as far as it is none that begins a call."""
    with load(n_threads=1, n_ctx=1024) as demo, serving(demo, n_slots=1) as (url, _):
        told = {"messages": [{"role": "user", "content": "What is the symbol of tungsten?"}]}
        told |= {"tools": TOOLS[:1], "temperature": 0}
        prompt = httpx.post(f"{url}/apply-template", json=told, timeout=60).json()["prompt"]
        body = {"prompt": prompt, "special": True, "temperature": 0, "max_tokens": 60}
        plain = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]
        chat = httpx.post(f"{url}/v1/chat/completions", json=told | {"max_tokens": 60}, timeout=60)
        choice = chat.json()["choices"][0]
    assert choice["message"]["content"] == plain["text"] != ""
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == plain["finish_reason"]


@pytest.mark.parametrize("template", NATIVE)
def test_tools_that_may_not_be_called_are_not_told(urls, template):
    url = urls[template]
    without = httpx.post(
        f"{url}/v1/chat/completions", json={"messages": CHAT, "max_tokens": 20}, timeout=60
    ).json()
    assert choice_of(url, tool_choice="none", max_tokens=20) == without["choices"][0]


CALLED = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "a1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome", "days": 1}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "a1", "content": "sunny"},
]


def test_earlier_calls_are_told_as_the_template_has_them(urls):
    def prompt(template: str, **more) -> str:
        body = {"messages": CALLED, **more}
        return httpx.post(f"{urls[template]}/apply-template", json=body, timeout=60).json()[
            "prompt"
        ]

    hermes = prompt("hermes", tools=TOOLS[:1])
    assert '"name": "get_weather", "description": "d"' in hermes
    assert hermes.endswith(
        "user: weather?\nassistant: \n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Rome", "days": 1}}\n</tool_call>\n'
        "tool: sunny\nassistant:"
    )
    plain = prompt("plain", tools=TOOLS[:1])
    assert plain.startswith("user: These functions can be called:\n{")
    assert "\n\nweather?\nassistant: " in plain
    assert plain.endswith(
        'assistant: {"name": "get_weather", "arguments": {"city": "Rome", "days": 1}}\n'
        "user: get_weather returned: sunny\nassistant:"
    )


@pytest.mark.parametrize(
    ("role", "content"),
    [
        ("system", "hello\n\n{}"),  # behind what the user wants of it anyway
        ("user", "{}\n\nhello"),  # no system message is made up, as some templates refuse one
        ("assistant", "{}"),
    ],
)
def test_a_template_without_tools_has_them_in_the_first_message(role, content):
    first, *rest = plain_messages([{"role": role, "content": "hello"}], [Tool("get_weather")])
    offer = first["content"].removeprefix("hello\n\n").removesuffix("\n\nhello")
    assert offer.startswith("These functions can be called:\n{")
    assert first["content"] == content.format(offer)
    assert first["role"] == ("user" if role == "assistant" else role)
    assert rest == ([{"role": role, "content": "hello"}] if role == "assistant" else [])


def test_tools_and_a_schema_go_together(urls):
    wanted = {"type": "json_schema", "json_schema": {"schema": CITY}}
    choice = choice_of(urls["hermes"], response_format=wanted)
    if calls := choice["message"].get("tool_calls"):
        check(calls)
    else:
        jsonschema.validate(json.loads(choice["message"]["content"]), CITY)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tool_choice": "required", "tools": []}, "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "expected one of"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "the same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "a tool's name"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"grammar": 'root ::= "a"'}, "give one"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True,
                "parameters": {"type": "object", "minProperties": 1}}}]},
            "minProperties",
        ),
        (
            {"tools": [{"type": "function", "function": {
                "name": "f", "parameters": {"$ref": "#/nowhere"}}}]},
            "the parameters of the tool 'f'",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [
            {"id": "1", "function": {"name": "f"}}]}]}, "only messages of the assistant"),
    ],
)  # fmt: skip
def test_wrong_tools_are_told_what_is_wrong(urls, more, words):
    refused = asked(urls["hermes"], **more)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]


def test_the_form_is_read_off_the_template():
    assert form_of(HERMES_TEMPLATE) is HERMES
    assert form_of(LLAMA_TEMPLATE) is LLAMA
    assert form_of(PLAIN_TEMPLATE) is GENERIC
    assert form_of("<tool_call>\n<function=name> arguments") is GENERIC  # not JSON


def test_a_choice_is_one_of_the_tools():
    tool = Tool("f")
    assert use_of([tool], only="f") == ToolUse((tool,), tool)
    assert use_of([tool], "none").callable == ()
    with pytest.raises(ColmError, match="expected one of f"):
        use_of([tool], only="g")


@pytest.mark.parametrize("name", ["none", "auto", "required"])
def test_a_tool_that_is_named_like_a_choice_can_be_chosen(name):
    chat = {"tools": [{"function": {"name": name}}]}
    chat["tool_choice"] = {"type": "function", "function": {"name": name}}
    responses = {"tools": [{"type": "function", "name": name}], "input": "x"}
    responses["tool_choice"] = {"type": "function", "name": name}
    message = {"tools": [{"name": name, "input_schema": {}}], "max_tokens": 1}
    message["tool_choice"] = {"type": "tool", "name": name}
    messages = [{"role": "user", "content": "x"}]
    for kind, asked in (ChatRequest, chat), (ResponsesRequest, responses), (CountRequest, message):
        use = kind.model_validate({"messages": messages, **asked}).conversation().use
        assert use.callable == (use.choice,) == use.tools
        assert use.forced


@pytest.fixture(scope="module")
def model(tiny):
    model = Model(tiny["template"])
    yield model
    model.close()


USE = ToolUse((Tool("f", parameters={"type": "object", "properties": {"a": {"enum": [1]}}}),))
CALL = {
    HERMES: '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    LLAMA: '{"name": "f", "parameters": {"a": 1}}',
    GENERIC: '{"name": "f", "arguments": {"a": 1}}',
}


@pytest.mark.parametrize("form", CALL, ids=("hermes", "llama", "generic"))
def test_what_an_answer_may_be(model, form):
    auto = grammar_for(form, USE, None, "no")
    forced = grammar_for(form, ToolUse(USE.tools, "required"), None, "no")
    single = grammar_for(form, ToolUse(USE.tools, "auto", parallel=False), None, "no")
    call = CALL[form]
    wrong = call.replace('"f"', '"g"')
    for text, in_auto, in_forced, in_single in (
        (call, True, True, True),
        (f"{call}\n{call}", True, True, False),
        (wrong, not form.begin, False, not form.begin),  # not a tool: a text as any other
        (call.replace("1", "2"), False, False, False),
        (call.replace('"f"', '"fu"'), not form.begin, False, not form.begin),
        (call[: call.index(":") + 1], not form.begin, False, not form.begin),
        ("words", True, False, True),
        ("", True, False, True),
        ('{"nam": 1}', True, False, True),
        ("{}", True, False, True),
        ("<tool_c> <<tool_cal", True, False, True),
    ):
        assert accepts(model, auto, text) == in_auto, text
        assert accepts(model, forced, text) == in_forced, text
        assert accepts(model, single, text) == in_single, text
    if form.begin:
        assert accepts(model, auto, CALL[GENERIC])  # small models leave the marks out
        assert not accepts(model, forced, CALL[GENERIC])
        assert accepts(model, auto, f"words\n{call}")
        assert not accepts(model, auto, f"words\n{wrong}")


def test_a_thought_may_come_first(model):
    call, use = CALL[HERMES], ToolUse(USE.tools, "required")
    may, does = (grammar_for(HERMES, use, None, thinks) for thinks in ("may", "does"))
    assert accepts(model, may, call)
    assert accepts(model, may, f"<think>any <tool_call> </</think>\n\n{call}")
    assert not accepts(model, may, "<think>so</think>\n\nwords")
    assert not accepts(model, may, f"<think>{call}")
    assert accepts(model, does, f"so</think>\n{call}")
    assert not accepts(model, does, call)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet='<tool_cal>{"name": é\n', max_size=30))
def test_any_text_without_the_mark_is_allowed(model, text):
    grammar = grammar_for(HERMES, USE, None, "no")
    if "<tool_call>" not in text:
        assert accepts(model, grammar, text)


def test_what_is_nested_too_deep_is_refused(urls):
    for depth in (100, 900, 100_000):
        nested = "[" * depth + "]" * depth
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": nested}}
        messages = [*CHAT, {"role": "assistant", "tool_calls": [call]}, CALLED[2]]
        body = {"messages": messages, "max_tokens": 1}
        answer = httpx.post(f"{urls['hermes']}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code in (200, 400), answer.text
    body = '{"messages": [], "chat_template_kwargs": {"x": ' + "[" * 700 + "]" * 700 + "}}"
    body = body.replace("[]", json.dumps(CHAT), 1)
    url = f"{urls['hermes']}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    assert httpx.post(url, content=body, headers=headers, timeout=60).status_code in (200, 400)


def test_a_thought_is_told_apart(urls):
    """The grammar stands in for a model that thinks."""
    for template, start in (("thinking", "<think>"), ("open", "")):
        body = {
            "messages": CHAT,
            "max_tokens": 60,
            "grammar": f'root ::= "{start}because</think>\\n\\nyes"',
        }
        url = f"{urls[template]}/v1/chat/completions"
        message = httpx.post(url, json=body, timeout=60).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("because", "yes")
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "because"
        assert "".join(delta.get("content", "") for delta in deltas) == "yes"


def test_the_templates_variables_may_be_given(urls):
    body = {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}}
    prompt = httpx.post(f"{urls['hermes']}/apply-template", json=body, timeout=60).json()["prompt"]
    assert prompt == "user: hello\n(think)\nassistant:"
    body["chat_template_kwargs"] = {"messages": []}
    refused = httpx.post(f"{urls['hermes']}/apply-template", json=body, timeout=60)
    assert refused.status_code == 400
    assert "messages" in refused.json()["error"]["message"]
