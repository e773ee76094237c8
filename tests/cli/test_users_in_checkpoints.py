"""Users of a checkpoint: listed, shown, added, removed without a trace, exported; what is written still trains."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from urllib.parse import quote

import pytest
import torch
from conftest import write_votes
from quiet_trainer import quiet_trainer
from safetensors.torch import load_file
from torch import nn

from prlhf_lightning.cli import users
from prlhf_lightning.cli.main import main
from prlhf_lightning.data import FileSource, PreferenceDataModule, Pseudonyms, UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import GenerationRequest
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import Optim, PersonalizedLM, checkpoint_files
from prlhf_lightning.training.user_rows import UserRows, check_known_users
from prlhf_lightning.types import SoftPrompt
from prlhf_lightning.user_models import (
    ClusterUserModel,
    CompositeUserModel,
    IndividualUserModel,
    TextUserModel,
    UniformUserModel,
    UserModel,
)

IDS = {"ann@example.org": 8, "bob-the-builder": 8, "carla-ñandú-🦤": 8, "dee dee": 8}
CARLA = "carla-ñandú-🦤"


class OwnUserModel(UserModel):
    """A model from outside, with dense gradients, whose new users do not start as the generic user."""

    def build(self, num_rows, token_embeddings):
        self.table = nn.Parameter(0.1 * torch.randn(num_rows, 3, token_embeddings.shape[1]))

    def forward(self, rows):
        return SoftPrompt.full(self.table[rows.rows])

    def row_tables(self):
        return [self.table]

    def new_rows(self, tables):
        return [tables[0][1:].mean(0)]


USER_MODELS = {
    "individual": lambda: IndividualUserModel(2),
    "cluster": lambda: ClusterUserModel(3, 2),
    "composite": lambda: CompositeUserModel([IndividualUserModel(1), TextUserModel(), ClusterUserModel(2, 1)]),
    "own": OwnUserModel,
    "composite of own": lambda: CompositeUserModel([ClusterUserModel(2, 1), OwnUserModel()]),
}


def make(model_path, user_model) -> PersonalizedLM:
    policy = CausalLMPolicy(model_path, lora=LoRA(rank=2))
    return PersonalizedLM(user_model, policy, DPOLoss(), optim=Optim(lr=1e-2, user_lr=1e-1, warmup_steps=0))


def fit(model_path, tmp_path, user_model, people=IDS, **kwargs):
    """Train on people's votes; return trainer and model."""
    votes = write_votes(tmp_path / "votes.jsonl", people)
    ckpt_path = kwargs.pop("ckpt_path", None)
    options = {"max_epochs": 1, "enable_checkpointing": False, "limit_val_batches": 0, **kwargs}
    trainer = quiet_trainer(tmp_path, **options)
    module = make(model_path, user_model)
    data = PreferenceDataModule(FileSource(str(votes)), tokenizer=model_path, batch_size=4, validation_fraction=0)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module


@pytest.fixture(params=USER_MODELS)
def make_user_model(request):
    return USER_MODELS[request.param]


@pytest.fixture
def checkpoint(model_path, tmp_path, make_user_model):
    trainer, _ = fit(model_path, tmp_path, make_user_model())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def of(path) -> UserRows:
    return UserRows(checkpoint_files.load(path))


def run(*args: object) -> None:
    main(["users", *map(str, args)])


def test_a_removed_user_leaves_no_trace_and_others_no_change(checkpoint, capsys):
    before, raw = of(checkpoint), checkpoint.read_bytes()
    row = before.row(CARLA)
    secrets = [CARLA.encode(), *(table[row].numpy().tobytes() for table in before.remembered())]
    assert len(secrets) >= 4  # the id; a vector, and the optimiser's two averages
    assert all(secret in raw for secret in secrets)
    run("remove", "--model", checkpoint, "--user", CARLA)
    raw = checkpoint.read_bytes()
    assert not any(secret in raw for secret in secrets)
    assert f"{CARLA} and {len(secrets) - 1} vectors: nothing left" in capsys.readouterr().out
    after = of(checkpoint)
    assert CARLA not in after.vocabulary
    for user_id in after.vocabulary.ids:
        pairs = zip(before.remembered(), after.remembered(), strict=True)
        assert all(torch.equal(a[before.row(user_id)], b[after.row(user_id)]) for a, b in pairs)
    if before.steps() is not None:
        assert torch.equal(after.steps(), before.steps()[[0, 1, 2, 4]])


