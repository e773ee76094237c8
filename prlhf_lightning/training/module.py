"""The LightningModule that composes user model, policy and preference loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from prlhf_lightning.data.batching import share_of
from prlhf_lightning.data.tokenization import TokenizationSettings, decode
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import PreferenceLoss
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.policies import Policy, Sampling
from prlhf_lightning.policies.loading import warning_of_other_base
from prlhf_lightning.training import checkpoint_files, checkpointing
from prlhf_lightning.training.checkpoint_entry import KEY, entry_of, users_of
from prlhf_lightning.training.checkpointing import (
    check_names,
    check_shapes,
    is_local,
    names_of,
    trained_names,
    use_checksummed_files,
)
from prlhf_lightning.training.distributed import (
    average_gradients,
    broadcast_parameters,
    ddp_wrapper,
    exclude_from_ddp,
    holds_whole_model,
    sparse_tables,
    sum_over_processes,
)
from prlhf_lightning.training.evaluation import Evaluation, EvaluationHooks
from prlhf_lightning.training.finite import FiniteGuard, check_state, what_to_try
from prlhf_lightning.training.histories import keep_histories
from prlhf_lightning.training.micro_batch import (
    IntervalMeans,
    Share,
    batch_weight,
    is_logged_now,
    seed_randomness,
    sums_to_log,
)
from prlhf_lightning.training.objective import Objective, Term
from prlhf_lightning.training.optim import (
    Optim,
    StepParameters,
    apply_settings,
    clip_gradients,
    make_optimizer,
    make_schedule,
    optimizer_steps,
    training_batches,
)
from prlhf_lightning.training.precision import cast_frozen, check_float16, described, keep_trained_in_float32
from prlhf_lightning.training.reference_store import ReferenceStore, exchange, open_store
from prlhf_lightning.training.resume import StepProgress, end_epoch, go_on
from prlhf_lightning.training.settings_checks import (
    check_feedback,
    check_fit,
    check_row_lengths,
    check_takes_rewards,
)
from prlhf_lightning.training.sharding import check_strategy, dummy_batch, is_sharded, shard
from prlhf_lightning.training.user_start import start_users
from prlhf_lightning.training.warm_start import WarmStart
from prlhf_lightning.types import PreferenceBatch
from prlhf_lightning.user_models import UserModel
from prlhf_lightning.user_models.shapes import shapes_when_built
from prlhf_lightning.utils import lightning_compat
from prlhf_lightning.utils.finite import check_finite
from prlhf_lightning.utils.load_errors import opening
from prlhf_lightning.utils.trust import class_paths, only_trusted_classes

# So that a checkpoint of a module built in code opens with `weights_only=True`.
torch.serialization.add_safe_globals([Optim, Sampling])


class PersonalizedLM(EvaluationHooks, PersonalizedModel, LightningModule):
    """A policy conditioned on users, trained on preference pairs.

    The objective of a pair is `alpha * l(u) + (1 - alpha) * l(u_0)`: the loss under the pair's own user and under
    the generic user in its place (P-DPO and its relatives, arXiv:2402.05133). The two are mixed pair by pair, so the
    weight of a pair does not depend on its batch.

    Args:
        user_model: Maps users to soft-prompt vectors.
        policy: The language model, conditioned on the vectors.
        loss: The preference loss of both terms.
        alpha: Weight of the user's own term, in [0, 1]; the generic user's has 1 - alpha.
        optim: Learning rates and schedule.
        sampling: Sampling settings of `predict`.
        cache_reference: Cache the reference's log-probs on disk (in `$PRLHF_CACHE` or `~/.cache/prlhf_lightning`), so
                    that each completion is scored once for all epochs, evaluations and runs with the same policy.
                    Ignored for sharded models (FSDP), where all processes must compute together.
        sample_terms: In training, compute one of a pair's two terms, sampled in proportion to their weights, instead of
                    both: half the work of the policy. The gradient is unbiased; sampling adds
            `alpha * (1 - alpha) * |g(u) - g(u_0)|^2` to the variance of a pair's gradient g.
    """

    #: Arguments that are modules or hold some: in checkpoints only as configurations.
    components: ClassVar[Sequence[str]] = ("user_model", "policy", "loss")

    reference_store: ReferenceStore | None
    device = LightningModule.device  # Lightning updates it, also for sharded weights

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
        super().__init__(user_model, policy, loss)
        if not 0.0 <= alpha <= 1.0:
            raise ConfigurationError(f"model.alpha is {alpha}; the weight of the user's own term must be in [0, 1].")
        check_takes_rewards(policy, loss)
        # From the CLI these are the components' configurations, which are enough to load a checkpoint. Built in code,
        # they are live modules, which must not be in a checkpoint (nor in the copy made here).
        live = [] if lightning_compat.is_built_from_config() else list(self.components)
        self.save_hyperparameters(ignore=live, logger=False)
        self.alpha = alpha
        self.optim = optim
        self.sampling = sampling
        self.cache_reference = cache_reference
        self.sample_terms = sample_terms
        self._has_asked_for_store = False
        self._built_for: UserVocabulary | None = None
        self._width = 0  # of the policy's embeddings, once it is built
        self._expected: Mapping[str, Tensor] = {}  # weights of a checkpoint that is being loaded
        self._warm_start: WarmStart | None = None
        self._started_from: dict[str, str] | None = None  # stored in checkpoints, to identify runs with the same start
        self._evaluation = Evaluation((), user_model.personalizes, loss.feedback)
        self._finite = FiniteGuard()
        self._means = IntervalMeans()
        self._progress = StepProgress()
        self._kept_means: dict[str, Tensor] = {}  # of the resumed checkpoint
        self._saves_alone = False
        self._seed: int | None = None
        self._has_started = False  # whether weights are those of a fit or a checkpoint, and not of `build`
        self._id_key: str | None = None  # fingerprint, see `id_key_of`; stored in checkpoints
        self._rendering: dict[str, Any] = {}  # tokenization settings, as stored in checkpoints

    # ---- set-up

    def start_from(self, checkpoint: str | Path) -> None:
        """Start the next fit from the weights and users of an earlier training, with a new optimizer.

        The users of the checkpoint keep their rows, with or without votes in the new data. New users get the row of a
        new user, usually the generic user's. The reference is that of the earlier training: the base model, which is
        the policy with its adapters off, or, with all weights trained, as it was loaded. In contrast, `trainer.fit(...,
        ckpt_path=...)` resumes the same training, with its optimizer and its data.

        Args:
            checkpoint: A file that `fit` wrote, the folder of its run (for the newest checkpoint in it), or a folder
                            that `export` wrote. If the folder holds a merged model, that must be the policy's base
                            model, and becomes the reference.

        Raises:
            ConfigurationError: There is no such checkpoint, or it has another base model, other adapters, or another
                user model.
        """
        if self.vocabulary is not None:
            raise ConfigurationError(
                "start_from: this module has users of a checkpoint or an earlier fit; make a new PersonalizedLM."
            )
        with opening(f"init_from: {checkpoint}", "Use a checkpoint that `fit` wrote, or what `export` wrote."):
            warm_start = WarmStart.read(checkpoint)
            warm_start.check(self.policy, self.user_model)
        self._warm_start, self._started_from = warm_start, dict(warm_start.origin)

    def setup(self, stage: str) -> None:
        """Set the users from the data, unless a checkpoint has set them."""
        use_checksummed_files(self.trainer)
        check_strategy(self.trainer.strategy)
        keep_trained_in_float32(self.trainer)
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.vocabulary is None:
            if datamodule is None:
                raise ConfigurationError(
                    "The users are not known: pass a PreferenceDataModule to the trainer, or set `module.vocabulary` "
                    "to a UserVocabulary first."
                )
            self.vocabulary = datamodule.vocabulary
            if self._warm_start is not None:
                self.vocabulary = self._warm_start.users_with(datamodule.vocabulary)
        self._check_data(datamodule)
        if stage == "fit":
            check_fit(self.trainer, self.user_model, self.loss, self.vocabulary)
            self._render_as(checkpointing.rendering_of(datamodule))
            self._id_key = checkpointing.id_key_of(datamodule)
            if self._warm_start is not None:
                self._warm_start.check_id_key(self._id_key)
                self._warm_start.check_rendering(self._rendering)
        sets = getattr(datamodule, "eval_sets", {})
        evaluated = sets.get("validate" if stage == "fit" else stage, ())
        self._evaluation = Evaluation(evaluated, self.user_model.personalizes, self.loss.feedback)

    def _check_data(self, datamodule: Any) -> None:
        """Refuse data that cannot be trained on."""
        check_feedback(self.loss, getattr(datamodule, "feedback", self.loss.feedback))

    def configure_model(self) -> None:
        """Load the policy and create the user model's parameters."""
        if self.vocabulary is None:
            return
        trainer = lightning_compat.trainer_of(self)
        if self._built_for is not self.vocabulary:
            if self._built_for is None:
                # Histories use the embeddings of the reference, which training does not change.
                self.policy.build(self.loss.requires_reference or self.user_model.history_size > 0)
            embeddings = self.policy.token_embeddings()
            self._width = embeddings.shape[-1]
            if self._expected:
                num_rows = len(self.vocabulary)
                shapes = shapes_when_built(self.user_model, num_rows, embeddings)
                shapes = {f"user_model.{name}": shape for name, shape in shapes.items()}
                check_shapes(self._expected, shapes, [n for n, shape in shapes.items() if shape[:1] == (num_rows,)])
            self.user_model.build(len(self.vocabulary), embeddings)
            if self._built_for is None and self._warm_start is not None:  # once: a checkpoint may be loaded over it
                with opening("init_from: the earlier training", "Use a checkpoint that `fit` wrote."):
                    self._warm_start.load_into(self, self.user_model, self.vocabulary)
                self._warm_start.warn_of_other_base(self.policy)
                self._warm_start = None
            exclude_from_ddp(self, sparse_tables(self.user_model))
            if self._built_for is None:
                cast_frozen(self.policy, trainer)
                shard(self.policy, trainer.strategy if trainer is not None else None)
            self._built_for = self.vocabulary
        if not is_sharded(self.policy):  # built in code, or for another trainer
            cast_frozen(self.policy, trainer)
        check_row_lengths(trainer, self.policy, self.user_model)

    def teardown(self, stage: str) -> None:
        """Write the reference cache's buffer to disk."""
        if self.reference_store is not None:
            self.reference_store.cache.close()
            self.reference_store = None
        self._has_asked_for_store = False

    def on_fit_start(self) -> None:
        """Broadcast the user model to all processes and make DDP ignore its tables."""
        check_float16(self.policy, self.trainer)
        self._finite.forget()  # state of a failed fit
        self._seed = torch.initial_seed() if self._seed is None else self._seed
        for note in self.policy.training_notes():
            rank_zero_info(note)
        if getattr(self.policy, "torch_compile", False):
            rank_zero_info("policy.torch_compile is true: the first steps compile the model, which takes minutes.")
        if self.vocabulary is not None:
            is_fresh = not self._has_started and self._started_from is None and not self.trainer.ckpt_path
            start_users(self, self.vocabulary, self._datamodule, is_fresh, self._started_from is not None)
            self._has_started = True
        ddp = ddp_wrapper(self.trainer)
        if ddp is not None or is_sharded(self.policy):
            broadcast_parameters(self.user_model, alone=ddp is None)
        if self.user_model.history_size and self.vocabulary is not None:
            keep_histories(self.user_model, self.policy, self.vocabulary, self.trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        """Apply the optimizer settings of this run in place of those of the resumed checkpoint."""
        self._means.reset({name: sums.to(self.device) for name, sums in self._kept_means.items()})
        self._kept_means, self._saves_alone = {}, False
        self._progress.begin(self.trainer, self._running_state(), self._means.sums)
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        apply_settings(self.optim, self.trainer.optimizers[0], scheduler)

    def on_train_end(self) -> None:
        """Check that the weights are finite after the last step, even if nothing saves them."""
        self._check_state()

    def on_validation_start(self) -> None:
        """In a fit, check that the weights are finite before files and the best checkpoint depend on them."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._check_state()

    def _check_state(self) -> None:
        check_state(
            self,
            what_to_try(self.trainer, self.policy, self.loss),
            names_of(self, self.user_model.row_tables()),
            self.vocabulary.ids if self.vocabulary is not None else (),
            together=is_sharded(self.policy),
        )

    def on_after_backward(self) -> None:
        """Average the user model's gradients over processes, in the same backward pass as the other gradients.

        Not later: Lightning's float16 gradient scaler looks for non-finite gradients before `on_before_optimizer_step`,
        and all processes must skip the same steps.
        """
        ddp = ddp_wrapper(self.trainer)
        # DDP averages in the last accumulated batch, FSDP2 in each.
        if is_sharded(self.policy) or (ddp is not None and ddp.require_backward_grad_sync):
            average_gradients(self.user_model, ddp is None, self.trainer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return one optimizer with separate rates for the policy, the user model and its tables, and its schedule."""
        all_weights = getattr(self.policy, "lora", None) is None
        given = self.optim
        self.optim = given.for_width(self._width, all_weights, self.user_model.history_size > 0)
        if self.optim != given:
            rank_zero_info(
                f"Learning rates: model.optim.lr {self.optim.lr:.2g}, model.optim.user_lr {self.optim.user_lr:.2g} "
                f"(defaults depend on the model's width, {self._width})"
            )
        optimizer = make_optimizer(self.optim, self.policy, self.user_model)
        scheduler = make_schedule(self.optim, optimizer, optimizer_steps(self.trainer, self.steps_per_batch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take a step and record it as complete: a checkpoint saved before the next step resumes here."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._progress.step_taken(epoch, batch_idx, self._running_state(), self._means.sums)

    def _running_state(self) -> dict[str, Tensor]:
        """Return what batches change before their step, by its names in checkpoints: the state of the loss."""
        return {f"loss.{name}": value for name, value in self.loss.named_buffers()}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the joint norm of dense and sparse gradients, after checking that it is finite.

        Lightning's own clipping does not support sparse gradients. Lightning calls this before every step, with
        clipping or without, when all processes have the same gradients.
        """
        moved = StepParameters.of(optimizer, self.policy)
        norm = moved.norm(self.trainer, self.device)
        if not self._finite.may_step(norm, self.trainer):
            # One process alone cannot compute a sharded policy's gradient.
            losses_of = None if is_sharded(self.policy) else lambda batch: self.objective(batch)[0]
            advice = what_to_try(self.trainer, self.policy, self.loss)
            raise self._finite.error(self, moved.all, losses_of, advice)
        self.log("train/grad_norm", norm)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            moved.refuse_clipping_by_value()
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_gradients(moved.all, gradient_clip_val, norm)

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that a batch takes, if it takes any: batches may be accumulated."""
        return 1

    # ---- objective

    def objective(
        self, batch: PreferenceBatch, every_term: bool = False, sampled: bool = False
    ) -> tuple[Tensor, list[Term]]:
        """Compute the alpha-weighted loss of each pair.

        Args:
            batch: B pairs.
            every_term: Also compute a term of weight zero, for its rewards.
            sampled: For each pair, compute one of its two terms, sampled in proportion to their weights.

        Returns:
            The losses `[B]`, and the terms: the user's own and the generic user's. If the user model does not
            distinguish users there is only one term; sampled terms are one term, too.
        """
        return Objective(self, self.alpha).compute(batch, every_term, sampled)

    # ---- steps

    def on_before_batch_transfer(self, batch: PreferenceBatch, dataloader_idx: int) -> PreferenceBatch:
        """Add cached reference log-probs to a batch while its ids are still in host memory."""
        if not (self._caches_reference and len(batch)) or self.trainer.predicting:
            return batch
        if self.reference_store is None and not self._has_asked_for_store:
            self._has_asked_for_store = True
            self.reference_store = open_store(self.policy, self.user_model.uses_text, described(self.trainer))
        return batch if self.reference_store is None else self.reference_store.attach(batch)

    @property
    def _caches_reference(self) -> bool:
        return self.cache_reference and self.loss.requires_reference and holds_whole_model(self.trainer)

    def on_train_epoch_end(self) -> None:
        """Share computed reference log-probs between processes: the next epoch distributes pairs differently."""
        if self._caches_reference and self.trainer.world_size > 1:
            exchange(self.reference_store, self.trainer)

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Seed randomness (dropout, sampled terms) from seed, process and batch."""
        seed_randomness(self._seed, self.trainer, batch_idx)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch's pairs, weighted so that every pair of an optimizer step counts the same."""
        losses, terms = self.objective(batch, sampled=self.sample_terms)
        self._finite.watch(batch, losses)
        sums = sums_to_log(losses, terms[0], self.loss.feedback, self.policy.writes)
        self._log_means(sums, ("loss", "accuracy"), len(batch))
        return losses.mean() * batch_weight(self.trainer, len(batch), batch_idx)

    def _log_means(self, shares: Mapping[str, Share], shown: Collection[str], batch_size: int) -> None:
        """Add the sums of a batch, and log means over the interval; `shown` are in the progress bar."""
        self._means.add(shares)
        is_logged = is_logged_now(self.trainer)
        for name, value in self._means.means(self.trainer if is_logged else None).items():
            self.log(f"train/{name}", value, prog_bar=name in shown, batch_size=batch_size)
        if is_logged:
            self._means.reset()

    def _evaluation_step(self, batch: PreferenceBatch, dataloader_idx: int) -> None:
        if not len(batch):  # a process without rows of a small set still takes part in the sums
            if is_sharded(self.policy):
                self.objective(dummy_batch(batch), every_term=True)
            return
        losses, terms = self.objective(batch, every_term=True)
        self._evaluation.update(self.eval_sets[dataloader_idx], batch.user_ids, losses, terms)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and margin over pairs and over users."""
        super().on_validation_epoch_end()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._progress.validated(self.trainer)

    def margins(self, name: str) -> Tensor | None:
        """Return the margins of all pairs in the last evaluation of a set, `[2, N]`; see `Evaluation.margins`."""
        return self._evaluation.margins(name)

    # ---- generation

    def predict_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, str]]:
        """Generate for each row's user; returns rows of `user_id`, `prompt` and `completion`."""
        if not len(batch):
            if is_sharded(self.policy):
                batch = dummy_batch(batch)
                self.generate(batch.prompt, batch.user_ids, batch.user_text)
            return []
        completions = self.generate(batch.prompt, batch.user_ids, batch.user_text)
        prompts = [decode(self.policy.tokenizer, row.tolist()) for row in batch.prompt.unpadded()]
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
        trust_remote_code: bool = False,
        trust_classes: Collection[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return a model from a checkpoint, like `LightningModule.load_from_checkpoint`, after verifying the file.

        Args:
            checkpoint_path: See Lightning, also for the next arguments.
            map_location: Device of the weights.
            hparams_file: Settings that replace the checkpoint's.
            strict: Refuse weights that do not fit.
            weights_only: Only an explicit False lets the file run code.
            trust_remote_code: Run code that comes with the base model, if the checkpoint's settings also allow it.
            trust_classes: Dotted paths of classes outside this package that the checkpoint may name; they are imported.
                            Classes that are already imported need not be listed.
            kwargs: Arguments of the model that replace the checkpoint's.

        Raises:
            ConfigurationError: The checkpoint names other classes.
            DamagedCheckpointError: The file is damaged.
        """
        if isinstance(checkpoint_path, str | Path) and is_local(checkpoint_path) and Path(checkpoint_path).is_file():
            checkpoint_files.check(Path(checkpoint_path))
        safely = weights_only is not False
        named = {*(trust_classes or ()), *class_paths(kwargs)}
        with only_trusted_classes(f"The checkpoint {checkpoint_path}", named, trust_remote_code):
            return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, safely, **kwargs)

    @classmethod
    def from_content(
        cls,
        content: Mapping[str, Any],
        trust_remote_code: bool = False,
        trust_classes: Collection[str] | None = None,
        source: str = "The checkpoint",
    ) -> Self:
        """Return a model on the CPU, like `load_from_checkpoint`, from the content of a checkpoint.

        Of memory-mapped tensors (`checkpoint_files.load` with `mmap`) only the weights are read, not the optimizer
        state, which may be larger.

        Args:
            content: Content of a checkpoint; it is not changed.
            trust_remote_code: Run code that comes with the base model. The checkpoint's own value is ignored, since its
                            author could otherwise run any code.
            trust_classes: As for `load_from_checkpoint`.
            source: Name of the checkpoint, for messages.

        Raises:
            ConfigurationError: The checkpoint names other classes.
        """
        needed = {name: content[name] for name in ("state_dict", KEY) if name in content}
        parts = copy.deepcopy(content.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        arguments = (parts.get("policy") or {}).get("init_args") or {}
        if trust_remote_code or "trust_remote_code" in arguments:
            arguments["trust_remote_code"] = trust_remote_code
        with only_trusted_classes(source, trust_classes, trust_remote_code, parts):
            return lightning_compat.load_from_content(cls, {**needed, cls.CHECKPOINT_HYPER_PARAMS_KEY: parts})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store trained weights and the users of the rows; not the frozen backbone.

        Raises:
            NonFiniteError: Trained state is infinite or NaN.
        """
        trainer = lightning_compat.trainer_of(self)
        if trainer is not None:
            self._check_state()
        if self.reference_store is not None:
            # A resumed run must find the reference's log-probs of this one: recomputed in another batch, they would
            # differ in their last bits.
            self.reference_store.cache.flush()
        seed = torch.initial_seed() if self._seed is None else self._seed
        checkpointing.fill(checkpoint, self, self.user_model, self.vocabulary, seed, self._rendering)
        checkpoint[KEY]["base"] = checkpointing.base_of(self.policy)
        for name, value in (("started_from", self._started_from), ("id_key", self._id_key)):
            if value is not None:
                checkpoint[KEY][name] = value
        if (place := self._progress.entry(trainer) if trainer is not None else None) is not None:
            checkpoint[KEY]["place"] = place
            state = self._progress.state
            checkpoint["state_dict"].update({k: v for k, v in state.items() if k in checkpoint["state_dict"]})
            checkpoint[KEY]["means"] = self._interval_so_far()
            if hasattr(datamodule := self._datamodule, "order_record"):
                checkpoint[KEY]["order"] = datamodule.order_record(*self._sharing)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the checkpoint's users, and size the user model for them.

        Raises:
            NonFiniteError: Its weights are infinite or NaN.
        """
        kept, users = entry_of(checkpoint), users_of(checkpoint)
        source, is_fitted = "The checkpoint", False
        if (trainer := lightning_compat.trainer_of(self)) is not None:
            source = str(trainer.ckpt_path or source)
            is_fitted = trainer.state.fn == TrainerFn.FITTING
        check_finite(checkpoint, source, with_optimizer=is_fitted)
        self._seed, self._started_from = kept.get("seed"), kept.get("started_from")
        self._has_started = True
        self._take_rendering(kept.get("tokenization") or {})
        checkpointing.warn_of_other_id_key("The checkpoint", kept.get("id_key"), self._data_id_key)
        self._id_key = kept.get("id_key")
        if is_fitted:
            self._go_on(checkpoint, kept)
        if self.vocabulary != users:
            if self.vocabulary is not None:
                checkpointing.warn_of_other_users(users, self.vocabulary)
            self.vocabulary = users
        self._expected = checkpoint["state_dict"]
        try:
            self.configure_model()
        finally:
            self._expected = {}
        name = str(getattr(self.policy, "name", ""))
        if warning := warning_of_other_base(kept.get("base"), checkpointing.base_of(self.policy), name):
            rank_zero_warn(warning)

    def _take_rendering(self, kept: dict[str, Any]) -> None:
        """Set the checkpoint's rendering of text for data and generation; warn if the data module's settings differ."""
        data: Any = getattr(lightning_compat.trainer_of(self), "datamodule", None)
        if kept.get("chat_template_date") and hasattr(data, "use_template_date"):
            data.use_template_date(kept["chat_template_date"])
        now = checkpointing.rendering_of(data)
        checkpointing.warn_of_other_rendering("The checkpoint", kept, now)
        self._render_as(now if self._rendering and now else kept)

    def _render_as(self, kept: dict[str, Any]) -> None:
        self._rendering, self.tokenization = kept, TokenizationSettings.from_kept(kept)

    def _interval_so_far(self) -> dict[str, Tensor]:
        """Return the sums for the next logged means, over all processes unless this one saves alone."""
        means = self._progress.means
        if not means or self.trainer.world_size == 1 or self._saves_alone:
            return means
        return dict(zip(means, sum_over_processes(self.trainer, torch.stack(list(means.values()))), strict=True))

    def before_lone_save(self) -> None:
        """Make the next checkpoint without the other processes, which may be at another point."""
        self._saves_alone = True

    def log_last_step(self) -> None:
        """Log the values of the last complete step if training was interrupted before they were logged."""
        if not self._progress.is_logged(self.trainer):
            lightning_compat.log_training_step(self.trainer)

    def validate_again(self) -> None:
        """Make a run that resumes from a checkpoint saved before the next batch repeat the last validation.

        For checkpoints of an interrupted run: results of the validation, such as the best checkpoint, may be missing.
        """
        self._progress.validate_again()

    def _go_on(self, checkpoint: dict[str, Any], kept: Mapping[str, Any]) -> None:
        """Resume a fit at the checkpoint's position, with the remaining rows of the epoch."""
        place = kept.get("place")
        if place is None or "loops" not in checkpoint:
            end_epoch(checkpoint)
            return
        batch, batches = place["batch"], place["batches"]
        datamodule, (world_size, accumulate) = self._datamodule, self._sharing
        if hasattr(datamodule, "go_on"):
            batches = training_batches(self.trainer)
            if "order" in kept:
                left = batch if batch < place["batches"] else 0
                after = datamodule.go_on(kept["order"], place["epoch"], left, world_size, accumulate)
                batch = after if left else batch
        go_on(checkpoint, place, batch, batches, accumulate)
        current = checkpoint["loops"]["fit_loop"]
        self._progress.enter(
            current["epoch_progress"]["current"]["processed"],
            current["epoch_loop.batch_progress"]["current"]["processed"],
            place.get("validations", 0),
        )
        # They are sums over all processes: only the first one restores them.
        means: dict[str, Tensor] = dict(kept.get("means", {}))
        self._kept_means = means if self.trainer.is_global_zero else {k: sums * 0 for k, sums in means.items()}

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    @property
    def _data_id_key(self) -> str | None:
        return checkpointing.id_key_of(getattr(lightning_compat.trainer_of(self), "datamodule", None))

    @property
    def _sharing(self) -> tuple[int, int]:
        """Number of processes that share the data, and batches of each in an optimizer step."""
        return share_of(self.trainer)[1], self.trainer.accumulate_grad_batches

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        """Load trained weights; the frozen backbone is not in a checkpoint and does not change.

        Raises:
            ConfigurationError: A trained weight is missing, has another shape, or is not in this model.
        """
        shapes = {name: weight.shape for name, weight in super().state_dict().items()}
        check_shapes(state_dict, shapes, names_of(self, self.user_model.row_tables()))
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        if strict:
            check_names(trained_names(self) & set(result.missing_keys), result.unexpected_keys)
        return _IncompatibleKeys([], [])
