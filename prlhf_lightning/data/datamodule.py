"""Lightning data module of per-user feedback."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.batching import (
    Loader,
    PairsWithHistory,
    PromptDataset,
    collate,
    make_loader,
    refuse_injected_sampler,
    resume_point,
    share_of,
)
from prlhf_lightning.data.holdout import Pairs, SplitConfig
from prlhf_lightning.data.order import (
    TrainingOrder,
    differences,
    earlier_rows,
    has_other_texts,
    hold_out_of,
    leave_out,
    record,
    trained_rows,
)
from prlhf_lightning.data.preparation import PreparedFeedback, Stage, summary
from prlhf_lightning.data.privacy import Pseudonyms
from prlhf_lightning.data.records import Text
from prlhf_lightning.data.sampling import SequentialBatchSampler, UserGroupedBatchSampler
from prlhf_lightning.data.sources.base import DataSource
from prlhf_lightning.data.splits import SplitBy, spread
from prlhf_lightning.data.store import Ties
from prlhf_lightning.data.streaming import FeedbackStream, StreamBatchSampler, StreamedRows
from prlhf_lightning.data.tokenization import Overlong, TokenizationSettings
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import Feedback, PairTokens, PreferenceBatch, Tokens, to_device
from prlhf_lightning.utils.cache_dir import default_cache_dir


class PreferenceDataModule(LightningDataModule):
    """Validates, tokenizes, splits and batches the feedback of a source, grouped by user.

    Evaluation has two sets: `seen` (users in the training data) and `unseen` (other users, who fall back to the generic
    user). `eval_sets` lists the sets that are not empty, in the order of their dataloaders.

    Args:
        source: Source of the rows.
        tokenizer: The policy's tokenizer, or its path or hub name. The command line links it from the policy.
        batch_size: Training pairs per batch and process.
        eval_batch_size: Most pairs in an evaluation batch; by default `batch_size`.
        pairs_per_user: Most pairs of one user that are placed together in a training batch.
        balance: Sampling of users, from 0 (every training pair once per epoch) to 1 (every user equally often).
        bucket_by_length: Batch training pairs of similar length together, which saves most of the padding (but little
            with `pairs_per_user` above 1, because one user's pairs differ in length). Always on with
            `max_tokens_per_batch`.
        max_tokens_per_batch: Most tokens in a training batch of one process, padding included: two completions per
            pair, each padded to the longest user text, prompt and completion of the batch. `batch_size` is then the
            most pairs in a batch of short ones. User vectors are not counted.
        validation_fraction: Share of the training prompts (or pairs) held out for validation. Only used if the source
            has no validation split.
        unseen_user_fraction: Share of the users held out of training. If the source has a validation split, its rows
            of these users are the unseen set.
        split_by: Unit of holding out: all pairs on a `prompt`, so no prompt of the seen set is trained on; or all
            judgments of the same `pair`, for data with few prompts.
        max_prompt_length: Most tokens of a prompt, BOS included; longer prompts keep their end.
        max_completion_length: Most tokens of a completion, EOS included; longer completions keep their start.
        max_user_text_length: Most tokens of the text about a user; longer texts keep their start.
        overlong: Whether rows over these limits are truncated, dropped (both are counted and reported), or an error.
        ties: Whether rows with two equal completions (as text, or after tokenization and truncation) are an error, or
            dropped (counted and reported).
        chat_template: Wrap plain strings in the tokenizer's chat template as one turn. Conversations always use it.
        user_text_format: Format of the text about a user before the prompt; `{user_text}` is replaced by the text.
        chat_template_args: Extra arguments of the tokenizer's chat template, such as `{enable_thinking: false}`. They
            are saved in checkpoints and exports, and used wherever the model generates.
        chat_template_date: Date, such as 2026-01-31, for chat templates that ask for today's date. By default today,
            or the checkpoint's date when a run resumes. It is saved in checkpoints and exports.
        feedback: Kind of rows: `pairs` (`chosen` and `rejected`), `thumbs` (`completion` and `label`) or
            `demonstrations` (`chosen`). The command line links it from the loss.
        streaming: Read, validate and tokenize training rows on the fly and never store them, for data sets larger than
            disk or memory. One pass counts them first, to know the users and the length of an epoch. Evaluation splits
            are stored as usual. Only users, not prompts or pairs, can be held out of the training split.
        shuffle_buffer: Rows of a stream that are held in memory to be shuffled, grouped and bucketed together.
        users_file: The users of a stream and their numbers of rows, if already known: a CSV, JSON Lines or Parquet file
            of `user_id` and `rows`.
        seed: Seed of the splits and of the training order.
        num_workers: Processes that load batches; 0 is fast enough for stored rows, whose ids are memory-mapped.
        cache_dir: Folder of the tokenized data; by default `$PRLHF_CACHE` or `~/.cache/prlhf_lightning`.
        pin_memory: Pin batches in host memory; by default if there is a GPU.
        history_size: Most other training pairs of the same user that come with a training pair, for user models that
            read them. The command line links it from the user model.
        hash_user_ids_with: Environment variable or file with a secret salt. User ids are then replaced by keyed hashes
            (see `Pseudonyms`) when they are read; no cache, checkpoint or table contains the ids or the salt. By
            default ids are not hashed.
    """

    def __init__(
        self,
        source: DataSource,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        pairs_per_user: int = 1,
        balance: float = 0.0,
        bucket_by_length: bool = False,
        max_tokens_per_batch: int | None = None,
        validation_fraction: float = 0.05,
        unseen_user_fraction: float = 0.0,
        split_by: SplitBy = "prompt",
        max_prompt_length: int = 512,
        max_completion_length: int = 512,
        max_user_text_length: int = 256,
        overlong: Overlong = "truncate",
        ties: Ties = "error",
        chat_template: bool = False,
        user_text_format: str = "{user_text}\n",
        chat_template_args: dict[str, Any] | None = None,
        chat_template_date: str | None = None,
        feedback: Feedback = "pairs",
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        users_file: str | Path | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
        pin_memory: bool | None = None,
        hash_user_ids_with: str | None = None,
        history_size: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(source, DataSource):
            raise ConfigurationError(f"source is {source!r}; give a source of rows, such as FileSource({source!r}).")
        if eval_batch_size is not None and eval_batch_size < 1:
            raise ConfigurationError(f"eval_batch_size is {eval_batch_size}; it must be at least 1.")
        if num_workers < 0:
            raise ConfigurationError(f"num_workers is {num_workers}; it must be at least 0 (load in the main process).")
        if ties not in get_args(Ties):
            raise ConfigurationError(f"ties is {ties!r}; it must be one of {get_args(Ties)}.")
        if feedback not in get_args(Feedback):
            raise ConfigurationError(f"feedback is {feedback!r}; it must be one of {get_args(Feedback)}.")
        if history_size and (streaming or feedback != "pairs"):
            raise ConfigurationError(
                f"history_size is {history_size}; histories need stored pairs: set streaming: false and give "
                "pairs, or choose a user model that reads no histories, such as IndividualUserModel."
            )
        if users_file and not streaming:
            raise ConfigurationError("users_file is only for streams: leave it out, or set streaming: true.")
        self.source = source
        self.tokenizer = tokenizer
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.order = TrainingOrder(
            batch_size,
            pairs_per_user,
            balance,
            bucket_by_length,
            max_tokens_per_batch,
            seed,
            streaming,
            shuffle_buffer,
        )
        self.hold_out = SplitConfig(validation_fraction, unseen_user_fraction, split_by, seed)
        self._settings = TokenizationSettings(
            max_prompt_length,
            max_completion_length,
            max_user_text_length,
            overlong,
            chat_template,
            user_text_format,
            chat_template_args or {},
            chat_template_date,
        )
        self.ties: Ties = ties
        self.feedback: Feedback = feedback
        self.history_size = history_size
        self.streaming = streaming
        self.users_file = Path(users_file).expanduser() if users_file else None
        self.pseudonyms = None if hash_user_ids_with is None else Pseudonyms.load(hash_user_ids_with)
        self._left_out: tuple[int, npt.NDArray[np.int64]] | None = None  # an epoch, and the rows to skip in it
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        # With fewer rows than processes, some processes have no batch; this is no error.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @property
    def settings(self) -> TokenizationSettings:
        """Tokenization settings; with the date of the chat template, once the tokenizer is known."""
        return self._settings if self.tokenizer is None else self._prepared.dated_settings

    @property
    def vocabulary(self) -> UserVocabulary:
        """The generic user, then the users of the training rows, sorted."""
        return self._prepared.division.vocabulary

    @property
    def num_users(self) -> int:
        """Number of rows of the user table, with the generic user's."""
        return len(self.vocabulary)

    @property
    def num_training_rows(self) -> int:
        """Number of training rows."""
        return len(self._prepared.division.train)

    @property
    def longest_row(self) -> int:
        """Most tokens of a row of any split: user text, prompt and the longer completion, after truncation.

        Streamed rows are not known in advance; for them it is the sum of the limits.
        """
        return self._prepared.longest_row()

    @property
    def has_user_text(self) -> bool:
        """Whether any row of any split has a text about its user."""
        return self._prepared.has_user_text()

    @property
    def eval_sets(self) -> dict[Stage, tuple[str, ...]]:
        """For each evaluation stage, the names of its dataloaders in order, such as `("seen", "unseen")`."""
        stages: tuple[Stage, ...] = ("validate", "test", "predict")
        return {stage: tuple(self._prepared.evaluation(stage)) for stage in stages}

    @property
    def conversational(self) -> bool:
        """Whether the training rows are conversations instead of plain strings (in mixed data: most of them)."""
        return self._prepared.conversational

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Return the number of training batches of each process in one epoch."""
        return len(self._training_batches(0, world_size))

    def order_record(self, world_size: int, accumulate: int) -> dict[str, Any]:
        """Return the settings and progress that determine the training order; a checkpoint keeps them for `go_on`.

        Args:
            world_size: Number of processes that share the data.
            accumulate: Batches per process and optimizer step.
        """
        found = record(
            self.order, self.hold_out, self._prepared.division.train, self._sequences, world_size, accumulate
        )
        if self._left_out is not None:
            epoch, rows = self._left_out
            found["left_out"] = {"epoch": epoch, "rows": torch.from_numpy(rows)}
        return found

    def go_on(self, kept: Mapping[str, Any], epoch: int, batch: int, world_size: int, accumulate: int) -> int:
        """Resume within an epoch, after rows that may have been batched with other settings.

        If settings of the training order changed, the remaining rows of the epoch are trained once each, and a warning
        names the settings. If the rows changed, or are a stream, a warning says that rows may repeat or be skipped.

        Args:
            kept: The result of `order_record` in the resumed run.
            epoch: The epoch.
            batch: Number of batches per process already trained in it; 0 at its start.
            world_size: Number of processes that share the data now.
            accumulate: Batches per process and optimizer step now.

        Returns:
            The index of the next batch, among the batches of this data module.
        """
        here = self.order_record(world_size, accumulate)
        changed, rows = differences(kept, here), self._prepared.division.train
        is_other = kept["data"] != here["data"]
        self._left_out = None
        if not is_other and has_other_texts(kept, here):
            rank_zero_warn(
                "The training rows have other texts or other token ids than in the checkpoint's run: training "
                "continues on the new ones. To train further on new data, give --init_from instead of --ckpt_path."
            )
        if not batch:
            if is_other:
                changed = [_other_rows(kept, here), *changed]
            if changed:
                rank_zero_warn(
                    f"Settings differ from the checkpoint's run: {'; '.join(changed)}. The following epochs use the "
                    "new settings."
                )
            return 0
        if is_other or (changed and not isinstance(rows, Pairs)):
            size: int = kept["settings"]["batch_size"] * kept["settings"]["world_size"]
            done = min(int(kept["rows"]), batch * size) // (self.batch_size * world_size)
            if is_other:
                changed = [_other_rows(kept, here), *changed]
            rank_zero_warn(
                f"Settings differ from the checkpoint's run: {'; '.join(changed)}. In this epoch, rows may be "
                "trained twice or skipped. To train further on new data, give --init_from instead of --ckpt_path."
            )
            return min(done, self.batches_per_epoch(world_size))
        if not isinstance(rows, Pairs) or not (changed or len(earlier_rows(kept, epoch))):
            return batch
        then = hold_out_of(kept).divide(self._prepared.splits).train
        assert isinstance(then, Pairs)
        self._left_out = epoch, trained_rows(kept, then, epoch, batch)
        sampler = self._training_batches(0, world_size)
        assert isinstance(sampler, UserGroupedBatchSampler)
        if changed:
            left = sum(map(len, sampler.steps(epoch)))
            rank_zero_warn(
                f"Settings differ from the checkpoint's run: {'; '.join(changed)}. The remaining {left:,} rows of this "
                "epoch are trained once each; the learning rates are those of a run with the new settings."
            )
        return sampler.first(epoch)

    def evaluation_pairs(self, name: str, stage: Literal["validate", "test"] = "validate") -> Pairs | None:
        """Return the rows of one of `eval_sets`, `seen` or `unseen`; None if it is empty."""
        return self._prepared.division.evaluation.get(stage, {}).get(name)

    def votes_by_user(self) -> dict[str, int]:
        """Return the number of training rows of each user."""
        return self._prepared.votes_by_user()

    def training_rows(self) -> Pairs | None:
        """Return the training rows; None for a stream."""
        rows = self._prepared.division.train
        return rows if isinstance(rows, Pairs) else None

    def training_sample(self, count: int) -> PreferenceBatch:
        """Return up to `count` training rows, spread evenly; none of a stream."""
        rows = self._prepared.division.train
        if not isinstance(rows, Pairs):
            return collate([])
        return collate(rows.__getitems__(spread(len(rows), count).tolist()))

    def known_as(self, user_id: str) -> str:
        """Return the id in batches, checkpoints and tables of the source's user `user_id`."""
        return self._prepared.known_as(user_id)

    def histories(self) -> Iterator[tuple[list[str], PairTokens]]:
        """Yield all training users in chunks, each with up to `history_size` of their pairs; deterministic."""
        pairs = self._prepared.with_history
        return iter(()) if pairs is None else pairs.of_users()

    def encode_prompts(self, prompts: Sequence[Text]) -> Tokens:
        """Tokenize prompts exactly as those of the data.

        Args:
            prompts: B strings, or conversations that end with the message to answer. If the training rows are
                conversations, a string is one turn of the user.

        Returns:
            `[B, L]` token ids, padded on the right.
        """
        return Tokens.from_lists([ids.tolist() for ids in self._prepared.tokenize.prompts(prompts)])

    def where(self, record: int, stage: Stage = "train", number: int = 0) -> str:
        """Return the location of a row in the source, such as `votes.jsonl:17`.

        Args:
            record: Its number in `PreferenceBatch.records`.
            stage: The row's stage.
            number: Index of its dataloader in the stage.
        """
        sets: list[Pairs | PromptDataset] = list(self._prepared.evaluation(stage).values())
        return (self._prepared.division.train if stage == "train" else sets[number]).where(record)

    def sample(self, count: int) -> PreferenceBatch:
        """Return up to `count` validation pairs, spread evenly over the first of `eval_sets["validate"]`.

        For thumbs, it returns only the thumbs-up among them.
        """
        pairs = next(iter(self._prepared.division.evaluation.get("validate", {}).values()), None)
        if pairs is None:
            return collate([])
        rows = pairs.__getitems__(spread(len(pairs), count).tolist())
        return collate([row for row in rows if row["chosen_ids"]])

    def describe(self) -> str:
        """Return a summary of the training and evaluation data, in one paragraph."""
        counts = self.source.counts("train") if self.streaming else {}
        made = self._prepared
        overlong = self._settings.overlong
        return summary(made.division, made.splits, self.order, self._sequences, overlong, counts, self.feedback)

    def use_template_date(self, day: str) -> None:
        """Set the date of the chat template to a checkpoint's date, unless the user has set one."""
        if self._settings.chat_template_date is None and self.settings.chat_template_date not in (None, day):
            rank_zero_info(f"The chat template writes the checkpoint's date, {day}, instead of today's.")
            self._settings = replace(self._settings, chat_template_date=day)
            self.__dict__.pop("_prepared", None)  # created again on next access

    def prepare_data(self) -> None:
        """Validate and tokenize every split of the source, or count the users of a stream, unless cached."""
        _ = self._prepared.splits
        if self.streaming:
            _ = self._prepared.census

    def setup(self, stage: str) -> None:
        """Open the caches, split the rows, and log a summary."""
        if self.trainer is not None:
            refuse_injected_sampler(self.trainer)
        name: Any = TrainerFn(stage).value  # Lightning passes a member of this enum
        if name != "fit" and not self._prepared.evaluation(name):
            split = {"validate": "validation", "test": "test"}.get(name, "test or validation")
            raise ConfigurationError(f"There are no rows to {name} on; give the source a {split} split.")
        rank_zero_info(self.describe())
        written = self._prepared.tokenize
        if name == "fit" and written.tokenizer.chat_template and not written.settings.chat_template:
            rank_zero_warn(
                "The tokenizer has a chat template, but the rows are plain strings and are used without it. For a "
                "chat model set data.chat_template to true: each prompt is then a message of the user."
            )
        if (day := self.settings.chat_template_date) is not None and self._settings.chat_template_date is None:
            rank_zero_info(
                f"The chat template writes a date: {day}, in training and later whenever the model generates. "
                "Set data.chat_template_date to choose another."
            )

    def train_dataloader(self) -> Loader:
        """Return the batches of this process, in the order of the current epoch."""
        pairs = self._prepared.with_history or self._prepared.division.train
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            if isinstance(pairs, StreamedRows):
                raise ConfigurationError("trainer.overfit_batches needs stored rows: set data.streaming: false.")
            return self._loader(pairs, SequentialBatchSampler(len(pairs), self.batch_size, *share_of(self.trainer)))
        sampler = self._training_batches(*share_of(self.trainer))
        if self.trainer is not None:
            # Lightning sets the epoch of samplers too, but on resume only after iteration has started.
            sampler.set_epoch(*resume_point(self.trainer))
        rows = self._prepared.stream(pairs, sampler) if isinstance(pairs, StreamedRows) else pairs
        return self._loader(rows, sampler)

    def val_dataloader(self) -> list[Loader]:
        """Return one dataloader for each of `eval_sets["validate"]`."""
        return self._evaluation_loaders("validate")

    def test_dataloader(self) -> list[Loader]:
        """Return one dataloader for each of `eval_sets["test"]`."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> list[Loader]:
        """Return one dataloader for each of `eval_sets["predict"]`.

        Its rows are the source's prompts without judgments (`prompts`), for every seen user. Without such prompts, they
        are the rows of the test split, or of the validation split.
        """
        return self._evaluation_loaders("predict")

    def transfer_batch_to_device(
        self, batch: PreferenceBatch, device: torch.device, dataloader_idx: int
    ) -> PreferenceBatch:
        """Move a batch asynchronously on CUDA; Lightning would wait for each tensor."""
        return to_device(batch, device)

    @cached_property
    def _prepared(self) -> PreparedFeedback:
        """Created on first access, so settings may change before."""
        return PreparedFeedback(
            source=self.source,
            tokenizer=self.tokenizer,
            settings=self._settings,
            hold_out=self.hold_out,
            feedback=self.feedback,
            ties=self.ties,
            streaming=self.streaming,
            users_file=self.users_file,
            pseudonyms=self.pseudonyms,
            cache_dir=self.cache_dir,
            history_size=self.history_size,
        )

    def _evaluation_loaders(self, stage: Stage) -> list[Loader]:
        # `describe` already reports an empty validation set.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        share = share_of(self.trainer)
        return [
            self._loader(pairs, SequentialBatchSampler(len(pairs), self.eval_batch_size, *share))
            for pairs in self._prepared.evaluation(stage).values()
        ]

    @property
    def _sequences(self) -> int:
        """Number of sequences scored per row."""
        return 2 if self.feedback == "pairs" else 1

    def _training_batches(self, rank: int, world_size: int) -> UserGroupedBatchSampler | StreamBatchSampler:
        rows = self._prepared.division.train
        sampler = self.order.batches(rows, self._sequences, rank, world_size)
        if self._left_out is not None and isinstance(sampler, UserGroupedBatchSampler) and isinstance(rows, Pairs):
            leave_out(sampler, rows, *self._left_out)
        return sampler

    def _loader(self, rows: Pairs | PairsWithHistory | PromptDataset | FeedbackStream, batches: Sampler[Any]) -> Loader:
        return make_loader(rows, batches, self.num_workers, self.pin_memory)


def _other_rows(kept: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return f"the training data changed ({kept['rows']:,} rows then, {here['rows']:,} now)"
