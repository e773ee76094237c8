import pickle
import tempfile
from pathlib import Path

import datasets
import pytest
from feedback_helpers import row, word_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import GOOD

from prlhf_lightning.data import DataSource, FileSource, HubSource, SimulatedSource
from prlhf_lightning.data.checks import Inspector
from prlhf_lightning.data.problems import Problem, Problems
from prlhf_lightning.data.readers import read_rows
from prlhf_lightning.data.records import TieError, parse_record
from prlhf_lightning.data.store import FeedbackCache
from prlhf_lightning.data.tokenization import TokenizationSettings
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError, Place

TOKENIZER = word_tokenizer()


def inspect(folder, train, validation=None, min_votes=0, **settings):
    files = {"train": train, "validation": validation}
    paths = {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in files.items() if rows is not None}
    return Inspector(FileSource(**paths), min_votes=min_votes, **settings)()


def kinds(report):
    return {group.kind: group.count for group in report.problems}


def lines(report, kind):
    return [example.line for group in report.problems if group.kind == kind for example in group.examples]


def test_faults_are_counted_and_the_first_of_each_kind_is_kept(tmp_path):
    rows = [row(0), row(1, user=7.5), row(2, user=8.5), row(3, user=9.5), row(4, chosen=" "), row(5)]
    report = inspect(tmp_path, rows, examples=2)
    assert not report.ok
    assert kinds(report) == {"user_id: is of type float": 3, "chosen: is empty": 1}
    assert lines(report, "user_id: is of type float") == [2, 3]
    assert report.splits["train"].accepted == 2


def test_values_and_names_make_no_kinds(tmp_path):
    rows = [{"user_id": "ann", "prompt": "p", "chosen": "a", f"name{i}": "x"} for i in range(5)]
    rows += [row(0, prompt=[{"role": "user", "content": "it's; so"}, {"role": "assistant", "content": "x"}])]
    found = kinds(inspect(tmp_path, rows))
    assert found == {"rejected: is missing": 5, "prompt: ends with an assistant message": 1}


def test_kinds_are_bounded():
    problems = Problems()
    for i in range(1000):
        problems.add("error", Problem.at("train", "a:1", "is odd", "mend it"), f"is odd in way {i}")
    assert len(list(problems)) <= 202
    assert problems.count("error") == 1000


@pytest.mark.parametrize(
    ("name", "content", "where", "place"),
    [
        ("votes.jsonl", '{"a": 1}\n{"a": 1\n', ":2", (2, None)),
        ("votes.json", '[{"a": 1}, [1]]', ":1, row 2", (1, 2)),
        ("votes.csv", "a,b\n1,2\n1\n", ":3", (3, None)),
        ("votes.jsonl", "", "", (None, None)),
    ],
)
def test_an_error_of_a_file_knows_its_place_by_parts(tmp_path, name, content, where, place):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(FeedbackFormatError) as caught:
        list(read_rows(path))
    error = caught.value
    assert (error.where.file, (error.where.line, error.where.row), error.field) == (str(path), place, None)
    assert str(error) == f"{path}{where}: {error.problem}; {error.fix}."


def test_an_error_of_a_row_knows_field_problem_and_fix(tmp_path):
    datasets.Dataset.from_list([row(0), {**row(1), "chosen": None}]).to_parquet(tmp_path / "train.parquet")
    hub = HubSource("parquet", data_files={"train": str(tmp_path / "train.parquet")})
    for source, file in ((FileSource(tmp_path / "train.parquet"), f"{tmp_path}/train.parquet"), (hub, "[train]")):
        ((where, _), (bad_where, bad)) = source.rows("train")
        with pytest.raises(FeedbackFormatError) as caught:
            parse_record(bad, bad_where)
        error = caught.value
        assert (where.line, error.where.line, error.where.row) == (1, 2, None)
        assert error.where.file.endswith(file)
        assert (error.field, error.kind) == ("chosen", "chosen: is null")
        assert (error.problem, error.fix) == ("is null (column 'chosen')", "fill it or drop the row")
        assert str(error) == f"{error.where}: field 'chosen' is null (column 'chosen'); fill it or drop the row."


def test_an_error_may_have_no_place():
    error = FeedbackFormatError("is empty", "fill it", field="prompt")
    assert error.where is None
    assert str(error) == "field 'prompt' is empty; fill it."


def test_errors_keep_their_fields_when_they_are_pickled():
    given = {"fix": "fill it", "field": "prompt", "where": Place("a.json", 1, 37), "kind": "is empty"}
    for error in (FeedbackFormatError("is ''", **given), ConfigurationError("is ''", **given), TieError("x", **given)):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), vars(copy), str(copy)) == (type(error), vars(error), str(error))
        assert (copy.where.file, copy.where.line, copy.where.row) == ("a.json", 1, 37)


