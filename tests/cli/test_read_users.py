"""Users who are read off their pairs: trained, kept in checkpoints, added, erased, exported."""

from __future__ import annotations

import json
import random

import pytest
import torch
from conftest import WORDS
from lightning.pytorch import Trainer

from prlhf_lightning.adaptation import Margins, cold_start, encode_users, select_pairs, trained_rows
from prlhf_lightning.cli.adapt import read_pairs
from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import load_module
from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import Generator
from prlhf_lightning.losses import DPOLoss, KTOLoss, SimPOLoss
from prlhf_lightning.model import pool_history
from prlhf_lightning.policies import CausalLMPolicy
from prlhf_lightning.training import Optim, PersonalizedLM, checkpoint_files
from prlhf_lightning.training.histories import check_histories
from prlhf_lightning.training.user_rows import UserRows
from prlhf_lightning.types import PairTokens, Tokens, Users
from prlhf_lightning.user_models import AmortizedUserModel, IndividualUserModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("read_users")


def write_votes(path, users, seed=0):
    """Write `users[id]` votes of each user on the same two answers; every other user prefers the other one."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for i, (user, count) in enumerate(users.items()):
            for _ in range(count):
                chosen, rejected = ("red sun fast", "blue moon")[:: -1 if i % 2 else 1]
                prompt = " ".join(draw.choices(WORDS, k=3))
                row = {"user_id": user, "prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def checkpoint(model_path, folder):
    """A run of the command line over eight users, of whom every other one likes the other answer."""
    votes = write_votes(folder / "votes.jsonl", {f"user{i}": 24 for i in range(8)})
    args = ["fit", "--model.user_model", "AmortizedUserModel", "--model.user_model.num_tokens", "2"]
    args += ["--model.user_model.num_pairs", "4", "--model.loss", "DPOLoss", "--model.loss.beta", "0.5"]
    args += ["--model.policy", "CausalLMPolicy", "--model.policy.model", model_path, "--model.policy.lora.rank", "4"]
    args += ["--model.optim.lr", "1e-2", "--model.optim.user_lr", "3e-2", "--model.alpha", "0.8"]
    args += ["--data.source", "FileSource", "--data.source.train", str(votes), "--data.cache_dir", str(folder / "c")]
    args += ["--collapse.prompts", "0"]
    args += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "3", "--trainer.enable_progress_bar", "false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRLHF_CACHE", str(folder / "cache"))
        main([*args, "--trainer.default_root_dir", str(folder / "runs")])
    return folder / "runs" / "version_0" / "checkpoints" / "last.ckpt"


@pytest.fixture
def model(checkpoint):
    return load_module(checkpoint, "checkpoint").eval()


@pytest.fixture
def pairs(model, folder):
    return read_pairs(model, FileSource(write_votes(folder / "new.jsonl", {"sun": 12, "moon": 12}, seed=5)))[0]


def test_four_pairs_tell_a_new_user_from_the_generic_user(model, pairs):
    first = [i for i in range(len(pairs)) if i % 12 < 4]
    found = encode_users(model, select_pairs(pairs, torch.tensor(first)))
    assert found.user_ids == ("sun", "moon")
    margins_of = Margins(model, pairs)
    rest = torch.tensor([i for i in range(len(pairs)) if i % 12 >= 4])
    own = (margins_of(found.rows, torch.arange(24) // 12) > 0).float()[rest].mean()
    generic = (margins_of(trained_rows(model)[1]) > 0).float()[rest].mean()
    assert own > 0.9
    assert generic < 0.7


def test_the_cold_start_curve_is_of_what_is_read(model, pairs):
    first = torch.tensor([i for i in range(len(pairs)) if i % 12 < 4])
    rest = torch.tensor([i for i in range(len(pairs)) if i % 12 >= 4])
    none, four = cold_start(model, select_pairs(pairs, first), select_pairs(pairs, rest), counts=(0, 4))
    assert (none.gain, none.accuracy) == (0.0, none.generic)
    assert four.accuracy > 0.9 > four.generic


def test_the_checkpoint_keeps_what_training_pairs_tell(model, folder, model_path):
    votes = FileSource(folder / "votes.jsonl")
    data = PreferenceDataModule(votes, model_path, history_size=4, cache_dir=folder / "c")
    (ids, _), (rows, generic) = next(data.histories()), trained_rows(model)
    likes_sun = [user_id in ("user0", "user2", "user4", "user6") for user_id in ids]
    # The last number is by how much longer the preferred answers are; that of suns has a word more.
    assert (rows[model.vocabulary.rows(ids) - 1, -1] > 0).tolist() == likes_sun
    assert not generic.any()


def test_pooled_histories_are_means_of_reference_embeddings(model, pairs):
    some = select_pairs(pairs, torch.arange(6))
    blocks = [
        Tokens(part.ids.view(2, 3, -1), part.mask.view(2, 3, -1).clone()) for part in (some.chosen, some.rejected)
    ]
    for block in blocks:
        block.mask[1, 2] = False
    history = pool_history(model.policy, PairTokens(*blocks))
    for part, block, length in zip((history.chosen, history.rejected), blocks, history.lengths.unbind(-1), strict=True):
        assert torch.equal(length, block.mask.sum(-1))
        for place in ((0, 0), (0, 2), (1, 1)):
            ids = block.ids[place][block.mask[place]]
            vectors = model.policy.embed(Tokens.from_lists([ids.tolist()]), reference=True).vectors[0]
            torch.testing.assert_close(part[place], vectors.mean(0))
        assert not part[1, 2].any()


def test_without_pairs_a_user_is_the_generic_one_bit_by_bit(model, pairs):
    found = encode_users(model, pairs, ("sun", "nobody", "moon"))
    assert not found.rows[1].any()
    assert found.rows[[0, 2]].any(dim=1).all()
    none = encode_users(model, select_pairs(pairs, torch.tensor([], dtype=torch.long)), ("nobody",))
    assert not none.rows.any()
    with pytest.raises(ConfigurationError, match="user_ids: 'sun' has pairs and is not among them"):
        encode_users(model, pairs, ("moon",))


def test_reading_in_blocks_does_not_depend_on_others_pairs(model, pairs, monkeypatch):
    uneven = select_pairs(pairs, torch.tensor([0, 12, 13, 14, 15]))
    together = encode_users(model, uneven, ("moon", "nobody", "sun"))
    blocks, encode = [], "prlhf_lightning.adaptation.adapt"
    monkeypatch.setattr(f"{encode}._PAIRS_AT_ONCE", 4)
    monkeypatch.setattr(
        f"{encode}.pool_history", lambda policy, block: blocks.append(block) or pool_history(policy, block)
    )
    torch.testing.assert_close(encode_users(model, uneven, ("moon", "nobody", "sun")).rows, together.rows)
    assert [tuple(block.chosen.ids.shape[:2]) for block in blocks] == [(2, 1), (1, 4)]


def test_the_command_adds_users_whom_remove_erases(checkpoint, folder, capsys):
    new = write_votes(folder / "two.jsonl", {"new-1": 6, "new-2": 2})
    command = ["adapt", "--model", str(checkpoint), "--feedback", str(new)]
    main([*command, "--output", str(folder / "more.ckpt")])
    assert "2 users read off 8 pairs" in capsys.readouterr().out
    row = UserRows(checkpoint_files.load(folder / "more.ckpt")).vectors()[-2]
    assert row.any()
    main(["users", "remove", "--model", str(folder / "more.ckpt"), "--user", "new-1"])
    assert "new-1 and 1 vectors: nothing left" in capsys.readouterr().out
    assert row.numpy().tobytes() not in (folder / "more.ckpt").read_bytes()
    main(["users", "add", "--model", str(folder / "more.ckpt"), "--user", "eve"])
    assert not UserRows(checkpoint_files.load(folder / "more.ckpt")).vectors()[-1].any()
    with pytest.raises(SystemExit, match="reads users off their pairs, which takes no steps"):
        main([*command, "--steps", "1"])


def test_an_exported_folder_has_the_prompts_without_the_data(checkpoint, model, folder):
    main(["export", "--model", str(checkpoint), "--output", str(folder / "exported")])
    writer = Generator.from_folder(folder / "exported")
    users = Users(torch.arange(9))
    assert torch.equal(writer.user_model(users).vectors, model.user_model(users).vectors)
    assert not torch.equal(writer.user_model(users).vectors[1], writer.user_model(users).vectors[2])


def test_kept_histories_stay_true_while_embeddings_train(model_path, folder):
    votes, policy = FileSource(folder / "votes.jsonl"), CausalLMPolicy(model_path, lora=None)
    module = PersonalizedLM(AmortizedUserModel(2, num_pairs=4), policy, SimPOLoss(), optim=Optim(lr=1e-2))
    data = PreferenceDataModule(votes, model_path, history_size=4, cache_dir=folder / "c")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", max_steps=3, limit_val_batches=0, **quiet).fit(module, data)
    ids, shown = next(data.histories())
    token = Tokens.from_lists([[5]])
    assert not torch.equal(policy.embed(token).vectors, policy.embed(token, reference=True).vectors)
    (rows,) = module.user_model.history_rows(pool_history(policy, shown))
    assert torch.equal(module.user_model.row_tables()[0][module.vocabulary.rows(ids)], rows)


def test_a_loss_or_data_without_pairs_to_read_are_refused(model_path, folder):
    def refused(loss, says, **settings):
        module = PersonalizedLM(AmortizedUserModel(2), CausalLMPolicy(model_path), loss)
        data = PreferenceDataModule(FileSource(folder / "votes.jsonl"), model_path, **settings)
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        with pytest.raises(ConfigurationError, match=says):
            trainer.fit(module, data)

    refused(DPOLoss(), "and the data module gives 0: pass history_size=10 to PreferenceDataModule")
    refused(DPOLoss(), "the data module gives 3: pass history_size=10", history_size=3)
    with pytest.raises(ConfigurationError, match="AmortizedUserModel reads which of two completions"):
        check_histories(AmortizedUserModel(2), KTOLoss(), None)


def test_models_that_read_no_pairs_say_so(model_path, pairs):
    module = PersonalizedLM(IndividualUserModel(1), CausalLMPolicy(model_path), DPOLoss())
    with pytest.raises(ConfigurationError, match="IndividualUserModel reads no pairs; learn users' rows with adapt_"):
        encode_users(module, pairs)


def test_pairs_go_to_the_device_of_the_model(model_path, pairs, monkeypatch):
    class Asked(Exception):
        pass

    def pool_history(policy, pairs):
        raise Asked(pairs.chosen.ids.device.type)

    monkeypatch.setattr("prlhf_lightning.adaptation.adapt.pool_history", pool_history)
    users = AmortizedUserModel(1)
    users.build(3, torch.randn(4, 8))
    with pytest.raises(Asked, match="meta"):
        encode_users(PersonalizedLM(users, CausalLMPolicy(model_path), DPOLoss()).to("meta"), pairs)
