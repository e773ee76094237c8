"""Arguments of chat templates: those of the settings, checked, and the date that templates write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from functools import lru_cache
from string import ascii_letters
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.template_limits import TemplateLimitError

# What `apply_chat_template` takes for itself, or the rows give.
_TAKEN = {
    *(
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "tokenize",
        "padding",
    ),
    *("continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens", "strftime_now"),
}


def check_values(args: Mapping[str, Any], day: str | None) -> None:
    """Refuse arguments that cannot be kept in a checkpoint, or are set elsewhere, and a day that is none."""
    for name in args:
        if not isinstance(name, str) or name in _TAKEN:
            raise ConfigurationError(
                f"chat_template_args: {name!r} is no argument that can be set here; give the chat template's own, such "
                "as {enable_thinking: false}."
            )
    try:
        json.dumps(args)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"chat_template_args is {args!r}; give numbers, strings, true, false, null, and lists and mappings of them."
        ) from error
    if day is not None:
        try:
            date.fromisoformat(day)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"chat_template_date is {day!r}; write a day such as 2026-01-31.") from error


def check_names(args: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that is no Jinja, and arguments that it does not read, which would have no effect."""
    _check_syntax(tokenizer)
    template = _text(tokenizer)
    for name in args:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            has = "does not read it" if template else "is missing"
            raise ConfigurationError(
                f"chat_template_args: {name!r} has no effect, as the tokenizer's chat template {has}; leave it out, or "
                "correct its name."
            )


def _check_syntax(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that is no Jinja, whatever the messages.

    Raises:
        ConfigurationError: Names the line of the template and what is wrong there.
    """
    templates: Any = tokenizer.chat_template or {}
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "1"}], chat_template=template, tokenize=False)
        except TemplateSyntaxError as error:
            raise ConfigurationError(
                f"the tokenizer's chat template (chat_template.jinja, or chat_template in tokenizer_config.json) is no "
                f"valid Jinja: line {error.lineno}: {error.message}; correct it there, or download it again."
            ) from error
        except TemplateLimitError:
            raise
        except Exception:  # templates raise whatever their authors chose, of which rows tell more
            continue


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template of a tokenizer asks for today's date."""
    return "strftime_now" in _text(tokenizer)


@lru_cache
def on_day(template: str, day: str) -> str:
    """Return a chat template for which it is always the first moment of a day, such as `2026-01-31`."""
    then = datetime.combine(date.fromisoformat(day), time())
    codes = [flag + letter for flag in ("", *"-_0^#") for letter in ascii_letters]
    values = {code: then.strftime(f"%{code}") for code in codes}
    known = {code: value for code, value in values.items() if value != f"%{code}"}
    # A macro stands in for the clock that transformers gives to templates, which takes no other from its callers.
    clock = (
        "{% macro strftime_now(format) %}{% set known = " + json.dumps(known) + " %}"
        "{% for text in format.split('%%') %}{{ '' if loop.first else '%' }}{% for part in text.split('%') %}"
        "{% if loop.first %}{{ part }}{% elif part[:2] in known %}{{ known[part[:2]] + part[2:] }}"
        "{% elif part[:1] in known %}{{ known[part[:1]] + part[1:] }}{% else %}{{ '%' + part }}{% endif %}"
        "{% endfor %}{% endfor %}{% endmacro %}"
    )
    # Templates are read with blocks that take the line break after them: this one, not one at the template's start.
    return clock + "\n" + template


def _text(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""
