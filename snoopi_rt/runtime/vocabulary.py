"""Whether a narrow model can draw what a prompt asks for: its words are compared with the vocabulary in bundle.json. No model is run.

The object of a prompt is the noun before its first preposition or verb: `submarine` in "a huge red submarine in front of a castle".
Objects joined by "and a" must all be known; of several separated by commas one is enough.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from snoopi_rt.bundle.manifest import Vocabulary
from snoopi_rt.runtime.english import (
    BACKGROUNDS,
    BOUNDARIES,
    CONTAINERS,
    DETERMINERS,
    JOINTS,
    NO_OBJECTS,
    NUMBERS,
    OTHER_COLOURS,
    PHRASES,
    PLURALS,
    REQUESTS,
    TAILS,
)

MAX_SUGGESTIONS = 3
"""How many similar objects a warning names."""
MAX_CHARACTERS = 2000
"""Characters of a prompt that are analysed."""
MAX_NAME_WORDS = 6
"""Words of an object's name."""
SEPARATORS = r"[^\w\s'\u2019&+-]+"
MAX_SHOWN = 60
"""Characters of an object that a warning shows."""


@dataclass(frozen=True)
class Unknown:
    """What a prompt asks for that the model cannot draw: `object` as in the prompt, None if the prompt names no object at all."""

    object: str | None
    nearest: tuple[str, ...] = ()

    def message(self, model: str) -> str:
        """A warning in one line."""
        if self.object is None:
            return f"the prompt names no object that {model} knows"
        return f"{model} does not know {self.object!r}" + (f"; nearest: {', '.join(self.nearest)}" if self.nearest else "")


@dataclass
class _Word:
    """A word of a prompt, or several words that name a known object."""

    text: str
    object: str | None = None


@dataclass
class _Part:
    """A noun and the words before it, without those that name nothing."""

    words: list[_Word] = field(default_factory=list)

    @property
    def object(self) -> str | None:
        return self.words[-1].object if self.words else None


