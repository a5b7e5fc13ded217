"""Chat templates: what they write, and those that would take all time or memory."""

from __future__ import annotations

import tracemalloc

import pytest

from colm_edge.errors import LONGEST, PromptError
from colm_edge.llama import template_sandbox
from colm_edge.llama.chat_template import ChatTemplate

ASKED = {"role": "user", "content": "Hi <é>"}
TALK = [{"role": "system", "content": " Be brief. "}, ASKED, {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "So?"}]  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Bonn", "Köln"]}},
                "required": ["city"],
            },
        },
    }
]
# What templates of the well-known families do.
TEMPLATES = [
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m.content|trim + '<|im_end|>' }}"
    "{%- if loop.first or loop.index0 % 2 == 0 -%}{{ loop.index ~ '/' ~ loop.length }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    "{{ bos_token }}{% set ns = namespace(system='', n=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content.strip() %}{% else %}"
    "{% set ns.n = ns.n + 1 %}[INST] {{ ns.system ~ m['content'] }} [/INST]{{ eos_token * 2 }}"
    "{% endif %}{% endfor %}{{ ns.n }}",
    "{% macro one(t, depth=0) %}{% for k, v in t.items() %}{{ '  ' * depth }}{{ k }}: "
    "{% if v is mapping %}{{ one(v, depth + 1) }}{% elif v is iterable and v is not string %}"
    "[{{ v|join(', ') }}]{% else %}{{ v }}{% endif %}{{ '\\n' }}{% endfor %}{% endmacro %}"
    "{% if tools %}{% for t in tools %}{{ one(t.function) }}{{ t | tojson }}"
    "{{ t.function | tojson(indent=4) }}{% endfor %}{% endif %}"
    "{% generation %}x{% endgeneration %}",
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{{ users | length }}"
    "{{ users[-1].content.split(' ')[0] }}{{ messages[1:] | map(attribute='content') | join('|') }}"
    "{{ 'a-b'.replace('-', '+') }}{{ '%s:%05d' | format('n', 7) }}{{ '{:>4}|{}'.format(3, 'é') }}"
    "{{ ['x', 'y'] + ['z'] }}{{ dict(a=1) | items | list }}{{ {'b': none} }}{{ 7 // 2 ** 2 }}"
    "{% set block %}{{ users | length }} users{% endset %}{{ block | upper | indent(2, true) }}",
    "{% for m in messages[::-1] if m.role != 'system' recursive %}{{ m.role }}"
    "{% if loop.last %}{% break %}{% endif %}{% else %}none{% endfor %}"
    "{{ messages | groupby('role') | length }}{{ range(3) | list }}{{ [3, 1] | sort | first }}"
    "{% filter title %}some words{% endfilter %}{{ 'x' if not tools else 'y' }}{{ undefined_name }}"
    "{% call(a) caller_of() %}{{ a }}{% endcall %}{% macro caller_of() %}{{ caller('c') }}"
    "{% endmacro %}",
]  # fmt: skip


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("text", [*TEMPLATES[:4], TEMPLATES[4].split("{% call")[0]])
def test_it_writes_what_jinja_writes(text, tools):
    """The sandbox that llama-cpp-python sets up as transformers does."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    for messages in (TALK, TALK[:2], [ASKED]):
        expected = Jinja2ChatFormatter(text, "</s>", "<s>")(messages=messages, tools=tools).prompt
        assert ChatTemplate(text, "<s>", "</s>").render(messages, tools=tools) == expected


def test_an_answer_may_have_begun_in_any_number_of_messages():
    template = ChatTemplate("{{ messages | map(attribute='content') | join('|') }}>", "", "")
    begun = [{"role": "assistant", "content": f"{i} "} for i in range(2000)]
    written = "".join(message["content"] for message in begun)
    assert template.render([ASKED, *begun]) == f"{ASKED['content']}>{written}"
    assert template.render(begun) == f"0 >{written.removeprefix('0 ')}"


def test_a_template_reads_what_it_is_given_besides():
    template = ChatTemplate(
        "{{ thinks }}{{ strftime_now('%Y') | length }}{{ messages|length }}{{ bos_token }}", "", ""
    )
    assert template.render([ASKED], thinks=True, bos_token="x") == "True41"


def test_a_template_refuses_in_its_own_words():
    template = ChatTemplate("{{ raise_exception('roles must alternate\x1b[31m') }}", "", "")
    with pytest.raises(PromptError, match="refuses this conversation: roles must alternate") as e:
        template.render([ASKED])
    assert str(e.value).isprintable()


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a name": "{% set r = range(99999) %}"
    + "".join(f"{{% for a{i} in r %}}" for i in range(9)) + "{% endfor %}" * 9,
    "a filter in a loop": "{% for a in range(99999) %}"
    "{% for b in range(99999) if b < 0 %}{% endfor %}"
    "{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "maps": "{% for a in range(99999) %}"
    "{% set x = range(99999)|map('abs')|list|length %}{% endfor %}",
    "loops that call themselves": "{% for a in [1] recursive %}{{ loop(range(99)) }}{% endfor %}",
    "text without end": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "a{% endfor %}{% endfor %}",
    "comparisons": "{% set ns = namespace(a=[1], b=[1]) %}"
    "{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
    "{{ ns.a == ns.b }}",
}  # fmt: skip
LARGE = {
    "a product": "{{ 'a' * 10000000000 }}",
    "a product the other way": "{{ 10000000000 * 'a' }}",
    "a list of many": "{{ ([1, 2] * 1000000000) | length }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent in a filter": "{{ '%1000000000d' | format(1) }}",
    "percent with a width by a number": "{{ '%*d' % (1000000000, 1) }}",
    "percent of one name": "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "braces": "{{ '{:1000000000}'.format(1) }}",
    "braces with a width by a number": "{{ '{:{}}'.format(1, 1000000000) }}",
    "braces of one value": "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "a power": "{{ 10 ** 1000000000 }}",
    "powers of powers": "{% set ns = namespace(n=3) %}{% for i in range(99) %}"
    "{% set ns.n = ns.n ** 9 %}{% endfor %}{{ ns.n }}",
    "products of products": "{% set ns = namespace(n=3) %}{% for i in range(99) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "doubling": "{% set ns = namespace(t='aa') %}{% for i in range(99) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "doubling with ~": "{% set ns = namespace(t='aa') %}{% for i in range(99) %}"
    "{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "doubling in a block": "{% set ns = namespace(t='aa') %}{% for i in range(99) %}"
    "{% set b %}{{ ns.t }}{{ ns.t }}{% endset %}{% set ns.t = b %}{% endfor %}",
    "doubling in a macro": "{% macro two(t) %}{{ t }}{{ t }}{% endmacro %}"
    "{% set ns = namespace(t='aa') %}{% for i in range(99) %}{% set ns.t = two(ns.t) %}"
    "{% endfor %}",
    "doubling lists": "{% set ns = namespace(t=[1]) %}{% for i in range(99) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "lists in lists": "{% set ns = namespace(t=[1]) %}{% for i in range(99) %}"
    "{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.t }}",
    "namespaces in lists": "{% set ns = namespace(t=[1]) %}{% for i in range(99) %}"
    "{% set ns.t = [namespace(a=ns.t, b=ns.t), ns.t, ns.t] %}{% endfor %}{{ ns.t }}",
    "dicts in dicts": "{% set ns = namespace(t={}) %}{% for i in range(99) %}"
    "{% set ns.t = {'a': ns.t, 'b': ns.t} %}{% endfor %}{{ ns.t | tojson }}",
    "the same text again": "{% set t = 'a' * 1000000 %}{% for a in range(99999) %}"
    "{{ t }}{% endfor %}",
    "many texts": "{% set ns = namespace(t=[]) %}{% for a in range(99999) %}"
    "{% set ns.t = [ns.t, 'a' * 1000000] %}{% endfor %}",
    "many slices": "{% set t = 'a' * 1000000 %}{% for a in range(99999) %}"
    "{% set x = t[1:] %}{% endfor %}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "a method by another name": "{% set f = 'a'.rjust %}{{ f(10000000000) }}",
    "join": "{{ range(99999) | join('a' * 1000000) }}",
    "join as a method": "{{ ('a' * 1000000).join(('b' * 100000)|list) }}",
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "replace as a method": "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "indent": "{{ ('\\n' * 100000) | indent(1000000) }}",
    "indent with a text": "{{ ('\\n' * 100000) | indent('a' * 100000) }}",
    "indent of other line ends": "{{ ('\\r' * 100000) | indent(3000, blank=true) }}",
    "a width behind a nested name": "{{ '%(a(b)c)1000000000s' % {'a(b)c': 'x'} }}",
    "a width behind two names": "{{ '%(a)s%(((b)))900000000d' % {'a': 1, '((b))': 2} }}",
    "batch": "{{ [1] | batch(10000000000, 0) | list }}",
    "slice": "{{ [1] | slice(10000000000) | list }}",
    "JSON": "{{ range(9999) | list | tojson(indent=1000000) }}",
    "JSON with separators": "{{ range(9999) | list | tojson(separators=('a' * 1000000, ':')) }}",
    "round": "{{ 1 | round(1000000000, 'ceil') }}",
    "sum": "{{ ([[1]] * 1000) | sum(start=[]) }}",
    "strip": "{{ ('a' * 1000000).strip('b' * 1000000) }}",
    "trim": "{{ ('a' * 1000000) | trim('b' * 1000000) }}",
    "rfind": "{{ ('a' * 1000000).rfind('ab' ~ 'a' * 100000) }}",
    "rsplit": "{{ ('a' * 1000000).rsplit('ab' ~ 'a' * 100000) }}",
    "a number of many digits": "{{ ('9' * 1000000) | float }}",
    "a whole number of many digits": "{{ ('f' * 1000000) | int(base=16) }}",
    "a form of the date": "{{ strftime_now('%Y' * 1000000) }}",
    "map with a filter": "{{ ['a'] | map('center', 10000000000) | list }}",
    "letters": "{{ ('ab' * 1000000) | list | length }}",
    "bytes": "{{ (1).to_bytes(10000000000, 'little') }}",
    "words": "{{ lipsum(n=1000000) }}",
    "a long template": "{{ 'a' }}" * 40_000,
    "a nested one": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a nested list": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "a chain": "{{ 1" + "+1" * 50_000 + " }}",
    "nots": "{{ " + "not " * 50_000 + "1 }}",
    "ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_a_template_that_makes_too_much_is_ended(text):
    """And takes no more than a quarter of a gigabyte until it is."""
    tracemalloc.start()
    try:
        with pytest.raises(PromptError, match="chat template") as caught:
            ChatTemplate(text, "", "").render([ASKED])
        assert tracemalloc.get_traced_memory()[1] < 1 << 28
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_ended(text, monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2)
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(text, "", "").render([ASKED])
    assert ChatTemplate("{{ messages[0].content }}", "", "").render([ASKED]) == "Hi <é>"


def test_a_template_that_was_ended_can_go_on_with_less():
    template = ChatTemplate("{{ 'a' * 100000 * messages[0].content|length }}", "", "")
    with pytest.raises(PromptError, match="was ended: it makes too much"):
        template.render([{"role": "user", "content": "x" * 1000}])
    assert template.render([{"role": "user", "content": "x"}]) == "a" * 100_000


def test_a_long_conversation_is_no_long_template():
    """A megabyte in a thousand messages, put together piece by piece."""
    talk = [{"role": ("user", "assistant")[i % 2], "content": "a" * 1000} for i in range(999)]
    text = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% set ns.n = ns.n + m.content|length %}"
        "{{ m.role + ': ' + m.content.strip() | trim ~ '\\n' }}{% endfor %}{{ ns.n }}"
    )
    assert ChatTemplate(text, "", "").render(talk).endswith("999000")
