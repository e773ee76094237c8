from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import History, Users
from prlhf_lightning.user_models import AmortizedUserModel, CompositeUserModel, IndividualUserModel

VOCABULARY = torch.randn(20, 8) * 0.02


def built(num_pairs: int = 4) -> AmortizedUserModel:
    model = AmortizedUserModel(num_tokens=3, rank=5, num_pairs=num_pairs)
    model.build(5, VOCABULARY)
    return model


def history(users: int, pairs: int) -> History:
    chosen, rejected = torch.randn(2, users, pairs, 8) * 0.02
    return History(chosen, rejected, torch.randint(1, 9, (users, pairs, 2)))


def prompts(model: AmortizedUserModel, pairs: History) -> torch.Tensor:
    return model(Users(torch.arange(1, len(pairs.chosen) + 1), history=pairs)).vectors - model.generic_prompt


def test_no_pairs_give_the_generic_prompt_exactly():
    model, nothing = built(), history(2, 3).select(torch.arange(2))
    nothing = History(*(torch.zeros_like(part) for part in (nothing.chosen, nothing.rejected, nothing.lengths)))
    assert not prompts(model, nothing).any()
    assert not prompts(model, History(torch.zeros(2, 0, 8), torch.zeros(2, 0, 8), torch.zeros(2, 0, 2))).any()


def test_the_generic_user_has_no_history():
    model, users = built(), Users(torch.tensor([1, 0]), history=history(2, 3))
    assert torch.equal(model.generic(users).vectors, model.generic_prompt.expand(2, 3, 8))
    assert torch.equal(model(users).vectors[1], model.generic_prompt)
    assert not torch.equal(model(users).vectors[0], model.generic_prompt)


def test_the_order_of_pairs_and_empty_places_do_not_matter():
    model, pairs = built(), history(2, 3)
    order = torch.tensor([2, 0, 1])
    mixed = History(*(part[:, order] for part in (pairs.chosen, pairs.rejected, pairs.lengths)))
    padded = History(
        *(torch.nn.functional.pad(part, (0, 0, 1, 0)) for part in (pairs.chosen, pairs.rejected, pairs.lengths))
    )
    for other in (mixed, padded):
        torch.testing.assert_close(prompts(model, other), prompts(model, pairs))


def test_opposite_judgements_give_opposite_offsets():
    model, pairs = built(), history(2, 3)
    turned = replace(pairs, chosen=pairs.rejected, rejected=pairs.chosen, lengths=pairs.lengths.flip(-1))
    torch.testing.assert_close(prompts(model, turned), -prompts(model, pairs))


def test_pairs_up_to_num_pairs_count_and_then_their_mean():
    model, pairs = built(num_pairs=4), history(1, 1)
    once, twice, four, eight = (
        model.history_rows(
            History(*(p.repeat(1, n, 1) for p in (pairs.chosen, pairs.rejected, pairs.lengths)))
        )[0]
        for n in (1, 2, 4, 8)
    )  # fmt: skip
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(four, 4 * once)
    torch.testing.assert_close(eight, four)


def test_a_stored_reading_gives_the_prompt_of_reading():
    model, pairs = built(), history(2, 3)
    model.row_tables()[0].data[1:3] = model.history_rows(pairs)[0]
    torch.testing.assert_close(model(Users(torch.tensor([1, 2]))).vectors - model.generic_prompt, prompts(model, pairs))


def test_reading_trains_what_is_shared_and_not_the_table():
    model = built()
    prompts(model, history(2, 3)).square().sum().backward()
    assert model.histories.weight.grad is None
    assert model.reads.weight.grad.any()
    assert model.writes.weight.grad.any()


def test_a_composite_reads_for_the_parts_that_do():
    model = CompositeUserModel([IndividualUserModel(2), AmortizedUserModel(1, 2, 3), AmortizedUserModel(1, 2, 6)])
    model.build(5, VOCABULARY)
    assert model.history_size == 6
    read = model.history_rows(history(2, 3))
    assert list(map(id, model.history_tables())) == list(map(id, model.row_tables()[1:]))
    assert [rows.shape for rows in read] == [(2, 9), (2, 9)]
    assert model(Users(torch.tensor([1, 2]), history=history(2, 3))).vectors.shape == (2, 4, 8)


def test_no_pairs_to_read_are_refused():
    with pytest.raises(ConfigurationError, match="AmortizedUserModel: num_pairs is 0; it must be 1 or more"):
        AmortizedUserModel(num_pairs=0)
