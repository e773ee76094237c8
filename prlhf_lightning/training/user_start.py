"""The start of a fit for users' codes: what their feedback alone says about them, and the size of the directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torch.func import functional_call

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.rewards.codes import STEPS, estimate_codes
from prlhf_lightning.training.judged_pairs import judged_pairs
from prlhf_lightning.types import PreferenceBatch, Users, select_pairs
from prlhf_lightning.user_models.base import UserCodes
from prlhf_lightning.utils.modes import eval_mode
from prlhf_lightning.utils.progress import progress_bars

_SAMPLE = 64  # pairs to measure the directions by
#: Mean square by which a code of length 1 moves a reward margin at the start. In a linear model of several real data
#: sets, trained directions reach 0.04 to 1.5, and overfitted ones 5 to 30.
_START_EFFECT = 0.35
_MOST_SCALE = 30.0
_POSITIONS = 1 << 11  # in a pass, of prompts and completions


def start_users(
    model: PersonalizedModel, vocabulary: UserVocabulary, data: Any, is_fresh: bool, is_warm_start: bool
) -> None:
    """Prepare the user model for a fit; see `UserModel.start_fit`.

    Args:
        model: A model that has been built.
        vocabulary: The users of its rows.
        data: The data module, or None.
        is_fresh: Whether all weights are those of `build`.
        is_warm_start: Whether the training started from the rows of an earlier one, on other data; codes estimated
            here would not fit its directions.
    """
    if not hasattr(data, "votes_by_user"):
        return
    counts = data.votes_by_user()
    device = model.device
    pairs = torch.tensor([0.0, *(float(counts.get(user_id, 0)) for user_id in vocabulary.ids)], device=device)
    codes = None
    if model.user_model.code_size and not is_warm_start:
        codes = codes_from(data, vocabulary, model.user_model.code_size)
    if codes is not None and is_fresh:
        rank_zero_info(_told(codes))
    model.user_model.start_fit(pairs, codes, is_fresh)
    if is_fresh and model.user_model.directions() and model.loss.feedback == "pairs":
        batch = data.training_sample(_SAMPLE)
        if len(batch):
            scale_directions(model, batch.to(device))


def codes_from(data: Any, vocabulary: UserVocabulary, size: int) -> UserCodes | None:
    """Return what the training rows alone say about users' codes `[U, size]`; None for streams and demonstrations."""
    stored = None if data.feedback == "demonstrations" else data.training_rows()
    if stored is None:
        return None
    pairs = judged_pairs(stored)
    rows = vocabulary.rows(pairs.user_ids)
    known = rows.nonzero().flatten()
    if not len(known):
        return None
    if len(known) < len(rows):  # a resumed fit keeps the users of its checkpoint
        pairs, rows = pairs.select(known), rows[known]
    with progress_bars(getattr(rank_zero_only, "rank", 0) == 0) as progress:
        task = progress.add_task("Estimating users' codes", total=STEPS)
        return estimate_codes(pairs, rows - 1, len(vocabulary) - 1, size, lambda step: progress.advance(task))


def _told(codes: UserCodes) -> str:
    if codes.explained > 0:
        return (
            f"Users differ: codes estimated from their feedback lower the log loss of judgments that were left out by "
            f"{codes.explained:.1%}. Training learns to use them."
        )
    return (
        "The estimate of users' codes finds nothing in these judgments in which users differ. Expect little from "
        "personalization, unless there are more judgments per user. If users differ in what words do not show, try "
        "model.user_model.estimate_codes: false."
    )


def scale_directions(model: PersonalizedModel, batch: PreferenceBatch) -> None:
    """Scale the directions so that a code of length 1 moves reward margins by a mean square of 0.35.

    Depending on the policy, one and the same soft prompt moves margins by a thousandth or by several units. Where
    directions start too small, users' codes have no effect for a long time, and Adam blows both up by noise.

    Args:
        model: The model; its directions are changed in place.
        batch: Pairs to measure by.
    """
    effect = code_effect(model, batch)
    scale = (_START_EFFECT / max(effect, 1e-12)) ** 0.5
    with torch.no_grad():
        for direction in model.user_model.directions():
            direction.mul_(min(scale, _MOST_SCALE))


def code_effect(model: PersonalizedModel, batch: PreferenceBatch) -> float:
    """Return the mean over pairs of the squared norm of the margin's gradient by the user's code, at the generic user.

    Args:
        model: A model whose user model has `directions`.
        batch: B pairs; they are computed in parts, since these passes keep all activations.
    """
    positions = sum(part.mask.shape[1] for part in (batch.user_text, batch.prompt, batch.chosen, batch.rejected))
    parts = torch.split(torch.arange(len(batch), device=model.device), max(1, _POSITIONS // positions))
    squares = [_squared_slopes(model, select_pairs(batch, rows)) for rows in parts]
    return float(torch.cat(squares).mean())


def _squared_slopes(model: PersonalizedModel, batch: PreferenceBatch) -> Tensor:
    every = torch.arange(len(batch), device=model.device)
    names = {id(parameter): name for name, parameter in model.user_model.named_parameters()}
    tables = model.user_model.row_tables()
    # Each pair gets its own copy of the row, so that one backward pass gives the gradient of each margin separately.
    own = {names[id(table)]: table.detach()[:1].repeat(len(batch) + 1, 1).requires_grad_() for table in tables}
    with eval_mode(model), torch.enable_grad():
        users: Users = replace(model.users_of(batch), rows=every + 1)
        prompt = functional_call(model.user_model, own, (users,))
        scored = model.scored(batch, every, prompt)
        # The reference only shifts margins; these log-probs in its place spare another pass.
        chosen, rejected = model.loss.rewards(scored, scored.detached() if model.loss.requires_reference else None)
        margins = (chosen - rejected).sum()
        grads = torch.autograd.grad(margins, list(own.values()), allow_unused=True, materialize_grads=True)
    dense = [(grad.to_dense() if grad.is_sparse else grad)[1:].flatten(1) for grad in grads]
    return torch.cat(dense, 1).float().square().sum(1)
