from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from counting_policy import CountingPolicy
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from quiet_trainer import quiet_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.losses import DPOLoss, SimPOLoss
from prlhf_lightning.policies import LoRA
from prlhf_lightning.training import PersonalizedLM
from prlhf_lightning.training.reference_cache import ReferenceCache
from prlhf_lightning.training.reference_store import ReferenceStore
from prlhf_lightning.types import LogProbs, PairLogProbs, PreferenceBatch, Tokens
from prlhf_lightning.user_models import CompositeUserModel, IndividualUserModel, TextUserModel, UserModel


def fit(model_path, votes, tmp_path, user_model: UserModel | None = None, epochs=1, loss=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    policy = CountingPolicy(model_path, lora=LoRA(rank=2), **kwargs.pop("policy", {}))
    module = PersonalizedLM(user_model or IndividualUserModel(2), policy, loss or DPOLoss(), **kwargs)
    data = PreferenceDataModule(FileSource(str(votes)), tokenizer=model_path, batch_size=4, validation_fraction=0.25)
    trainer = quiet_trainer(tmp_path, max_epochs=epochs, enable_checkpointing=False, num_sanity_val_steps=0)
    trainer.fit(module, data)
    return module


def test_each_completion_is_scored_once_for_all_epochs_and_runs(model_path, votes, tmp_path):
    assert fit(model_path, votes, tmp_path, epochs=3).policy.scored == 2 * 48
    assert fit(model_path, votes, tmp_path, epochs=2, seed=1).policy.scored == 0


def test_training_is_the_same_with_and_without_the_cache(model_path, votes, tmp_path):
    plain = fit(model_path, votes, tmp_path, epochs=2, cache_reference=False)
    filling, served = (fit(model_path, votes, tmp_path, epochs=2) for _ in range(2))
    assert plain.policy.scored > filling.policy.scored > served.policy.scored == 0
    for (name, a), b, c in zip(plain.named_parameters(), filling.parameters(), served.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(b, c), name


def test_a_cache_that_cannot_be_kept_is_told_once(model_path, votes, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"Cannot create the reference cache in .*file.*computed again") as told:
        assert fit(model_path, votes, tmp_path, epochs=2).policy.scored > 2 * 48
    assert len([one for one in told if "Cannot create the reference cache" in str(one.message)]) == 1


def scores_of(tokens: Tokens, width: int) -> LogProbs:
    """Log-probs as a policy computes them: of another batch, in other last bits, and padded to another width."""
    mask = torch.nn.functional.pad(tokens.mask, (0, width - tokens.mask.shape[1]))
    return LogProbs(torch.randn(mask.shape) * mask, mask)


def batch_of(chosen: list[list[int]], rejected: list[list[int]]) -> PreferenceBatch:
    count = len(chosen)
    tokens = [Tokens.from_lists(rows) for rows in ([[]] * count, [[1]] * count, chosen, rejected)]
    return PreferenceBatch(("ann",) * count, *tokens, records=torch.arange(count))


def test_what_is_used_does_not_depend_on_whether_it_was_known(tmp_path):
    """To the last bit, so that a run that was killed goes on as if it had not been."""
    store = ReferenceStore(ReferenceCache(tmp_path, {"model": "a"}), sees_text=False)
    a, b, c = [5, 6, 7], [8, 9], [4, 4, 4, 4]
    first = store.attach(batch_of([a, b], [b, c]))  # b is chosen and rejected
    assert first.reference is None
    computed = store.keep(first, PairLogProbs(scores_of(first.chosen, 6), scores_of(first.rejected, 6)))
    assert torch.equal(computed.chosen.tokens[1, :2], computed.rejected.tokens[0, :2])
    served = store.attach(batch_of([a, b], [b, c])).reference
    for x, y in ((computed.chosen, served.chosen), (computed.rejected, served.rejected)):
        assert torch.equal(x.tokens, y.tokens)
        assert torch.equal(x.mask, y.mask)
    second = store.attach(batch_of([a, [3]], [c, b]))  # known but for one
    assert second.reference is None
    again = store.keep(second, PairLogProbs(scores_of(second.chosen, 6), scores_of(second.rejected, 6)))
    assert torch.equal(again.chosen.tokens[0], computed.chosen.tokens[0])
    assert torch.equal(again.rejected.tokens[0], computed.rejected.tokens[1])
    assert torch.equal(store.attach(batch_of([a], [c])).reference.chosen.tokens, computed.chosen.tokens[:1])


def test_a_checkpoint_writes_out_what_was_scored_before_it(model_path, votes, tmp_path):
    module = fit(model_path, votes, tmp_path)
    store = ReferenceStore(ReferenceCache(tmp_path / "own", {"model": "a"}), sees_text=False)
    batch = store.attach(batch_of([[5]], [[6]]))
    store.keep(batch, PairLogProbs(scores_of(batch.chosen, 1), scores_of(batch.rejected, 1)))
    module.reference_store = store
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = ReferenceStore(ReferenceCache(tmp_path / "own", {"model": "a"}), sees_text=False)
    assert other.attach(batch_of([[5]], [[6]])).reference is not None


def change_model(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    model.lm_head.weight.data[3, 3] += 1e-3
    model.save_pretrained(path)
    return {}


def change_template(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.post_processor = None  # no BOS any more
    tokenizer.save_pretrained(path)
    return {}


@pytest.mark.parametrize(
    "change",
    [change_model, change_template, lambda path: {"policy": {"dtype": "bfloat16"}}],
    ids=["weights", "ids", "dtype"],
)
def test_another_model_tokenizer_or_dtype_is_not_served_from_it(model_path, votes, tmp_path, change):
    path = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(model_path).save_pretrained(path)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(path)
    fit(str(path), votes, tmp_path)
    assert fit(str(path), votes, tmp_path).policy.scored == 0
    assert fit(str(path), votes, tmp_path, **change(path)).policy.scored == 2 * 48


def test_the_user_text_is_in_the_key_if_the_reference_sees_it(model_path, votes, tmp_path):
    fit(model_path, votes, tmp_path)
    with_text = CompositeUserModel([IndividualUserModel(2), TextUserModel()])
    assert fit(model_path, votes, tmp_path, with_text).policy.scored == 2 * 48


def test_a_loss_without_a_reference_computes_and_keeps_nothing(model_path, votes, tmp_path):
    assert fit(model_path, votes, tmp_path, loss=SimPOLoss()).policy.scored == 0
    assert not (tmp_path / "cache/reference").exists()


def test_a_model_that_is_sharded_over_processes_is_not_served(model_path, votes, tmp_path):
    module = fit(model_path, votes, tmp_path)
    data = PreferenceDataModule(FileSource(str(votes)), tokenizer=model_path, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    for strategy, served in ((DDPStrategy(), True), (FSDPStrategy(accelerator="cuda"), False)):
        module.trainer = SimpleNamespace(
            world_size=2, strategy=strategy, precision="32-true", precision_plugin=Precision(), predicting=False
        )
        assert bool(module.on_before_batch_transfer(batch, 0).reference_keys) is served
