"""DataLoaders and collation for a Lightning trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

from prlhf_lightning.data.holdout import Pairs
from prlhf_lightning.data.splits import Positions
from prlhf_lightning.data.tokenization import Ids
from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.types import PairTokens, PreferenceBatch, Tokens
from prlhf_lightning.utils import lightning_compat

Loader: TypeAlias = DataLoader[dict[str, Any]]


class _WholeErrors(DataLoader[dict[str, Any]]):
    """Raises what its processes hand over in the place of a batch: an error of ours, with its fields.

    Left to torch, it would be made anew of its class and the text of its traceback.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return map(_raised, super().__iter__())


def _raised(batch: PreferenceBatch | PRLHFError) -> PreferenceBatch:
    if isinstance(batch, PRLHFError):
        raise batch
    return batch


def _collated(rows: Sequence[Mapping[str, Any]] | PRLHFError) -> PreferenceBatch | PRLHFError:
    return rows if isinstance(rows, PRLHFError) else collate(rows)


def make_loader(rows: Dataset[dict[str, Any]], batches: Sampler[Any], num_workers: int, pin_memory: bool) -> Loader:
    """Return a DataLoader of a batch sampler's batches.

    Args:
        rows: Data set of the rows.
        batches: Batch sampler of one process.
        num_workers: Worker processes; 0 loads in the current process.
        pin_memory: Whether to pin batches in host memory.
    """
    # Lightning's advice does not apply: batches load in well under a millisecond, the evaluation sampler returns every
    # row, and training resumes at the right batch.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
    warnings.filterwarnings("ignore", message=".*custom batch sampler `SequentialBatchSampler` for prediction")
    if num_workers:
        # Workers are forked after the tokenizer has used threads; it would warn in each of them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _WholeErrors(
        rows,
        batch_sampler=batches,
        collate_fn=_collated,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


def share_of(trainer: Trainer | None) -> tuple[int, int]:
    """Return the data-parallel rank and world size (tensor-parallel processes count as one)."""
    kwargs = trainer.distributed_sampler_kwargs if trainer is not None else None
    return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)


