"""Data classes that components pass to one another: tokens, soft prompts, users, batches, log-probs, losses.

Shapes: B pairs (or rows) in a batch, L tokens, T soft-prompt positions, d the policy's embedding width.
Token tensors are padded on the right; their mask is true on real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Feedback: TypeAlias = Literal["pairs", "thumbs", "demonstrations"]
"""Kind of feedback in a row: a preference between two completions, a label of one completion, or one to imitate."""

_T = TypeVar("_T", bound="_TensorStruct")


class _TensorStruct:
    """Dataclass of tensors and nested structs; moves and indexes all of them together."""

    def _map(self: _T, fn: Any) -> _T:
        changes = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor | _TensorStruct):
                changes[field.name] = fn(value)
        return replace(self, **changes)  # type: ignore[type-var]

    def to(self: _T, *args: Any, **kwargs: Any) -> _T:
        """Return a copy with every tensor moved, as `torch.Tensor.to`."""
        return self._map(lambda value: value.to(*args, **kwargs))

    def select(self: _T, rows: Tensor) -> _T:
        """Index every tensor by rows `[n]`."""
        return self._map(lambda value: value.select(rows) if isinstance(value, _TensorStruct) else value[rows])

    def pin_memory(self: _T) -> _T:
        """Return a copy with its tensors in pinned host memory."""
        return self._map(lambda value: value.pin_memory())


_Sent = TypeVar("_Sent", bound=Tensor | _TensorStruct)


def to_device(value: _Sent, device: torch.device) -> _Sent:
    """Move tensors to a device, asynchronously on CUDA.

    CUDA keeps or copies the source until it has read it. Other devices may read memory that is already reused.
    """
    return cast(_Sent, value.to(device, non_blocking=device.type == "cuda"))


@dataclass  # not frozen: Lightning's precision plugins rebuild batches field by field
class Tokens(_TensorStruct):
    """Token ids of a batch of texts.

    Attributes:
        ids: `[B, L]` int64, padded on the right.
        mask: `[B, L]` bool, true where a token is real.
    """

    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        """Return the number of rows, B."""
        return self.ids.shape[0]

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int] | npt.NDArray[np.integer]], pad_id: int = 0) -> Tokens:
        """Pad ragged lists (or arrays) of ids on the right to `[B, max length]`."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        mask = torch.arange(int(lengths.max()) if len(rows) else 0) < lengths[:, None]
        ids = torch.full(mask.shape, pad_id, dtype=torch.long)
        if len(rows):
            ids[mask] = torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))
        return cls(ids, mask)

    def trimmed(self) -> Tokens:
        """Cut to the length of the longest row; needs at least one row."""
        width = int(self.mask.sum(1).max())
        return Tokens(self.ids[:, :width], self.mask[:, :width])

    def unpadded(self) -> list[Tensor]:
        """Return the ids of each row without padding, `[length]` each."""
        return [ids[mask] for ids, mask in zip(self.ids, self.mask, strict=True)]

    @classmethod
    def concat(cls, parts: Sequence[Tokens]) -> Tokens:
        """Concatenate along the batch, padding to the longest part."""
        width = max(part.ids.shape[1] for part in parts)
        pad = torch.nn.functional.pad
        return cls(
            torch.cat([pad(part.ids, (0, width - part.ids.shape[1])) for part in parts]),
            torch.cat([pad(part.mask, (0, width - part.mask.shape[1])) for part in parts]),
        )


@dataclass(frozen=True)
class SoftPrompt(_TensorStruct):
    """Vectors in the policy's input-embedding space, placed before the prompt.

    Attributes:
        vectors: `[B, T, d]` float.
        mask: `[B, T]` bool, true on real vectors, false on padding.
    """

    vectors: Tensor
    mask: Tensor

    def unpadded(self) -> list[Tensor]:
        """Return the vectors of each row without padding, `[length, d]` each."""
        return [vectors[mask] for vectors, mask in zip(self.vectors, self.mask, strict=True)]

    @classmethod
    def full(cls, vectors: Tensor) -> SoftPrompt:
        """Wrap vectors `[B, T, d]` without padding."""
        return cls(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device))

    @classmethod
    def cat_time(cls, parts: Sequence[SoftPrompt]) -> SoftPrompt:
        """Concatenate along time, `[B, T1 + T2 + ..., d]`."""
        return cls(
            torch.cat([part.vectors for part in parts], dim=1),
            torch.cat([part.mask for part in parts], dim=1),
        )

    @classmethod
    def cat_batch(cls, parts: Sequence[SoftPrompt]) -> SoftPrompt:
        """Concatenate along the batch; all parts must have the same T."""
        return cls(torch.cat([part.vectors for part in parts]), torch.cat([part.mask for part in parts]))


@dataclass  # not frozen, like `Tokens`
class PairTokens(_TensorStruct):
    """Token ids of up to K pairs for each of B users; missing pairs are fully masked.

    Attributes:
        chosen: `[B, K, L]` ids and mask of the chosen completions.
        rejected: `[B, K, L]` ids and mask of the rejected completions.
    """

    chosen: Tokens
    rejected: Tokens


