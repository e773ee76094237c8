# ruff: noqa: RUF001 - DeepSeek's control tokens are written with full-width bars
"""Small tokenizers with the structure, special tokens and chat templates of well-known families, made on the spot."""

import json
import string
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What helps to sleep? Sleep early, walk more and drink water often.",
    "How do I stay calm? Read books, call friends and eat slowly.",
    "user assistant system model human ASSISTANT: USER: ### Instruction: ### Response: [INST] [/INST] <<SYS>>",
    "You are a careful assistant. Answer in one line.\n\nYes.\nNo, thanks.\n",
]
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def with_bos(backend, bos):
    """Have a tokenizer write BOS before a text."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


def byte_level(special, bos=None, split=None, add_prefix_space=False, ordinary=()):
    """Byte-level BPE as GPT-2's (or with Llama-3's and Qwen's regular expression)."""
    backend = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    if split is None:
        backend.pre_tokenizer = bytes_
    else:
        parts = [pre_tokenizers.Split(Regex(split), "isolated"), bytes_]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    return with_bos(backend, bos) if bos else backend


def sentencepiece(scheme="first", added=(), ordinary=(), unigram=False):
    """BPE with byte fallback over `▁` as Mistral's and Llama's (`legacy`: the normalizer writes it), or Unigram."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(
        models.Unigram() if unigram else models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    if unigram:
        trainer = trainers.UnigramTrainer(
            vocab_size=220,
            special_tokens=special,
            unk_token="<unk>",
            initial_alphabet=sorted(string.printable),
            show_progress=False,
        )
    else:
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *bytes_], show_progress=False)
    lines = [line for text in CORPUS for line in text.splitlines()]  # SentencePiece learns from lines
    backend.train_from_iterator(lines, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": unigram}
    if scheme == "legacy":
        content["pre_tokenizer"] = None
        steps = [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    if not unigram:
        steps += [{"type": "ByteFallback"}]
    steps += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": int(scheme != "never"), "stop": 0}]
    content["decoder"] = {"type": "Sequence", "decoders": steps}
    backend = Tokenizer.from_str(json.dumps(content))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in ordinary])
    return with_bos(backend, "<s>")


def _chatml(default_system=""):
    start = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n" + default_system + "<|im_end|>\n' }}{% endif %}"
        if default_system
        else ""
    )
    return start + (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for m in loop_messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}"
    "{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set content = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
#: The system message stands in the last message, and nowhere if that is an answer.
MISTRAL_3 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
    "{% if system is defined and loop.last %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK_V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
#: Prompts end in `<think>`, and the thoughts of answers are left out: no whole conversation begins with its prompt.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
#: Earlier answers get an empty thought, and what a tool answers stands in a user's turn.
GLM_4_5 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set thought = '' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{% if not loop.last %}{% set thought = '' %}{% endif %}"
    "{{ '<|im_start|>assistant\n<think>' + thought + '</think>' + content + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL_SMALL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + '\n\n' }}"
    "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<|assistant|>\n' + m.content + eos_token }}{% elif m.role == 'assistant' %}"
    "{{ '<|assistant|>\n' + m.content + eos_token + '\n' }}{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FALCON = (
    "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ m.role.capitalize() + ': ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' + 'Assistant:' }}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{% set role = {'user': 'USER', 'system': 'SYSTEM'}[m.role] "
    "if m.role != 'assistant' else 'CHATBOT' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
STABLELM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | trim + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_QWEN_ADDED = ("<think>", "</think>", "<tool_response>", "</tool_response>")
_COMMAND_R = ("START_OF_TURN", "END_OF_TURN", "USER", "SYSTEM", "CHATBOT")
_CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_SPM = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
_DEEPSEEK_NAMES = {"bos_token": _DEEPSEEK[0], "eos_token": _DEEPSEEK[1], "pad_token": _DEEPSEEK[1]}
_DEEPSEEK_TURNS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")  # which are added, but not special

#: By name: how the Rust tokenizer is made, its named tokens, its template, and whether that takes a system message.
FAMILIES = {
    "llama-2": (lambda: sentencepiece("legacy"), _SPM, LLAMA_2, True),
    "llama-3": (
        lambda: byte_level(
            ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            bos="<|begin_of_text|>",
            split=GPT4_SPLIT,
        ),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        LLAMA_3,
        True,
    ),
    "mistral-1": (lambda: sentencepiece("first"), _SPM, MISTRAL_1, False),
    "mistral-small": (
        lambda: sentencepiece("first", added=["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]),
        _SPM,
        MISTRAL_SMALL,
        True,
    ),
    "mistral-3": (lambda: sentencepiece("first", added=["[INST]", "[/INST]"]), _SPM, MISTRAL_3, False),
    "gemma": (
        lambda: byte_level(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], bos="<bos>"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        GEMMA,
        False,
    ),
    "gemma-sentencepiece": (
        lambda: sentencepiece("never", added=["<start_of_turn>", "<end_of_turn>"], ordinary=["\n", "\n\n", "\n\n\n"]),
        _SPM,
        GEMMA,
        False,
    ),
    "qwen-2": (
        lambda: byte_level(_CHATML_TOKENS, split=GPT4_SPLIT),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        _chatml("You are a careful assistant."),
        True,
    ),
    "qwen-3": (
        lambda: byte_level(_CHATML_TOKENS, split=GPT4_SPLIT, ordinary=_QWEN_ADDED),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        QWEN_3,
        True,
    ),
    "zephyr": (lambda: sentencepiece("first"), _SPM, ZEPHYR, True),
    "zephyr-always": (lambda: sentencepiece("always"), _SPM, ZEPHYR, True),
    "phi-3": (
        lambda: sentencepiece("legacy", added=["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"]),
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>"},
        PHI_3,
        True,
    ),
    "deepseek-v3": (
        lambda: byte_level(_DEEPSEEK, bos=_DEEPSEEK[0], split=GPT4_SPLIT, ordinary=_DEEPSEEK_TURNS),
        _DEEPSEEK_NAMES,
        DEEPSEEK_V3,
        True,
    ),
    "chatml": (lambda: byte_level(_CHATML_TOKENS), {"eos_token": "<|im_end|>"}, _chatml(), True),
    "chatml-over-base": (lambda: byte_level(_CHATML_TOKENS), {"eos_token": "<|endoftext|>"}, _chatml(), True),
    "vicuna": (lambda: sentencepiece("legacy"), _SPM, VICUNA, True),
    "alpaca": (lambda: byte_level(["<|endoftext|>"]), {"eos_token": "<|endoftext|>"}, ALPACA, True),
    "olmo": (
        lambda: byte_level(["<|endoftext|>", "<|padding|>"]),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
        OLMO,
        True,
    ),
    "falcon": (lambda: byte_level(["<|endoftext|>"]), {"eos_token": "<|endoftext|>"}, FALCON, True),
    "command-r": (
        lambda: byte_level(
            ["<PAD>", "<BOS_TOKEN>", *(f"<|{kind}_TOKEN|>" for kind in _COMMAND_R)],
            bos="<BOS_TOKEN>",
        ),
        {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"},
        COMMAND_R,
        True,
    ),
    "smollm": (
        lambda: byte_level(_CHATML_TOKENS),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        _chatml("You are a helpful assistant."),
        True,
    ),
    "stablelm": (lambda: byte_level(["<|endoftext|>"]), {"eos_token": "<|endoftext|>"}, STABLELM, True),
    "add-prefix-space": (
        lambda: byte_level(_CHATML_TOKENS, add_prefix_space=True),
        {"eos_token": "<|im_end|>"},
        _chatml(),
        True,
    ),
    "unigram": (lambda: sentencepiece("first", unigram=True), _SPM, ZEPHYR, True),
    "unigram-always": (lambda: sentencepiece("always", unigram=True), _SPM, ZEPHYR, True),
    "gpt-2": (lambda: byte_level(["<|endoftext|>"]), {"eos_token": "<|endoftext|>"}, None, False),
    "gpt-2-with-bos": (
        lambda: byte_level(["<bos>", "<eos>"], bos="<bos>"),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        None,
        False,
    ),
}
CHAT_FAMILIES = [name for name, (_, _, template, _) in FAMILIES.items() if template]


@cache
def _backend(name):
    return FAMILIES[name][0]().to_str()


def family(name, template=None):
    """Return the tokenizer of a family, and with another chat template if one is given."""
    _, named, own, _ = FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_backend(name)), **named)
    tokenizer.chat_template = template or own
    return tokenizer


def takes_system(name):
    """Return whether the template of a family takes a system message."""
    return FAMILIES[name][3]


def control_ids(tokenizer):
    """Return the ids of the tokens that make up turns: the special ones, and DeepSeek's, which are not special."""
    added = tokenizer.added_tokens_decoder.items()
    return {number for number, token in added if token.special or "｜" in str(token)}
