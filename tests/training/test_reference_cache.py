"""The store of reference log-probs: nothing is lost, nothing wrong is ever returned."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import warnings
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.training.reference_cache import ReferenceCache
from prlhf_lightning.utils.hashing import content_key, weights_digest

IDENTITY = {
    "weights": "3f2a",
    "dtype": "float32",
    "tokenizer": "77aa",
    "template": None,
    "chat": False,
    "max_prompt_length": 512,
    "scale": 1.0,
}
FORK = multiprocessing.get_context("fork")


def key(number):
    return content_key([], [number, 7], [number])


def value(number):
    return -np.random.default_rng(number).random(number % 9 + 1, dtype=np.float32)


def store(cache, *numbers):
    cache.put([key(n) for n in numbers], [value(n) for n in numbers])
    cache.flush()


def holds(cache, *numbers):
    found = cache.get([key(n) for n in numbers])
    return all(v is not None and v.tobytes() == value(n).tobytes() for n, v in zip(numbers, found, strict=True))


def segments(folder):
    return sorted(path for path in Path(folder).rglob("*.safetensors") if path.parent.name != "superseded")


def run(*targets):
    """Run functions at the same time, each in a process of its own; return their exit codes."""
    processes = [FORK.Process(target=target, args=args) for target, *args in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


KEYS = st.lists(st.integers(0, 2**40), max_size=4).map(content_key)
ROWS = hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))


@given(batches=st.lists(st.dictionaries(KEYS, ROWS, max_size=6), max_size=5), flush=st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_is_put_comes_back_bit_for_bit_now_and_later(batches, flush):
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        with ReferenceCache(folder, IDENTITY) as cache:
            for batch in batches:
                cache.put(list(batch), list(batch.values()))
                expected |= batch
                if flush:
                    cache.flush()
                found = cache.get(list(expected))
                assert [v.tobytes() for v in found] == [v.tobytes() for v in expected.values()]
        later = ReferenceCache(folder, IDENTITY)
        assert len(later) == len(expected)
        assert all(k in later for k in expected)
        assert [v.tobytes() for v in later.get(list(expected))] == [v.tobytes() for v in expected.values()]


def test_keys_that_nobody_stored_are_not_found(tmp_path):
    cache = ReferenceCache(tmp_path, IDENTITY)
    assert cache.get([key(1), key(2)]) == [None, None]
    store(cache, *range(50))
    assert cache.get([key(n) for n in range(50, 90)]) == [None] * 40
    assert key(50) not in cache
    assert cache.get([]) == []


def test_found_and_missing_keys_keep_their_places(tmp_path):
    cache = ReferenceCache(tmp_path, IDENTITY)
    store(cache, 1, 3)
    cache.put([key(5)], [value(5)])
    found = cache.get([key(n) for n in (5, 2, 3, 3, 4, 1)])
    assert [None if v is None else v.tolist() for v in found] == [
        None if n in (2, 4) else value(n).tolist() for n in (5, 2, 3, 3, 4, 1)
    ]


@given(st.binary(min_size=15, max_size=15), st.integers(0, 15))
@settings(max_examples=30, deadline=None)
def test_keys_with_zero_bytes_stay_apart(rest, place):
    keys = [rest[:place] + bytes([byte]) + rest[place:] for byte in (0, 1, 255)] + [bytes(16)]
    keys = list(dict.fromkeys(keys))
    with tempfile.TemporaryDirectory() as folder:
        cache = ReferenceCache(folder, IDENTITY)
        cache.put(keys, [np.full(2, n) for n in range(len(keys))])
        cache.flush()
        assert [v[0] for v in cache.get(keys)] == list(range(len(keys)))


def test_rows_are_read_only_and_stored_ones_view_the_file(tmp_path):
    cache = ReferenceCache(tmp_path, IDENTITY)
    store(cache, 1)
    cache.put([key(2)], [value(2)])
    stored, waiting = cache.get([key(1), key(2)])
    assert not stored.flags.owndata
    assert not stored.flags.writeable
    assert not waiting.flags.writeable


def test_the_block_that_was_put_may_be_used_again(tmp_path):
    cache = ReferenceCache(tmp_path, IDENTITY)
    block = value(1)
    cache.put([key(1)], [block])
    block[:] = 0
    assert holds(cache, 1)


def test_arrays_outlive_the_cache(tmp_path):
    with ReferenceCache(tmp_path, IDENTITY) as cache:
        store(cache, 1)
        (found,) = cache.get([key(1)])
    shutil.rmtree(tmp_path)
    assert found.tolist() == value(1).tolist()


def test_eight_megabytes_are_written_without_a_flush(tmp_path):
    cache = ReferenceCache(tmp_path, IDENTITY)
    cache.put([key(1)], [np.zeros(2_200_000)])
    assert key(1) in ReferenceCache(tmp_path, IDENTITY)


def test_rows_wait_no_longer_than_a_minute(tmp_path, monkeypatch):
    cache = ReferenceCache(tmp_path, IDENTITY)
    cache.put([key(1)], [value(1)])
    assert not segments(tmp_path)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    cache.put([key(2)], [value(2)])
    assert holds(ReferenceCache(tmp_path, IDENTITY), 1, 2)


def test_a_row_stored_twice_counts_once_and_the_later_counts(tmp_path):
    for number in (3.0, 4.0):
        with ReferenceCache(tmp_path, IDENTITY) as cache:
            cache.put([key(1)] * 2, [np.array([number])] * 2)
            assert len(cache) == 1
    assert ReferenceCache(tmp_path, IDENTITY).get([key(1)])[0].tolist() == [4.0]


@pytest.mark.parametrize("field", IDENTITY)
def test_another_reference_finds_nothing(tmp_path, field):
    store(ReferenceCache(tmp_path, IDENTITY), 1)
    other = ReferenceCache(tmp_path, IDENTITY | {field: "other"})
    assert other.get([key(1)]) == [None]
    assert len(other) == 0
    assert holds(ReferenceCache(tmp_path, dict(reversed(IDENTITY.items()))), 1)


def test_identities_are_told_apart_by_type_too(tmp_path):
    values = [1, 1.0, True, "1", None, "None", "true"]
    assert len({ReferenceCache(tmp_path, {"field": v}).folder for v in values}) == len(values)


def test_the_identity_stands_beside_the_files_for_people(tmp_path):
    cache = ReferenceCache(tmp_path, IDENTITY)
    assert json.loads((cache.folder / "identity.json").read_text())["identity"] == IDENTITY


def test_segments_open_with_safetensors(tmp_path):
    store(ReferenceCache(tmp_path, IDENTITY), 1, 2, 3)
    tensors = load_file(segments(tmp_path)[0])
    assert len(tensors["index"]) == 3
    assert sorted(tensors["values"].tolist()) == sorted(x for n in (1, 2, 3) for x in value(n).tolist())


# Several processes ---------------------------------------------------------------------------------------------------


def test_a_refresh_takes_in_what_others_wrote(tmp_path):
    ours, theirs = (ReferenceCache(tmp_path, IDENTITY) for _ in range(2))
    store(theirs, 1)
    assert key(1) not in ours
    ours.refresh()
    assert holds(ours, 1)


def _write(folder, barrier, first):
    cache = ReferenceCache(folder, IDENTITY)
    barrier.wait()
    for step in range(50):
        # Each number is written by both processes, but for the ends of their ranges.
        store(cache, *range(first + 3 * step, first + 3 * step + 3))
        assert holds(cache, *range(first, first + 3 * step + 3))


def _read(folder, numbers):
    assert holds(ReferenceCache(folder, IDENTITY), *numbers)


def test_two_processes_write_at_once_and_a_third_reads_all(tmp_path):
    reader = ReferenceCache(tmp_path, IDENTITY)
    store(reader, 1000)
    (held,) = reader.get([key(1000)])
    barrier = FORK.Barrier(2)
    assert run((_write, tmp_path, barrier, 0), (_write, tmp_path, barrier, 30)) == [0, 0]
    assert run((_read, tmp_path, [*range(180), 1000])) == [0]
    assert len(segments(tmp_path)) <= 65  # they compacted while they wrote
    assert held.tolist() == value(1000).tolist()
    assert holds(reader, 1000)
    assert len(ReferenceCache(tmp_path, IDENTITY)) == 181


def _die(folder, where, nth):
    calls, real = count(1), getattr(os, where)

    def deadly(*args):
        if next(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    cache = ReferenceCache(folder, IDENTITY)
    setattr(os, where, deadly)
    for number in range(100):
        store(cache, number)


# Every store syncs its file, names it, and syncs the folder. The 65th starts a compaction: a 66th file, then 65 that
# are set aside.
@pytest.mark.parametrize(
    ("where", "nth", "survive"),
    [
        *[("fsync", 2 * nth - 1, nth - 1) for nth in (1, 4, 66)],
        *[("replace", nth, nth - 1) for nth in (1, 4, 66)],
        ("replace", 90, 65),
    ],
)
def test_a_killed_writer_loses_only_what_it_was_writing(tmp_path, where, nth, survive):
    assert run((_die, tmp_path, where, nth)) == [-signal.SIGKILL]
    cache = ReferenceCache(tmp_path, IDENTITY)
    assert holds(cache, *range(survive))
    assert len(cache) == survive
    store(cache, *range(survive, 100))
    assert holds(ReferenceCache(tmp_path, IDENTITY), *range(100))


def _write_for_ever(folder, pipe):
    cache = ReferenceCache(folder, IDENTITY)
    for number in count():
        store(cache, number)
        pipe.send(number)


def test_a_kill_at_any_moment_keeps_what_was_flushed(tmp_path):
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_write_for_ever, args=(tmp_path, sender))
    process.start()
    sender.close()
    while receiver.recv() < 40:
        pass
    process.kill()
    process.join()
    last = 40
    while receiver.poll():
        try:
            last = receiver.recv()
        except EOFError:
            break
    assert holds(ReferenceCache(tmp_path, IDENTITY), *range(last + 1))


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a segment of five rows."""
    folder = tmp_path_factory.mktemp("whole")
    store(ReferenceCache(folder, IDENTITY), *range(5))
    return segments(folder)[0].read_bytes()


