"""Whatever is wrong with a row of an original file, it is refused in words, or no row is lost without being counted."""

import contextlib
import copy
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from original_files import (
    PROFILES,
    answers,
    comparison,
    dialogue,
    respondent,
    transcripts,
    write_hh,
    write_jsonl,
    write_psoups,
    write_ultrafeedback_p,
)

from prlhf_lightning.data import (
    HHRLHFSource,
    PersonalizedSoupsSource,
    PersonalLLMSource,
    PRISMSource,
    TLDRSource,
    UltraFeedbackPSource,
)
from prlhf_lightning.data.records import TieError, parse_record
from prlhf_lightning.errors import FeedbackFormatError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
DELETED = object()


def paths(value, path=()):
    """Return every path into a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(longer for key, item in inner for longer in paths(item, (*path, key)))]


@st.composite
def spoilt(draw, row):
    """Change or delete a value or two somewhere in a row."""
    row = copy.deepcopy(row)
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from([path for path in paths(row) if path]))
        place = row
        for key in way:
            place = place[key]
        value = draw(st.just(DELETED) | VALUES)
        if value is DELETED:
            del place[last]
        else:
            place[last] = value
    return row


def tldr(folder, bad):
    return TLDRSource(write_jsonl(folder / "batch.json", [comparison(0, "ann"), bad]))


def soups(folder, bad):
    write_psoups(folder, per_user=1)
    (folder / "P1A.json").unlink()
    good = {"user_input": PROFILES["P1A"], "completion_a": "a", "completion_b": "b"}
    write_jsonl(folder / "P1A.json", [good, bad])
    return PersonalizedSoupsSource(folder)


def survey(folder, bad):
    write_jsonl(folder / "survey.jsonl", [respondent("ann", 2), bad])
    write_jsonl(folder / "conversations.jsonl", [dialogue(i, "ann") for i in range(2)])
    return PRISMSource(folder)


def dialogues(folder, bad):
    write_jsonl(folder / "survey.jsonl", [respondent("ann", 2)])
    write_jsonl(folder / "conversations.jsonl", [dialogue(0, "ann"), bad])
    return PRISMSource(folder)


def personal_llm(folder, bad):
    return PersonalLLMSource(write_jsonl(folder / "train.jsonl", [answers(0), bad]), num_users=2, judges=2)


def ultrafeedback_p(folder, bad):
    write_ultrafeedback_p(folder)
    write_jsonl(folder / "8" / "train.jsonl", [bad])
    return UltraFeedbackPSource(folder, controversial_only=True)


def hh(folder, bad):
    write_jsonl(write_hh(folder) / "helpful-base" / "train.jsonl.gz", [bad])
    return HHRLHFSource(folder, conversations=True)


PAIR = {"user_input": f"Why? {PROFILES['P1A']}", "completion_a": "c", "completion_b": "d"}
ULTRA = {"prompt": "p", "chosen": "Human: p\n\nAssistant: c", "rejected": "Human: p\n\nAssistant: d",
         "controversial": True}  # fmt: skip
CASES = {  # a source with one spoilt row, the row to spoil, and the number of rows, where each is one pair
    "tldr": (tldr, comparison(1, "bob"), 2),
    "soups": (soups, PAIR, None),
    "survey": (survey, respondent("bob", 1), None),
    "dialogues": (dialogues, dialogue(1, "ann"), None),
    "personal_llm": (personal_llm, answers(1), 4),
    "ultrafeedback_p": (ultrafeedback_p, ULTRA, 10),
    "hh": (hh, transcripts(0), 4),
}


def read(source, splits):
    """Return the number of pairs, those with equal completions included, or what the source was refused for."""
    pairs = 0
    try:
        for split in splits:
            for where, pair in source.rows(split):
                pairs += 1
                with contextlib.suppress(TieError):
                    parse_record(pair, where)
    except FeedbackFormatError as error:
        return str(error)
    return pairs


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=40)
@given(data=st.data())
def test_a_spoilt_row_is_refused_by_its_place_or_counted(case, data):
    make, row, total = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        source = make(Path(folder), data.draw(spoilt(row)))
        found = read(source, sorted(source.splits()) if total is None else ["train"])
    if isinstance(found, str):
        assert found.startswith(folder)
        assert ": field '" in found
    elif total is not None:
        accounted = found + sum(source.counts("train").values())
        assert accounted in ((total, total - 1) if case == "tldr" else (total,))  # it may have become a validation row


def blank_answers():
    """For each source, a row in whose schema nothing is wrong, and one completion of which is blank."""
    tldr_row, llm_row = comparison(1, "bob"), answers(1)
    tldr_row["summaries"][0]["text"] = " "
    llm_row |= {f"response_{i}": "" for i in range(1, 9)}
    return {
        "tldr": tldr_row,
        "soups": PAIR | {"completion_b": ""},
        "personal_llm": llm_row,
        "ultrafeedback_p": ULTRA | {"rejected": "Human: p\n\nAssistant: \n"},
    }


@pytest.mark.parametrize("case", blank_answers())
def test_empty_completions_of_public_data_are_counted_not_fatal(case, tmp_path):
    source = CASES[case][0](tmp_path, blank_answers()[case])
    assert isinstance(read(source, ["train"]), int)
    assert sum(count for what, count in source.counts("train").items() if "(empty " in what)
