"""What must hold for doubt, tested on scripted sessions with random logits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from reference import log_softmax
from scripted import END, N_VOCAB, Drawn, decoder, reader
from test_review import THRESHOLD, plain_of

from colm_edge.decode.doubt import Doubt
from colm_edge.decode.loop import Decoder
from colm_edge.decode.step import Drafted, Step, Undone

parts = {
    "seed": st.integers(0, 10_000),
    "rate": st.floats(0, 1),
    "nats": st.sampled_from([0.1, 0.5, 1.0, 3.0]),
    "window": st.sampled_from([1, 2, 4, 9]),
    "n_prompt": st.integers(1, 20),
    "n_ctx": st.integers(20, 60),
    "max_tokens": st.integers(-1, 40),
    "likes_end": st.sampled_from([-2.0, 4.0, 8.0]),
}


def reference(base, expert, p_of, prompt, nats, window, max_tokens):
    """Co-LLM's loop with doubt in its simplest form: no caches, no states kept."""
    tokens, rivals = list(prompt), dict[int, int]()
    limit = base.n_ctx + 1
    if max_tokens >= 0:
        limit = min(limit, len(prompt) + max_tokens)

    def told(model, prefix):
        return log_softmax(model.logits(tuple(prefix)))

    def joint(branch, place):
        end = min(place + 1 + window, limit)
        while len(branch) < end and branch[-1] != END:
            branch = [*branch, int(told(base, branch).argmax())]
        places = range(place + 1, len(branch))
        both = sum(told(m, branch[:i])[branch[i]] for i in places for m in (base, expert))
        return both / (2 * len(places))

    while len(tokens) < limit and (tokens == list(prompt) or tokens[-1] != END):
        at, ours, theirs = len(tokens), told(base, tokens), told(expert, tokens)
        # What was watched long enough is final, even if a later token is taken back.
        rivals = {place: rival for place, rival in rivals.items() if at - place <= window}
        if rivals and max(ours.max(), theirs.max()) < -nats:
            place = max(rivals)
            other = [*tokens[:place], rivals.pop(place)]
            if joint(other, place) > joint(tokens, place):
                tokens = other
                rivals = {i: rival for i, rival in rivals.items() if i < place}
            continue
        if p_of(at) > THRESHOLD:
            tokens.append(int(theirs.argmax()))
            if ours.argmax() not in (tokens[-1], END):
                rivals[at] = int(ours.argmax())
        else:
            tokens.append(int(ours.argmax()))
    ended = tokens[-1] == END and len(tokens) > len(prompt)
    return tokens[len(prompt) : len(tokens) - ended], "stop" if ended else "length"


def doubted(seed, rate, nats, window, n_prompt, n_ctx, max_tokens, likes_end) -> Decoder:
    base, expert = (Drawn(seed + i, n_ctx, likes_end=likes_end) for i in (0, 1))
    prompt = [1 + i % (N_VOCAB - 1) for i in range(n_prompt)]
    schedule = Doubt(nats, window)
    return decoder(
        base, expert, reader(seed, rate)[0], prompt, max_tokens=max_tokens, schedule=schedule
    )


@settings(max_examples=300)
@given(**parts)
def test_doubt_is_the_plain_loop_with_doubt(**given):
    run = doubted(**given)
    steps = [step.token for step in run]
    base, expert = run._base, run._experts[0]
    _, p_of = reader(given["seed"], given["rate"])
    prompt = [1 + i % (N_VOCAB - 1) for i in range(given["n_prompt"])]
    wanted = given["nats"], given["window"], given["max_tokens"]
    assert (steps, run.finish_reason) == reference(base, expert, p_of, prompt, *wanted)
    assert run.stats.n_undone == sum(len(one.steps) for one in run.undone)


@given(**parts)
def test_only_tokens_of_the_experts_are_doubted_and_only_for_something_better(**given):
    run = doubted(**given)
    drafts, n_final = list[Step](), 0
    for event in run.events():
        if isinstance(event, Drafted):
            drafts.append(event.step)
            # Only the end token, which is not a step, stays without becoming one.
            assert len(drafts) <= given["window"] + 1
        elif isinstance(event, Undone):
            assert event.steps[0].source == "expert"
            assert event.regret > 0
            kept = event.at - n_final
            assert tuple(drafts[kept:]) == event.steps
            del drafts[kept:]
        else:
            assert event is drafts.pop(0)
            n_final += 1


@given(**parts)
def test_the_switch_is_asked_once_for_each_draft(**given):
    """A threshold that follows a rate would otherwise count a position again when it was doubted
    in vain."""
    run = doubted(**given)
    asked, read = [], run.policy.read

    def counted(at, logits, hidden):
        asked.append(at)
        return read(at, logits, hidden)

    run.policy.read = counted
    assert sum(isinstance(event, Drafted) for event in run.events()) == len(asked)


@given(**{**parts, "nats": st.just(1e9)})
def test_without_doubt_the_text_is_the_plain_loops(**given):
    run, plain = doubted(**given), plain_of(given)
    assert list(run) == list(plain)
    # Nor does it cost a call more.
    assert run.stats.expert_calls == plain.stats.expert_calls
    assert run.stats.base_tokens == plain.stats.base_tokens
