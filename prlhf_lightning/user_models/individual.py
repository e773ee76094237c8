"""User model with one offset per user from the generic user."""

from __future__ import annotations

from torch import Tensor, nn

from prlhf_lightning.types import SoftPrompt, Users
from prlhf_lightning.user_models.base import UserModel, check_count, sample_token_embeddings


class IndividualUserModel(UserModel):
    """`f_im(u) = e_0 + o_u`, and `f_im(u_0) = e_0` (arXiv:2402.05133, individualized preference).

    `e_0` is initialized with word vectors and the offsets with zeros, so every user starts as the generic user.

    Args:
        num_tokens: Length T_u of the soft prompt.
    """

    def __init__(self, num_tokens: int = 10) -> None:
        super().__init__()
        self.num_tokens = check_count(self, "num_tokens", num_tokens)

    def build(self, num_rows: int, token_embeddings: Tensor) -> None:
        """Create `e_0 [T, d]` and the offsets `[num_rows, T * d]`."""
        self.generic_prompt = nn.Parameter(sample_token_embeddings(token_embeddings, self.num_tokens))
        # padding_idx keeps the generic user's offset at zero and out of the gradient.
        self.offsets = nn.Embedding(num_rows, self.generic_prompt.numel(), padding_idx=0, sparse=True)
        nn.init.zeros_(self.offsets.weight)

    def forward(self, users: Users) -> SoftPrompt:
        """Return `e_0 + o_u` for each row, `[B, T, d]`."""
        offsets = self.offsets(users.rows).view(-1, *self.generic_prompt.shape)
        return SoftPrompt.full(self.generic_prompt + offsets)

    def row_tables(self) -> list[Tensor]:
        """Return the offsets."""
        return [self.offsets.weight]
