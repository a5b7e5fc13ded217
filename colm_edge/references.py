"""From a reference to a file: a path, a name in models.txt, or a file on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from colm_edge.errors import ModelError
from colm_edge.hub import Note, fetch, find_cached, is_reference

DEMO_PAIR = "demo"
# A model to be quantised here: the reference it is made from, and its types.
_QUANTISED = re.compile(r"(.+)@(\w+)(?:\+(\w+))?")
_COMMENT = re.compile(r"(?:^|\s)#")  # a server's address has its model after a #
_ADDRESS = re.compile(r"[\w.-]+:\d{1,5}")
_PACKAGE = Path(__file__).parent
_NAME = re.compile(r"\w[\w.-]*")  # of an expert; a folder may be named so
_ROLE = re.compile(rf"base|switch|expert(:{_NAME.pattern})?")
Reference = str | os.PathLike[str]
# One expert; or several, NAME=REF each or by their names.
Experts = Reference | Sequence[Reference] | Mapping[str, Reference]


@dataclass(frozen=True)
class PairFiles:
    """What makes a pair: GGUF models, and a switch file or the name of an untrained switch.

    experts: by their names, which is empty where there is one; they may be servers' addresses.
    """

    base: str
    experts: Mapping[str, str]
    switch: str
    is_demo: bool = False


def _models_txt() -> Path:
    # An installed package has the list beside the code, a checkout has it at the top.
    installed = _PACKAGE / "models.txt"
    return installed if installed.exists() else _PACKAGE.parent / "models.txt"


@dataclass(frozen=True)
class ListedModel:
    """A line of models.txt: a model or a switch."""

    reference: str
    licence: str
    note: str


def known_pairs() -> dict[str, dict[str, ListedModel]]:
    """Return models.txt as alias -> role -> line. Raises ModelError for a bad line."""
    pairs: dict[str, dict[str, ListedModel]] = {}
    path = _models_txt()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError(f"{path}: cannot be read ({e}); install colm-edge again") from e
    for number, line in enumerate(lines, 1):
        fields = _COMMENT.split(line)[0].split(maxsplit=4)
        if not fields:
            continue
        if len(fields) < 4 or not _ROLE.fullmatch(fields[1]):
            raise ModelError(
                f"{path}, line {number}: expected 'alias role reference licence note' with a role "
                "of base, expert, switch, or expert:NAME for each of several"
            )
        alias, role, reference, licence, *note = fields
        pairs.setdefault(alias, {})[role] = ListedModel(reference, licence, "".join(note))
    for alias, roles in pairs.items():
        for model in roles.values():
            if model.reference in pairs:
                raise ModelError(
                    f"{path}: {alias} stands for {model.reference}, a name of the list; "
                    "expected a file or user/repo:file.gguf"
                )
    return pairs


def find_pair(
    name: str,
    switch: str | None = None,
    *,
    offline: bool = False,
    note: Note = lambda text: None,
) -> PairFiles:
    """Return the files of a pair in models.txt, downloaded if need be.

    switch: one to use instead of the pair's own.

    Raises ModelError when models.txt has no pair of that name, and what `resolve` raises.
    """
    base, experts = listed_pair(name)
    switch = _switch_of(name, switch, offline=offline, note=note)
    files = {expert: resolve(ref, offline=offline, note=note) for expert, ref in experts.items()}
    base = resolve(base, offline=offline, note=note)
    return PairFiles(base, files, switch, is_demo=name == DEMO_PAIR)


def listed_pair(name: str) -> tuple[str, dict[str, str]]:
    """Return the references of a pair in models.txt: its base's, and its experts' by their names.

    Raises ModelError when models.txt has no pair of that name.
    """
    pairs = known_pairs()
    roles = pairs.get(name, {})
    experts = _experts_in(roles)
    if "base" not in roles or not experts:
        complete = sorted(n for n, r in pairs.items() if "base" in r and _experts_in(r))
        raise ModelError(f"no pair named {name!r} in {_models_txt()}; known: {', '.join(complete)}")
    references = {expert: roles[role].reference for expert, role in experts.items()}
    return roles["base"].reference, references


def references_of(name: str) -> list[str]:
    """Return the references of a name in models.txt: a base's, its experts', a switch's. Of any
    other name, itself."""
    roles = known_pairs().get(name)
    if roles is None or os.path.exists(name):
        return [name]
    order = [
        role for place in ("base", "expert", "switch") for role in roles if role.startswith(place)
    ]
    return [roles[role].reference for role in order]


def check_offline(servers: Iterable[str]) -> None:
    """Raise ModelError for a server, HOST:PORT, that is not on this machine."""
    for server in servers:
        if not is_this_machine(server.rpartition(":")[0]):
            raise ModelError(
                f"{server}: --offline allows only servers on this machine; leave it out, or rpc"
            )


def _experts_in(roles: Iterable[str]) -> dict[str, str]:
    """Return the experts among a pair's roles: their names, and the roles."""
    return {role.partition(":")[2]: role for role in roles if role.partition(":")[0] == "expert"}


def named(experts: Experts | None) -> dict[str, str] | None:
    """Return the references of a pair's experts by their names: one by an empty name, several by
    those that NAME=REF gives them, or else their files'.

    Raises ModelError where two have one name, or a name that cannot be.
    """
    if experts is None:
        return None
    if isinstance(experts, str | os.PathLike):
        given = [_split_name(os.fspath(experts))]
    elif isinstance(experts, Mapping):
        given = [(name, os.fspath(ref)) for name, ref in experts.items()]
    else:
        given = [_split_name(os.fspath(ref)) for ref in experts]
    if not given:
        raise ModelError("no expert is given; give at least one")
    if len(given) == 1:
        return {"": given[0][1]}
    found = dict[str, str]()
    for name, ref in given:
        chosen = name or re.sub(r"[^\w.-]+", "-", Path(ref).stem).lstrip("-.")
        if not _NAME.fullmatch(chosen):
            raise ModelError(
                f"{chosen!r} is not a valid name of an expert; use letters, digits, '_', and "
                "after the first '.', '-'"
            )
        if chosen in found:
            raise ModelError(f"two experts are named {chosen}; give -me NAME=FILE for each")
        found[chosen] = ref
    return found


