"""A journal keeps what was finished."""

from prlhf_lightning.utils.journal import Journal


def test_a_journal_continues_with_the_same_settings(tmp_path):
    path = tmp_path / "x.progress"
    Journal(path, {"seed": 1}).add("a", {"reward": 1.5})
    with path.open("ab") as file:
        file.write(b'["b", {"rew')  # a line that the kill cut off
    again = Journal(path, {"seed": 1})
    assert again.results == {"a": {"reward": 1.5}}
    assert not again.replaced
    again.add("b", None)
    assert Journal(path, {"seed": 1}).results == {"a": {"reward": 1.5}, "b": None}
    other = Journal(path, {"seed": 2})
    assert other.results == {}
    assert other.replaced
    other.remove()
    assert not path.exists()
