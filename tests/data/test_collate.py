import torch
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.data.batching import collate

IDS = st.lists(st.integers(1, 50), max_size=5)
ROW = st.fixed_dictionaries(
    {
        "user_id": st.text(min_size=1),
        "record": st.integers(0, 10**6),
        "user_text_ids": IDS,
        "prompt_ids": IDS,
        "chosen_ids": IDS,
        "rejected_ids": IDS,
    }
)


@given(st.lists(ROW, min_size=1, max_size=5))
def test_every_token_comes_back_and_nothing_else_counts(rows):
    batch = collate(rows)
    assert batch.user_ids == tuple(row["user_id"] for row in rows)
    assert batch.records.tolist() == [row["record"] for row in rows]
    for name in ("user_text", "prompt", "chosen", "rejected"):
        tokens = getattr(batch, name)
        assert [ids.tolist() for ids in tokens.unpadded()] == [row[f"{name}_ids"] for row in rows]
        assert tokens.ids.shape == (len(rows), max(len(row[f"{name}_ids"]) for row in rows))
        assert (tokens.mask[:, :-1] >= tokens.mask[:, 1:]).all()  # padded on the right


def test_supervised_rows_have_empty_rejected_rows():
    rows = [
        {"user_id": "a", "record": 3, "user_text_ids": [], "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}
    ]
    assert collate(rows).rejected.ids.shape == (1, 0)
    assert collate(rows).rejected.ids.dtype == torch.long
