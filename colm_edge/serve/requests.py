"""What requests of every kind hold, and those of plain completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from colm_edge.errors import ColmError
from colm_edge.llama.grammar import grammar_of
from colm_edge.options import OPTIONS, Option, Options
from colm_edge.serve.dialogue import Prompt, check_length
from colm_edge.serve.errors import RefusalError

if TYPE_CHECKING:
    from colm_edge.pair import Pair

MAX_CHOICES = 16  # answers to one request
MAX_LOGPROBS = 20
DEFAULT_COMPLETION = 16  # tokens of a plain completion that sets no limit, as in OpenAI's API
# Fields of other servers and of old clients that would change the answer: refused, never ignored,
# except for values that change nothing, which some clients always send.
REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("allowed_token_ids", "guided_choice", "guided_grammar",
         "guided_json", "guided_regex", "logits_processors", "n_predict", "structured_outputs",
         "truncate_prompt_tokens"), ()),
    **dict.fromkeys(("bad_words", "functions", "lora", "samplers", "stop_token_ids"), ([],)),
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "chat_template": ("",),
    "function_call": ("auto", "none"),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "repeat_last_n": (64,),  # what llama.cpp's penalties look at here
    "skip_special_tokens": (True,),
    "suffix": ("",),
    **dict.fromkeys(("t_max_predict_ms", "top_n_sigma"), (0, -1)),
    **dict.fromkeys(
        ("dry_multiplier", "dynatemp_range", "ignore_eos", "min_tokens", "mirostat",
         "use_beam_search", "xtc_probability"), (0,)),
    **dict.fromkeys(("length_penalty", "repetition_penalty", "tfs_z", "typical_p"), (1,)),
}  # fmt: skip


T = TypeVar("T")
# The first wrong element ends the reading: 4 MB of them would be made into 5 GB of errors.
List = Annotated[list[T], Field(fail_fast=True)]
# Of objects, whose reading takes long, and everybody waits for it.
Objects = Annotated[list[T], Field(fail_fast=True, max_length=10_000)]


class Body(BaseModel):
    """An object in a request. Null is taken as not given, as OpenAI does."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


def refuse_unsupported(given: dict[str, Any]) -> None:
    """Raise RefusalError for a field of REFUSED whose value would change the answer."""
    for name, harmless in REFUSED.items():
        if given.get(name) is not None and given[name] not in harmless:
            raise not_supported(name)


def not_supported(name: str) -> RefusalError:
    """Return the refusal of a field."""
    return RefusalError(400, f"{name} is not supported by this server; leave it out", param=name)


def options_in(place: Literal["body", "colm"]) -> dict[str, Any]:
    """Return the fields of `Options` that requests set there, all optional, for create_model."""

    def type_of(option: Option) -> Any:
        limited: Any = Annotated[option.type, Field(**option.request_limits)]
        return limited | Literal[tuple(option.words)] if option.words else limited

    return {
        name: (type_of(option) | None, None)
        for name, option in OPTIONS.items()
        if option.request == place
    }


if TYPE_CHECKING:  # mypy does not follow create_model

    class BodyOptions(Body): ...

    class ColmOptions(Body): ...

else:
    BodyOptions = create_model("BodyOptions", __base__=Body, **options_in("body"))
    ColmOptions = create_model("ColmOptions", __base__=Body, **options_in("colm"))


class ColmFields(ColmOptions):
    """What this server adds to a request."""

    model_config = ConfigDict(extra="forbid")

    trace: bool = False
    provisional: bool = False  # of a stream: report drafts, and what is undone


class TextPart(Body):
    """A piece of a message's content; each API has its own types of such pieces."""

    text: str


def joined(texts: str | Sequence[TextPart]) -> str:
    """Return a content, which may come in pieces, as one text."""
    return texts if isinstance(texts, str) else "".join(part.text for part in texts)


