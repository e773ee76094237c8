"""User model that concatenates the vectors of other user models."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import History, SoftPrompt, Users
from prlhf_lightning.user_models.base import UserCodes, UserModel


class CompositeUserModel(UserModel):
    """`f_P(u) = concat(f_im(u_p), f_ex(u_t))` (arXiv:2402.05133), or the concatenated vectors of any other models.

    Args:
        parts: The models, in the order of their vectors before the prompt.
    """

    def __init__(self, parts: list[UserModel]) -> None:
        super().__init__()
        if not parts:
            raise ConfigurationError("CompositeUserModel: parts is empty; give one user model or more.")
        self.parts = nn.ModuleList(parts)
        self.personalizes = any(part.personalizes for part in parts)
        self.uses_text = any(part.uses_text for part in parts)
        self.history_size = max(part.history_size for part in parts)
        self.code_size = max(part.code_size for part in parts)

    @property
    def _models(self) -> list[UserModel]:
        return list(self.parts)  # type: ignore[arg-type]

    def build(self, num_rows: int, token_embeddings: Tensor) -> None:
        """Build each part."""
        for part in self._models:
            part.build(num_rows, token_embeddings)

    def forward(self, users: Users) -> SoftPrompt:
        """Concatenate the parts' vectors along time, `[B, T1 + T2 + ..., d]`."""
        return SoftPrompt.cat_time([part(users) for part in self._models])

    def row_tables(self) -> list[Tensor]:
        """Return the tables of all parts."""
        return [table for part in self._models for table in part.row_tables()]

    def new_rows(self, tables: list[Tensor]) -> list[Tensor]:
        """Return each part's rows for its own tables."""
        left = iter(tables)
        return [row for part in self._models for row in part.new_rows(list(islice(left, len(part.row_tables()))))]

    def directions(self) -> list[nn.Parameter]:
        """Return the directions of all parts."""
        return [parameter for part in self._models for parameter in part.directions()]

    def start_fit(self, pairs: Tensor, codes: UserCodes | None, is_fresh: bool) -> None:
        """Prepare each part."""
        for part in self._models:
            part.start_fit(pairs, codes if part.code_size else None, is_fresh)

    def penalty(self, users: Users) -> Tensor | None:
        """Return the sum of the parts' penalties."""
        found = [penalty for part in self._models if (penalty := part.penalty(users)) is not None]
        return torch.stack(found).sum(0) if found else None

    @property
    def has_unit_prior(self) -> bool:
        """Whether all parts with rows have one."""
        with_rows = [part for part in self._models if part.row_tables()]
        return bool(with_rows) and all(part.has_unit_prior for part in with_rows)

    def history_tables(self) -> list[Tensor]:
        """Return the history tables of all parts."""
        return [table for part in self._models for table in part.history_tables()]

    def history_rows(self, history: History) -> list[Tensor]:
        """Return each part's rows for its own tables."""
        return [rows for part in self._models for rows in part.history_rows(history)]

    def share_tables(self) -> list[Tensor]:
        """Return the share tables of all parts."""
        return [table for part in self._models for table in part.share_tables()]
