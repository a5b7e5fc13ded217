"""A conversation that a request gives, in whichever API's words: the prompt it becomes, the grammar
that its answer keeps to, and the parts that the answer is told in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from colm_edge.errors import ColmError, ContextError
from colm_edge.llama.chat_template import THINK, THINK_END
from colm_edge.llama.tokenizer import PARTED
from colm_edge.serve.call_grammar import grammar_for
from colm_edge.serve.parts import Reply, Splitter, reply_of
from colm_edge.serve.tools import GENERIC, ToolUse, form_of, plain_messages

if TYPE_CHECKING:
    from colm_edge.pair import Pair
    from colm_edge.stream import Answer


RESERVED = {"messages", "raw", "tools", "tool_choice"}


@dataclass(frozen=True)
class Conversation:
    """messages: as OpenAI's API has them, but each content is a text, and the arguments of calls
    are objects. schema: of the answer, if it has to be JSON. variables: of the chat template. raw:
    whether that is left out."""

    messages: Sequence[dict[str, Any]]
    use: ToolUse = field(default_factory=ToolUse)
    schema: Mapping[str, Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False


@dataclass(frozen=True)
class Prompt:
    """Token ids to go on from, and the grammar of what follows, if it has one."""

    tokens: list[int]
    grammar: str | None = None


def check_length(pair: Pair, text: str) -> None:
    """Raise ContextError for a text that cannot fit the context, before it takes minutes to read as
    tokens."""
    if (n := pair.base.fewest_tokens(text)) > pair.n_ctx:
        raise ContextError(
            f"the prompt has at least {n} tokens, the context holds {pair.n_ctx}; shorten it or "
            "raise -c"
        )


class Dialogue:
    """A conversation with a pair: its prompt, as text and as tokens, and what answers are made of.

    Raises ColmError for what the chat template refuses and for schemas that cannot be used.
    """

    def __init__(self, pair: Pair, conversation: Conversation) -> None:
        template = pair.template.text if pair.template is not None else ""
        raw = conversation.raw or pair.defaults.raw
        use, messages = conversation.use, conversation.messages
        offered = use.tools if use.choice != "none" else ()
        form = GENERIC if raw else form_of(template)
        variables = dict(conversation.variables)
        for name in RESERVED & variables.keys():
            raise ColmError(f"chat_template_kwargs holds {name}, which is the request's own")
        if not form.native:
            messages = plain_messages(messages, offered)
        elif offered:
            variables["tools"] = [tool.as_dict() for tool in offered]
        text = pair.prompt_text(messages, raw=raw, **variables)
        check_length(pair, text)
        self.text = text.replace(PARTED, "")
        self.thinks = not raw and THINK_END in template
        self._thinking = self.thinks and text.rstrip().endswith(THINK)
        self._form = form if use.callable else None
        self._names = [tool.name for tool in use.callable]
        thinks: Literal["no", "may", "does"] = "no"
        if self.thinks:
            thinks = "does" if self._thinking else "may"
        grammar = grammar_for(form, use, conversation.schema, thinks)
        self.prompt = Prompt(pair.tokens_of(text), grammar)

    def splitter(self) -> Splitter:
        """Return what tells the parts of one answer apart."""
        return Splitter(self._form, self._names, thinks=self.thinks, thinking=self._thinking)

    def reply(self, answer: Answer) -> Reply:
        """Return a whole answer's parts."""
        return reply_of(self.splitter(), answer.text)


async def dialogue_of(pair: Pair, conversation: Callable[[], Conversation]) -> Dialogue:
    """Return the dialogue of a conversation, both made on another thread: where they are long, that
    takes seconds, and other clients are not to wait for it."""
    return await asyncio.to_thread(lambda: Dialogue(pair, conversation()))


def arguments_of(text: str) -> Any:
    """Return the arguments of an earlier call as an object, as templates read them; a text that is
    no JSON stays one."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def finish_of(answer: Answer, *, is_call: bool) -> str:
    """Return why an answer ended, in the words of OpenAI's chats. is_call: whether with calls, none
    of which a stop text has cut."""
    return "tool_calls" if is_call and answer.finish_reason == "stop" else answer.finish_reason


def thinking_of(effort: str | None) -> dict[str, Any]:
    """Return what chat templates read of how much an answer is to be thought over; None says
    nothing."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {})}
