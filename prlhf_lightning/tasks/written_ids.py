"""Users' ids as they may be written in a file of any kind, and which of them a file names."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Literal
from urllib.parse import quote, quote_plus

from prlhf_lightning.tasks.byte_search import ByteSearch, Stream

_PLAIN = re.compile(r"[0-9A-Za-z_.-]*")  # of which no format quotes anything
_ESCAPE = re.compile(r"(?<=\\)([xuU])([0-9a-f]+)")
_NORMAL_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
_WIDE = ("utf-16-le", "utf-16-be", "utf-32-le")  # of spreadsheets, and of numpy
_IN_PAGES = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&'"})  # JSON in a page


def id_bytes(user_id: str) -> bytes:
    """Return an id as it stands in a file."""
    return user_id.encode("utf-8", "surrogatepass")


def written_forms(user_id: str) -> set[bytes]:
    """Return an id as it may stand in a file: quoted as CSV, JSON, YAML, Python, HTML and URLs do, once or twice.

    Also in other normal forms of Unicode, as file systems and editors make them, and in other encodings.
    """
    texts = {user_id, *(unicodedata.normalize(form, user_id) for form in _NORMAL_FORMS)}
    if not _PLAIN.fullmatch(user_id):
        for _ in range(2):  # for instance JSON in a cell of a CSV file
            texts |= {form for text in texts for form in _quoted(text)}
    found = {id_bytes(text) for text in texts}
    for encoding in (*_WIDE, "cp1252"):
        try:
            found.add(user_id.encode(encoding))
        except UnicodeEncodeError:
            continue
    return found


class IdSearch:
    """Finds which of some ids a stream of bytes names.

    Args:
        user_ids: The ids.
    """

    def __init__(self, user_ids: Iterable[str]) -> None:
        self._of_form: dict[bytes, list[str]] = {}
        for user_id in user_ids:
            for form in written_forms(user_id):
                self._of_form.setdefault(form, []).append(user_id)
        self._search = ByteSearch(self._of_form)

    def named_in(self, stream: Stream, progress: Callable[[int], object] = lambda _: None) -> set[str]:
        """Return the ids that a stream names; see `ByteSearch.found_in` for how."""
        return {user_id for form in self._search.found_in(stream, progress) for user_id in self._of_form[form]}


def _quoted(text: str) -> Iterator[str]:
    as_json = [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    as_python = [repr(text)[1:-1], ascii(text)[1:-1]]
    yield from as_json
    yield from as_python
    yield from (_ESCAPE.sub(lambda found: found[1] + found[2].upper(), form) for form in (*as_json, *as_python))
    yield as_json[0].replace("/", "\\/")
    yield as_json[0].translate(_IN_PAGES)
    yield from (text.replace(sign, 2 * sign) for sign in ('"', "'"))
    escaped = html.escape(text)
    yield from (escaped, html.escape(text, quote=False), escaped.replace("&#x27;", "&#39;").replace("&quot;", "&#34;"))
    in_url = quote(text, safe="", errors="surrogatepass")
    yield from (in_url, in_url.replace(".", "%2E"), quote(text, errors="surrogatepass"))
    yield quote_plus(text, errors="surrogatepass")
