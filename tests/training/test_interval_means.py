"""What `train/...` says is the mean over the rows of the logged interval, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import Logger
from test_training import make, make_data, make_trainer

from prlhf_lightning.losses import DPOLoss, KTOLoss, SFTLoss
from prlhf_lightning.training.micro_batch import sums_to_log
from prlhf_lightning.training.objective import Term
from prlhf_lightning.types import LogProbs, LossOutput, PairLogProbs
from prlhf_lightning.user_models import UniformUserModel


class Kept(Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step):
        if "train/loss" in metrics:
            self.rows.append((step, metrics))


def train(model_path, data, folder, loss, **options):
    """Train; return what was logged, and losses and rewards of each micro-batch."""
    logger, batches = Kept(), []
    module = make(model_path, loss=loss)
    compute = module.objective

    def objective(batch, **kwargs):
        losses, terms = compute(batch, **kwargs)
        if module.trainer.training:
            output = terms[0].output
            batches.append((losses.detach(), output.chosen_rewards, output.rejected_rewards))
        return losses, terms

    module.objective = objective
    make_trainer(folder, logger=logger, max_epochs=2, **options).fit(module, data)
    return logger.rows, batches


@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (1, 3), (3, 1), (3, 2)])
def test_they_are_means_over_pairs_of_all_micro_batches(model_path, votes, tmp_path, accumulate, every):
    # 38 pairs in batches of 4, the last of 2: of 10 micro-batches an epoch the last step has 1 where it takes 3
    how = {"accumulate_grad_batches": accumulate, "log_every_n_steps": every}
    rows, batches = train(model_path, make_data(votes, model_path), tmp_path, DPOLoss(), **how)
    sizes = [len(losses) for losses, *_ in batches]
    assert sizes == [4] * 9 + [sizes[9]] + [4] * 9 + [sizes[9]]
    assert sizes[9] < 4
    ends = [i + 1 for i in range(20) if (i % 10 + 1) % accumulate == 0 or i % 10 == 9]  # of the steps
    edges = [0, *ends[every - 1 :: every]]
    assert [step for step, _ in rows] == list(range(every - 1, len(ends), every))
    for (_, logged), start, end in zip(rows, edges, edges[1:], strict=False):
        losses, chosen, rejected = (torch.cat(parts) for parts in zip(*batches[start:end], strict=True))
        margins = chosen - rejected
        assert logged["train/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert logged["train/margin"] == pytest.approx(margins.mean().item(), rel=1e-4, abs=1e-6)
        scores = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins.tolist()]
        assert logged["train/accuracy"] == pytest.approx(sum(scores) / len(scores))


def test_a_pair_that_is_tied_counts_as_half(model_path, votes, tmp_path):
    log_probs = LogProbs(torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool))
    output = LossOutput(torch.zeros(4), torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 0.0, 5.0]))
    term = Term(False, PairLogProbs(log_probs, log_probs), output)
    right, pairs = sums_to_log(output.losses, term, "pairs")["accuracy"]
    assert (right, pairs) == (0.5 + 0 + 1 + 0.5, 4)

    module = make(model_path, UniformUserModel(0))  # before training it is the reference, and every margin zero
    (result,) = make_trainer(tmp_path).validate(module, make_data(votes, model_path))
    assert result["val/seen/margin"] == 0
    assert result["val/seen/accuracy"] == 0.5


def test_thumbs_are_means_over_those_that_are_up_or_down(model_path, thumbs, tmp_path):
    data = make_data(thumbs, model_path, feedback="thumbs")
    rows, batches = train(model_path, data, tmp_path, KTOLoss(), log_every_n_steps=4)
    _, up, down = (torch.cat(parts) for parts in zip(*batches[:4], strict=True))
    assert rows[0][1]["train/chosen_rewards"] == pytest.approx(up.nanmean().item(), rel=1e-4, abs=1e-6)
    assert rows[0][1]["train/rejected_rewards"] == pytest.approx(down.nanmean().item(), rel=1e-4, abs=1e-6)


def test_demonstrations_have_a_loss_alone(model_path, votes, tmp_path):
    rows, batches = train(model_path, make_data(votes, model_path), tmp_path, SFTLoss(), log_every_n_steps=5)
    assert rows[0][1]["train/loss"] == pytest.approx(torch.cat([b[0] for b in batches[:5]]).mean().item(), rel=1e-5)
    assert "train/accuracy" not in rows[0][1]
