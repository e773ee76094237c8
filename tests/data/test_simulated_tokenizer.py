from random import Random

import pytest

from prlhf_lightning.data.sources.simulated import StyleCorpus
from prlhf_lightning.simulation.blank_model import make_tokenizer
from prlhf_lightning.simulation.grammar import MAX_WORDS, PROMPTS, STYLES, render


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("style", STYLES[::5])
def test_answers_survive_the_tokenizer(tokenizer, style):
    for prompt in PROMPTS[::7]:
        text = render(prompt, style, Random(0))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) <= MAX_WORDS


def test_the_tokenizer_knows_every_word_of_the_corpus(tokenizer):
    for _, row in StyleCorpus(num_rows=500).rows("train"):
        assert tokenizer.unk_token_id not in tokenizer(row["prompt"] + " " + row["chosen"])["input_ids"]


def test_prompts_begin_with_bos_and_special_tokens_differ(tokenizer):
    ids = tokenizer(PROMPTS[0])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == PROMPTS[0]
