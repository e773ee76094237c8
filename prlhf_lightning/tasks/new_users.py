"""Users whom a running server learns, put beside those whom its model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from prlhf_lightning.adaptation import UserPrior, adapt_users, encode_users, fit_prior
from prlhf_lightning.adaptation.pauses import pausing
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.finite_numbers import are_finite
from prlhf_lightning.inference import PersonalizedWriter
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.tasks.pair_batches import to_batch
from prlhf_lightning.types import PreferenceBatch

_ENOUGH = 32  # pairs, to tell kinds of users apart by


class NewUsers:
    """Learns users from their pairs, and has a writer know them. They are held in memory only.

    Args:
        model: A trained model.
        writer: Writes with the same policy and user model.
    """

    def __init__(self, model: PersonalizedLM, writer: PersonalizedWriter) -> None:
        self._model, self._writer = model, writer
        self._tokenize = FeedbackTokenizer(model.policy.tokenizer, model.tokenization)
        self._trained = writer.vocabulary
        self._prior: UserPrior | None = None
        self._fitted_on = 0

    @torch.no_grad()
    def __call__(
        self, user_id: str, rows: Sequence[Mapping[str, Any]], between: Callable[[], None] = lambda: None
    ) -> None:
        """Learn a user from their pairs, in place of what had been learned of them before; see `serving.Learner`.

        Raises:
            ConfigurationError: The model was trained on this user, or can't learn users.
            FeedbackFormatError: The pairs are not what they should be.
        """
        if user_id in self._trained:
            raise ConfigurationError("This model was trained on this user; train it again with the new feedback.")
        pairs = self._pairs([{**row, "user_id": user_id} for row in rows])
        with pausing(between):
            row = self._row(user_id, pairs)
        if not are_finite([row]):
            raise ConfigurationError("What was learned of this user is infinite or NaN, and was dropped.")
        self._put(user_id, row)

    def _row(self, user_id: str, pairs: PreferenceBatch) -> torch.Tensor:
        """Return a user's row, the numbers of all tables side by side."""
        if self._model.user_model.history_size:
            return encode_users(self._model, pairs, [user_id]).rows[0]
        return adapt_users(self._model, pairs, [user_id], self._prior_by(pairs)).rows[0]

    def _prior_by(self, pairs: PreferenceBatch) -> UserPrior:
        """Return what is known of a new user, told by the pairs of whoever had the most so far, until they suffice."""
        if self._prior is None or self._fitted_on < min(len(pairs), _ENOUGH):
            trained = len(self._trained) - 1  # those who were learned here, and come after them, are no evidence
            self._prior, self._fitted_on = fit_prior(self._model, pairs, first=trained), len(pairs)
        return self._prior

    def _pairs(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        try:
            found = to_batch(self._tokenize, rows, [f"pair {number}" for number in range(1, len(rows) + 1)])
        finally:
            self._tokenize.forget()  # what people write is not to be kept
        if found is None:
            raise ConfigurationError("In every pair both answers are the same to the model.")
        return found[0]

    def _put(self, user_id: str, row: torch.Tensor) -> None:
        """Give a user their row at the end of all tables, or where they have it already."""
        tables = self._model.user_model.row_tables()
        if user_id not in self._writer.vocabulary:
            for table in tables:
                table.data = torch.cat([table.data, table.data[:1]])
            self._writer.vocabulary = self._writer.vocabulary.plus(user_id)
        place = int(self._writer.vocabulary.rows([user_id])[0])
        for table, part in zip(tables, torch.split(row, [table[0].numel() for table in tables]), strict=True):
            table.data[place] = part.view_as(table[place]).to(table)
