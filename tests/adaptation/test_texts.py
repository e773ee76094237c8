"""Texts that many pairs have in common."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.adaptation.margins import DistinctTexts
from prlhf_lightning.types import PreferenceBatch, Tokens

TEXT = st.lists(st.integers(1, 3), min_size=1, max_size=3)


def contents(tokens: Tokens) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


@st.composite
def batches(draw):
    rows = draw(st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT), max_size=8))
    parts = [Tokens.from_lists([row[place] for row in rows]) for place in range(4)]
    return PreferenceBatch(tuple(map(str, range(len(rows)))), *parts, records=torch.arange(len(rows)))


@given(batches(), st.booleans())
def test_every_pair_finds_its_texts_and_no_text_comes_twice(batch, uses_text):
    texts = DistinctTexts.of(batch, uses_text)
    prompt_of = texts.prompt_of.tolist()
    user_text = contents(texts.user_text) if uses_text else [[]] * len(texts.prompt)
    prompts = list(zip(user_text, contents(texts.prompt), strict=True))
    completions = [(prompts[p], text) for p, text in zip(prompt_of, contents(texts.completion), strict=True)]
    for places, own in ((texts.chosen, batch.chosen), (texts.rejected, batch.rejected)):
        for row, (place, text) in enumerate(zip(places.tolist(), contents(own), strict=True)):
            user = contents(batch.user_text)[row] if uses_text else []
            assert completions[place] == ((user, contents(batch.prompt)[row]), text)
    for all_of_them in (prompts, completions):
        assert all(all_of_them.count(one) == 1 for one in all_of_them)


@given(batches(), st.integers(1, 4), st.data())
def test_groups_hold_what_is_wanted_once_and_few_whole_prompts(batch, most, data):
    texts = DistinctTexts.of(batch, True)
    wanted = torch.tensor(
        [data.draw(st.booleans()) for _ in texts.chosen.new_zeros(len(texts.completion))], dtype=torch.bool
    )
    groups = list(texts.groups(wanted, most))
    found = [place for group in groups for place in group.tolist()]
    assert sorted(found) == wanted.nonzero().flatten().tolist()
    owners = [set(texts.prompt_of[group].tolist()) for group in groups]
    assert all(0 < len(prompts) <= most for prompts in owners)
    assert sum(map(len, owners)) == len(set().union(*owners))


def test_a_user_text_matters_only_where_the_model_reads_it():
    batch = PreferenceBatch(
        ("a", "b"),
        Tokens.from_lists([[1], [2]]),
        *(Tokens.from_lists([[3], [3]]) for _ in range(2)),
        Tokens.from_lists([[4], [4]]),
        torch.arange(2),
    )
    assert [len(DistinctTexts.of(batch, uses_text).prompt) for uses_text in (False, True)] == [1, 2]
    assert len(DistinctTexts.of(replace(batch, user_ids=("a", "a")), False).completion) == 2
