"""Pseudonyms stand for ids, and neither ids nor the salt are left anywhere."""

import hashlib
import hmac
import logging

import pytest
from feedback_helpers import row, word_tokenizer, write_jsonl

from prlhf_lightning.data import FileSource, PreferenceDataModule, Pseudonyms
from prlhf_lightning.errors import ConfigurationError

SALT = "a salt that nobody can guess"


def files_with(folder, text):
    """Return the files under a folder whose content or name holds a text, as UTF-8 or UTF-16."""
    found = []
    for path in folder.rglob("*"):
        raw = path.read_bytes() if path.is_file() else b""
        if any(text.encode(code) in raw for code in ("utf-8", "utf-16-le")) or text in path.name:
            found.append(path)
    return found


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_SALT", SALT)
    path = write_jsonl(tmp_path / "votes.jsonl", [row(i, user=f"person-{i % 4}") for i in range(40)])

    def make(**settings):
        return PreferenceDataModule(FileSource(path), word_tokenizer(), cache_dir=tmp_path / "cache", **settings)

    return make


def test_a_pseudonym_is_the_keyed_hash_of_the_id():
    expected = hmac.new(SALT.encode(), b"ann", hashlib.sha256).hexdigest()[:32]
    assert Pseudonyms(SALT.encode())("ann") == expected


def test_salts_in_variables_and_files_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_SALT", SALT)
    path = tmp_path / "salt"
    path.write_text(f"{SALT}\n")
    assert Pseudonyms.load("STUDY_SALT")("ann") == Pseudonyms.load(str(path))("ann")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("NO_SUCH_SALT", "the environment variable NO_SUCH_SALT is not set"),
        ("./no/salt", "the file ./no/salt cannot be read"),
        ("SHORT_SALT", "has 5 bytes, fewer than 16"),
    ],
)
def test_a_missing_or_short_salt_is_refused_and_not_quoted(monkeypatch, where, says):
    monkeypatch.setenv("SHORT_SALT", "hello")
    with pytest.raises(ConfigurationError, match=says) as error:
        Pseudonyms.load(where)
    assert "hello" not in str(error.value)
    assert "secrets.token_hex" in str(error.value)


def test_users_are_known_by_their_pseudonyms_alone(make, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    data = make(hash_user_ids_with="STUDY_SALT", validation_fraction=0.2)
    data.prepare_data()
    data.setup("fit")
    assert sorted(data.vocabulary.ids) == sorted(Pseudonyms(SALT.encode())(f"person-{i}") for i in range(4))
    assert data.known_as("person-1") in data.vocabulary
    assert make().known_as("person-1") == "person-1"
    batch = next(iter(data.train_dataloader()))
    assert set(batch.user_ids) <= set(data.vocabulary.ids)
    assert files_with(tmp_path / "cache", "person-") == files_with(tmp_path / "cache", SALT) == []
    assert "person-" not in caplog.text
    assert SALT not in caplog.text + repr(vars(data)) + repr(data.pseudonyms)


def test_without_a_salt_ids_are_found_where_they_are_looked_for(make, tmp_path):
    make().prepare_data()
    assert files_with(tmp_path / "cache", "person-")


def test_a_cache_is_of_one_salt(make, monkeypatch):
    plain, first = make(), make(hash_user_ids_with="STUDY_SALT")
    monkeypatch.setenv("STUDY_SALT", SALT + "!")
    other, again = make(hash_user_ids_with="STUDY_SALT"), make(hash_user_ids_with="STUDY_SALT")
    ids = [data.vocabulary.ids for data in (plain, first, other, again)]
    assert ids[0] == tuple(f"person-{i}" for i in range(4))
    assert ids[2] == ids[3]
    assert len(set(ids)) == 3
