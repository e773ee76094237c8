"""Many byte strings are found in one pass over a file, as a search for each alone finds them."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.cli import byte_search
from prlhf_lightning.cli.byte_search import ByteSearch

SMALL = st.sampled_from([b"a", b"b", b"\0", b"\\", b"n", b"%", b"1", b" ", b"\xc3"])
BYTES = st.lists(SMALL, max_size=60).map(b"".join)
SHORT = st.lists(SMALL, min_size=1, max_size=12).map(b"".join)
ESCAPED = re.compile(rb"(?s)(\\.|%..|\\x..|\\u.{4}|\\U.{8})\Z")


def occurs(string: bytes, data: bytes, text: bool) -> bool:
    def joins(place: int) -> bool:
        return bool(re.fullmatch(rb"[0-9A-Za-z]{2}", data[max(0, place - 1) : place + 1]))

    for place in (found.start() for found in re.finditer(b"(?=%s)" % re.escape(string), data)):
        within = joins(place) and not ESCAPED.search(data[:place])
        if not text or not (within or joins(place + len(string))):
            return True
    return False


@pytest.mark.parametrize("block", [5, 64])
@given(data=BYTES, strings=st.sets(SHORT, max_size=8), text=st.booleans())
def test_the_same_is_found_as_by_a_search_for_each(block, data, strings, text):
    strings |= {data[start : start + 9] for start in range(0, len(data), 7)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_search, "_BLOCK", block)
        found = ByteSearch(strings).found_in(io.BytesIO(data), text=text)
    assert found == {string for string in strings if occurs(string, data, text)}
