"""User model with the same vectors for all users: vanilla RLHF, the baseline."""

from __future__ import annotations

from torch import Tensor, nn

from prlhf_lightning.types import SoftPrompt, Users
from prlhf_lightning.user_models.base import UserModel, check_count, sample_token_embeddings


class UniformUserModel(UserModel):
    """`f_im(u) = e_0` for every user (arXiv:2402.05133, uniform preference): the baseline without personalization.

    Args:
        num_tokens: Length T of the soft prompt; 0 trains the policy alone, as vanilla DPO does.
    """

    personalizes = False

    def __init__(self, num_tokens: int = 0) -> None:
        super().__init__()
        self.num_tokens = check_count(self, "num_tokens", num_tokens, least=0)

    def build(self, num_rows: int, token_embeddings: Tensor) -> None:
        """Create `e_0 [T, d]` from word vectors."""
        vectors = sample_token_embeddings(token_embeddings, self.num_tokens)
        self.prompt = nn.Parameter(vectors, requires_grad=self.num_tokens > 0)

    def forward(self, users: Users) -> SoftPrompt:
        """Return `e_0` for each row, `[B, T, d]`."""
        return SoftPrompt.full(self.prompt.expand(len(users.rows), -1, -1))
