"""API keys and rates."""

from __future__ import annotations

import re
from hashlib import sha256

import pytest

from prlhf_lightning.cli.main import main
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.serving.auth import KeyRing, RateLimiter, new_key


def test_a_new_key_opens_what_its_entry_says(tmp_path):
    key, entry = new_key('the "a" team', "team-a-*")
    (tmp_path / "keys.toml").write_text(entry)
    ring = KeyRing.load(tmp_path / "keys.toml", {})
    found = ring.find(key)
    assert (found.name, found.may_act_for("team-a-1"), found.may_act_for("ann")) == ('the "a" team', True, False)
    assert ring.find(key[:-1]) is ring.find("") is None
    assert key not in entry


@pytest.mark.parametrize("text", ["😀", "\x7f\x1b\u0085", '"\\n', "[x]", "007", " "])
def test_any_name_and_pattern_can_be_written_to_the_file(tmp_path, text):
    key, entry = new_key(text, text)
    (tmp_path / "keys.toml").write_text(entry, encoding="utf-8", newline="")
    found = KeyRing.load(tmp_path / "keys.toml", {}).find(key)
    assert (found.name, found.users) == (text, text)


def test_a_key_of_the_environment_is_one_more(tmp_path):
    assert not KeyRing.load(None, {})
    assert KeyRing.load(None, {"PRLHF_API_KEY": "secret"}).find("secret").name == "environment"


def test_a_key_that_could_be_guessed_is_warned_of(caplog):
    KeyRing.load(None, {"PRLHF_API_KEY": new_key("a")[0]})
    assert not caplog.text
    KeyRing.load(None, {"PRLHF_API_KEY": "secret"})
    assert "make one with the command api-key" in caplog.text


def test_a_key_is_added_to_a_file_that_its_owner_alone_can_read(tmp_path, capsys, caplog):
    path = tmp_path / "keys.toml"
    for name in ("a", "b"):
        main(["api-key", "--name", name, "--keys", str(path)])
        key = re.search(r"sk-\S+", capsys.readouterr().out)[0]
        assert KeyRing.load(path, {}).find(key).name == name
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SystemExit, match="a key of this name already"):
        main(["api-key", "--name", "a", "--keys", str(path)])
    assert not caplog.text
    path.chmod(0o666)
    KeyRing.load(path, {})
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    "content",
    ["", "not toml", "[a]\n", '[a]\nsha256 = "short"', f'[a]\nsha256 = "{"0" * 64}"\nuser = "*"', 'a = "key"'],
)
def test_a_bad_file_of_keys_is_refused(tmp_path, content):
    (tmp_path / "keys.toml").write_text(content)
    with pytest.raises(ConfigurationError, match=r"keys: .*keys\.toml"):
        KeyRing.load(tmp_path / "keys.toml", {})


def test_two_keys_of_one_name_are_refused(tmp_path):
    (tmp_path / "keys.toml").write_text(f'[environment]\nsha256 = "{sha256(b"x").hexdigest()}"')
    with pytest.raises(ConfigurationError, match="same name"):
        KeyRing.load(tmp_path / "keys.toml", {"PRLHF_API_KEY": "y"})


def test_a_bucket_fills_at_its_rate_and_no_further():
    limiter = RateLimiter(per_minute=60, burst=2)
    assert [limiter.wait("a", now) for now in (0, 0, 0, 0.5, 1.5)] == [0, 0, 1, 0.5, 0]
    assert [limiter.wait("a", 1000) for _ in range(3)] == [0, 0, 1]
    assert limiter.wait("b", 0) == 0


def test_a_limiter_remembers_only_so_many_callers():
    limiter = RateLimiter(per_minute=1, burst=1)
    for i in range(20_000):
        limiter.wait(str(i), 0)
    assert len(limiter._buckets) == 10_000