def _split_name(text: str) -> tuple[str, str]:
    """Return the name and the reference in NAME=REF; the name is empty where there is none."""
    name, equals, ref = text.partition("=")
    if equals and ref and _NAME.fullmatch(name) and not os.path.exists(text):
        return name, ref
    return "", text


def _switch_of(pair: str | None, switch: str | None, *, offline: bool, note: Note) -> str:
    """Return the switch that a user chose; else that of a pair in models.txt; else margin."""
    if switch is not None:  # the name of a rule resolves to itself
        return resolve(switch, "switch", offline=offline, note=note)
    roles = {} if pair is None else known_pairs()[pair]
    if "switch" not in roles:
        return "margin"
    return resolve(roles["switch"].reference, offline=offline, note=note)


def is_this_machine(host: str) -> bool:
    """Return whether a host is this machine's own name or address, which --offline allows."""
    try:
        return host.lower() == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError as e:
        raise ModelError(f"{url}: {e}; write it as http://host:port") from e


def is_url(reference: str) -> bool:
    """Return whether a reference is a server's address rather than a file."""
    return reference.lower().startswith(("http://", "https://"))


def resolve(
    reference: str, role: str = "base", *, offline: bool = False, note: Note = lambda text: None
) -> str:
    """Return the path of a reference, downloaded if need be.

    It is a path, an alias in models.txt, or user/repo:FILE on the Hub, in this order; `package:`
    stands for the files that ship with colm-edge. REF@TYPE is the model of a reference, quantised
    to a type and kept in the cache; REF@TYPE+TYPE gives the output matrix a type of its own. A
    server's address is returned as it is, and so is anything else: opening it reports what is
    wrong.

    role: which of a pair's models an alias means. offline, note: as for `hub.fetch`; offline, a
        server must be on this machine.

    Raises ModelError: an address that is incomplete or not allowed offline, a failed download, a
    type that is unknown; WriteError for a full disk.
    """
    if is_url(reference):
        if offline and not is_this_machine(_host_of(reference)):
            raise ModelError(
                f"{reference}: --offline allows only servers on this machine; leave it out, or "
                "give a GGUF file"
            )
        return reference
    if _ADDRESS.fullmatch(reference) and not os.path.exists(reference):
        raise ModelError(f"{reference}: no such file; write a server as http://{reference}")
    quantised = _QUANTISED.fullmatch(reference)
    if quantised is not None and not os.path.exists(reference):
        from colm_edge.llama.quantize import Recipe

        recipe = Recipe(quantised[2], quantised[3])  # an unknown type is told before a download
        return recipe.made_from(resolve(quantised[1], role, offline=offline, note=note), note)
    if reference.startswith("package:"):
        return str(_PACKAGE / "data" / reference.removeprefix("package:"))
    try:
        path = Path(reference).expanduser()
    except RuntimeError as e:  # ~user, of a user who does not exist
        raise ModelError(f"{reference}: {e}; give a path that exists") from e
    if os.path.exists(path):  # not of Path, which raises for a name that is too long
        return str(path)
    known = known_pairs().get(reference, {})
    if role in known:
        return resolve(known[role].reference, offline=offline, note=note)
    if is_reference(reference):
        return str(fetch(reference, offline=offline, note=note))
    return str(path)


def is_here(reference: str) -> bool:
    """Return whether the file of a reference in models.txt is on this machine, or the one that it
    is made from."""
    source = source_of(reference)
    if is_reference(source):
        return find_cached(source) is not None
    return os.path.exists(resolve(source, offline=True))


def source_of(reference: str) -> str:
    """Return the reference that a model is made from: REF of REF@TYPE, or the reference itself."""
    quantised = _QUANTISED.fullmatch(reference)
    return reference if quantised is None else quantised[1]


def choose_pair(
    model: str | None,
    experts: Mapping[str, str] | None,
    switch: str | None,
    pair: str | None = None,
    *,
    offline: bool = False,
    note: Note = lambda text: None,
) -> PairFiles:
    """Return the pair that a user chose; without a choice, the one that ships with colm-edge.

    experts: by their names, as `named` returns them. pair: a name in models.txt; beside models of
    the user's own, it names the switch.

    Raises ModelError when the choices contradict each other or are incomplete, and what `resolve`
    raises.
    """
    if pair is not None and pair not in known_pairs():
        listed_pair(pair)  # says which ones there are
    if (model is None) != (experts is None):
        given, missing = ("-m", "-me") if model else ("-me", "-m")
        raise ModelError(f"{given} without {missing}: give both models, or neither")
    if model is not None and is_url(model):
        raise ModelError(
            f"-m {model}: the base runs on this machine, at every token; give a GGUF file"
        )
    if model is not None and experts is not None:
        return PairFiles(
            resolve(model, "base", offline=offline, note=note),
            {
                name: resolve(ref, "expert", offline=offline, note=note)
                for name, ref in experts.items()
            },
            _switch_of(pair, switch, offline=offline, note=note),
        )
    return find_pair(DEMO_PAIR if pair is None else pair, switch, offline=offline, note=note)