def resume_point(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch and batch that a trainer runs next; on resume, its progress must be restored already."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if epoch.processed == epoch.ready:  # between epochs
        return epoch.processed, 0
    # An interrupted batch runs again; a batch whose checkpoint was saved at its end does not.
    if batch.processed != batch.ready:
        return epoch.processed, batch.completed
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        return epoch.processed + 1, 0
    return epoch.processed, batch.processed


def refuse_injected_sampler(trainer: Trainer) -> None:
    """Reject a trainer that would replace our batch sampler.

    Raises:
        ConfigurationError: It would; the message names the setting.
    """
    if lightning_compat.replaces_sampler(trainer):
        raise ConfigurationError(
            "The trainer would replace the sampler that groups pairs by user, which divides the data over processes "
            "itself; set trainer.use_distributed_sampler: false."
        )


def collate(rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
    """Pad rows on the right to the longest row and collate them.

    Args:
        rows: Rows with `user_id`, `record` and the ids `user_text_ids`, `prompt_ids`, `chosen_ids`, `rejected_ids`.
            All rows or none have a `history`: other rows of the same user.
    """
    return PreferenceBatch(
        user_ids=tuple(row["user_id"] for row in rows),
        user_text=Tokens.from_lists([row["user_text_ids"] for row in rows]),
        prompt=Tokens.from_lists([row["prompt_ids"] for row in rows]),
        chosen=Tokens.from_lists([row["chosen_ids"] for row in rows]),
        rejected=Tokens.from_lists([row["rejected_ids"] for row in rows]),
        records=torch.tensor([row["record"] for row in rows], dtype=torch.long),
        history=pair_tokens([row["history"] for row in rows]) if rows and "history" in rows[0] else None,
    )


def pair_tokens(histories: Sequence[Sequence[Mapping[str, Any]]]) -> PairTokens:
    """Pad users' rows, each with `chosen_ids` and `rejected_ids`, to `[B, K, L]`: the most rows, the longest ids."""
    size = max(map(len, histories), default=0)

    def block(name: str) -> Tokens:
        rows = [row for history in histories for row in [*(r[name] for r in history), *[[]] * (size - len(history))]]
        flat = Tokens.from_lists(rows)
        shape = len(histories), size, flat.ids.shape[1]
        return Tokens(flat.ids.view(shape), flat.mask.view(shape))

    return PairTokens(block("chosen_ids"), block("rejected_ids"))


USERS_AT_ONCE = 64


class PairsWithHistory(Dataset[dict[str, Any]]):
    """Pairs with a `history`: up to `size` other pairs of the same user, or none, drawn at random.

    The draw depends only on the seed and on the pairs of the batch, and so on the epoch. A resumed run therefore draws
    the same histories.

    Args:
        pairs: The training pairs; histories contain only these.
        size: Most pairs in a history.
        seed: Seed of the draws.
    """

    def __init__(self, pairs: Pairs, size: int, seed: int) -> None:
        self.pairs, self.size, self.seed = pairs, size, seed
        self._users = pairs.split.users[pairs.positions]
        self._by_user = np.argsort(self._users, kind="stable")
        self._starts = np.searchsorted(self._users[self._by_user], np.arange(len(pairs.split.user_ids) + 1))
        self._place = np.empty_like(self._by_user)
        self._place[self._by_user] = np.arange(len(self._by_user))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several rows, each with its history."""
        draw = np.random.default_rng([self.seed, *indices])
        histories = [self._others(index, draw) for index in indices]
        rows = iter(self.pairs.__getitems__([*indices, *np.concatenate(histories).tolist()]))
        own = [next(rows) for _ in indices]
        return [row | {"history": [next(rows) for _ in history]} for row, history in zip(own, histories, strict=True)]

    def of_users(self) -> Iterator[tuple[list[str], PairTokens]]:
        """Yield all users in chunks, each with `size` of their pairs (or all, if fewer), the same in every run.

        Yields:
            The users' ids, and their histories `[n, K, L]`.
        """
        users = np.unique(self._users)
        for some in np.split(users, range(USERS_AT_ONCE, len(users), USERS_AT_ONCE)):
            drawn = [self._some(user, np.random.default_rng([self.seed, int(user)])) for user in some]
            rows = iter(self.pairs.__getitems__(np.concatenate(drawn).tolist()))
            ids = [self.pairs.split.user_ids[user] for user in some]
            yield ids, pair_tokens([[next(rows) for _ in places] for places in drawn])

    def _others(self, index: int, draw: np.random.Generator) -> Positions:
        """Draw a history for one pair, without the pair itself."""
        start, stop = self._starts[self._users[index] : self._users[index] + 2]
        others = stop - start - 1
        count = int(draw.integers(min(self.size, others), endpoint=True))
        picked = draw.choice(others, count, replace=False)
        found: Positions = self._by_user[start + picked + (picked >= self._place[index] - start)]
        return found

    def _some(self, user: int, draw: np.random.Generator) -> Positions:
        own: Positions = self._by_user[self._starts[user] : self._starts[user + 1]]
        return draw.choice(own, min(self.size, len(own)), replace=False)


class PromptDataset(Dataset[dict[str, Any]]):
    """Every prompt for every user, ordered by prompt; without completions or texts about users.

    Args:
        places: Location of each of the P prompts.
        prompts: P arrays of token ids.
        user_ids: The users.
    """

    def __init__(self, places: Sequence[str], prompts: Sequence[Ids], user_ids: Sequence[str]) -> None:
        self._places, self._prompts, self._user_ids = places, prompts, user_ids

    def __len__(self) -> int:
        return len(self._prompts) * len(self._user_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, user = divmod(index, len(self._user_ids))
        nothing: dict[str, list[int]] = {f"{part}_ids": [] for part in ("user_text", "chosen", "rejected")}
        prompt_ids = self._prompts[prompt].tolist()
        return {"user_id": self._user_ids[user], "prompt_ids": prompt_ids, **nothing, "record": index}

    def where(self, record: int) -> str:
        """Return the location of a row's prompt."""
        return self._places[record // len(self._user_ids)]