def open_with(folder, data):
    """Put a good segment and one of these bytes into a cache; return what it gives, and its warnings."""
    good = ReferenceCache(folder, IDENTITY)
    store(good, 100)
    (good.folder / "1-damaged.safetensors").write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = ReferenceCache(folder, IDENTITY)
        found = cache.get([key(n) for n in range(5)])
        cache.refresh()
        assert holds(cache, 100)
        assert [v is None for v in cache.get([key(n) for n in range(5)])] == [v is None for v in found]
    return found, [str(w.message) for w in caught]


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_yields_a_wrong_value(whole, data):
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    with tempfile.TemporaryDirectory() as folder:
        found, messages = open_with(folder, flipped)
    assert all(v is None or v.tobytes() == value(n).tobytes() for n, v in enumerate(found))
    if any(v is None for v in found):
        assert len(messages) == 1
        assert "1-damaged.safetensors" in messages[0]


@pytest.mark.parametrize("place", [3, -1], ids=["header", "values"])
def test_a_flipped_bit_is_noticed(whole, tmp_path, place):
    flipped = bytearray(whole)
    flipped[place] ^= 1
    found, messages = open_with(tmp_path, flipped)
    assert sum(v is None for v in found) == (1 if place == -1 else 5)
    assert len(messages) == 1


