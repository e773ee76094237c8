"""Per-user feedback for a Lightning Trainer."""

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
from prlhf_lightning.data.sampling import SequentialBatchSampler, UserGroupedBatchSampler
from prlhf_lightning.data.schema import Text
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

    Evaluation is divided into the sets `seen` (users that training meets) and `unseen` (users that it does not, whom
    only the generic user can serve); `eval_sets` names those that are not empty, in the order of their dataloaders.

    Args:
        source: Where the rows come from.
        tokenizer: The policy's tokenizer, or the path or hub name of one. The command line links it from the policy.
        batch_size: Training pairs in a batch of one process.
        eval_batch_size: Most pairs in an evaluation batch; `batch_size` if none is given.
        pairs_per_user: Up to so many pairs of one user stand side by side in a training batch.
        balance: From 0, every training pair once an epoch, to 1, every user equally often.
        bucket_by_length: Whether training pairs of about the same length share a batch, which saves most of the
            padding (but little of it with `pairs_per_user` above 1, as one user's pairs differ in length).
            Always so where `max_tokens_per_batch` is given.
        max_tokens_per_batch: Most tokens of a training batch of one process, padding included: two completions of each
            pair, each as long as the longest of user text, prompt and completion in the batch. `batch_size` is then
            the most pairs that a batch of short ones may have. User vectors are not counted.
        validation_fraction: Share of the training prompts (or pairs) that is held out for validation. Only used where
            the source has no validation split of its own.
        unseen_user_fraction: Share of the users who are held out of training altogether. Where the source has a
            validation split of its own, its rows about them are the unseen set.
        split_by: What is held out together: all pairs on a `prompt`, so that no prompt of the seen set was trained
            on, or all judgments of the same `pair`, for data with few prompts.
        max_prompt_length: Most tokens of a prompt, BOS included; of longer ones the end is kept.
        max_completion_length: Most tokens of a completion, EOS included; of longer ones the start is kept.
        max_user_text_length: Most tokens of the text about a user; of longer ones the start is kept.
        overlong: Whether rows over these limits are truncated, dropped (both are counted and reported), or an error.
        ties: Whether rows whose two completions are the same, as they stand or once tokenized and truncated, are an
            error, or dropped (counted and reported).
        chat_template: Whether plain strings are wrapped in the tokenizer's chat template as one turn. Rows that are
            conversations always are.
        user_text_format: How the text about a user is written before the prompt; `{user_text}` stands for it.
        chat_template_args: Further arguments of the tokenizer's chat template, such as `{enable_thinking: false}`.
            They are kept in checkpoints and exports, for everything that writes with the model.
        chat_template_date: The day, such as 2026-01-31, that a chat template writes which asks for today's date; today
            if none is given, or the checkpoint's where one is gone on from. It is kept in checkpoints and exports.
        feedback: What the rows are: `pairs` (`chosen` and `rejected`), `thumbs` (`completion` and `label`) or
            `demonstrations` (`chosen`). The command line links it from the loss.
        streaming: Whether training rows are read, validated and tokenized as they are needed, and never stored, for
            sets larger than disk or memory. They are counted once, to know the users and the length of an epoch.
            Evaluation splits are stored as always; nothing is held out of the training split but users.
        shuffle_buffer: Rows that are shuffled, grouped and bucketed together in a stream, and held in memory.
        users_file: The users of a stream and their numbers of rows, where they are known already: a CSV, JSON Lines or
            Parquet file of `user_id` and `rows`.
        seed: Seed of the splits and of the order of training.
        num_workers: Processes that load batches; none is fast enough for stored rows, whose ids are memory-mapped.
        cache_dir: Folder of the tokenized data; `$PRLHF_CACHE` or `~/.cache/prlhf_lightning` if none is given.
        pin_memory: Whether batches are laid in pinned memory; where there is a GPU if not given.
        history_size: Most other training pairs of the same user that come with a training pair, for user models that
            read them. The command line links it from the user model.
        hash_user_ids_with: Name of the environment variable, or path of the file, that holds a secret salt. Users' ids
            are then replaced by keyed hashes (see `Pseudonyms`) as they are read; the ids and the salt are in no cache,
            checkpoint or table. By default ids stay as they are.
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
                f"history_size is {history_size}; users' histories are of stored pairs: set streaming: false and give "
                "pairs, or choose a user model that reads no histories, such as IndividualUserModel."
            )
        if users_file and not streaming:
            raise ConfigurationError("users_file tells the users of a stream: leave it out, or set streaming: true.")
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
        self._left_out: tuple[int, npt.NDArray[np.int64]] | None = None  # an epoch, and rows that it is without
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        # Fewer rows than processes leave some without a batch, which is nothing to stop for.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @property
    def settings(self) -> TokenizationSettings:
        """How text becomes ids. Once the tokenizer is known, a date that its chat template writes is part of it."""
        return self._settings if self.tokenizer is None else self._prepared.dated_settings

    @property
    def vocabulary(self) -> UserVocabulary:
        """The users of the training rows, sorted, after the generic user."""
        return self._prepared.division.vocabulary

    @property
    def num_users(self) -> int:
        """Number of rows of the user table, the generic user's included."""
        return len(self.vocabulary)

    @property
    def num_training_rows(self) -> int:
        """Number of rows that are trained on."""
        return len(self._prepared.division.train)

    @property
    def longest_row(self) -> int:
        """Most tokens of a row of any split: user text, prompt and the longer completion, after truncation.

        Of streamed rows, which are not known, it is what the limits allow.
        """
        return self._prepared.longest_row()

    @property
    def has_user_text(self) -> bool:
        """Whether any row of any split has a text about its user."""
        return self._prepared.has_user_text()

    @property
    def eval_sets(self) -> dict[Stage, tuple[str, ...]]:
        """For each stage that evaluates, the names of its dataloaders in order, such as `("seen", "unseen")`."""
        stages: tuple[Stage, ...] = ("validate", "test", "predict")
        return {stage: tuple(self._prepared.evaluation(stage)) for stage in stages}

    @property
    def conversational(self) -> bool:
        """Whether the training rows are conversations, and not plain strings (in mixed data: most of them)."""
        return self._prepared.conversational

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Return the number of training batches of each process in one epoch."""
        return len(self._training_batches(0, world_size))

    def order_record(self, world_size: int, accumulate: int) -> dict[str, Any]:
        """Return what decides which rows are trained on when, to be kept in a checkpoint for `go_on`.

        Args:
            world_size: Number of processes that share the data.
            accumulate: Batches of a process in an optimizer step.
        """
        found = record(
            self.order, self.hold_out, self._prepared.division.train, self._sequences, world_size, accumulate
        )
        if self._left_out is not None:
            epoch, rows = self._left_out
            found["left_out"] = {"epoch": epoch, "rows": torch.from_numpy(rows)}
        return found

    def go_on(self, kept: Mapping[str, Any], epoch: int, batch: int, world_size: int, accumulate: int) -> int:
        """Enter an epoch after rows that were trained on, which may have been batched otherwise.

        Where the settings differ that decide the order, the rows of the epoch that are left are trained once each, and
        a warning names the settings. Where the rows themselves are others, or a stream, it says that this can't be.

        Args:
            kept: What `order_record` returned in the run that is gone on with.
            epoch: The epoch.
            batch: Number of batches of each process that were trained in it; 0 where it begins.
            world_size: Number of processes that share the data now.
            accumulate: Batches of a process in an optimizer step now.

        Returns:
            The number of the batch that comes next, in the batches of this data module.
        """
        here = self.order_record(world_size, accumulate)
        changed, rows = differences(kept, here), self._prepared.division.train
        is_other = kept["data"] != here["data"]
        self._left_out = None
        if not is_other and has_other_texts(kept, here):
            rank_zero_warn(
                "The training rows have other texts than those that the checkpoint was trained on, or become other "
                "token ids: going on trains on these from here on. To train further on new data, give --init_from "
                "instead of --ckpt_path."
            )
        if not batch:
            if is_other:
                changed = [_other_rows(kept, here), *changed]
            if changed:
                rank_zero_warn(
                    f"Going on otherwise than the checkpoint was trained: {'; '.join(changed)}. The epochs to come are "
                    "trained with these."
                )
            return 0
        if is_other or (changed and not isinstance(rows, Pairs)):
            size: int = kept["settings"]["batch_size"] * kept["settings"]["world_size"]
            done = min(int(kept["rows"]), batch * size) // (self.batch_size * world_size)
            if is_other:
                changed = [_other_rows(kept, here), *changed]
            rank_zero_warn(
                f"Going on otherwise than the checkpoint was trained: {'; '.join(changed)}. In this epoch rows may be "
                "trained twice or left out. To train further on new data, give --init_from instead of --ckpt_path."
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
                f"Going on otherwise than the checkpoint was trained: {'; '.join(changed)}. The {left:,} rows of this "
                "epoch that are left are trained once each; the learning rates are those of a run with these settings."
            )
        return sampler.first(epoch)

    def evaluation_pairs(self, name: str, stage: Literal["validate", "test"] = "validate") -> Pairs | None:
        """Return the rows of one of `eval_sets`, `seen` or `unseen`, or None where it is empty."""
        return self._prepared.division.evaluation.get(stage, {}).get(name)

    def votes_by_user(self) -> dict[str, int]:
        """Return how many training rows each user gave."""
        return self._prepared.votes_by_user()

    def known_as(self, user_id: str) -> str:
        """Return the id by which batches, checkpoints and tables know a user whom the source calls `user_id`."""
        return self._prepared.known_as(user_id)

    def histories(self) -> Iterator[tuple[list[str], PairTokens]]:
        """Yield all training users, some at a time, each with up to `history_size` of their pairs, always the same."""
        pairs = self._prepared.with_history
        return iter(()) if pairs is None else pairs.of_users()

    def encode_prompts(self, prompts: Sequence[Text]) -> Tokens:
        """Tokenize prompts to be answered exactly as those of the data are.

        Args:
            prompts: B strings, or conversations that end with what is to be answered. Where the training rows are
                conversations, a string is one turn of the user.

        Returns:
            `[B, L]` token ids, padded on the right.
        """
        return Tokens.from_lists([ids.tolist() for ids in self._prepared.tokenize.prompts(prompts)])

    def where(self, record: int, stage: Stage = "train", number: int = 0) -> str:
        """Return where a row stands in the source.

        Args:
            record: Its number in `PreferenceBatch.records`.
            stage: The stage whose row it is.
            number: Which of the stage's dataloaders gave it.
        """
        sets: list[Pairs | PromptDataset] = list(self._prepared.evaluation(stage).values())
        return (self._prepared.division.train if stage == "train" else sets[number]).where(record)

    def sample(self, count: int) -> PreferenceBatch:
        """Return up to `count` pairs to validate on, spread evenly over the first of `eval_sets["validate"]`.

        Of thumbs, those of them that are up.
        """
        pairs = next(iter(self._prepared.division.evaluation.get("validate", {}).values()), None)
        if pairs is None:
            return collate([])
        rows = pairs.__getitems__(spread(len(pairs), count).tolist())
        return collate([row for row in rows if row["chosen_ids"]])

    def describe(self) -> str:
        """Return a summary of what is trained and evaluated on, in one paragraph."""
        counts = self.source.counts("train") if self.streaming else {}
        made = self._prepared
        overlong = self._settings.overlong
        return summary(made.division, made.splits, self.order, self._sequences, overlong, counts, self.feedback)

    def use_template_date(self, day: str) -> None:
        """Have the chat template write the day that a checkpoint's rows were written on, unless one is set."""
        if self._settings.chat_template_date is None and self.settings.chat_template_date not in (None, day):
            rank_zero_info(f"The chat template writes the checkpoint's date, {day}, and not today's.")
            self._settings = replace(self._settings, chat_template_date=day)
            self.__dict__.pop("_prepared", None)  # which is made anew

    def prepare_data(self) -> None:
        """Validate and tokenize every split of the source, or count its users, unless the cache has them."""
        _ = self._prepared.splits
        if self.streaming:
            _ = self._prepared.census

    def setup(self, stage: str) -> None:
        """Open the caches, divide the rows, and say what there is."""
        if self.trainer is not None:
            refuse_injected_sampler(self.trainer)
        name: Any = TrainerFn(stage).value  # Lightning passes a member of this enum
        if name != "fit" and not self._prepared.evaluation(name):
            split = {"validate": "validation", "test": "test"}.get(name, "test or validation")
            raise ConfigurationError(f"There is nothing to {name} on; give the source a {split} split.")
        rank_zero_info(self.describe())
        written = self._prepared.tokenize
        if name == "fit" and written.tokenizer.chat_template and not written.settings.chat_template:
            rank_zero_warn(
                "The tokenizer has a chat template, and the rows are plain strings, which are used as they stand. For "
                "a chat model set data.chat_template to true: each prompt is then a message of the user."
            )
        if (day := self.settings.chat_template_date) is not None and self._settings.chat_template_date is None:
            rank_zero_info(
                f"The chat template writes a date: {day}, in training and in all that is written with the model later. "
                "Set data.chat_template_date to choose another."
            )

    def train_dataloader(self) -> Loader:
        """Return the batches of this process, in the order of the epoch that training has reached."""
        pairs = self._prepared.with_history or self._prepared.division.train
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            if isinstance(pairs, StreamedRows):
                raise ConfigurationError("trainer.overfit_batches needs stored rows: set data.streaming: false.")
            return self._loader(pairs, SequentialBatchSampler(len(pairs), self.batch_size, *share_of(self.trainer)))
        sampler = self._training_batches(*share_of(self.trainer))
        if self.trainer is not None:
            # Lightning sets the epoch of samplers too, but when it resumes only after it began to iterate.
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

        It is the source's prompts without judgments, for every seen user (`prompts`), if it has any; or else the rows
        of the test split, or of validation.
        """
        return self._evaluation_loaders("predict")

    def transfer_batch_to_device(
        self, batch: PreferenceBatch, device: torch.device, dataloader_idx: int
    ) -> PreferenceBatch:
        """Move a batch, without waiting for each of its tensors as Lightning would."""
        return to_device(batch, device)

    @cached_property
    def _prepared(self) -> PreparedFeedback:
        """Made when it is first needed: until then what it is made of may be set."""
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
        # That there may be nothing to validate on is said by `describe`.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        share = share_of(self.trainer)
        return [
            self._loader(pairs, SequentialBatchSampler(len(pairs), self.eval_batch_size, *share))
            for pairs in self._prepared.evaluation(stage).values()
        ]

    @property
    def _sequences(self) -> int:
        """Sequences that a row is scored as."""
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
    return f"the training data are others ({kept['rows']:,} rows then, {here['rows']:,} now)"
