"""User model that reads the text about a user."""

from __future__ import annotations

from torch import Tensor

from prlhf_lightning.types import SoftPrompt, Users
from prlhf_lightning.user_models.base import UserModel


class TextUserModel(UserModel):
    """`f_ex(u_t)`: the policy's own input embeddings of the user's text (arXiv:2402.05133, explicit preference).

    It has no parameters. A user without a text gets no vectors. The reference policy sees the text too, because it is
    part of the prompt. The two terms of the objective are then equal, unless a `CompositeUserModel` adds an implicit
    model.
    """

    personalizes = False
    uses_text = True

    def build(self, num_rows: int, token_embeddings: Tensor) -> None:
        """Store the embedding width d, for batches in which no user has a text."""
        self.hidden_size = token_embeddings.shape[1]

    def forward(self, users: Users) -> SoftPrompt:
        """Return the embedded texts, `[B, L, d]`."""
        if users.text is None:
            return SoftPrompt.full(users.rows.new_zeros((len(users.rows), 0, self.hidden_size)).float())
        return users.text
