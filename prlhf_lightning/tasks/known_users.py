"""Users whom a command names and a model does not know: which id may have been meant."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from prlhf_lightning.data import UserVocabulary
from prlhf_lightning.data.look_alikes import look_alikes
from prlhf_lightning.errors import ConfigurationError

_NEAREST = 3
_PSEUDONYM = re.compile("[0-9a-f]{32}")  # see `Pseudonyms`


def require_known(user_ids: Iterable[str], vocabulary: UserVocabulary, option: str = "user", more: str = "") -> None:
    """Refuse ids that are not in a vocabulary, with those in it that look alike.

    Args:
        user_ids: What was named.
        vocabulary: The users of the model.
        option: What the user called the ids, for messages.
        more: What else can be done, to end the message.

    Raises:
        ConfigurationError: An id is not there.
    """
    missing = [user_id for user_id in user_ids if user_id not in vocabulary]
    if not missing:
        return
    others = f" (nor are {len(missing) - 1} others)" if len(missing) > 1 else ""
    near = nearest(missing[0], vocabulary.ids)
    meant = f"did you mean {' or '.join(near)}?" if near else "`users list` shows who is."
    if vocabulary.ids and not near and all(map(_PSEUDONYM.fullmatch, vocabulary.ids)):
        meant = (
            "its users seem to be pseudonyms (data.hash_user_ids_with), so give the user's, which this prints: python "
            "-c 'import sys; from prlhf_lightning.data import Pseudonyms; print(Pseudonyms.load(sys.argv[1])"
            "(sys.argv[2]))' SALT ID"
        )
    raise ConfigurationError(f"{option}: {missing[0]!r} is not in this model{others}; {meant}{more}")


def nearest(user_id: str, known: Sequence[str]) -> list[str]:
    """Return the known ids that look most like one, as they are to be shown."""
    alike = next((group for group in look_alikes([user_id, *known]) if group[0] == user_id), [user_id])[1:]
    found = alike[:_NEAREST] or difflib.get_close_matches(user_id, known, n=_NEAREST, cutoff=0.75)
    return [ascii(one) if _same_glyphs(one, user_id) else repr(one) for one in found]


def _same_glyphs(one: str, other: str) -> bool:
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
