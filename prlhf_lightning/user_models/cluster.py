"""User model with a few shared prompts and mixture weights for each user."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prlhf_lightning.types import SoftPrompt, Users
from prlhf_lightning.user_models.base import UserModel, check_count, sample_token_embeddings


class ClusterUserModel(UserModel):
    """`f_im(u) = sum_k softmax(w_u)_k V_k` (arXiv:2402.05133, cluster-based preference).

    The generic user has its own row of weights, trained by the generic term.

    Args:
        num_clusters: Number K of shared prompts.
        num_tokens: Length T_u of each shared prompt.
    """

    def __init__(self, num_clusters: int = 10, num_tokens: int = 10) -> None:
        super().__init__()
        self.num_clusters = check_count(self, "num_clusters", num_clusters)
        self.num_tokens = check_count(self, "num_tokens", num_tokens)

    def build(self, num_rows: int, token_embeddings: Tensor) -> None:
        """Create the prompts `V [K, T, d]` from word vectors and the weights `w [num_rows, K]`, all equal."""
        vectors = sample_token_embeddings(token_embeddings, self.num_clusters * self.num_tokens)
        self.prompts = nn.Parameter(vectors.view(self.num_clusters, self.num_tokens, -1))
        self.weights = nn.Embedding(num_rows, self.num_clusters, sparse=True)
        nn.init.zeros_(self.weights.weight)

    def forward(self, users: Users) -> SoftPrompt:
        """Return the weighted prompts for each row, `[B, T, d]`."""
        shares = self.weights(users.rows).softmax(-1)
        return SoftPrompt.full(torch.einsum("bk,ktd->btd", shares, self.prompts))

    def row_tables(self) -> list[Tensor]:
        """Return the weights."""
        return [self.weights.weight]

    def share_tables(self) -> list[Tensor]:
        """Return the weights: a row's softmax is the user's share of each prompt."""
        return self.row_tables()
