"""Style grammar: a small language of requests and answers; the style of an answer can be parsed from its text.

An answer has an optional warm opening, one to three tips on the topic of the request, and an optional offer of more.
All its sentences share one register and one certainty. `parse` is the exact inverse of `render`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random

from prlhf_lightning.simulation.phrases import FRAMES, OFFERS, OPENINGS, REQUESTS, TIPS

# attribute -> its values, from the one that scores -1 to the one that scores +1
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "length": ("short", "medium", "long"),
    "register": ("casual", "formal"),
    "warmth": ("cool", "warm"),
    "certainty": ("careful", "sure"),
    "offer": ("closed", "open"),
}


@dataclass(frozen=True)
class Style:
    """Style of an answer; each field has one of its values in `ATTRIBUTES`."""

    length: str
    register: str
    warmth: str
    certainty: str
    offer: str

    @property
    def scores(self) -> tuple[float, ...]:
        """Each attribute's value as a number in [-1, 1], in the order of `ATTRIBUTES`."""
        return tuple(
            2 * values.index(getattr(self, name)) / (len(values) - 1) - 1 for name, values in ATTRIBUTES.items()
        )


STYLES: tuple[Style, ...] = tuple(Style(*values) for values in product(*ATTRIBUTES.values()))
PROMPTS: tuple[str, ...] = tuple(request.format(topic=topic) for topic in TIPS for request in REQUESTS)
_TOPIC_OF = {request.format(topic=topic): topic for topic in TIPS for request in REQUESTS}
# Words without a style: those of topics and tips, except attribute values.
NOTE_WORDS: tuple[str, ...] = tuple(
    sorted(
        {word for text in (*TIPS, *(tip for tips in TIPS.values() for tip in tips)) for word in text.split()}
        - {value for values in ATTRIBUTES.values() for value in values}
    )
)
# Most words and punctuation marks of an answer; generate with a larger limit, so only the model ends the text.
MAX_WORDS = 36


def render(prompt: str, style: Style, rng: Random) -> str:
    """Return a random answer to `prompt` in a style; wordings and tips are uniform over those of their position."""
    sentences = [rng.choice(OPENINGS[style.register])] if style.warmth == "warm" else []
    frames = FRAMES[style.register, style.certainty]
    for place in range(1 + ATTRIBUTES["length"].index(style.length)):
        tip = rng.choice(_tips(_TOPIC_OF[prompt], place))
        sentences.append(rng.choice(frames[place]).format(tip=tip))
    if style.offer == "open":
        sentences.append(rng.choice(OFFERS[style.register]))
    return " ".join(sentences)


def _tips(topic: str, place: int) -> tuple[str, ...]:
    """Return the tips of a position, counted from 0; positions share no tips, so an answer does not repeat one."""
    return TIPS[topic][2 * place : 2 * place + 2]


def sample(prompt: str, rng: Random) -> str:
    """Return a random answer to `prompt` in a style drawn uniformly from `STYLES`."""
    return render(prompt, rng.choice(STYLES), rng)


def parse(prompt: str, text: str) -> Style | None:
    """Return the style of a text; None if it is not exactly an answer of the grammar to `prompt`."""
    topic = _TOPIC_OF.get(prompt)
    if topic is None:
        return None
    sentences = re.findall(r"[^.!?]+[.!?]", text)
    parts = [_sentences_of(topic).get(sentence.removeprefix(" ")) for sentence in sentences]
    if " ".join(sentence.removeprefix(" ") for sentence in sentences) != text or None in parts:
        return None
    return _assemble([part for part in parts if part is not None])


@dataclass(frozen=True)
class _Sentence:
    kind: str  # opening, tip or offer
    register: str
    certainty: str | None = None
    place: int = 0


def _assemble(parts: Sequence[_Sentence]) -> Style | None:
    tips = [part for part in parts if part.kind == "tip"]
    warm, offered = parts[:1] != tips[:1], parts[-1:] != tips[-1:]
    lengths = ATTRIBUTES["length"]
    in_place = [part.kind for part in parts] == ["opening"] * warm + ["tip"] * len(tips) + ["offer"] * offered
    if (
        not in_place
        or not 1 <= len(tips) <= len(lengths)
        or [part.place for part in tips] != list(range(len(tips)))
        or len({part.register for part in parts}) > 1
        or len({part.certainty for part in tips}) > 1
    ):
        return None
    return Style(
        length=lengths[len(tips) - 1],
        register=tips[0].register,
        warmth="warm" if warm else "cool",
        certainty=str(tips[0].certainty),
        offer="open" if offered else "closed",
    )


@cache
def _sentences_of(topic: str) -> dict[str, _Sentence]:
    """Return every sentence of answers about a topic with its role; no two roles share a wording."""
    table = {text: _Sentence("opening", register) for register, texts in OPENINGS.items() for text in texts}
    table |= {text: _Sentence("offer", register) for register, texts in OFFERS.items() for text in texts}
    for (register, certainty), frames in FRAMES.items():
        for place, wordings in enumerate(frames):
            for wording, tip in product(wordings, _tips(topic, place)):
                table[wording.format(tip=tip)] = _Sentence("tip", register, certainty, place)
    return table
