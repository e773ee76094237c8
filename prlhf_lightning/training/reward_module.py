"""The LightningModule of personalized reward models."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from prlhf_lightning.data.tokenization import TokenizationSettings
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import BradleyTerryLoss, MarginLoss
from prlhf_lightning.rewards import (
    FeatureMap,
    JudgedPairs,
    RewardBackbone,
    RewardModel,
    TextFeatures,
    choose_precision,
    fit_head,
)
from prlhf_lightning.rewards.fitting import GENERIC_PRECISION, PRECISIONS, IndexedPairs, steps_in_all
from prlhf_lightning.training import checkpoint_files, checkpointing
from prlhf_lightning.training.checkpoint_entry import KEY, entry_of, users_of
from prlhf_lightning.training.checkpointing import check_names, is_local, trained_names, use_checksummed_files
from prlhf_lightning.training.evaluation import Evaluation, EvaluationHooks
from prlhf_lightning.training.feature_store import open_feature_store
from prlhf_lightning.training.optim import RowwiseAdamW
from prlhf_lightning.training.reward_data import RewardDataModule
from prlhf_lightning.types import LossOutput
from prlhf_lightning.user_models import LowRankUserModel, UniformUserModel, UserModel
from prlhf_lightning.utils import lightning_compat
from prlhf_lightning.utils.finite import check_finite
from prlhf_lightning.utils.progress import progress_bars
from prlhf_lightning.utils.trust import class_paths, only_trusted_classes

_BATCH = 512  # pairs in a step of gradient descent
_SAMPLE = 64  # texts whose features give the scale at which heads start
_SCALE = 0.1


@dataclass(frozen=True)
class RewardTerm:
    """The pairs of a batch under their own users or under the generic user.

    Attributes:
        generic: Whether the generic user replaced each user.
        output: Losses and rewards of the pairs.
    """

    generic: bool
    output: LossOutput


class PersonalizedRewardModel(EvaluationHooks, RewardModel, LightningModule):
    """A reward model with a head for each user, trained on preference pairs.

    The loss of a pair is `alpha * l(r(c, u) - r(r, u)) + (1 - alpha) * l(r(c, u_0) - r(r, u_0))`: a margin loss under
    the pair's own user and under the generic user in its place, as in P-DPO (arXiv:2402.05133).

    The backbone is frozen. All pairs are one batch, so an epoch is a whole fit. `LowRankUserModel` and
    `UniformUserModel` with the likelihood `BradleyTerryLoss()` are fitted by variational expectation-maximization (see
    `rewards.fitting`), which needs no learning rate. Other user models and losses are trained by AdamW.

    Args:
        user_model: Maps users to heads; with `num_tokens: 1`.
        backbone: Maps texts to vectors.
        loss: The loss of a margin.
        alpha: Weight of the user's own term, in [0, 1]; the generic user's has 1 - alpha.
        precision: Precision of the Gaussian prior of the directions in which users differ (with AdamW: of the
            differences between a user's head and the generic one). By default the fit chooses it by the likelihood of
            held-out judgments; with AdamW it is then 100.
        lr: Learning rate of AdamW.
        steps: Steps of AdamW, of 512 pairs each.
        cache_features: Keep the backbone's vectors of texts on disk (in `$PRLHF_CACHE` or
            `~/.cache/prlhf_lightning`), so that each text is embedded once for all runs.
    """

    device = LightningModule.device

    def __init__(
        self,
        user_model: UserModel,
        backbone: RewardBackbone,
        loss: MarginLoss | None = None,
        alpha: float = 0.8,
        precision: float | None = None,
        lr: float = 1e-2,
        steps: int = 1000,
        cache_features: bool = True,
    ) -> None:
        super().__init__(user_model, backbone)
        if not 0.0 <= alpha <= 1.0:
            raise ConfigurationError(f"model.alpha is {alpha}; the weight of the user's own term must be in [0, 1].")
        for name, value in (("precision", precision), ("lr", lr), ("steps", steps)):
            if value is not None and not value > 0:
                raise ConfigurationError(f"model.{name} is {value}; it must be above 0.")
        live = [] if lightning_compat.is_built_from_config() else ["user_model", "backbone", "loss"]
        self.save_hyperparameters(ignore=live, logger=False)
        self.automatic_optimization = False
        if getattr(loss, "center_rewards_coefficient", 0):
            raise ConfigurationError(
                "model.loss: center_rewards_coefficient has no effect with model.backbone, where every user's mean "
                "reward is about 0 already; leave it out."
            )
        self.loss: MarginLoss = BradleyTerryLoss() if loss is None else loss
        self.alpha, self.precision, self.lr, self.steps = alpha, precision, lr, steps
        self.cache_features = cache_features
        self._seed: int | None = None
        self._rendering: dict[str, Any] = {}
        self._id_key: str | None = None  # of the data
        self._evaluation = Evaluation((), user_model.personalizes, "pairs")

    # ---- set-up

    def setup(self, stage: str) -> None:
        """Load the backbone; for a fit, embed the training texts and create the heads."""
        use_checksummed_files(self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, RewardDataModule):
            raise ConfigurationError("A PersonalizedRewardModel takes a RewardDataModule: pass one to the trainer.")
        self._build_backbone()
        self.backbone.to(self.trainer.strategy.root_device)  # before Lightning moves the module there, to embed texts
        id_key = checkpointing.id_key_of(data)
        if stage != "fit":
            checkpointing.warn_of_other_id_key("The model", self._id_key, id_key)
        self._id_key = id_key
        sets = data.eval_sets["validate" if stage == "fit" else cast(Any, stage)]
        self._evaluation = Evaluation(sets, self.user_model.personalizes, "pairs")
        if stage == "fit":
            self.vocabulary = data.vocabulary
            self._rendering = checkpointing.rendering_of(data)
            self._seed = torch.initial_seed()
            pairs = data.training_pairs()
            self.features = FeatureMap.fit(self.vectors(pairs.texts), pairs)
            self._build_heads(self.features_of(pairs.texts))

    def _build_backbone(self) -> None:
        if not hasattr(self.backbone, "model"):
            self.backbone.build()
        if self.cache_features and self.store is None:
            self.store = open_feature_store(self.backbone)

    def _build_heads(self, features: TextFeatures) -> None:
        sample = torch.linspace(0, len(features.vectors) - 1, min(_SAMPLE, len(features.vectors))).long()
        self.user_model.build(len(self._users()), _SCALE * features.dense(sample.to(features.vectors.device)))

    def _users(self) -> UserVocabulary:
        assert self.vocabulary is not None  # for the type checker: setup or a checkpoint has set it
        return self.vocabulary

    def configure_optimizers(self) -> RowwiseAdamW:
        """Return AdamW for the heads."""
        return RowwiseAdamW(self.user_model.parameters(), lr=self.lr, weight_decay=0.0)

    # ---- steps

    @property
    def has_likelihood(self) -> bool:
        """Whether differences of rewards are log-odds of the choices."""
        return isinstance(self.loss, BradleyTerryLoss) and self.loss.is_likelihood

    @property
    def has_closed_form(self) -> bool:
        """Whether heads are fitted by variational expectation-maximization."""
        return self.has_likelihood and isinstance(self.user_model, LowRankUserModel | UniformUserModel)

    def training_step(self, pairs: JudgedPairs, batch_idx: int) -> None:
        """Fit the heads to all pairs."""
        features = self.features_of(pairs.texts)
        indexed = self._indexed(pairs)
        self._fit(features, indexed) if self.has_closed_form else self._descend(features, indexed)
        losses, terms = self._judge(features, indexed)
        self.log("train/loss", (indexed.weights * losses).sum() / indexed.weights.sum(), batch_size=len(pairs))
        margins = terms[0].output.chosen_rewards - terms[0].output.rejected_rewards
        self.log("train/accuracy", (margins > 0).float().mean(), prog_bar=True, batch_size=len(pairs))
        self.log("train/margin", margins.mean(), batch_size=len(pairs))

    def _indexed(self, pairs: JudgedPairs) -> IndexedPairs:
        rows = self.rows_of(pairs.user_ids).to(self.device)
        return IndexedPairs.weighted(
            rows, pairs.chosen.to(self.device), pairs.rejected.to(self.device), pairs.threshold
        )

    def _fit(self, features: TextFeatures, pairs: IndexedPairs) -> None:
        rank = self.user_model.rank if isinstance(self.user_model, LowRankUserModel) else 0
        seed = (self._seed or 0) % (1 << 31)
        precision = self.precision or (None if rank else PRECISIONS[0])  # without directions it has no effect
        with progress_bars() as progress:
            task = progress.add_task("Fitting heads", total=steps_in_all(precision is None))

            def report(step: int) -> None:
                progress.advance(task)

            if precision is None:
                precision = choose_precision(features, pairs, len(self._users()), rank, self.alpha, seed, report=report)
                rank_zero_info(f"model.precision: {precision:g} of {PRECISIONS} predicts held-out judgments best")
            head = fit_head(features, pairs, len(self._users()), rank, precision, self.alpha, seed, report=report)
        self._count_step()
        with torch.no_grad():
            if isinstance(self.user_model, LowRankUserModel):
                self.user_model.generic_prompt.copy_(head.weights[:, :1].T)
                self.user_model.basis.copy_(head.weights[:, 1:].T)
                self.user_model.codes.weight.copy_(head.codes)
            else:
                cast(UniformUserModel, self.user_model).prompt.copy_(head.weights.T)

    def _count_step(self) -> None:
        """Tell Lightning of a step, without which it would save no checkpoint."""
        self._optimizer.zero_grad()
        self._optimizer.step()  # without gradients: nothing moves

    @property
    def _optimizer(self) -> Any:
        return self.optimizers()

    def _descend(self, features: TextFeatures, pairs: IndexedPairs) -> None:
        """Train the heads by AdamW on batches of pairs, with a Gaussian prior on them."""
        counts = torch.bincount(pairs.users, minlength=len(self._users())).float()
        precision = self.precision or PRECISIONS[1]
        with progress_bars() as progress:
            for part in progress.track([*self._batches(len(pairs))], description="Training heads"):
                batch = pairs.part(part)
                differences = features.dense(batch.chosen) - features.dense(batch.rejected)
                own, generic = (self.heads(batch.users, g) for g in (False, True))
                losses = self._mixed(*((head * differences).sum(1) for head in (own, generic)))
                # Summed over all pairs, the negative log of `o_u ~ N(0, I / precision)` and of the prior of w_0.
                prior = precision * (own - generic).square().sum(1) / (2 * counts[batch.users])
                prior = prior + GENERIC_PRECISION * generic.square().sum(1) / (2 * len(pairs))
                self._optimizer.zero_grad()
                self.manual_backward((batch.weights * losses + prior).mean())
                self._optimizer.step()

    def _batches(self, count: int) -> Iterator[Tensor]:
        left = self.steps
        while left:
            for part in torch.split(torch.randperm(count, device=self.device), _BATCH)[:left]:
                left -= 1
                yield part

    def _mixed(self, own: Tensor, generic: Tensor) -> Tensor:
        return self.alpha * self.loss.margin_loss(own) + (1 - self.alpha) * self.loss.margin_loss(generic)

    def _judge(self, features: TextFeatures, pairs: IndexedPairs) -> tuple[Tensor, list[RewardTerm]]:
        """Return the losses of pairs, `[N]`, and their terms: the user's own and the generic user's, if they differ."""
        terms, margins = [], []
        for generic in (False, True) if self.user_model.personalizes else (False,):
            chosen, rejected = (
                self.rewards(features, pairs.users, texts, generic) for texts in (pairs.chosen, pairs.rejected)
            )
            margins.append(chosen - rejected)
            terms.append(RewardTerm(generic, LossOutput(self.loss.margin_loss(margins[-1]), chosen, rejected)))
        return self._mixed(margins[0], margins[-1]), terms

    # ---- evaluation

    def _evaluation_step(self, batch: JudgedPairs, dataloader_idx: int) -> None:
        losses, terms = self._judge(self.features_of(batch.texts), self._indexed(batch))
        self._evaluation.update(self.eval_sets[dataloader_idx], batch.user_ids, losses, terms)

    # ---- checkpoints

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
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
            trust_classes: Dotted paths of classes outside this package that the checkpoint may name.
            kwargs: Arguments of the model that replace the checkpoint's.

        Raises:
            ConfigurationError: The checkpoint names other classes, or is not of a reward model.
            DamagedCheckpointError: The file is damaged.
        """
        if isinstance(checkpoint_path, str | Path) and is_local(checkpoint_path) and Path(checkpoint_path).is_file():
            checkpoint_files.check(Path(checkpoint_path))
        named = {*(trust_classes or ()), *class_paths(kwargs)}
        with only_trusted_classes(f"The checkpoint {checkpoint_path}", named, False):
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only is not False, **kwargs
            )

    @classmethod
    def from_content(
        cls,
        content: Mapping[str, Any],
        trust_classes: Collection[str] | None = None,
        source: str = "The checkpoint",
    ) -> Self:
        """Return a model on the CPU from the content of a checkpoint (`checkpoint_files.load`).

        Args:
            content: Content of a checkpoint; it is not changed.
            trust_classes: As for `load_from_checkpoint`.
            source: Name of the checkpoint, for messages.

        Raises:
            ConfigurationError: The checkpoint names other classes, or is not of a reward model.
        """
        parts = copy.deepcopy(content.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        needed = {"state_dict": content["state_dict"], KEY: content[KEY], cls.CHECKPOINT_HYPER_PARAMS_KEY: parts}
        with only_trusted_classes(source, trust_classes, content=parts):
            return lightning_compat.load_from_content(cls, needed)

    @property
    def tokenization(self) -> TokenizationSettings:
        """How the texts of training were rendered and tokenized."""
        return TokenizationSettings.from_kept(self._rendering)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the heads, the map of features and the users; not the frozen backbone, nor an optimizer's state.

        A fit takes seconds and goes on from no checkpoint.

        Raises:
            NonFiniteError: Weights are infinite or NaN.
        """
        seed = torch.initial_seed() if self._seed is None else self._seed
        checkpoint["optimizer_states"] = []
        checkpointing.fill(checkpoint, self, self.user_model, self.vocabulary, seed, self._rendering)
        check_finite(checkpoint, "After this fit, the model", with_optimizer=False)
        checkpoint[KEY]["backbone"] = self.backbone.identity()
        if self._id_key is not None:
            checkpoint[KEY]["id_key"] = self._id_key

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the checkpoint's users, and size features and heads for them.

        Raises:
            ConfigurationError: The checkpoint is not of a reward model, its backbone had other weights, or a fit was to
                go on from it.
            NonFiniteError: Its weights are infinite or NaN.
        """
        trainer = lightning_compat.trainer_of(self)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            raise ConfigurationError("A fit of a reward model goes on from no checkpoint: leave ckpt_path out.")
        kept, weights = entry_of(checkpoint), checkpoint["state_dict"]
        if "backbone" not in kept or "features.means" not in weights:
            raise ConfigurationError("This checkpoint is not of a PersonalizedRewardModel.")
        check_finite(checkpoint, "The checkpoint", with_optimizer=False)
        self.vocabulary = users_of(checkpoint)
        self._seed, self._rendering = kept.get("seed"), kept.get("tokenization") or {}
        checkpointing.warn_of_other_id_key("The checkpoint", kept.get("id_key"), self._id_key)
        self._id_key = kept.get("id_key")
        self._build_backbone()
        if self.backbone.identity()["weights"] != kept["backbone"]["weights"]:
            raise ConfigurationError(
                f"The weights of the backbone {self.backbone.name} are not those of training, so the heads do not fit "
                "its features; restore them, or train again."
            )
        means, prompts, texts = (weights[f"features.{name}"] for name in ("means", "prompt_keys", "text_keys"))
        self.features = FeatureMap(means.shape[1], len(prompts), len(texts))
        self.user_model.build(len(self.vocabulary), torch.zeros(2, self.features.size))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        """Load trained weights; the frozen backbone is not in a checkpoint and does not change.

        Raises:
            ConfigurationError: A trained weight is missing, or is not in this model.
        """
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        if strict:
            check_names(trained_names(self) & set(result.missing_keys), result.unexpected_keys)
        return _IncompatibleKeys([], [])
