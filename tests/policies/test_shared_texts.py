"""What the rows of a batch share."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.policies.shared_texts import SharedTexts
from prlhf_lightning.types import LogProbs, Tokens

text = st.lists(st.integers(1, 3), min_size=1, max_size=3)


@given(rows=st.lists(st.tuples(st.integers(0, 2), text, text), min_size=1, max_size=12))
def test_each_answer_stands_once_and_rows_find_theirs(rows):
    prompts = torch.tensor([prompt for prompt, _, _ in rows])
    shared = SharedTexts.find([prompts], [Tokens.from_lists([row[n] for row in rows]) for n in (1, 2)])
    held = {(prompt, tuple(part)) for prompt, *texts in rows for part in texts}
    assert len(shared.completions) == len(held)
    assert sorted(prompts[shared.rows].tolist()) == sorted({prompt for prompt, _, _ in rows})
    # Scores that say which text they are of.
    found = shared.of_rows(LogProbs(shared.completions.ids.float(), shared.completions.mask))
    asked = prompts[shared.rows][shared.prompt_of][shared.number]
    for n in (0, 1):
        assert [ids[mask].tolist() for ids, mask in zip(found[n].tokens, found[n].mask, strict=True)] == [
            row[n + 1] for row in rows
        ]
        assert torch.equal(asked[n], prompts)


def test_the_share_of_positions_that_are_saved():
    prompts, completions = torch.tensor([1, 1, 1, 1]), Tokens.from_lists([[1, 2], [1, 2], [3, 4], [5, 6]])
    shared = SharedTexts.find([prompts], [completions, completions])
    # Apart: 4 prompts of 10 and 8 completions of 2. Shared: one prompt, and 3 completions.
    assert shared.saved(10) == 1 - (10 + 3 * 2) / (4 * 10 + 8 * 2)
