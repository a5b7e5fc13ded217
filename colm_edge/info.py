"""Describe a model or a switch file, and whether two models can collaborate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as llama

from colm_edge.errors import MismatchError, ModelError, printable
from colm_edge.gguf_header import read_architecture
from colm_edge.hub import Note
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.costs import (
    OUTPUTS,
    CostTable,
    break_even,
    seconds_per_token,
)
from colm_edge.llama.measure import cost_table, kept_table
from colm_edge.llama.memory import cache_bytes
from colm_edge.llama.model import Model
from colm_edge.llama.quantize import file_type
from colm_edge.llama.session import Session
from colm_edge.llama.vocabulary import shared_vocab
from colm_edge.references import is_url, references_of, resolve
from colm_edge.switch.file import ARCHITECTURE, Switch, role_of
from colm_edge.switch.load import in_order, warnings_of
from colm_edge.tables import threshold_text

RATES = (0.05, 0.1, 0.2)  # of deferrals, that speeds are predicted for
FASTEST = "Q4_0"  # of llama.cpp's types, on most CPUs
N_CTX = 4096  # tokens that the memory is stated for, or fewer if the model was trained for fewer


def describe_files(
    refs: Sequence[str],
    *,
    costs: bool = False,
    n_threads: int = 0,
    note: Note = lambda text: None,
) -> tuple[list[dict[str, Any]], str]:
    """Return the facts of each file, and why the models cannot collaborate ("" if they can): a base
    and an expert, or several. One name in models.txt stands for all of its files.

    costs: measure what decodes cost, if that is not known yet. note: told before that, before a
    download, and where costs cannot be kept.
    Raises ModelError or SwitchError for a file that is neither.
    """
    facts, obstacle = list[dict[str, Any]](), ""
    models, tables, switches = list[Model](), list[CostTable | None](), list[Switch]()
    try:
        for ref in references_of(refs[0]) if len(refs) == 1 else refs:
            if is_url(ref):
                raise ModelError(f"{ref}: a server is not described; give a GGUF file")
            path = resolve(ref, "expert" if models else "base", note=note)
            switch = _as_switch(path)
            if switch is not None:
                switches.append(switch)
                facts.append(_switch_facts(switch))
                continue
            model = Model(path)
            models.append(model)
            tables.append(_costs(model, costs, n_threads, note))
            facts.append(_model_facts(model, tables[-1]))
        if len(models) == 1:
            of_switches = (fact for fact in facts if "reads" in fact)
            for switch, fact in zip(switches, of_switches, strict=True):
                fact["with_this_base"] = _fit_of(switch, models)[0]
        if len(models) > 1:
            pairs = [_pair_facts(models[0], expert) for expert in models[1:]]
            facts += [pair for pair, _ in pairs]
            fits = [_fit_of(switch, models) for switch in switches]
            obstacle = next((missing for _, missing in pairs + fits if missing), "")
            if len(pairs) > 1:
                facts.append(_team_facts(models))
            if fits:
                facts[-1]["switch"] = "; ".join(fit for fit, _ in fits)
            if not obstacle:
                speeds = _speed_facts if len(pairs) == 1 else _team_speeds
                facts[-1] |= speeds(models, tables)
    finally:
        for model in models:
            model.close()
    return facts, obstacle


def _as_switch(path: str) -> Switch | None:
    """Return the switch in a file, or None for a file of another kind."""
    try:
        is_switch = read_architecture(path) == ARCHITECTURE
    except (OSError, ValueError):
        return None  # reading the file as a model says what is wrong
    return Switch.load(path) if is_switch else None


def _switch_facts(switch: Switch) -> dict[str, Any]:
    roles = "base", *map(role_of, switch.expert_names or ("",))
    nats = switch.review
    return {
        "switch": switch.name,
        "fitted_for": [switch.info[role] for role in roles if role in switch.info],
        "reads": switch.features,
        "n_embd": switch.n_embd if switch.needs_hidden else 0,
        "experts": switch.n_experts,
        "expert_names": switch.expert_names,
        "threshold": switch.threshold,
        "review": "off" if nats == math.inf else nats,  # None: it does not say
        "calibration": [
            {"defer_rate": rate, "threshold": threshold}
            for rate, threshold in zip(switch.defer_rates, switch.thresholds, strict=True)
        ],
    }


def _costs(model: Model, measures: bool, n_threads: int, note: Note) -> CostTable | None:
    """Return what decodes cost here, None where that is not known and not to be measured."""
    session = Session(model, ContextOptions(n_ctx=_n_ctx(model), n_threads=n_threads))
    return cost_table(session, note=note) if measures else kept_table(session)


def _n_ctx(model: Model) -> int:
    return min(N_CTX, model.n_ctx_train) or N_CTX


def _model_facts(model: Model, table: CostTable | None) -> dict[str, Any]:
    n_ctx = _n_ctx(model)
    size, n_params = llama.llama_model_size(model.header()), model.n_params
    return {
        "model": str(model.path),
        "name": model.metadata("general.name"),
        "architecture": model.metadata("general.architecture"),
        "quantisation": file_type(model),
        "parameters": n_params,
        "bits_per_weight": round(8 * size / max(1, n_params), 2),
        "trained_context": model.n_ctx_train,
        "n_vocab": model.n_vocab,
        "vocabulary_hash": model.vocabulary_hash,
        "chat_template": model.chat_template is not None,
        "weights_bytes": size,
        "cache_bytes": cache_bytes(model, n_ctx),
        "cache_tokens": n_ctx,
        "decode_costs": None
        if table is None
        else {"sizes": table.sizes, "seconds": table.seconds, "more": table.more},
    }


def _pair_facts(base: Model, expert: Model) -> tuple[dict[str, Any], str]:
    """Return the facts of two models together, and why they cannot collaborate ("" if they can)."""
    obstacle = ""
    try:
        can = f"yes, over {shared_vocab(base, expert):,} shared tokens"
    except MismatchError as e:
        obstacle = str(e)
        can = f"no: {obstacle}"
    names = " with ".join(short_names([base.path, expert.path]))
    return {"pair": names, "can_collaborate": can}, obstacle


def _fit_of(switch: Switch, models: Sequence[Model]) -> tuple[str, str]:
    """Return whether a switch fits a base and experts, and why it cannot be used with them ("" if
    it can). Where it has names for its experts, they are taken to be in that order."""
    base, *others = models
    names = switch.expert_names
    if len(names) != len(others):
        names = ("",) if len(others) == 1 else tuple(map(str, range(1, len(models))))
    experts = dict(zip(names, others, strict=True))
    try:
        if others:
            in_order(switch, experts)
        switch.reader(base, base.n_vocab)
    except MismatchError as e:
        return f"no: {e}", str(e)
    if warnings := "; ".join(warnings_of(switch, base, experts)):
        return warnings, ""
    roles = "base", *map(role_of, names)
    knows = all(f"{role}_fingerprint" in switch.info for role in roles)
    return f"{switch.name}, fits" + ("" if knows else "; it does not say which files it is for"), ""


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file: its own, or its whole path where others have that name too."""
    names = [path.name for path in paths]
    return [
        str(path) if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]


