"""Which tokens end an answer, for chat templates of the structure that families of models have."""

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.utils.chat_tokens import end_token_ids

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = "{% for m in messages %}<|start|>{{ m.role }}<|header|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
GLM = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
)
COHERE = "{% for m in messages %}<|turn|>{{ m.role }}<|open|>{{ m.content }}<|close|><|end_turn|>{% endfor %}"
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
ASKS_FOR_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('No system message.') }}{% endif %}" + CHATML
REFUSING = "{{ raise_exception('Nothing fits this template.') }}"
ORDINARY = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"


def tokenizer(template, *special, bos="<s>", eos="</s>", plain=()):
    """Make a tokenizer whose ids are BOS 0, EOS 1, and then `special` and `plain` in their order."""
    words = [bos, eos, *special, *plain, "<unk>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in [bos, eos, *special]])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>")
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "special", "ends"),
    [
        (CHATML, ["<|im_start|>", "<|im_end|>"], (1, 3)),
        (LLAMA_2, [], (1,)),
        (LLAMA_3, ["<|start|>", "<|header|>", "<|eot_id|>"], (1, 4)),
        (GEMMA, ["<start_of_turn>", "<end_of_turn>"], (1, 3)),
        (PHI, ["<|user|>", "<|assistant|>", "<|end|>"], (1, 4)),
        (GLM, ["<|user|>", "<|assistant|>"], (1, 2)),
        (PARTS, ["<|im_start|>", "<|im_end|>"], (1, 3)),
        (ASKS_FOR_SYSTEM, ["<|im_start|>", "<|im_end|>"], (1, 3)),
        (None, ["<|im_end|>"], (1,)),
        (REFUSING, ["<|im_end|>"], (1,)),
        (ORDINARY, [], (1,)),
    ],
    ids=[
        "chatml",
        "llama-2",
        "llama-3",
        "gemma",
        "phi",
        "glm",
        "parts",
        "system",
        "no template",
        "refusing",
        "ordinary text",
    ],
)
def test_the_end_of_a_turn_is_found_in_the_template(template, special, ends):
    assert end_token_ids(tokenizer(template, *special)) == ends


def test_a_turn_end_that_is_not_a_special_token_is_not_added():
    assert end_token_ids(tokenizer(CHATML, "<|im_start|>", plain=["<|im_end|>"])) == (1,)


def test_the_last_message_counts_where_earlier_ends_differ():
    made = tokenizer(HARMONY, "<|start|>", "<|message|>", "<|end|>", "<|return|>")
    assert end_token_ids(made) == (1, 5)


def test_a_token_inside_an_end_that_is_known_is_not_added():
    made = tokenizer(COHERE, "<|turn|>", "<|open|>", "<|close|>", eos="<|end_turn|>")
    assert end_token_ids(made) == (1,)


@pytest.mark.parametrize("configured", [3, [3], [1, 3, 3]])
def test_all_ends_of_the_generation_config_count(configured):
    assert end_token_ids(tokenizer(None, "x", "y"), GenerationConfig(eos_token_id=configured)) == (1, 3)


@pytest.mark.parametrize("configured", ["x", ["x"], [[3]], 3.0, True])
def test_generation_config_ends_that_are_no_ids_are_refused(configured):
    with pytest.raises(ConfigurationError, match=r"eos_token_id in generation_config.json .* whole number"):
        end_token_ids(tokenizer(None, "x", "y"), SimpleNamespace(eos_token_id=configured))


@pytest.mark.parametrize("unknown", [-1, 99])
def test_generation_config_ends_that_are_no_tokens_are_left_out(unknown):
    with pytest.warns(UserWarning, match=rf"eos_token_id .* holds {unknown}, which its tokenizer does not have"):
        assert end_token_ids(tokenizer(None, "x"), GenerationConfig(eos_token_id=[unknown, 2])) == (1, 2)


def test_a_generation_config_without_ends_adds_nothing():
    assert end_token_ids(tokenizer(None), GenerationConfig()) == (1,)
    assert end_token_ids(tokenizer(None), SimpleNamespace()) == (1,)


def test_without_eos_the_generation_configs_ends_are_used():
    made = tokenizer(None)
    made.eos_token = None
    assert end_token_ids(made, GenerationConfig(eos_token_id=[0])) == (0,)


def test_one_token_for_everything_is_one_end():
    made = tokenizer(CHATML.replace("<|im_end|>", "{{ eos_token }}"), bos="<|endoftext|>", eos="<|endoftext|>")
    made.pad_token = made.eos_token
    assert end_token_ids(made) == (made.eos_token_id,)