class Matcher:
    """Finds the objects of a vocabulary in prompts, in any case, including plurals and synonyms, with or without spaces and hyphens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._objects: dict[str, str] = {}
        names = [(name, name) for name in vocabulary.objects]
        names += [(synonym, name) for name, synonyms in vocabulary.objects.items() for synonym in synonyms]
        for spelling, name in names:  # names first, so that another object's synonym does not hide them
            for form in _forms(_words(spelling)):
                self._objects.setdefault(form, name)
        self._related: dict[str, list[str]] = {}
        for name, related in (vocabulary.related or {}).items():
            for word in related.split():
                self._related.setdefault(word, []).append(name)
        self._names = [(_words(spelling), name) for spelling, name in names]
        self._phrases = [_words(phrase) for phrase in (*vocabulary.artifacts, *vocabulary.styles, *PHRASES)]
        self._vocabulary = vocabulary
        self._highest = max(map(_number, vocabulary.counts), default=0)
        self._other_colours = OTHER_COLOURS - {*map(str.lower, vocabulary.colours)} if vocabulary.colours else frozenset()
        words = (word.lower() for kind in (vocabulary.colours, vocabulary.counts) for word in kind)
        self._no_objects = NO_OBJECTS | set(words)

    def warning(self, prompt: str, model: str) -> str | None:
        """A line about an object, number or colour of the prompt that is not in the vocabulary of `model`; None if nothing is missing."""
        if unknown := self.unknown(prompt):
            return unknown.message(model)
        if number := self.too_many(prompt):
            return f"{model} draws at most {self._vocabulary.counts[-1]} of a thing; {number!r} is more"
        if colour := self.unknown_colour(prompt):
            return f"{model} does not know the colour {colour!r}; it knows {', '.join(self._vocabulary.colours)}"
        return None

    def unknown(self, prompt: str) -> Unknown | None:
        """What the prompt asks for that is not in the vocabulary; None if nothing is missing."""
        segments = [[part for part in segment if part.words] for segment in self._segments(prompt)]
        segments = [segment for segment in segments if segment]
        if any(all(part.object for part in segment) for segment in segments):
            return None
        if not segments:
            return Unknown(None)
        part = next(part for part in segments[0] if not part.object)
        return Unknown(self._named(part), tuple(self._nearest(part)))

    def too_many(self, prompt: str) -> str | None:
        """The number in "five red cats", if it is above the vocabulary's highest, as it stands in the prompt; else None."""
        for text in re.split(SEPARATORS, _plain(prompt[:MAX_CHARACTERS])) if self._highest else ():
            number = None
            for word in self._grouped(_words(text)):
                if self._highest < _number(word.text) < 1000:  # above, it may be a year
                    number = word.text
                elif word.object and number:
                    return number
                elif word.text not in self._no_objects:
                    number = None
        return None

    def unknown_colour(self, prompt: str) -> str | None:
        """A word of the prompt that names a colour, outside names of objects, and is not in the vocabulary; else None."""
        words = self._grouped(_words(prompt[:MAX_CHARACTERS]))
        return next((word.text for word in words if word.text in self._other_colours), None)

    def _segments(self, prompt: str) -> Iterator[list[_Part]]:
        """The segments between punctuation, each as the parts that "and" joins."""
        for text in re.split(SEPARATORS, _plain(prompt[:MAX_CHARACTERS])):
            words = _words(text)
            for phrase in self._phrases:
                words = _without(words, phrase)
            grouped = self._grouped(words)
            while grouped and not grouped[0].object and grouped[0].text in REQUESTS:
                del grouped[0]
            yield self._parts(grouped)

    def _grouped(self, words: Sequence[str]) -> list[_Word]:
        """The words, with known names of several words merged, the longest match first."""
        grouped, start = [], 0
        while start < len(words):
            for end in range(min(start + MAX_NAME_WORDS, len(words)), start, -1):
                name = self._objects.get("".join(words[start:end]))
                if name is not None and not (end - start > 1 and words[start] in DETERMINERS):
                    break
            else:
                end, name = start + 1, None
            grouped.append(_Word(" ".join(words[start:end]), name))
            start = end
        return grouped

    def _parts(self, words: Sequence[_Word]) -> list[_Part]:
        parts = [_Part()]
        for place, word in enumerate(words):
            following = words[place + 1].text if place + 1 < len(words) else ""
            part = parts[-1]
            if word.text in JOINTS:
                if following in DETERMINERS and part.words:
                    parts.append(_Part())
            elif word.text == "of" and part.words:
                # In a bowl of soup it is the soup, in a king of spades the king; one known object is enough.
                rest = self._parts(words[place + 1 :])
                if not rest[0].words or not (part.words[-1].text in CONTAINERS or (rest[0].object and not part.object)):
                    rest[0] = part
                return [*parts[:-1], *rest]
            elif word.text in BACKGROUNDS:
                if part.words and part.words[-1] is words[place - 1] and part.words[-1].text in self._no_objects:
                    del part.words[-1]  # "orange" is a fruit, too
            elif word.object is None and self._ends(word.text, part):
                if part.words:
                    break
            elif word.object or not (word.text in self._no_objects or (part.object and word.text in TAILS)):
                part.words.append(word)
        return parts

    def _ends(self, word: str, part: _Part) -> bool:
        """Whether this word ends the noun phrase, because a place or an action follows."""
        if word in BOUNDARIES:
            return True
        is_verb = len(word) > 4 and word.endswith(("ing", "ed"))
        return is_verb and any(known.object or not _may_be_adjective(known.text) for known in part.words)

    def _named(self, part: _Part) -> str:
        """The noun, with the known object before it that qualifies it: `train station`."""
        *before, noun = part.words
        text = " ".join(word.text for word in (*self._modifiers(before[-1:]), noun))
        return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."

    def _modifiers(self, words: Sequence[_Word]) -> list[_Word]:
        """Known objects among the words, except colours that are also fruits."""
        return [word for word in words if word.object and word.text not in self._no_objects]

    def _nearest(self, part: _Part) -> list[str]:
        """Objects that share a word with the noun or have a similar meaning; if there are none, those with a similar spelling."""
        noun = part.words[-1].text
        shared = [str(word.object) for word in self._modifiers(part.words)]
        shared += [name for words, name in self._names if noun in words and len(noun) > 2]
        similar = (name for form, name in self._objects.items() if _is_typo(noun, form))
        related = self._related.get(noun) or self._related.get(noun.removesuffix("s"), [])
        return list(dict.fromkeys([*shared, *related] or similar))[:MAX_SUGGESTIONS]


