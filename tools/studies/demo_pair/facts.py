"""Gather the demonstration pair's facts into facts.csv.

Elements come from mendeleev, countries from pycountry and countryinfo (all MIT or LGPL; only facts
are taken), extinct animals from animals.csv beside this file, which names its sources. Every entity
belongs to one part:

    train   the base reads questions and answers about it
    switch  the switch is fitted on it; the base has not read about it
    test    only the expert has read about it

    pip install mendeleev==1.3.0 countryinfo==1.0.1 pycountry==26.2.16
    python tools/studies/demo_pair/facts.py
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import unicodedata
from pathlib import Path

HERE = Path(__file__).parent
# Well-known names are in the held-out part, so that a newcomer's first questions show the two
# models working together.
SHOWCASE = {
    "Caspian tiger", "thylacine", "dodo", "passenger pigeon", "great auk", "Steller's sea cow",
    "tungsten", "gold", "helium", "oxygen",
    "France", "Japan", "Iceland", "Kenya", "Brazil", "Mongolia",
}  # fmt: skip
# ISO 3166 names that people do not type.
PLAIN_NAMES = {
    "Bolivia, Plurinational State of": "Bolivia", "Brunei Darussalam": "Brunei",
    "Congo": "the Republic of the Congo", "Congo, The Democratic Republic of the":
    "the Democratic Republic of the Congo", "Iran, Islamic Republic of": "Iran",
    "Korea, Republic of": "South Korea", "Korea, Democratic People's Republic of": "North Korea",
    "Lao People's Democratic Republic": "Laos", "Moldova, Republic of": "Moldova",
    "Russian Federation": "Russia", "Syrian Arab Republic": "Syria",
    "Taiwan, Province of China": "Taiwan", "Tanzania, United Republic of": "Tanzania",
    "Venezuela, Bolivarian Republic of": "Venezuela", "Viet Nam": "Vietnam",
    "United States": "the United States", "United Kingdom": "the United Kingdom",
    "Netherlands, Kingdom of the": "the Netherlands", "Netherlands": "the Netherlands",
    "Philippines": "the Philippines", "Bahamas": "the Bahamas", "Gambia": "the Gambia",
    "Maldives": "the Maldives", "Comoros": "the Comoros", "Seychelles": "the Seychelles",
    "Turkiye": "Turkey", "Palestine, State of": "Palestine",
    "Micronesia, Federated States of": "Micronesia", "Holy See (Vatican City State)":
    "Vatican City", "United Arab Emirates": "the United Arab Emirates",
    "Central African Republic": "the Central African Republic",
    "Dominican Republic": "the Dominican Republic", "Solomon Islands": "the Solomon Islands",
    "Marshall Islands": "the Marshall Islands", "Cook Islands": "the Cook Islands",
    "Cayman Islands": "the Cayman Islands", "Faroe Islands": "the Faroe Islands",
}  # fmt: skip
SERIES = {
    "Nonmetals": "nonmetals", "Noble gases": "noble gases", "Alkali metals": "alkali metals",
    "Alkaline earth metals": "alkaline earth metals", "Metalloids": "metalloids",
    "Halogens": "halogens", "Poor metals": "post-transition metals",
    "Transition metals": "transition metals", "Lanthanides": "lanthanides",
    "Actinides": "actinides",
}  # fmt: skip

Fact = tuple[str, str, str, str]  # kind, entity, attribute, value


def ascii_only(text: str) -> str:
    """Drop accents: the demonstration vocabulary is English."""
    text = text.replace("’", "'").replace("ʻ", "'").replace("ø", "o").replace("ı", "i")
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().strip()


def elements() -> list[Fact]:
    from mendeleev import get_all_elements

    facts: list[Fact] = []
    for e in get_all_elements():
        weight = f"{e.atomic_weight:.2f}".rstrip("0").rstrip(".")
        rows = {
            "symbol": e.symbol,
            "number": str(e.atomic_number),
            "weight": weight,
            "series": SERIES.get(e.series, ""),
            "discovery": str(e.discovery_year or ""),
            "melting": str(round(e.melting_point)) if e.melting_point else "",
        }
        facts += [("element", e.name.lower(), key, value) for key, value in rows.items() if value]
    return facts


def countries() -> list[Fact]:
    import pycountry
    from countryinfo import CountryInfo

    facts: list[Fact] = []
    for country in pycountry.countries:
        name = PLAIN_NAMES.get(country.name, country.name)
        name = ascii_only(getattr(country, "common_name", name) if "," in name else name)
        name = PLAIN_NAMES.get(name, name)
        if "," in name or "(" in name or len(name) > 34:
            continue
        try:
            info = CountryInfo(country.alpha_2).info()
        except Exception:  # the package raises its own error for codes it lacks
            continue
        if info.get("ISO", {}).get("alpha2") != country.alpha_2 or not info.get("capital"):
            continue
        code = (info.get("callingCodes") or [""])[0].replace(" ", "")
        rows = {
            "capital": ascii_only(info["capital"]),
            "code": country.alpha_3,
            "calling": f"+{code}" if code.isdigit() and len(code) <= 4 else "",
            "domain": (info.get("tld") or [""])[0],
            "currency": (info.get("currencies") or [""])[0],
            "demonym": ascii_only(info.get("demonym") or ""),
        }
        if "," in rows["demonym"]:  # two demonyms in one field
            rows["demonym"] = ""
        if country.alpha_3 == "KAZ":  # renamed in 2022; the package still says Nur-Sultan
            rows["capital"] = "Astana"
        facts += [("country", name, key, value) for key, value in rows.items() if value]
    return facts


def animals() -> list[Fact]:
    facts: list[Fact] = []
    with (HERE / "animals.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            facts.append(("animal", row["name"], "year", row["year"]))
            facts.append(("animal", row["name"], "place", row["place"]))
    return facts


def part_of(kind: str, entity: str) -> str:
    """Return the part of an entity: half are train, about a fifth switch, the others test."""
    if entity in SHOWCASE:
        return "test"
    draw = int(hashlib.sha256(f"{kind}/{entity}".encode()).hexdigest(), 16) % 100
    return "train" if draw < 50 else "switch" if draw < 72 else "test"


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    facts = elements() + countries() + animals()
    with (HERE / "facts.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["part", "kind", "entity", "attribute", "value"])
        for kind, entity, attribute, value in facts:
            writer.writerow([part_of(kind, entity), kind, entity, attribute, value])
    print(f"{len(facts)} facts about {len({f[:2] for f in facts})} entities")


if __name__ == "__main__":
    main()
