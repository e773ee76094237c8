"""Welcome new users: learn their soft prompts from ten pairs each, while everything else stays as it is.

    python examples/new_user.py

Trains on twenty simulated users, then meets twenty others. Prints their accuracy on held-out pairs as the generic user,
and after adapting to ten pairs of each.
"""

from __future__ import annotations

import torch
from plain_loop import accuracy
from plain_loop import main as train

from prlhf_lightning import PreferenceDataModule, SimulatedSource
from prlhf_lightning.adaptation import adapt_users, select_pairs

PAIRS = 10


def main(pairs_per_user: int = 450) -> tuple[float, float]:
    """Train, adapt, and return the accuracy on new users' pairs before and after."""
    model = train(pairs_per_user)
    source = SimulatedSource(
        num_users=20, pairs_per_user=pairs_per_user, validation_pairs_per_user=40, num_unseen_users=20
    )
    data = PreferenceDataModule(
        source, model.policy.tokenizer, eval_batch_size=10_000, max_prompt_length=64, max_completion_length=64
    )
    data.prepare_data()
    data.setup("fit")
    (pairs,) = data.val_dataloader()[list(data.eval_sets["validate"]).index("unseen")]

    seen_so_far: dict[str, int] = {}
    is_known = []
    for user in pairs.user_ids:
        seen_so_far[user] = seen_so_far.get(user, 0) + 1
        is_known.append(seen_so_far[user] <= PAIRS)
    known, held_out = (
        select_pairs(pairs, torch.tensor(is_known).eq(kind).nonzero().flatten()) for kind in (True, False)
    )
    before = accuracy(model, [held_out], generic=True)

    adapted = adapt_users(model, known)
    model.add_users(adapted.user_ids, adapted.rows)
    after = accuracy(model, [held_out], generic=False)
    print(f"new users: accuracy {before:.3f} as the generic user, {after:.3f} after {PAIRS} pairs each")
    return before, after


if __name__ == "__main__":
    main()
