"""Every source is selected and set up by class path, as the command line does it."""

import pytest
import yaml
from jsonargparse import ArgumentParser

from prlhf_lightning import data
from prlhf_lightning.data import DataSource

SOURCES = {
    "FileSource": {"train": ["a.csv", "b.csv"], "validation": ["c.csv"], "test": "d.csv"},
    "TLDRSource": {"files": ["a.json", "b.json"], "policies": "supervised", "most_active": 10, "taste": "length"},
    "PersonalizedSoupsSource": {"folder": "soups", "koala": "koala.json", "prompt_format": "Q: {prompt}"},
    "PRISMSource": {"folder": "prism", "preferences": "displayed", "user_text_template": None},
    "PersonalLLMSource": {"train": "a.parquet", "validation": ["b.parquet"], "num_users": 20},
    "UltraFeedbackPSource": {"folder": "uf", "users": ["helpfulness", "honesty"]},
    "HHRLHFSource": {"folder": "hh", "users": {"anyone": ["helpful-base", "harmless-base"]}},
    "RatingSource": {
        "raw": {"class_path": "prlhf_lightning.data.FileSource", "init_args": {"train": "a.csv"}},
        "columns": {"rating": "stars"},
        "pairs": "adjacent",
    },
    "RankingSource": {
        "raw": {"class_path": "prlhf_lightning.data.HubSource", "init_args": {"path": "some/data", "revision": "1f"}},
        "max_pairs": 2,
    },
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_set_up_from_a_configuration(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=DataSource)
    config = {"source": {"class_path": f"prlhf_lightning.data.{name}", "init_args": SOURCES[name]}}
    parsed = parser.parse_object(config)
    source = parser.instantiate(parsed).source
    assert type(source) is getattr(data, name)
    assert "train" in source.splits()
    written = yaml.safe_load(parser.dump(parsed))["source"]["init_args"]  # as in the config.yaml that a run leaves
    given = {key: value for key, value in SOURCES[name].items() if key != "raw"}
    assert {key: written.get(key) for key in given} == given


@pytest.mark.parametrize("name", ["TLDRSource", "PRISMSource", "PersonalLLMSource", "HHRLHFSource"])
def test_a_source_of_the_hub_needs_no_settings(name):
    source = getattr(data, name)()
    assert source.splits() == {"train", "validation"}
    loaded = {part.source._path for parts in source._parts.values() for part in parts}
    assert loaded <= {"openai/summarize_from_feedback", "HannahRoseKirk/prism-alignment", "namkoong-lab/PersonalLLM",
                      "Anthropic/hh-rlhf"}  # fmt: skip