def test_a_checkpoint_without_a_user_loads_and_goes_on(checkpoint, model_path, tmp_path, make_user_model):
    run("remove", "--model", checkpoint, "--user", CARLA)
    fewer = {user_id: count for user_id, count in IDS.items() if user_id != CARLA}
    _, module = fit(model_path, tmp_path, make_user_model(), fewer, max_epochs=2, ckpt_path=checkpoint)
    assert CARLA not in module.vocabulary
    assert all(len(table) == 4 for table in module.user_model.row_tables())


def test_users_are_added_as_the_generic_user_and_then_train(checkpoint, model_path, tmp_path, make_user_model):
    before = of(checkpoint)
    run("add", "--model", checkpoint, "--user+", "eve", "--user+", "7")
    after = of(checkpoint)
    assert after.vocabulary.ids == (*before.vocabulary.ids, "eve", "7")
    tables = list(before.tables.values())
    expected = make_user_model()
    expected.build(2, torch.randn(9, 32))
    for a, b, row in zip(tables, after.tables.values(), expected.new_rows(tables), strict=True):
        assert torch.equal(b[:5], a)
        assert all(torch.equal(b[n], row) for n in (5, 6))
    people = {**IDS, "eve": 8}
    _, module = fit(model_path, tmp_path, make_user_model(), people, max_epochs=2, ckpt_path=checkpoint)
    (eve, seven) = module.vocabulary.rows(["eve", "7"]).tolist()
    was = of(checkpoint).tables.values()
    assert all(not torch.equal(t[eve], w[eve]) for t, w in zip(module.user_model.row_tables(), was, strict=True))
    first = module.user_model.row_tables()[0]
    if not isinstance(module.user_model, OwnUserModel):  # whose gradients are dense
        assert torch.equal(first[seven], next(iter(was))[seven])  # who is not in the data does not move


def test_adding_and_removing_a_user_gives_the_same_checkpoint(checkpoint, tmp_path):
    run("add", "--model", checkpoint, "--user", "eve", "--output", tmp_path / "b.ckpt")
    run("remove", "--model", tmp_path / "b.ckpt", "--user", "eve")
    a, b = of(checkpoint), of(tmp_path / "b.ckpt")
    assert a.vocabulary == b.vocabulary
    assert all(torch.equal(x, y) for x, y in zip(a.remembered(), b.remembered(), strict=True))


def test_vectors_are_exported_by_user(checkpoint, tmp_path):
    run("export", "--model", checkpoint, "--output", tmp_path / "out")
    rows, vectors = of(checkpoint), load_file(tmp_path / "out/users.safetensors")
    assert set(vectors) == set(IDS)
    about = json.loads((tmp_path / "out/users.json").read_text())
    for name, part in about["tables"].items():
        part_of = vectors[CARLA][part["start"] : part["stop"]].view(part["shape"])
        assert torch.equal(part_of, rows.tables[name][rows.row(CARLA)])
    shared = load_file(tmp_path / "out/shared.safetensors")
    assert set(shared) == {*about["shared"], *(f"generic.{name}" for name in about["tables"])}