@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_left_out_with_a_warning(whole, share):
    with tempfile.TemporaryDirectory() as folder:
        found, messages = open_with(folder, whole[: int(share * len(whole))])
    assert found == [None] * 5
    assert len(messages) == 1
    assert "1-damaged.safetensors" in messages[0]


def test_the_warning_says_how_much_of_a_truncated_file_is_left(whole, tmp_path):
    _, messages = open_with(tmp_path, whole[:-5])
    assert f"{len(whole) - 5} bytes instead of {len(whole)}" in messages[0]


def test_a_file_of_another_cache_is_left_out_with_a_warning(tmp_path):
    with (
        ReferenceCache(tmp_path, IDENTITY) as own,
        ReferenceCache(tmp_path, {**IDENTITY, "weights": "others"}) as other,
    ):
        store(own, 0)
        store(other, 1)
    shutil.copy(next(other.folder.glob("*.safetensors")), own.folder)
    with pytest.warns(UserWarning, match=f"it belongs to the cache {other.folder.name}"):
        cache = ReferenceCache(tmp_path, IDENTITY)
    assert holds(cache, 0)
    assert cache.get([key(1)]) == [None]


def test_a_damaged_row_that_is_computed_again_stays_mended(whole, tmp_path):
    good = ReferenceCache(tmp_path, IDENTITY)
    (good.folder / "1-damaged.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    cache = ReferenceCache(tmp_path, IDENTITY)
    with pytest.warns(UserWarning, match=r"1-damaged\.safetensors"):
        (lost,) = [n for n, v in enumerate(cache.get([key(n) for n in range(5)])) if v is None]
    store(cache, lost)
    assert holds(cache, *range(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert holds(ReferenceCache(tmp_path, IDENTITY), *range(5))


# Compaction ----------------------------------------------------------------------------------------------------------


def test_compaction_keeps_everything(tmp_path):
    cache = ReferenceCache(tmp_path, IDENTITY)
    for number in range(0, 400, 2):
        store(cache, number, number + 1, number // 3)
    for opened in (cache, ReferenceCache(tmp_path, IDENTITY)):
        assert len(segments(tmp_path)) <= 64
        assert len(opened) == 400
        assert holds(opened, *range(400))


def many_small_segments(folder):
    """Make a cache of 70 segments as if by as many processes; return its own folder."""
    target = ReferenceCache(folder, IDENTITY).folder
    for number in range(70):
        part = ReferenceCache(folder / "parts" / str(number), IDENTITY)
        store(part, number)
        segments(part.folder)[0].replace(target / f"{number}.safetensors")
    return target


def test_many_small_segments_are_compacted_on_opening(tmp_path):
    target = many_small_segments(tmp_path)
    assert holds(ReferenceCache(tmp_path, IDENTITY), *range(70))
    assert len(segments(target)) == 1


def test_opening_succeeds_while_another_process_compacts(tmp_path, monkeypatch):
    many_small_segments(tmp_path)
    real, opened = Path.open, count()

    def compacted_meanwhile(path, *args, **kwargs):
        if path.suffix == ".safetensors" and next(opened) == 30:
            assert run((ReferenceCache, tmp_path, IDENTITY)) == [0]
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", compacted_meanwhile)
    assert holds(ReferenceCache(tmp_path, IDENTITY), *range(70))


def test_nobody_waits_for_a_compaction(tmp_path):
    target = many_small_segments(tmp_path)
    with FileLock(target / "compaction.lock"):
        cache = ReferenceCache(tmp_path, IDENTITY)
        assert holds(cache, *range(70))
        store(cache, 70)
    assert len(segments(target)) == 71
    store(cache, 71)
    assert len(segments(target)) == 1
    assert holds(cache, *range(72))


def test_what_compaction_set_aside_is_deleted_in_time(tmp_path, monkeypatch):
    cache = ReferenceCache(tmp_path, IDENTITY)
    for number in range(70):
        store(cache, number)
    (cache.folder / ".killed.partial").touch()
    size = len(list(tmp_path.rglob("*")))
    assert holds(ReferenceCache(tmp_path, IDENTITY), *range(70))
    assert len(list(tmp_path.rglob("*"))) == size
    later = time.time() + 8 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: later)
    assert holds(ReferenceCache(tmp_path, IDENTITY), *range(70))
    assert not list(tmp_path.rglob("superseded/*")) + list(tmp_path.rglob("*.partial"))


def test_a_failed_compaction_harms_nothing_and_is_not_repeated(tmp_path, monkeypatch):
    real = os.replace

    def forbidden(source, target):
        if "superseded" in str(target):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        real(source, target)

    monkeypatch.setattr(os, "replace", forbidden)
    cache = ReferenceCache(tmp_path, IDENTITY)
    for number in range(80):
        store(cache, number)
    assert len(segments(tmp_path)) == 80 + 1
    assert holds(cache, *range(80))


# Trouble -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing_stored_and_training_goes_on(tmp_path, monkeypatch):
    cache = ReferenceCache(tmp_path, IDENTITY)
    store(cache, 1)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        cache.put([key(2)], [value(2)])
        with pytest.warns(UserWarning, match=r"could not be stored in .*No space left on device"):
            cache.flush()
    assert holds(cache, 1)
    assert cache.get([key(2)]) == [None]
    assert not list(tmp_path.rglob("*.partial"))
    store(cache, 2, 3)  # there is room again
    assert holds(ReferenceCache(tmp_path, IDENTITY), 1, 2, 3)


def test_an_interrupted_flush_can_be_repeated(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    cache = ReferenceCache(tmp_path, IDENTITY)
    cache.put([key(1)], [value(1)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.flush()
    assert not list(tmp_path.rglob("*.partial"))
    cache.flush()
    assert holds(ReferenceCache(tmp_path, IDENTITY), 1)


def test_a_folder_that_cannot_be_made_is_a_configuration_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"Cannot create the reference cache in .*file.*Set a writable folder"):
        ReferenceCache(tmp_path / "file", IDENTITY)


def test_the_folder_may_be_deleted_at_any_time(tmp_path):
    cache = ReferenceCache(tmp_path, IDENTITY)
    store(cache, 1)
    shutil.rmtree(cache.folder)
    assert holds(cache, 1)
    store(cache, 2)
    later = ReferenceCache(tmp_path, IDENTITY)
    assert later.get([key(1)]) == [None]
    assert holds(later, 2)
    assert (later.folder / "identity.json").exists()


# Keys and digests ----------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 3), max_size=3)


@given(st.lists(IDS, max_size=3), st.lists(IDS, max_size=3))
def test_keys_are_equal_only_for_equal_parts(one, other):
    assert (content_key(*one) == content_key(*other)) == (one == other)


def test_keys_do_not_depend_on_how_the_ids_are_held():
    ids = np.arange(24)
    keys = {content_key(x) for x in (ids, ids.tolist(), ids.astype(np.int32), np.repeat(ids, 2)[::2], tuple(ids))}
    assert len(keys) == 1
    assert len(keys.pop()) == 16


def weights():
    draw = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(300, 500, generator=draw),  # more than two blocks
        "b": torch.randn(300, 500, generator=draw),
        "half": torch.randn(33, 7, generator=draw).bfloat16(),
        "double": torch.randn(8, generator=draw).double(),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
        "packed": torch.arange(13, dtype=torch.uint8),
    }


BEFORE = weights_digest(weights().items())


@given(st.sampled_from(["a", "half", "double", "scalar", "packed"]), st.data())
@settings(max_examples=40, deadline=None)
def test_one_changed_bit_is_noticed(name, data):
    changed = weights()
    raw = changed[name].reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert weights_digest(changed.items()) != BEFORE


CHANGES = {
    "two parameters swapped": lambda w: w | {"a": w["b"], "b": w["a"]},
    "one renamed": lambda w: {name.replace("half", "quarter"): t for name, t in w.items()},
    "one missing": lambda w: {name: t for name, t in w.items() if name != "empty"},
    "rows permuted": lambda w: w | {"a": w["a"][torch.randperm(300)]},
    "rows rolled by a block": lambda w: w | {"a": w["a"].flatten().roll(1 << 16).reshape(300, 500)},
    "neighbors swapped": lambda w: w | {"double": w["double"][[1, 0, 2, 3, 4, 5, 6, 7]]},
    "negated": lambda w: w | {"a": -w["a"]},
    "negated, eight bytes each": lambda w: w | {"double": -w["double"]},
    "two signs flipped": lambda w: w | {"a": w["a"] * (1 - 2.0 * (torch.arange(150_000) % 70_000 == 1)).view(300, 500)},
    "transposed": lambda w: w | {"a": w["a"].T},
    "another shape": lambda w: w | {"a": w["a"].reshape(500, 300)},
    "same bits, another dtype": lambda w: w | {"a": w["a"].view(torch.int32)},
    "another precision": lambda w: w | {"half": w["half"].float()},
    "longer by zeros": lambda w: w | {"packed": torch.cat([w["packed"], w["packed"].new_zeros(1)])},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_digest_notices(change):
    assert weights_digest(change(weights()).items()) != BEFORE


SAME = {
    "another order": lambda w: dict(reversed(w.items())),
    "strided": lambda w: w | {"a": w["a"].T.contiguous().T},
    "at an odd place in storage": lambda w: (
        w | {"half": torch.cat([w["half"].new_zeros(1), w["half"].flatten()])[1:].view(33, 7)}
    ),
    "a parameter": lambda w: w | {"a": torch.nn.Parameter(w["a"])},
}


@pytest.mark.parametrize("same", SAME.values(), ids=SAME)
def test_the_digest_does_not_depend_on_how_weights_are_held(same):
    assert weights_digest(same(weights()).items()) == BEFORE


def test_the_digest_does_not_depend_on_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert weights_digest(weights().items()) == BEFORE
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_digest_does_not_depend_on_the_device():
    assert weights_digest((name, t.cuda()) for name, t in weights().items()) == BEFORE


def test_the_digest_is_the_same_in_every_release():
    """If this fails, every cache on disk is lost to its owner: say so in the changelog."""
    assert weights_digest([("w", torch.arange(100_000, dtype=torch.int64) ** 2)])[:16] == "2f506f7bce54d980"
