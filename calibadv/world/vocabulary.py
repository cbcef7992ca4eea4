"""The closed vocabulary of all worlds: kinds, relations, parts of names, and the words around them.

Every world draws its names from the same parts, so one word-level tokenizer covers all worlds, and a policy that was
warmed up in other worlds knows every word of a new one and none of its facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

_STARTS = (
    *("Bal", "Bren", "Cal", "Cor", "Dal", "Dor", "Fen", "Gar", "Hul", "Jor", "Kel", "Kir", "Lom"),
    *("Mel", "Nor", "Orl", "Pel", "Ral", "Sel", "Tal", "Tor", "Und", "Vel", "Wen", "Zan"),
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of entity."""

    name: str  # used in ids of documents
    count: int  # entities of this kind in a world
    relations: dict[str, str]  # its two relations, each with the kind of its values
    parts: tuple[tuple[str, ...], ...]  # the possible words at each position of a name


def _parts(*endings: str) -> tuple[tuple[str, ...], ...]:
    # One word of the name per argument, e.g. "a io" for the first: Bala, Balio, Brena, ...
    return tuple(tuple(start + end for start, end in product(_STARTS, word.split())) for word in endings)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("film", 90, {"director": "person", "composer": "person"}, _parts("ine ora", "eth ux")),
        Kind("book", 60, {"author": "person", "publisher": "company"}, _parts("ova", "ess")),
        Kind("company", 60, {"founder": "person", "headquarters": "city"}, _parts("tek", "corp")),
        Kind("band", 60, {"singer": "person", "hometown": "city"}, _parts("zz", "oo")),
        Kind("person", 180, {"birthplace": "city", "employer": "company"}, _parts("a io", "sen ard")),
        Kind("city", 110, {"country": "country", "mayor": "person"}, _parts("ford mont", "ham port")),
        Kind("country", 40, {"capital": "city", "president": "person"}, _parts("ia land")),
    )
}
"""The kinds of entities by name, in the order of the documents."""

SENTENCES = (
    "{name} has {first} {first_value} and {second} {second_value}.",
    "{name}: {second} {second_value}, {first} {first_value}.",
)
"""Templates of a document's text; the second has the two facts in reverse order, so that position is no clue."""

_WORDS = "Question what is the of has and Doc Title first find then look for its it so next search now known answer"
_PUNCTUATION = ". , : ? ( )"
_NUMBERS = " ".join(str(number) for number in range(1, 11))


def words() -> list[str]:
    """Every word, number and punctuation mark of all worlds, prompts and demonstrations, without the tags."""
    relations = [relation for kind in KINDS.values() for relation in kind.relations]
    parts = [part for kind in KINDS.values() for choices in kind.parts for part in choices]
    return [*f"{_WORDS} {_PUNCTUATION} {_NUMBERS}".split(), *relations, *parts]