@pytest.fixture
def plain(model_path, tmp_path):
    trainer, _ = fit(model_path, tmp_path, ClusterUserModel(3, 2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_users_are_listed_and_shown(plain, capsys):
    run("list", "--model", plain)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[2:]] == sorted(IDS)
    weights = of(plain).tables["user_model.weights.weight"]
    assert f"{weights[1].norm():.4f}" in lines[2]
    assert f"{(weights[1] - weights[0]).norm():.4f}" in lines[2]
    assert f" {int(of(plain).steps()[1])}  ann@example.org" in lines[2]
    run("show", "--model", plain, "--user", CARLA)
    shown = capsys.readouterr().out
    assert "row           3 of 4" in shown
    assert " ".join(f"{share:.3f}" for share in weights[3].softmax(0)) in shown
    distances = (weights - weights[3]).norm(dim=1)
    distances[[0, 3]] = torch.inf
    assert f"nearest       {sorted(IDS)[int(distances.argmin()) - 1]} ({distances.min():.4f})" in shown


def test_removing_says_where_else_a_user_is(plain, tmp_path, capsys):
    folder = tmp_path / "runs/run/checkpoints"
    for name in ("last.ckpt", "best.ckpt", "bad.ckpt"):
        checkpoint_files.save(checkpoint_files.load(plain), folder / name)
    (folder / "bad.ckpt").write_bytes((folder / "bad.ckpt").read_bytes()[:-1])
    (folder / ".best.ckpt.partial").write_bytes(plain.read_bytes()[:9000] + CARLA.encode())
    (folder.parent / "users_seen.csv").write_text(f"{CARLA},0.5")
    run("remove", "--model", folder / "last.ckpt", "--user", CARLA)
    said = capsys.readouterr().out
    assert f"{folder / 'best.ckpt'} still holds {CARLA}" in said
    assert f"{folder / 'bad.ckpt'} can't be read, and names {CARLA}: delete it" in said
    assert f"{folder / '.best.ckpt.partial'}, which a killed process left, names {CARLA}: delete it" in said
    assert f"{folder.parent / 'users_seen.csv'} names {CARLA}" in said
    (command,) = [line.strip() for line in said.splitlines() if "users remove" in line]
    main(shlex.split(command)[1:])
    assert CARLA.encode() not in (folder / "best.ckpt").read_bytes()


def test_runs_beside_are_searched_whatever_they_are_called(plain, tmp_path, capsys):
    runs = [tmp_path / "runs" / name for name in ("study-a", "study-b", "other/version_0")]
    for run_folder in runs:
        checkpoint_files.save(checkpoint_files.load(plain), run_folder / "checkpoints/last.ckpt")
    run("remove", "--model", runs[0], "--user", CARLA, "--all", "true")
    said = capsys.readouterr().out
    assert all(f"{one / 'checkpoints/last.ckpt'} still holds {CARLA}" in said for one in runs[1:])


def test_an_export_in_a_run_is_named_and_folders_are_searched(plain, tmp_path, capsys):
    folder = tmp_path / "run"
    checkpoint_files.save(checkpoint_files.load(plain), folder / "checkpoints/last.ckpt")
    for path in (
        "ex/prlhf.json",
        f"ex/peft_users/{quote(CARLA)}/weights",
        f"{quote(CARLA)}/x",
        "answers_dee dee.jsonl",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")
    run("remove", "--model", folder, "--user", CARLA, "dee dee", "--all", "true")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(f"{folder / 'ex'}")] == [
        f"{folder / 'ex'} is an exported model with {CARLA} in it, vectors included: delete it, and export it again."
    ]
    assert f"{folder / quote(CARLA)} has {CARLA} in its own name: see to it yourself." in lines
    assert f"{folder / 'answers_dee dee.jsonl'} has dee dee in its own name: see to it yourself." in lines


def test_a_user_is_removed_from_all_checkpoints_of_a_run(plain, tmp_path):
    folder = tmp_path / "run/checkpoints"
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint_files.save(checkpoint_files.load(plain), folder / name)
    (tmp_path / "people.txt").write_text(f"{CARLA}\ndee dee\n", encoding="utf-8")
    run("remove", "--model", tmp_path / "run", "--user_file", tmp_path / "people.txt", "--all", "true")
    for path in folder.iterdir():
        assert of(path).vocabulary.ids == ("ann@example.org", "bob-the-builder")


def test_a_checkpoint_that_is_changed_in_place_keeps_its_age(plain):
    before = plain.stat()
    run("remove", "--model", plain, "--user", CARLA)
    assert plain.stat().st_mtime_ns == before.st_mtime_ns
    assert plain.stat().st_ino != before.st_ino  # a new file took its place


def test_an_id_inside_another_id_is_not_taken_for_the_user(plain, capsys):
    run("add", "--model", plain, "--user+", "eve", "--user+", "evelyn")
    run("remove", "--model", plain, "--user", "eve")
    assert "eve and 0 vectors: nothing left; its letters are also a part of evelyn" in capsys.readouterr().out


WORDS_OF_CHECKPOINTS = ["model", "epoch", "state_dict", "user_model", "optimizer_states", "name", "users", "policy"]


def test_ids_that_are_checkpoint_words_are_erased_everywhere(model_path, tmp_path, capsys):
    trainer, _ = fit(model_path, tmp_path, IndividualUserModel(2), dict.fromkeys(["ann", *WORDS_OF_CHECKPOINTS], 4))
    folder = tmp_path / "run/checkpoints"
    for name in ("last.ckpt", "best.ckpt"):
        trainer.save_checkpoint(folder / name)
    run("remove", "--model", tmp_path / "run", "--all", "true", "--user", "ann", *WORDS_OF_CHECKPOINTS[:-1])
    for path in folder.iterdir():
        assert of(path).vocabulary.ids == ("policy",)
    assert "epoch and 3 vectors: nothing left; the same letters are a name" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [("notes", {"favorites": [CARLA]}), ("notes", {CARLA: 1}), ("callbacks", {"Votes": {CARLA: 1}})],
)
def test_what_own_modules_and_callbacks_keep_of_users_is_found(plain, capsys, key, value):
    content = checkpoint_files.load(plain)
    content[key] = value
    checkpoint_files.save(content, plain)
    with pytest.raises(SystemExit, match="still holds carla"):
        run("remove", "--model", plain, "--user", CARLA)
    assert f"STILL THERE, in {key}." in capsys.readouterr().out


