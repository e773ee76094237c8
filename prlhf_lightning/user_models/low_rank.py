"""User model with low-rank offsets from the generic user, in a basis shared by all users."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import SoftPrompt, Users
from prlhf_lightning.user_models.base import UserModel, check_count, sample_token_embeddings


class LowRankUserModel(UserModel):
    """`f_im(u) = e_0 + sum_r c_ur B_r`, and `f_im(u_0) = e_0`: `IndividualUserModel` with factorized offsets.

    The basis `B`, the directions in which preferences differ, is learned from all users together; each user has only a
    code `c_u`. A row has `rank` numbers instead of `num_tokens * d`, so few pairs per user suffice. (LoRe,
    arXiv:2504.14439, factorizes reward models in the same way.) Codes start at zero, so every user starts as the
    generic user. The basis starts orthogonal; a code of 1 moves a vector by about the distance between word vectors.

    Args:
        num_tokens: Length T_u of the soft prompt.
        rank: Dimension of a user's code; at most `num_tokens * d`.
    """

    def __init__(self, num_tokens: int = 10, rank: int = 8) -> None:
        super().__init__()
        self.num_tokens = check_count(self, "num_tokens", num_tokens)
        self.rank = check_count(self, "rank", rank)

    def build(self, num_rows: int, token_embeddings: Tensor) -> None:
        """Create `e_0 [T, d]`, the basis `[rank, T * d]` and the codes `[num_rows, rank]`."""
        self.generic_prompt = nn.Parameter(sample_token_embeddings(token_embeddings, self.num_tokens))
        size = self.generic_prompt.numel()
        if self.rank > size:
            raise ConfigurationError(
                f"LowRankUserModel: rank is {self.rank}; it must be at most num_tokens * d = {size}."
            )
        directions = torch.empty(self.rank, size, device=token_embeddings.device)
        nn.init.orthogonal_(directions, gain=token_embeddings.std().item() * size**0.5)
        self.basis = nn.Parameter(directions)
        # padding_idx keeps the generic user's code at zero and out of the gradient.
        self.codes = nn.Embedding(num_rows, self.rank, padding_idx=0, sparse=True)
        nn.init.zeros_(self.codes.weight)

    def forward(self, users: Users) -> SoftPrompt:
        """Return `e_0 + B c_u` for each row, `[B, T, d]`."""
        offsets = (self.codes(users.rows) @ self.basis).view(-1, *self.generic_prompt.shape)
        return SoftPrompt.full(self.generic_prompt + offsets)

    def row_tables(self) -> list[Tensor]:
        """Return the codes."""
        return [self.codes.weight]