def test_repeated_and_contradictory_judgements_name_both_places(tmp_path):
    swapped = row(0, chosen="three four", rejected="one two")
    rows = [row(0), row(1), row(0), row(0, user="bob"), swapped, swapped]
    report = inspect(tmp_path, rows)
    assert report.ok
    assert kinds(report) == {"duplicate judgment in train": 2, "contradictory judgments in train": 1}
    assert lines(report, "duplicate judgment in train") == [3, 6]
    (group,) = (group for group in report.problems if "contra" in group.kind)
    assert group.examples[0].line == 5
    assert f"{tmp_path}/train.jsonl:1" in group.examples[0].problem


def test_what_stands_in_two_splits_is_told_with_both_places(tmp_path):
    swapped = row(1, user="bob", chosen="three four", rejected="one two")
    other = row(2, chosen="five")
    report = inspect(tmp_path, [row(9), row(0), row(1), row(2)], [row(0), swapped, other, row(3)])
    found = {name: count for name, count in kinds(report).items() if name.startswith("same")}
    assert found == {
        "same judgment in train and validation": 1,
        "same pair in train and validation": 2,
        "same prompt in train and validation": 3,
    }
    (group,) = (group for group in report.problems if group.kind.startswith("same judgment"))
    assert (group.examples[0].split, group.examples[0].line) == ("validation", 1)
    assert f"{tmp_path}/train.jsonl:2" in group.examples[0].problem


def test_users_with_few_judgements_or_none_in_training_are_told(tmp_path):
    report = inspect(tmp_path, [row(0), row(1), row(2, "bob")], [row(3, "cy"), row(4)], min_votes=2)
    assert kinds(report) == {"user with fewer than 2 judgments": 1, "user of validation who is not in train": 1}
    assert [group.examples[0].problem.split()[0] for group in report.problems] == ["'bob'", "'cy'"]


def test_ties_are_errors_unless_they_are_dropped(tmp_path):
    rows = [row(0), row(1, rejected="one two")]
    assert not inspect(tmp_path, rows).ok
    report = inspect(tmp_path, rows, ties="drop")
    assert report.ok
    assert report.splits["train"].ties == 1


def test_a_source_that_stops_early_reports_its_rest_as_unread():
    class Breaking(DataSource):
        def splits(self):
            return {"train"}

        def rows(self, split):
            yield "place:1", row(0)
            raise FeedbackFormatError("is broken", "mend it", field="x", where="place:2")

        def fingerprint(self, split):
            return ""

    report = Inspector(Breaking(), min_votes=0)()
    assert report.splits["train"].unread == ["place:2"]
    assert report.splits["train"].rows == 1
    assert kinds(report) == {"x: is broken": 1}


def test_unknown_columns_are_a_mistake_of_settings_not_of_rows(tmp_path):
    with pytest.raises(ConfigurationError, match="no field 'chosn'"):
        Inspector(FileSource(write_jsonl(tmp_path / "a.jsonl", [row(0)]), columns={"chosn": "better"}))()


def test_simulated_data_has_no_fault():
    assert set(kinds(Inspector(SimulatedSource(num_users=4, num_unseen_users=0))())) <= {"duplicate judgment in train"}


def test_rows_that_cannot_be_tokenised_are_told_each_for_itself(tmp_path):
    chat = {"prompt": [{"role": "user", "content": "w1"}]} | {
        name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")
    }
    report = inspect(tmp_path, [row(i, **(chat if i in (2, 7) else {})) for i in range(9)], tokenizer=TOKENIZER)
    (group,) = report.problems
    assert "the tokenizer has no chat template" in group.examples[0].problem
    assert [example.line for example in group.examples] == [3, 8]
    assert report.splits["train"].accepted == 7


@settings(max_examples=60, deadline=None)
@given(
    st.lists(GOOD, min_size=1, max_size=8),
    st.sampled_from([2, 3, 8]),
    st.sampled_from(["truncate", "drop"]),
)
def test_with_a_tokenizer_rows_are_judged_as_in_training(rows, limit, overlong):
    limits = TokenizationSettings(limit, limit, limit, overlong)
    with tempfile.TemporaryDirectory() as folder:
        source = FileSource(write_jsonl(Path(folder) / "votes.jsonl", rows))
        report = Inspector(source, ties="drop", tokenizer=TOKENIZER, settings=limits)()
        try:
            built = (
                FeedbackCache(Path(folder) / "cache", TOKENIZER, limits, "pairs", "drop").open(source, "train").report
            )
        except FeedbackFormatError:  # no row is left
            return
    over = {group.kind.partition(":")[0]: group.count for group in report.problems if ": over " in group.kind}
    assert over == {name: excess.count for name, excess in built.excess.items()}
    found = report.splits["train"]
    assert (found.accepted, found.too_long) == (built.kept, built.too_long)
    assert found.ties == built.ties + built.token_ties
