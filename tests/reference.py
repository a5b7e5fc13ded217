"""The slow twin of the whole runtime: Co-LLM's loop over llama.cpp's functions, without a cache or
drafts, with numpy for the switch. Tests compare the runtime with it, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import llama_cpp as llama
import numpy as np

from colm_edge.llama.backend import model_params
from colm_edge.switch.file import Switch


class PlainModel:
    """A model that evaluates the whole prefix at each step, with all outputs on."""

    def __init__(self, path: str, n_ctx: int = 512) -> None:
        params = model_params()
        params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(path).encode(), params)
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.n_vocab = llama.llama_vocab_n_tokens(self.vocab)
        self.n_embd = llama.llama_model_n_embd(self.model)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ctx, n_ctx
        params.n_threads = params.n_threads_batch = 1
        params.embeddings = True
        self.context = llama.llama_init_from_model(self.model, params)

    def state(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return (logits, hidden) after the last token, float64 copies."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        array = (llama.llama_token * len(tokens))(*tokens)
        assert llama.llama_decode(self.context, llama.llama_batch_get_one(array, len(tokens))) == 0
        logits = llama.llama_get_logits_ith(self.context, -1)
        hidden = llama.llama_get_embeddings_ith(self.context, -1)
        return (
            np.ctypeslib.as_array(logits, (self.n_vocab,)).astype(np.float64),
            np.ctypeslib.as_array(hidden, (self.n_embd,)).astype(np.float64),
        )

    def is_end(self, token: int) -> bool:
        return bool(llama.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)


def p_defer(switch: Switch | str, logits: np.ndarray, hidden: np.ndarray) -> float:
    """Compute p_defer by its definition, one line per feature."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    top = np.sort(p)[::-1]
    log_p = np.log(np.maximum(p, 1e-300))
    feature = {
        "entropy": -(p * log_p).sum(),
        "logp1": math.log(top[0]),
        "margin": top[0] - top[1],
        "p1": top[0],
        "p2": top[1],
        "p3": top[2],
        "p4": top[3],
        "p5": top[4],
    }
    if switch == "margin":
        return 1 - feature["margin"]
    if switch == "entropy":
        return 1 - math.exp(-feature["entropy"])
    assert isinstance(switch, Switch)
    columns: list[float] = []
    for name in switch.features:
        columns += list(hidden) if name == "hidden" else [feature[name]]
    d = float(np.array(columns) @ switch.weight[0].astype(np.float64)) + float(switch.bias[0])
    return 1 / (1 + math.exp(-d))


@dataclass
class PlainStep:
    token: int
    source: str
    p_defer: float
    lead: float  # the logit of the choice minus that of the runner-up


def plain_loop(
    base: PlainModel,
    expert: PlainModel,
    switch: Switch | str,
    prompt: list[int],
    threshold: float,
    max_tokens: int,
) -> list[PlainStep]:
    """Return the greedy Co-LLM answer to a prompt, with both models evaluated at every step."""
    tokens, steps = list(prompt), []
    while len(steps) < max_tokens:
        base_logits, hidden = base.state(tokens)
        expert_logits, _ = expert.state(tokens)
        # An expert that writes alone does not ask the base.
        p = p_defer(switch, base_logits, hidden) if threshold > 0 else 1.0
        deferred = p > threshold
        logits = (expert_logits if deferred else base_logits)[: min(base.n_vocab, expert.n_vocab)]
        best = np.sort(logits)[-2:]
        token = int(logits.argmax())
        if base.is_end(token) or expert.is_end(token):
            break
        source = "expert" if deferred else "base"
        steps.append(PlainStep(token, source, p, float(best[1] - best[0])))
        tokens.append(token)
    return steps


def assert_same(steps, plain: list[PlainStep], threshold: float) -> None:
    """Require the same tokens by the same writers with the same p_defer.

    The logits of cached and whole-prefix decodes differ in the last bits. So the two may diverge at
    a near-tie of two tokens, or of p_defer and threshold; after that nothing is compared.
    """
    for step, other in zip(steps, plain, strict=False):
        assert abs(step.p_defer - other.p_defer) < 1e-3
        if step.source != other.source:
            assert abs(other.p_defer - threshold) < 1e-3
            return
        if step.token != other.token:
            assert other.lead < 1e-2
            return
    assert len(steps) == len(plain)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())