class StreamOptions(Body):
    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=200)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class Sampling(BodyOptions):
    """What both kinds of completion accept, besides the options that are copied as they are."""

    # Fields, also of `colm`, that are not supported at this path, as REFUSED has them.
    elsewhere: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = None
    # -1 is llama.cpp's: no limit but the server's.
    max_tokens: int | None = Field(default=None, ge=-1)
    seed: Seed | None = None
    stop: Stop | List[Stop] | None = Field(default=None)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    colm: ColmFields = ColmFields()
    json_schema: dict[str, Any] | None = None  # llama.cpp's: of what the answer has to be

    @model_validator(mode="before")
    @classmethod
    def is_known(cls, given: Any) -> Any:
        """Refuse what is not supported."""
        if not isinstance(given, dict):
            return given
        colm = given["colm"] if isinstance(given.get("colm"), dict) else {}
        for name, harmless in cls.elsewhere.items():
            value = given.get(name)
            is_text = isinstance(value, dict) and value.get("type") == "text"  # of response_format
            if (value not in (None, *harmless) and not is_text) or colm.get(name):
                message = f"{name} is not supported at this path; leave it out"
                raise RefusalError(400, message, param=name)
        refuse_unsupported(given)
        return given

    def options(
        self, defaults: Options, choice: int, limit: int, grammar: str | None = None
    ) -> Options:
        """Return the decoding options of one choice; each has a seed of its own.

        grammar: what the prompt's answer has to keep to, if anything.
        """
        given = self.model_dump(include=set(BodyOptions.model_fields), exclude_none=True)
        given |= self.colm.model_dump(exclude={"trace", "provisional"}, exclude_none=True)
        seed = defaults.seed if self.seed is None else self.seed
        given["seed"] = -1 if seed == -1 else (seed + choice) % (2**32 - 1)
        if (stop := self.stops()) is not None:
            given["stop"] = stop
        wanted = self.limit()
        wanted = defaults.max_tokens if wanted is None else wanted
        given["max_tokens"] = limit if wanted == -1 else min(limit, wanted)
        given["n_probs"] = self.n_probs()
        if grammar is not None:
            if "grammar" in given:
                raise ColmError(
                    "a grammar and a JSON schema or tools both say what is allowed; give one"
                )
            given["grammar"] = grammar
        return defaults.with_changes(**given)

    def limit(self) -> int | None:
        """Return the most tokens that the request asks for, None where it does not say."""
        return self.max_tokens

    def stops(self) -> tuple[str, ...] | None:
        """Return the texts that end the answer, None where the request does not say."""
        if self.stop is None:
            return None
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def n_probs(self) -> int:
        """Return how many of the most likely tokens to report for each token."""
        return 0

    @property
    def reads_from(self) -> int:
        """The first of the prompt's tokens that is reported too, from 1 on; 0 for none."""
        return 0


class CompletionRequest(Sampling):
    elsewhere: ClassVar = {"max_completion_tokens": (), "response_format": (), "tools": ([],)}

    prompt: str | List[int] | List[str] | List[List[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)  # vLLM's
    prompt_logprobs_from: int = Field(default=1, ge=1)  # of the tokens from this one on
    echo: bool = False
    return_tokens_as_token_ids: bool = False  # vLLM's: token_id:7 instead of a text
    special: bool = False  # whether names of control tokens in a text stand for these
    with_pieces: bool = False  # tell what each token spells that has a log-probability

    def options(
        self, defaults: Options, choice: int, limit: int, grammar: str | None = None
    ) -> Options:
        if self.max_tokens is None:
            limit = min(limit, DEFAULT_COMPLETION)
        return super().options(defaults, choice, limit, grammar)

    def n_probs(self) -> int:
        return max(self.logprobs or 0, self.prompt_logprobs or 0)

    @property
    def reads_from(self) -> int:
        if self.echo and self.logprobs is not None:
            return 1
        return 0 if self.prompt_logprobs is None else self.prompt_logprobs_from

    def prompts(self, pair: Pair) -> list[Prompt]:
        """Return what to go on from; a list of numbers is one prompt.

        Raises ColmError for a schema that cannot be used, RefusalError for too many answers.
        """
        prompts: Sequence[Any] = [self.prompt]
        if isinstance(self.prompt, list) and not all(isinstance(i, int) for i in self.prompt):
            prompts = self.prompt
        if (n := len(prompts) * self.n) > MAX_CHOICES:
            raise RefusalError(
                400,
                f"the request asks for {n} answers; at most {MAX_CHOICES} are allowed",
                param="n",
            )
        grammar = None if self.json_schema is None else grammar_of(self.json_schema)
        return [Prompt(self._tokens(prompt, pair), grammar) for prompt in prompts]

    def _tokens(self, prompt: str | list[int], pair: Pair) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if not self.special:
            return pair.base.tokenize(prompt, special=False)
        check_length(pair, prompt)
        return pair.tokens_of(prompt)


class TokenizeRequest(Body):
    """vLLM's: a text whose token ids a client wants, for example to compare vocabularies."""

    prompt: str
    add_special_tokens: bool = True
    parse_special: bool = True  # llama.cpp's: whether names of control tokens stand for these
    with_pieces: bool = False  # llama.cpp's: tell what each token spells


class DetokenizeRequest(Body):
    """vLLM's: token ids whose text a client wants."""

    tokens: List[Annotated[int, Field(ge=0)]]