def test_a_file_that_fails_does_not_keep_users_in_the_others(plain, tmp_path, capsys):
    folder, content = tmp_path / "run/checkpoints", checkpoint_files.load(plain)
    for name, notes in {"last.ckpt": {}, "best.ckpt": {"favorites": CARLA}, "bad.ckpt": {}, "c.ckpt": {}}.items():
        checkpoint_files.save({**content, "notes": notes}, folder / name)
    (folder / "bad.ckpt").write_bytes((folder / "bad.ckpt").read_bytes()[:-1])
    with pytest.raises(SystemExit, match=r"(?s)^error: 2 of 4 files are not done:.*bad.ckpt.*best.ckpt still holds"):
        run("remove", "--model", tmp_path / "run", "--user", CARLA, "--all", "true")
    assert f"{folder / 'bad.ckpt'}: NOT DONE" in capsys.readouterr().out
    for name in ("last.ckpt", "best.ckpt", "c.ckpt"):
        assert CARLA not in of(folder / name).vocabulary


def test_a_slice_of_a_table_would_be_found_out(plain, monkeypatch, capsys):
    """`torch.save` writes the whole table that a slice is of."""
    keep = UserRows.keep

    def careless(self, rows):
        old = self.tables
        keep(self, rows)
        for name in old:
            self._checkpoint["state_dict"][name] = old[name][: 1 + len(rows)]

    monkeypatch.setattr(UserRows, "keep", careless)
    with pytest.raises(SystemExit, match="still holds dee dee"):
        run("remove", "--model", plain, "--user", "dee dee")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["show", "--user", "eve"], "user: 'eve' is not in this model"),
        (["remove", "--user", "eve"], "user: 'eve' is not in this model"),
        (["add", "--user", CARLA], "is in this checkpoint already"),
        (["add"], "user: give an id"),
        (["add", "--user_file", "/no/such/file"], "user_file: /no/such/file can't be read"),
        (["remove", "--user", CARLA, "--all", "true", "--output", "b.ckpt"], "output: `--all true` changes"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_changed(plain, args, says):
    before = plain.read_bytes()
    with pytest.raises(SystemExit, match=f"^error: .*{says}"):
        run(*args, "--model", plain)
    assert plain.read_bytes() == before


def test_a_checkpoint_without_a_list_of_tables_gives_advice(plain):
    content = checkpoint_files.load(plain)
    del content["prlhf_lightning"]["new_rows"]
    checkpoint_files.save(content, plain)
    with pytest.raises(SystemExit, match=r"does not say which of its weights are users' rows.*fit --ckpt_path"):
        run("list", "--model", plain)


def test_a_foreign_optimiser_is_refused_and_not_guessed_at(plain):
    content = checkpoint_files.load(plain)
    content["optimizer_states"][0]["param_groups"][-1]["name"] = "mine"
    checkpoint_files.save(content, plain)
    with pytest.raises(SystemExit, match="no group `user_tables`"):
        run("remove", "--model", plain, "--user", CARLA)


def test_users_without_rows_are_removed_from_the_vocabulary(model_path, tmp_path):
    trainer, _ = fit(model_path, tmp_path, UniformUserModel(1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    users.remove(tmp_path / "a.ckpt", CARLA)
    assert CARLA.encode() not in (tmp_path / "a.ckpt").read_bytes()
    users.list_users(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda path: users.show(path, 7), "user: 7 is of type int; ids are strings: '7'"),
        (lambda path: users.remove(path, 7), "user: 7 is of type int"),
        (lambda path: users.add(path, [1]), "user: 1 is of type int; ids are strings: '1'"),
        (lambda path: users.add(path, ["\ud800"]), "is not valid Unicode"),
        (lambda _: UserVocabulary(["ann", ""]), "user id is empty"),
        (lambda _: GenerationRequest("a", ""), "an id is empty"),
        (lambda _: GenerationRequest("a", {" ": 1}), "an id is empty"),
    ],
)
def test_what_can_not_be_an_id_is_refused_in_python_too(tmp_path, call, says):
    with pytest.raises(ConfigurationError, match=says):
        call(tmp_path / "none.ckpt")


def test_an_id_that_training_hashed_gets_a_hint_that_works():
    pseudonyms = Pseudonyms(b"x" * 16)
    with pytest.raises(ConfigurationError, match="seem to be pseudonyms") as raised:
        check_known_users(["ann"], UserVocabulary([pseudonyms("ann")]))
    words = shlex.split(str(raised.value).partition("prints: python ")[2].replace("SALT ID", "SALT ann"))
    said = subprocess.run(
        [sys.executable, *words], env={**os.environ, "SALT": "x" * 16}, capture_output=True, text=True
    )
    assert said.stdout.strip() == pseudonyms("ann")