@dataclass(frozen=True)
class History(_TensorStruct):
    """Up to K earlier pairs of each of B users, in the policy's input-embedding space.

    Attributes:
        chosen: `[B, K, d]` float32 mean embedding of the chosen completion, zero for a missing pair.
        rejected: `[B, K, d]` float32 mean embedding of the rejected completion, zero for a missing pair.
        lengths: `[B, K, 2]` int64 number of tokens of both, 0 for a missing pair.
    """

    chosen: Tensor
    rejected: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Users(_TensorStruct):
    """The users of a batch: the input of a user model.

    Attributes:
        rows: `[B]` int64 rows of the user table; 0 is the generic (unknown) user.
        text: The users' texts embedded by the policy, `[B, L, d]` with a mask; None if no row has a text.
        history: The users' earlier pairs; None makes the user model use the rows of its own tables.
    """

    rows: Tensor
    text: SoftPrompt | None = None
    history: History | None = None

    def anonymous(self) -> Users:
        """Replace each user by the generic user `u_0`; keep the text."""
        return replace(self, rows=torch.zeros_like(self.rows), history=None)


@dataclass
class PreferenceBatch(_TensorStruct):
    """One batch of feedback: pairs, or rows with one completion each.

    Attributes:
        user_ids: B ids, as in the data.
        user_text: Tokens of the text about each user; an empty row if there is none.
        prompt: Tokens of the prompts, with BOS if the tokenizer adds one.
        chosen: Tokens of the chosen completions, with EOS; empty for a thumbs-down.
        rejected: Tokens of the rejected completions, with EOS; empty in demonstrations and for a thumbs-up.
        records: `[B]` int64 position of each row in its data set, to name rows in messages.
        reference: Log-probs under the reference, if they are already known.
        reference_keys: B pairs of cache keys (chosen, rejected) for the reference log-probs.
        history: Other pairs of each row's user; only in training, for user models that read them.
    """

    user_ids: tuple[str, ...]
    user_text: Tokens
    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    records: Tensor
    reference: PairLogProbs | None = None
    reference_keys: tuple[tuple[bytes, bytes], ...] = ()
    history: PairTokens | None = None

    def __len__(self) -> int:
        """Return the number of rows, B."""
        return len(self.user_ids)

    @property
    def completion(self) -> Tokens:
        """The completion of each row of unpaired feedback, liked or not."""
        both = Tokens.concat([self.chosen, self.rejected])
        (liked, disliked), (is_liked, is_disliked) = both.ids.chunk(2), both.mask.chunk(2)
        up = self.desirable[:, None]
        return Tokens(torch.where(up, liked, disliked), torch.where(up, is_liked, is_disliked))

    @property
    def desirable(self) -> Tensor:
        """`[B]` bool, true for rows of unpaired feedback whose completion was liked."""
        return self.chosen.mask.any(1)


@dataclass(frozen=True)
class LogProbs(_TensorStruct):
    """Log-probabilities of one completion per row.

    Attributes:
        tokens: `[B, L]` float32 log-probability of each token, 0 on masked positions.
        mask: `[B, L]` bool, true on completion tokens.
    """

    tokens: Tensor
    mask: Tensor

    @property
    def sum(self) -> Tensor:
        """`[B]` log-probability of each completion."""
        return self.tokens.sum(-1)

    @property
    def lengths(self) -> Tensor:
        """`[B]` number of tokens of each completion."""
        return self.mask.sum(-1)

    @property
    def mean(self) -> Tensor:
        """`[B]` mean log-probability per token."""
        return self.sum / self.lengths

    def chunk(self, n: int) -> tuple[LogProbs, ...]:
        """Split the rows into n equal parts."""
        return tuple(LogProbs(t, m) for t, m in zip(self.tokens.chunk(n), self.mask.chunk(n), strict=True))


@dataclass(frozen=True)
class PairLogProbs(_TensorStruct):
    """Log-probabilities of the two completions of each pair."""

    chosen: LogProbs
    rejected: LogProbs

    def detached(self) -> PairLogProbs:
        """Return the same numbers without gradients."""
        return self._map(lambda part: part._map(Tensor.detach))


@dataclass(frozen=True)
class LossOutput(_TensorStruct):
    """Output of a preference loss.

    Attributes:
        losses: `[B]` loss of each pair, differentiable.
        chosen_rewards: `[B]` implicit reward of the chosen completion, detached.
        rejected_rewards: `[B]` implicit reward of the rejected completion, detached.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def select_pairs(pairs: PreferenceBatch, rows: Tensor) -> PreferenceBatch:
    """Return the pairs `rows` `[n]`, with their users."""
    users = tuple(pairs.user_ids[row] for row in rows.tolist())
    return replace(pairs.select(rows), user_ids=users, reference_keys=())