def _speed_facts(models: Sequence[Model], tables: Sequence[CostTable | None]) -> dict[str, Any]:
    """Return what speeds the costs of decodes promise: of the expert alone, and of the pair."""
    base, expert = tables
    if base is None or expert is None:
        return {"predicted": None, "break_even": None}
    return {
        "expert_tokens_per_second": 1 / expert(1),
        "predicted": _predicted(base, [expert]),
        "break_even": break_even(base, expert),
        "fastest_type": all(file_type(model) == FASTEST for model in models),
    }


def _predicted(base: CostTable, experts: Sequence[CostTable]) -> list[dict[str, float]]:
    """Return at each of RATES what a pair should write, and how that compares with its slowest
    expert alone."""
    slowest, found = max(expert(1) for expert in experts), []
    for rate in RATES:
        seconds = seconds_per_token(base, experts, rate)
        ratio = slowest / seconds
        found.append({"defer_rate": rate, "tokens_per_second": 1 / seconds, "ratio_expert": ratio})
    return found


def _team_facts(models: Sequence[Model]) -> dict[str, Any]:
    names = short_names([model.path for model in models])
    return {"team": f"{names[0]} with {', '.join(names[1:])}"}


def _team_speeds(models: Sequence[Model], tables: Sequence[CostTable | None]) -> dict[str, Any]:
    """Return what speeds a base and several experts promise."""
    names = short_names([model.path for model in models])
    if (base := tables[0]) is None or not all(experts := tables[1:]):
        return {"predicted": None}
    known = [table for table in experts if table is not None]
    alone = {name: 1 / table(1) for name, table in zip(names[1:], known, strict=True)}
    return {"experts_tokens_per_second": alone, "predicted": _predicted(base, known)}