def _number(word: str) -> int:
    """Its value in words or digits, 0 for any other word."""
    return NUMBERS.get(word, int(word) if word.isascii() and word.isdecimal() and len(word) < 5 else 0)


def _plain(text: str) -> str:
    """In lower case and without accents."""
    decomposed = unicodedata.normalize("NFKD", text.replace("_", " ")).casefold()
    return unicodedata.normalize("NFC", "".join(char for char in decomposed if not unicodedata.combining(char)))


def _words(text: str) -> list[str]:
    """The words, split at hyphens, without apostrophes and possessive s."""
    return [re.sub(r"['\u2019]s?$|['\u2019]", "", word) for word in re.findall(r"[^\W_]+(?:['\u2019][^\W_]*)?|[&+]", _plain(text))]


def _without(words: list[str], phrase: list[str]) -> list[str]:
    """The words without any occurrence of a phrase."""
    size = len(phrase)
    for start in range(len(words) - size, -1, -1):
        if words[start : start + size] == phrase:
            words = words[:start] + words[start + size :]
    return words


def _forms(words: Sequence[str]) -> Iterator[str]:
    """A name's spellings without spaces: as it is, then in the other number; faces also as emoji."""
    *rest, last = words
    start = "".join(rest)
    yield start + last
    if last == "face" and rest:
        yield from (f"{start}{word}" for word in ("emoji", "smiley", "faces", "emojis"))
        return
    if last in PLURALS:
        yield start + PLURALS[last]
    if last.endswith("man"):
        yield f"{start}{last[:-2]}en"
    if last.endswith(("s", "x", "ch", "sh", "o", "z")):
        yield f"{start}{last}es"
    if last.endswith("y"):
        yield f"{start}{last[:-1]}ies"
    if last.endswith("ies"):
        yield f"{start}{last[:-3]}y"
    if last.endswith(("f", "fe")):
        yield f"{start}{last.rstrip('e')[:-1]}ves"
    if last.endswith("s"):
        if not last.endswith("ss"):
            yield start + last[:-1]
    else:
        yield f"{start}{last}s"
    if "of" in rest[1:]:  # cups of coffee
        place = rest.index("of")
        yield from (head + "".join(rest[place:]) + last for head in _forms(rest[:place]))


def _is_typo(word: str, form: str) -> bool:
    """Whether the word is the other with a typo after its first letter; with seven letters or more, two."""
    errors = 0 if len(word) < 4 else 1 if len(word) < 7 else 2
    return word[:1] == form[:1] and abs(len(word) - len(form)) <= errors and _distance(word, form) <= errors


def _distance(one: str, other: str) -> int:
    """The Damerau-Levenshtein distance of two words."""
    last: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = last, row, [i]
        for j, char in enumerate(other, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != char)))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == char:
                row[j] = min(row[j], before[j - 2] + 1)
    return row[-1]


def _may_be_adjective(word: str) -> bool:
    return word.endswith(("y", "ful", "ous", "ish", "less", "like", "ic", "al", "ive", "en", "ed"))
