"""The LightningModule that composes user model, policy and preference loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from transformers import get_scheduler

from prlhf_lightning import checkpoint_files
from prlhf_lightning.data.sampler import UserGroupedBatchSampler
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import PreferenceLoss
from prlhf_lightning.metrics import PreferenceAccuracy, UserAccuracy
from prlhf_lightning.modules import checkpoint_content
from prlhf_lightning.modules.checkpoint_fit import check_shapes
from prlhf_lightning.modules.checkpoint_io import is_local, use_sealed_files
from prlhf_lightning.modules.finite import FiniteGuard, all_finite, non_finite_error
from prlhf_lightning.modules.optim import (
    Optim,
    RowwiseAdamW,
    apply_settings,
    clip_gradients,
    gradient_norm,
    optimizer_steps,
)
from prlhf_lightning.modules.reference_store import ReferenceStore
from prlhf_lightning.modules.resume import end_epoch
from prlhf_lightning.modules.sharding import check_strategy, is_sharded, plain_name, shard, stand_in
from prlhf_lightning.modules.table_sync import (
    average_dense_gradients,
    average_sparse_gradients,
    exclude_from_ddp,
    sparse_tables,
)
from prlhf_lightning.modules.trainer_settings import check_trainer
from prlhf_lightning.paths import cache_folder
from prlhf_lightning.policies import Policy, Sampling
from prlhf_lightning.reference_cache import ReferenceCache
from prlhf_lightning.types import LogProbs, LossOutput, PairLogProbs, PreferenceBatch, SoftPrompt, Tokens, Users
from prlhf_lightning.user_models import UserModel

# So that a checkpoint of a module built in code opens with `weights_only=True`.
torch.serialization.add_safe_globals([Optim, Sampling])


@dataclass(frozen=True)
class Term:
    """One term of the objective: the pairs of a batch as one kind of user sees them.

    Attributes:
        generic: Whether the generic user stood in each user's place; false of terms that were drawn pair by pair.
        log_probs: The policy's log-probabilities.
        output: The loss's per-pair result.
        reference: The reference's log-probabilities, if the loss has one.
    """

    generic: bool
    log_probs: PairLogProbs
    output: LossOutput
    reference: PairLogProbs | None = None

    @property
    def margins(self) -> Tensor:
        """`[B]` reward of the chosen less that of the rejected completion."""
        return self.output.chosen_rewards - self.output.rejected_rewards


class PersonalizedLM(LightningModule):
    """A policy conditioned on users, trained on who preferred which completion.

    The objective of a pair is `alpha * l(u) + (1 - alpha) * l(u_0)`: the loss under the pair's own user and under
    the generic user in its place (P-DPO and its relatives, arXiv:2402.05133). The two are mixed pair by pair, so a
    pair weighs the same whatever else is in its batch.

    Args:
        user_model: Turns users into soft-prompt vectors.
        policy: The language model that the vectors condition.
        loss: The pairwise objective of which both terms are made.
        alpha: Weight of the user's own term, in [0, 1]; the generic user's has 1 - alpha.
        optim: Learning rates and schedule.
        sampling: How `predict` writes.
        cache_reference: Keep the reference's log-probs on disk (in `$PRLHF_CACHE` or `~/.cache/prlhf_lightning`), so
            that each completion is scored once for all epochs, evaluations and runs with the same policy. Not done
            where the model is sharded over processes (FSDP and the like): there all must compute whenever one does.
        sample_terms: In training, compute one of a pair's two terms, drawn in proportion to their weights, instead of
            both: half the work of the policy. The gradient is right on average; the draw adds
            `alpha * (1 - alpha) * |g(u) - g(u_0)|^2` to the variance of a pair's gradient g.
    """

    def __init__(
        self,
        user_model: UserModel,
        policy: Policy,
        loss: PreferenceLoss,
        alpha: float = 0.5,
        optim: Optim = Optim(),  # noqa: B008 - frozen, hence safe to share
        sampling: Sampling = Sampling(),  # noqa: B008
        cache_reference: bool = True,
        sample_terms: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ConfigurationError(f"model.alpha is {alpha}; the weight of the user's own term lies in [0, 1].")
        # From the CLI these are the components' configurations, from which a checkpoint can be loaded without more.
        # Built in code there are only live modules, which belong in no checkpoint (nor in the copy made here).
        live = [] if _given_hyperparameters.get() else ["user_model", "policy", "loss"]
        self.save_hyperparameters(ignore=live, logger=False)
        self.user_model = user_model
        self.policy = policy
        self.loss = loss
        self.alpha = alpha
        self.optim = optim
        self.sampling = sampling
        self.cache_reference = cache_reference
        self.sample_terms = sample_terms
        self._reference_store: ReferenceStore | None = None
        #: The users that the table has a row for; taken from the data, or from a checkpoint.
        self.vocabulary: UserVocabulary | None = None
        self._built_for: UserVocabulary | None = None
        self._eval_sets: tuple[str, ...] = ()
        self._losses: dict[str, MeanMetric] = {}
        self._metrics: dict[str, PreferenceAccuracy] = {}
        self._names: dict[int, str] = {}
        self._finite = FiniteGuard()
        self._seed: int | None = None

    # ---- set-up

    def setup(self, stage: str) -> None:
        """Take the users from the data, unless a checkpoint has brought its own."""
        use_sealed_files(self.trainer)
        check_strategy(self.trainer.strategy)
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.vocabulary is None:
            if datamodule is None:
                raise ConfigurationError(
                    "The users are not known: pass a PreferenceDataModule to the trainer, or set `module.vocabulary` "
                    "to a UserVocabulary first."
                )
            self.vocabulary = datamodule.vocabulary
        if stage == "fit":
            check_trainer(self.trainer)
        sets = getattr(datamodule, "eval_sets", {})
        self._eval_sets = sets.get("validate" if stage == "fit" else stage, ())
        self._losses = {name: MeanMetric() for name in self._eval_sets}
        terms = ("own", "generic") if self.user_model.personalizes else ("own",)
        self._metrics = {f"{name}_{t}": PreferenceAccuracy() for name in self._eval_sets for t in terms}

    def configure_model(self) -> None:
        """Load the policy and create the user model's parameters, once the users are known."""
        if self.vocabulary is None:
            return
        if self._built_for is not self.vocabulary:
            if self._built_for is None:
                self.policy.build(with_reference=self.loss.requires_reference)
            self.user_model.build(len(self.vocabulary), self.policy.token_embeddings())
            exclude_from_ddp(self, sparse_tables(self.user_model))
            if self._built_for is None:
                shard(self.policy, self._trainer.strategy if self._trainer is not None else None)
            self._built_for = self.vocabulary
        self._check_lengths()

    @torch.no_grad()
    def _check_lengths(self) -> None:
        """Refuse data with rows too long for the policy now, and not in the batch that has the longest one."""
        limit = self.policy.max_positions
        data: Any = getattr(self._trainer, "datamodule", None)
        if limit is None or not hasattr(data, "longest_row") or self.trainer.predicting:
            return
        if data.has_user_text and not self.user_model.uses_text:
            return  # it counts texts that this model leaves out
        anyone = Users(torch.zeros(1, dtype=torch.long, device=self.device))
        vectors = self.user_model.generic(anyone).vectors.shape[1]
        if data.longest_row + vectors > limit:
            raise ConfigurationError(
                f"The longest row has {data.longest_row} tokens (user text, prompt and completion), with the user's "
                f"{vectors} vectors {data.longest_row + vectors}; the policy has {limit} positions. Lower "
                "data.max_prompt_length, data.max_completion_length or data.max_user_text_length, or the user model's "
                "num_tokens."
            )

    def teardown(self, stage: str) -> None:
        """Write out what the reference cache still holds in memory."""
        if self._reference_store is not None:
            self._reference_store.cache.close()
            self._reference_store = None

    def on_fit_start(self) -> None:
        """Give all processes the same user model, of which DDP looks after all but the tables."""
        self._finite.forget()  # what a fit that failed has left
        self._seed = torch.initial_seed() if self._seed is None else self._seed
        if self._ddp is not None or is_sharded(self.policy):
            alone = [*self.user_model.parameters(), *self.user_model.buffers()] if self._ddp is None else []
            for tensor in alone or sparse_tables(self.user_model):
                torch.distributed.broadcast(tensor.data, src=0)

    def on_train_start(self) -> None:
        """Train by the settings of this run, not by those of the checkpoint that it goes on from."""
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        apply_settings(self.optim, self.trainer.optimizers[0], scheduler)

    def on_after_backward(self) -> None:
        """Average the user model's gradients over processes, in the backward pass in which those of the rest are.

        Not later: Lightning's scaler of float16 gradients looks before `on_before_optimizer_step` for those that are
        not finite, and a step that one process skips all must skip.
        """
        ddp = self._ddp
        # DDP averages in the last of the batches that are accumulated, FSDP2 in each.
        if is_sharded(self.policy) or (ddp is not None and ddp.require_backward_grad_sync):
            tables = sparse_tables(self.user_model)
            average_sparse_gradients(tables, _all_gather)
            if ddp is None:
                ids = {id(table) for table in tables}
                dense = [p for p in self.user_model.parameters() if p.requires_grad and id(p) not in ids]
                average_dense_gradients(dense, self._mean_over_processes)

    def _mean_over_processes(self, tensor: Tensor) -> Tensor:
        mean: Tensor = self.trainer.strategy.reduce(tensor, reduce_op="mean")
        return mean

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        total: Tensor = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        return total

    @property
    def _ddp(self) -> DistributedDataParallel | None:
        """Return DDP's wrapper of this module, where several processes train it."""
        model = self.trainer.strategy.model
        return model if self.trainer.world_size > 1 and isinstance(model, DistributedDataParallel) else None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Give the policy, the user model and its tables their own rates, under one schedule by steps."""
        tables = self.user_model.row_tables()
        is_table = {id(table) for table in tables}
        shared = [p for p in self.user_model.parameters() if p.requires_grad and id(p) not in is_table]
        policy = [p for p in self.policy.parameters() if p.requires_grad]
        parts = {"policy": policy, "user_model": shared, "user_tables": tables}
        groups = [
            {"name": name, "params": params, **self.optim.group(name)} for name, params in parts.items() if params
        ]
        optimizer = RowwiseAdamW(groups)
        steps = optimizer_steps(self.trainer)
        name = "constant_with_warmup" if self.optim.schedule == "constant" else self.optim.schedule
        scheduler = get_scheduler(name, optimizer, self.optim.warmup(steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the joint norm of dense and sparse gradients, once it is known to be finite.

        Lightning's own clipping does not know sparse gradients. It calls this before every step, clipping or not, and
        when all processes have the same gradients.
        """
        parts = list(self.policy.parameters()) if is_sharded(self.policy) else []
        ids = {id(param) for param in parts}
        whole = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in ids]
        params = [*whole, *parts]
        norm = gradient_norm(whole, parts, self._sum_over_processes)
        self._stop_unless_finite(norm, params)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            if parts or any(param.grad is not None and param.grad.is_sparse for param in params):
                raise ConfigurationError(
                    "trainer.gradient_clip_algorithm: user tables and sharded policies can be clipped by 'norm' only."
                )
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_gradients(params, gradient_clip_val, norm)

    def _stop_unless_finite(self, norm: Tensor, params: Sequence[nn.Parameter]) -> None:
        """Raise on every process where a loss or a gradient of the coming step is not finite on any of them."""
        trainer = self.trainer
        # A scaler of float16 gradients looks for infinite ones itself, skips their step and scales less: that is its
        # normal way to find the largest scale. The losses are not scaled.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self._finite.is_finite(None if scaled else norm, self._mean_over_processes):
            self._finite.forget()
            return
        # Parts of a sharded policy may be finite here and not elsewhere, and all must do the same.
        intact = torch.full((), float(all_finite(params)), device=self.device)
        if self._mean_over_processes(intact) < 1:
            raise non_finite_error(trainer.global_step, None, self._advice())
        records = self._finite.of_losses()
        if not records and not is_sharded(self.policy):  # one process alone can't compute a sharded policy's gradient
            was_training = self.training
            self.eval()  # so that dropout, and losses that keep a running state, leave the search alone
            with trainer.precision_plugin.train_step_context():
                records = self._finite.of_gradients(lambda batch: self.objective(batch)[0], params)
            self.train(was_training)
        rows = [f"{self._place(record)} (user {user_id!r})" for record, user_id in records]
        if trainer.world_size > 1:
            gathered: list[list[str]] = [[]] * trainer.world_size
            torch.distributed.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        raise non_finite_error(trainer.global_step, rows, self._advice())

    def _place(self, record: int) -> str:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        return str(datamodule.where(record)) if hasattr(datamodule, "where") else f"row {record}"

    def _advice(self) -> list[str]:
        half = "16" in str(self.trainer.precision) and "bf16" not in str(self.trainer.precision)
        half = half or getattr(self.policy, "dtype", None) == "float16"
        return [
            *(["use bfloat16 (trainer.precision, model.policy.dtype), for float16 ends at 65504"] if half else []),
            *([] if self.trainer.gradient_clip_val else ["set trainer.gradient_clip_val: 1.0"]),
            "lower model.optim.lr and model.optim.user_lr, or lengthen model.optim.warmup_steps",
            f"lower model.loss.beta ({self.loss.beta:g})",
        ]

    # ---- objective

    def users(self, user_ids: Sequence[str], user_text: Tokens, reference: bool = False) -> Users:
        """Look up users and embed their texts.

        Args:
            user_ids: B ids; one that the model does not know becomes the generic user.
            user_text: B texts, empty where there is none.
            reference: Embed the texts as the reference policy does.
        """
        if self.vocabulary is None:
            raise ConfigurationError("The users are not known yet: call setup() or load a checkpoint first.")
        rows = self.vocabulary.rows(user_ids).to(user_text.ids.device)
        with_text = self.user_model.uses_text and user_text.ids.shape[1] > 0
        return Users(rows, self.policy.embed(user_text, reference) if with_text else None)

    def reference_log_probs(self, batch: PreferenceBatch) -> PairLogProbs | None:
        """Score a batch's completions under the reference, which never sees who the user is."""
        if not self.loss.requires_reference:
            return None
        if batch.reference is not None:
            return batch.reference
        first, of_pair = self._distinct(batch)
        with torch.no_grad():
            visible = self.user_model.reference(self.users(batch.user_ids, batch.user_text, reference=True))
        visible = visible.select(first) if visible is not None else None
        completions = [part.select(first) for part in self._completions(batch)]
        scored = self.policy.reference_log_probs(batch.prompt.select(first), completions, visible)
        reference = self._pair(scored).select(of_pair)
        if self._reference_store is not None and batch.reference_keys:
            reference = self._reference_store.keep(batch, reference)
        return reference

    def policy_log_probs(self, batch: PreferenceBatch, generic: Sequence[bool]) -> list[PairLogProbs]:
        """Score a batch's completions once for each entry of `generic`, in one pass through the policy.

        Pairs that several users of the batch judged are scored once under the generic user.

        Args:
            batch: B pairs.
            generic: For each result wanted, whether the generic user stands in each user's place.
        """
        users = self.users(batch.user_ids, batch.user_text)
        every = torch.arange(len(batch), device=users.rows.device)
        first, of_pair = self._distinct(batch) if any(generic) else (every, every)
        rows = [first if g else every for g in generic]
        soft_prompt = SoftPrompt.stacked(
            [self.user_model.generic(users).select(first) if g else self.user_model(users) for g in generic]
        )
        index = torch.cat(rows)
        completions = [part.select(index) for part in self._completions(batch)]
        scored = self._pair(self.policy.log_probs(batch.prompt.select(index), completions, soft_prompt))
        ends = torch.tensor([len(r) for r in rows]).cumsum(0).tolist()
        places = [torch.arange(end - len(r), end, device=index.device) for r, end in zip(rows, ends, strict=True)]
        return [scored.select(place[of_pair] if g else place) for place, g in zip(places, generic, strict=True)]

    def _sampled_log_probs(self, batch: PreferenceBatch, generic: Tensor) -> PairLogProbs:
        """Score each pair once: under the generic user where `generic` `[B]` says so, else under its own user."""
        users = self.users(batch.user_ids, batch.user_text)
        order = torch.cat([(~generic).nonzero().flatten(), generic.nonzero().flatten()])
        own, others = (users.select(rows) for rows in order.tensor_split([int((~generic).sum())]))
        soft_prompt = SoftPrompt.stacked([self.user_model(own), self.user_model.generic(others)])
        completions = [part.select(order) for part in self._completions(batch)]
        scored = self._pair(self.policy.log_probs(batch.prompt.select(order), completions, soft_prompt))
        return scored.select(order.argsort())

    def _distinct(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Find the distinct pairs of a batch, whoever judged them.

        Returns:
            The first row of each distinct pair `[U]`, and for each row the number of its pair `[B]`.
        """
        parts = [batch.prompt, *self._completions(batch), *([batch.user_text] if self.user_model.uses_text else [])]
        content = torch.cat([part.ids.masked_fill(~part.mask, -1) for part in parts], dim=1)
        _, of_pair = torch.unique(content, dim=0, return_inverse=True)
        rows = torch.arange(len(batch), device=content.device)
        first = rows.new_full((int(of_pair.max()) + 1,), len(batch)).scatter_reduce(0, of_pair, rows, "amin")
        return first, of_pair

    def _completions(self, batch: PreferenceBatch) -> list[Tokens]:
        return [batch.chosen, batch.rejected] if self.loss.requires_rejected else [batch.chosen]

    @staticmethod
    def _pair(scores: Sequence[LogProbs]) -> PairLogProbs:
        chosen = scores[0]
        rejected = scores[1] if len(scores) > 1 else LogProbs(chosen.tokens[:, :0], chosen.mask[:, :0])
        return PairLogProbs(chosen, rejected)

    def objective(
        self, batch: PreferenceBatch, every_term: bool = False, sampled: bool = False
    ) -> tuple[Tensor, list[Term]]:
        """Compute the alpha-weighted loss of each pair.

        Args:
            batch: B pairs.
            every_term: Compute a term of weight zero as well, for its rewards.
            sampled: Draw one of its two terms for each pair, in proportion to their weights, instead of both.

        Returns:
            The losses `[B]`, and the terms: the user's own and the generic user's. Where the user model does not tell
            users apart the two are one, and it comes once. Terms that were drawn come as one too.
        """
        if sampled and self.user_model.personalizes:
            generic = (torch.rand(len(batch)) >= self.alpha).to(batch.records.device)
            drawn = self._sampled_log_probs(batch, generic)
            reference = self.reference_log_probs(batch)
            output = self.loss(drawn, reference)
            return output.losses, [Term(False, drawn, output, reference)]
        weights = {False: self.alpha, True: 1.0 - self.alpha} if self.user_model.personalizes else {False: 1.0}
        kinds = [generic for generic, weight in weights.items() if weight > 0 or every_term]
        reference = self.reference_log_probs(batch)
        scored = self.policy_log_probs(batch, kinds)
        terms = [
            Term(g, policy, self.loss(policy, reference), reference) for g, policy in zip(kinds, scored, strict=True)
        ]
        # P-DPO, arXiv:2402.05133: mixed pair by pair, before any mean over a batch.
        losses = torch.stack([weights[term.generic] * term.output.losses for term in terms]).sum(0)
        return losses, terms

    # ---- steps

    def on_before_batch_transfer(self, batch: PreferenceBatch, dataloader_idx: int) -> PreferenceBatch:
        """Give a batch its reference log-probs where they are known, while its ids are still in the host's memory."""
        if not (self._caches_reference and len(batch)) or self.trainer.predicting:
            return batch
        if self._reference_store is None:
            identity = self.policy.reference_identity()
            if identity is None:
                return batch
            cache = ReferenceCache(cache_folder() / "reference", {**identity, "precision": str(self.trainer.precision)})
            self._reference_store = ReferenceStore(cache, self.user_model.uses_text)
        return self._reference_store.attach(batch)

    @property
    def _caches_reference(self) -> bool:
        # Where each process holds a part of the model, one that finds all in its cache leaves the others waiting.
        strategy = self.trainer.strategy
        whole = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        return self.cache_reference and self.loss.requires_reference and (self.trainer.world_size == 1 or whole)

    def on_train_epoch_end(self) -> None:
        """Let every process know what the others computed of the reference: the next epoch deals out pairs anew."""
        if self._caches_reference and self.trainer.world_size > 1:
            store = self._reference_store
            if store is not None:
                store.cache.flush()
            self.trainer.strategy.barrier("reference cache")
            if store is not None:
                store.cache.refresh()

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Have chance (dropout, terms drawn) depend on seed, process and batch alone, and not on interruptions."""
        draw = f"{self._seed} {self.global_rank} {self.current_epoch} {batch_idx}"
        torch.manual_seed(_hash(draw))

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch's pairs, weighted so that every pair of an optimiser step counts the same."""
        losses, terms = self.objective(batch, sampled=self.sample_terms)
        self._finite.watch(batch, losses)
        loss = losses.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/chosen_log_probs", terms[0].log_probs.chosen.sum.detach().mean(), batch_size=len(batch))
        if (reference := terms[0].reference) is not None:
            moved = (terms[0].log_probs.chosen.mean.detach() - reference.chosen.mean).mean()
            self.log("train/chosen_log_ratio", moved, batch_size=len(batch))  # a token
        if self.loss.requires_rejected:
            rejected = terms[0].log_probs.rejected.sum.detach().mean()
            self.log("train/rejected_log_probs", rejected, batch_size=len(batch))
            self.log("train/margin", terms[0].margins.mean(), batch_size=len(batch))
            accuracy = (terms[0].margins > 0).float().mean()
            self.log("train/accuracy", accuracy, prog_bar=True, batch_size=len(batch))
        return loss * self._share(len(batch), batch_idx)

    def _share(self, pairs: int, batch_idx: int) -> float:
        """Return a batch's pairs over the mean number in the batches of its optimiser step, over all processes.

        Lightning takes the mean over the batches that are accumulated, and DDP that over processes, whatever their
        sizes. The sampler knows all sizes of the epoch, so no process has to ask the others. A window of accumulation
        that the end of the epoch cuts short is a mean over its own pairs too.
        """
        trainer = self.trainer
        sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
        if not isinstance(sampler, UserGroupedBatchSampler):
            return 1.0  # batches of another data module
        window = trainer.accumulate_grad_batches
        first = batch_idx - batch_idx % window
        step = slice(first, min(first + window, int(trainer.num_training_batches)))
        return pairs * window / sampler.pairs_per_rank(trainer.current_epoch, step)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the seen or unseen users' validation pairs."""
        self._evaluation_step("val", batch, dataloader_idx)

    def test_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the seen or unseen users' test pairs."""
        self._evaluation_step("test", batch, dataloader_idx)

    def _evaluation_step(self, stage: str, batch: PreferenceBatch, dataloader_idx: int) -> None:
        if not len(batch):  # a process without rows of a small set takes part in what follows all the same
            if is_sharded(self.policy):
                self.objective(stand_in(batch), every_term=True)
            return
        name = self._eval_sets[dataloader_idx]
        losses, terms = self.objective(batch, every_term=True)
        self._losses[name].to(losses.device).update(losses)
        if not self.loss.requires_rejected:
            return
        keys = [_user_key(user_id) for user_id in batch.user_ids]
        self._names.update(zip(keys, batch.user_ids, strict=True))
        users = torch.tensor(keys, device=losses.device)
        for term in terms:
            metric = self._metrics[f"{name}_{'generic' if term.generic else 'own'}"].to(users.device)
            metric.update(users, term.output.chosen_rewards, term.output.rejected_rewards)

    def on_validation_epoch_start(self) -> None:
        """Forget the rewards of the last validation."""
        self._reset_metrics()

    def on_test_epoch_start(self) -> None:
        """Forget the rewards of the last test."""
        self._reset_metrics()

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and margin over pairs and over users."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log accuracy and margin over pairs and over users."""
        self._log_metrics("test")

    def _reset_metrics(self) -> None:
        for metric in (*self._losses.values(), *self._metrics.values()):
            metric.reset()

    def _log_metrics(self, stage: str) -> None:
        for name in self._eval_sets:
            # Lightning's own mean over batches and processes is wrong where these hold unequal numbers of pairs.
            values = {"loss": self._losses[name].compute()}
            if self.loss.requires_rejected:
                values |= self._metrics[f"{name}_own"].compute()
            # Without personalisation, and for users who are not known, the generic user is what was just logged.
            if self.loss.requires_rejected and self.user_model.personalizes and name != "unseen":
                values["generic_accuracy"] = self._metrics[f"{name}_generic"].compute()["accuracy"]
            for key, value in values.items():
                # They are gathered already; sync_dist only keeps Lightning from warning that they may not be.
                self.log(f"{stage}/{name}/{key}", value.to(self.device), prog_bar=key == "accuracy", sync_dist=True)

    def user_table(self, name: str) -> list[tuple[str, UserAccuracy]]:
        """Return each user's id and accuracy in the last evaluation of a set, `seen` or `unseen`.

        Where several processes train, all must call it.
        """
        names = dict(self._names)
        if self.trainer.world_size > 1:
            gathered: list[dict[int, str]] = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self._names)
            names = {key: user_id for part in gathered for key, user_id in part.items()}
        return [(names[row.user], row) for row in self._metrics[f"{name}_own"].table()]

    @property
    def eval_sets(self) -> tuple[str, ...]:
        """Names of the sets that the present stage evaluates, in the order of their dataloaders."""
        return self._eval_sets

    # ---- writing

    @torch.no_grad()
    def generate(
        self,
        prompt: Tokens,
        user_ids: Sequence[str],
        user_text: Tokens | None = None,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Write a completion of each prompt for its user.

        Args:
            prompt: B prompts.
            user_ids: B ids; an unknown one gets the generic user.
            user_text: B texts about the users, or None.
            sampling: How to draw; the module's own settings by default.
        """
        nothing = Tokens(prompt.ids[:, :0], prompt.mask[:, :0])
        soft_prompt = self.user_model(self.users(user_ids, user_text if user_text is not None else nothing))
        written = self.policy.generate(prompt, soft_prompt, sampling or self.sampling)
        rows = zip(written.ids.tolist(), written.mask.tolist(), strict=True)
        ids = [[token for token, real in zip(*row, strict=True) if real] for row in rows]
        return [str(text) for text in self.policy.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def predict_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, str]]:
        """Write for each row's user; returns rows of `user_id`, `prompt` and `completion`."""
        if not len(batch):
            if is_sharded(self.policy):
                batch = stand_in(batch)
                self.generate(batch.prompt, batch.user_ids, batch.user_text)
            return []
        completions = self.generate(batch.prompt, batch.user_ids, batch.user_text)
        prompts = self.policy.tokenizer.batch_decode(
            [ids[mask] for ids, mask in zip(batch.prompt.ids, batch.prompt.mask, strict=True)], skip_special_tokens=True
        )
        rows = zip(batch.user_ids, prompts, completions, strict=True)
        return [{"user_id": user, "prompt": prompt, "completion": text} for user, prompt, text in rows]

    # ---- checkpoints

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Rebuild a model, as `LightningModule.load_from_checkpoint` does, from a file that is whole.

        Only an explicit `weights_only=False` lets the file run code.

        Raises:
            DamagedCheckpointError: The file is not what was written.
        """
        if isinstance(checkpoint_path, str | Path) and is_local(checkpoint_path) and Path(checkpoint_path).is_file():
            checkpoint_files.check(Path(checkpoint_path))
        safely = weights_only is not False
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, safely, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained, and the users whose rows it holds; not the frozen backbone."""
        if self._reference_store is not None:
            # A run that goes on from here must find what this one knows: computed anew, in another batch, the
            # reference's log-probs would differ in their last bits.
            self._reference_store.cache.flush()
        kept = self._trained_names()
        checkpoint["state_dict"] = weights = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        tables = self._names_of(self.user_model.row_tables())
        if not weights.keys() >= set(tables):
            tables = []  # frozen, or held by other processes
        new_rows = self.user_model.new_rows([weights[name] for name in tables])
        checkpoint[checkpoint_content.KEY] = checkpoint_content.entry(
            self.vocabulary,
            {name: row.detach().clone() for name, row in zip(tables, new_rows, strict=True)},
            self._names_of(self.user_model.share_tables()),
            torch.initial_seed() if self._seed is None else self._seed,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the checkpoint's users, and size the user model for them."""
        users = checkpoint_content.users_of(checkpoint)
        end_epoch(checkpoint)
        self._seed = checkpoint[checkpoint_content.KEY].get("seed")
        if self.vocabulary is not None and list(self.vocabulary.ids) != list(users.ids):
            new = sum(user_id not in users for user_id in self.vocabulary.ids)
            rank_zero_warn(
                f"The checkpoint knows {len(users) - 1} users, and its rows are kept. {new} of the data's "
                f"{len(self.vocabulary) - 1} training users are not among them and are treated as the generic user."
            )
        if self.vocabulary is None or list(self.vocabulary.ids) != list(users.ids):
            self.vocabulary = users
        self.configure_model()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        """Load what was trained; the frozen backbone is not in a checkpoint and is left as it is.

        Raises:
            ConfigurationError: A trained weight is missing, has another shape, or is not in this model.
        """
        check_shapes(state_dict, super().state_dict(), self._names_of(self.user_model.row_tables()))
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = sorted(self._trained_names() & set(result.missing_keys))
        if strict and (missing or result.unexpected_keys):
            raise ConfigurationError(
                "The checkpoint does not fit this model. Use the user_model, policy and loss that it was trained "
                f"with. Missing: {missing[:5]}; not in the model: {result.unexpected_keys[:5]}."
            )
        return _IncompatibleKeys([], [])

    def _names_of(self, tables: Sequence[Tensor]) -> list[str]:
        """Return the names of some of the parameters, in their order."""
        names = {id(param): name for name, param in self.named_parameters()}
        return [names[id(table)] for table in tables if id(table) in names]

    def _trained_names(self) -> set[str]:
        buffers = {name for name, _ in self.named_buffers() if name.startswith(("user_model.", "loss."))}
        return {plain_name(name) for name, param in self.named_parameters() if param.requires_grad} | buffers


def _all_gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, stacked; Lightning's own way of it prints torch's deprecation warning."""
    gathered = tensor.new_empty(torch.distributed.get_world_size(), *tensor.shape)
    torch.distributed.all_gather(list(gathered.unbind()), tensor)
    return gathered


def _user_key(user_id: str) -> int:
    """Return an int64 that stands for a user on every process and in every run."""
    return _hash(user_id)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