def _speed(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _speed_lines(fact: dict[str, Any]) -> dict[str, str]:
    """Return the predictions of a pair as two lines."""
    if "predicted" not in fact:
        return {}
    if fact["predicted"] is None:
        return {"speed": "not measured (--costs)"}
    at = ", ".join(
        f"{_speed(row['tokens_per_second'])} at {row['defer_rate']:.0%}"
        for row in fact["predicted"]
    )
    if "team" in fact:
        alone = ", ".join(f"{n} {_speed(x)}" for n, x in fact["experts_tokens_per_second"].items())
        return {"tokens_per_second": f"experts alone: {alone}; called equally often, together {at}"}
    alone, limit = fact["expert_tokens_per_second"], fact["break_even"]
    fastest = fact["fastest_type"]
    if limit is None:
        pays = "at any defer rate"
    elif limit == 0:
        cure = "a smaller base" if fastest else f"a smaller base, or {FASTEST},"
        pays = f"at none: the base takes as long as the expert; {cure} would help"
    else:
        cure = "a smaller base raises" if fastest else f"{FASTEST} files, or a smaller base, raise"
        pays = f"below a defer rate of {limit:.0%}; {cure} it"
    return {"tokens_per_second": f"expert alone {_speed(alone)}; together {at}", "pays": pays}


def _model_lines(fact: dict[str, Any]) -> dict[str, Any]:
    weights, cache = (f"{fact[key] / 1e6:,.0f} MB" for key in ("weights_bytes", "cache_bytes"))
    costs = fact["decode_costs"]
    return {
        **{key: fact[key] or "–" for key in ("model", "name", "architecture", "quantisation")},
        "parameters": f"{fact['parameters']:,}",
        "bits_per_weight": fact["bits_per_weight"],
        "trained_context": fact["trained_context"],
        "vocabulary": f"{fact['n_vocab']:,} tokens, {fact['vocabulary_hash'][:12]}",
        "chat_template": "yes" if fact["chat_template"] else "none",
        "memory": f"{weights} of weights, {cache} of cache at {fact['cache_tokens']:,} tokens in "
        "f16",
        "decode_costs_in_ms": "not measured (--costs)" if costs is None else _cost_line(**costs),
    }


def _cost_line(sizes: Sequence[int], seconds: Sequence[float], more: Sequence[float]) -> str:
    costs = [f"{n}: {1e3 * s:.3g}" for n, s in zip(sizes, seconds, strict=True)]
    costs += [f"{n} states: {1e3 * s:.2g} more" for n, s in zip(OUTPUTS, more, strict=False)]
    return ", ".join(costs)


def _switch_lines(fact: dict[str, Any]) -> dict[str, Any]:
    names, review = ", ".join(fact["expert_names"]), fact["review"]
    rates = (
        f"{row['defer_rate']:.0%}: {threshold_text(row['threshold'])}"
        for row in fact["calibration"]
    )
    lines = {
        "switch": fact["switch"],
        "fitted_for": ", ".join(fact["fitted_for"]) or "not told",
        "reads": ", ".join(fact["reads"]),
        "hidden_state": f"{fact['n_embd']} numbers" if fact["n_embd"] else "not read",
        "experts": f"{fact['experts']}: {names}" if names else fact["experts"],
        "threshold": threshold_text(fact["threshold"]),
        "review": {None: "off", "off": "off, the switch says"}.get(review, f"{review} nats"),
        "calibration": ", ".join(rates) or "none",
    }
    known = "with_this_base"
    return lines | ({known: fact[known]} if known in fact else {})


def as_text(facts: list[dict[str, Any]]) -> str:
    """Return facts as lines, a blank line between two files."""

    def lines(fact: dict[str, Any]) -> str:
        if "model" in fact:
            shown = _model_lines(fact)
        elif "reads" in fact:
            shown = _switch_lines(fact)
        else:
            names = ("pair", "team", "can_collaborate", "switch")
            shown = {name: fact[name] for name in names if name in fact} | _speed_lines(fact)
        width = max(map(len, shown)) + 2
        texts = {key: printable(str(value)) for key, value in shown.items()}  # of strangers' files
        return "\n".join(f"{key.replace('_', ' '):{width}}{text}" for key, text in texts.items())

    return "\n\n".join(map(lines, facts))
