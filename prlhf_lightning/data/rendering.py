"""Rendering of feedback records to the texts that are tokenized, with the user-text format and the chat template."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cached_property, lru_cache
from string import ascii_letters
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.conversations import THOUGHTS
from prlhf_lightning.data.records import FeedbackRecord, Message, Text
from prlhf_lightning.data.special_tokens import MARK, TokenEscaper, unescaped
from prlhf_lightning.data.template_coverage import TemplateCoverage, Tools
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.utils.chat_tokens import end_token_ids
from prlhf_lightning.utils.template_limits import TemplateLimitError

_OPEN = re.compile(r"(<[\w:]+>|\[\w+\])\s*\Z")  # the start of a thought
_CLOSED = re.compile(r"(?:<([\w:]+)>\s*(</\1>)|\[(\w+)\]\s*(\[/\3\]))\s*\Z")  # an empty thought
_PRINTED_MARK = repr(MARK)[1:-1]  # the mark in templates that print a Python mapping
_LONGEST_CAUSE = 300  # characters of a template's error message
_ANOTHER_QUESTION, _ANOTHER_ANSWER = "Qzquestion7", "Azanswer7"  # placeholders that no template contains or changes


@dataclass(frozen=True)
class RenderedRecord:
    """The texts of one record, with user-written control tokens marked as text (`TokenEscaper`).

    Attributes:
        user_text: Text about the user, empty if there is none.
        prompt: The whole text before the completion; if `templated` is false, the tokenizer still adds BOS.
        chosen: The preferred completion, with its end token if the text has one, or None.
        rejected: The other completion, or None.
        templated: Whether a chat template wrote these texts; it then also decided about BOS.
    """

    user_text: str
    prompt: str
    chosen: str | None
    rejected: str | None
    templated: bool


@dataclass(frozen=True)
class Renderer:
    """Renders records for one tokenizer.

    Control tokens are escaped in messages, in plain strings that become a message, and in texts about users. Plain
    strings used without a chat template keep them, because they may be conversations that are already rendered.

    Attributes:
        tokenizer: Has the chat template.
        chat_template: Wrap plain strings as one turn of the chat template. Conversations always use it.
        user_text_format: Format of a user's text; `{user_text}` is replaced by the text.
        template_args: Extra arguments of the chat template.
        template_date: Date for chat templates that ask for today's date; None for today.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: bool
    user_text_format: str
    template_args: Mapping[str, Any] = field(default_factory=dict)
    template_date: str | None = None

    def __post_init__(self) -> None:
        if self.chat_template and not self.tokenizer.chat_template:
            raise ConfigurationError(
                "chat_template is true, but the tokenizer has no chat template; "
                "set it to false, or use the tokenizer of a chat model."
            )
        if "{user_text}" not in self.user_text_format:
            raise ConfigurationError(
                f"user_text_format is {self.user_text_format!r}; it must contain {{user_text}}, "
                "which stands for the user's text."
            )

    @cached_property
    def escaper(self) -> TokenEscaper:
        """The control tokens of the tokenizer."""
        return TokenEscaper(self.tokenizer)

    @cached_property
    def _coverage(self) -> TemplateCoverage:
        return TemplateCoverage(self._plain_chat)

    def __call__(self, record: FeedbackRecord, where: str) -> RenderedRecord:
        """Return the texts of a record with location `where`."""
        user_text = self.user_text(record.user_text)
        prompt, templated = self.prompt(record.prompt, where, record.tools)
        if not templated:
            chosen, rejected = (
                None if text is None else self._plain_answer(text) for text in (record.chosen, record.rejected)
            )
            return RenderedRecord(user_text, prompt, chosen, rejected, False)
        messages = self._messages(record.prompt, "user")
        tools = self.escaper.within(record.tools)
        chosen, rejected = (
            None
            if text is None
            else self._answer(prompt, [*messages, *self._messages(text, "assistant")], where, name, tools)
            for text, name in zip((record.chosen, record.rejected), record.fields, strict=True)
        )
        return RenderedRecord(user_text, prompt, chosen, rejected, True)

    def user_text(self, text: str | None) -> str:
        """Return the formatted text about a user; empty if there is none."""
        return self.user_text_format.replace("{user_text}", self.escaper.escape(text)) if text else ""

    def prompt(self, prompt: Text, where: str, tools: Tools = None, continued: bool = False) -> tuple[str, bool]:
        """Return the text of a prompt up to the start of the answer, and whether the chat template wrote it.

        Args:
            prompt: A string or a conversation.
            where: Location of the prompt.
            tools: Tool definitions, or None.
            continued: Whether its last message is the beginning of the answer.
        """
        if isinstance(prompt, str) and not self.chat_template:
            if tools:
                raise FeedbackFormatError(
                    "stands beside a prompt that is a plain string, which no chat template writes",
                    "write the prompt as a list of messages, or leave the tools out",
                    field="tools",
                    where=where,
                )
            return prompt, False
        if not self.tokenizer.chat_template:
            raise ConfigurationError(
                "the row is a conversation, but the tokenizer has no chat template",
                "use the tokenizer of a chat model, set its chat_template, or write prompt and completions as plain "
                "strings",
                where=where,
            )
        messages, tools = self._messages(prompt, "user"), self.escaper.within(tools)
        text = self._chat(messages, where, "prompt", not continued, tools, continued)
        self._coverage.check(messages, tools, where, ["prompt"] * len(messages))
        return text, True

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """The end tokens of an answer, as text."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(end_token_ids(self.tokenizer)))
        # Ordinary words that are configured as end tokens are not searched in the text.
        known = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        return tuple(token for token in tokens if token in known)

    @cached_property
    def _end(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self._ends, key=len, reverse=True))))

    def _messages(self, text: Text, role: str) -> list[Message]:
        messages = [{"role": role, "content": text}] if isinstance(text, str) else text
        return self.escaper.escape_messages(messages)

    def _plain_chat(self, messages: list[Message], tools: Tools) -> str:
        return self._chat(messages, "", "prompt", add_generation_prompt=False, tools=tools)

    def _chat(
        self,
        messages: list[Message],
        where: str,
        field: str,
        add_generation_prompt: bool,
        tools: Tools = None,
        continue_final_message: bool = False,
    ) -> str:
        day, template = self.template_date, None
        try:
            if day is not None:
                template = on_day(self.tokenizer.get_chat_template(tools=tools), day)
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **self.template_args,
            )
        except TemplateLimitError:
            raise
        except Exception as error:  # templates may raise any error
            said = " ".join(str(error)[:_LONGEST_CAUSE].split())
            fix = "change the roles of the messages or their order"
            if any(message["content"] is None for message in messages):
                fix = 'write "" for the content that is null beside tool calls, if the template cannot take it'
            kind = "does not fit the tokenizer's chat template"
            raise FeedbackFormatError(f"{kind} ({said})", fix, field=field, where=where, kind=kind) from error
        return text.replace(_PRINTED_MARK, MARK)

    def _plain_answer(self, text: Text) -> str:
        """Return a plain completion without BOS, and with at most one end token."""
        assert isinstance(text, str)  # because the prompt is
        bos = self.tokenizer.bos_token
        while bos and text.startswith(bos):
            text = text[len(bos) :]
        kept, end = text, ""
        while found := [one for one in self._ends if kept.rstrip().endswith(one)]:
            end = found[0]
            kept = kept.rstrip()[: -len(end)]
        return kept + end if kept else text

    def _answer(self, prompt: str, messages: list[Message], where: str, field: str, tools: Tools) -> str:
        """Return the template's text of the last message after the prompt, up to and including its end token."""
        if closed := _CLOSED.search(prompt):
            messages = [*messages[:-1], _without_thought(messages[-1], closed[2] or closed[4])]
        whole = self._chat(messages, where, field, add_generation_prompt=False, tools=tools)
        # The earlier messages were checked with the prompt, which must be complete.
        self._coverage.check(messages, tools, where, ["prompt"] * (len(messages) - 1) + [field], only_last=True)
        content = str(messages[-1]["content"] or "").strip()
        if whole.startswith(prompt):
            text = whole[len(prompt) :]
        else:
            text = self._after_other_prompt(prompt, messages, whole, where, field, tools)
        start = max(text.find(content), 0) + len(content)
        end = self._end.search(text, start if content in text else 0)
        # Many templates write a line break after the end of a turn; like generation, training stops before it.
        return text[: end.end()] if end else text

    def _after_other_prompt(
        self, prompt: str, messages: list[Message], whole: str, where: str, field: str, tools: Tools
    ) -> str:
        """Return the answer if the template writes a prompt differently with and without an answer.

        A template may add text at the end of prompts, such as `<think>` of DeepSeek-R1, or omit the system message when
        there is an answer, such as Mistral's. Generation starts from the prompt, so the answer starts after the part
        that both texts share after the last message. Thoughts that the template omits from answers are kept.
        """
        *asked, answer = messages
        # Replace the last message by a placeholder to find its end: its text, such as `hi`, may occur elsewhere.
        marked = [*asked[:-1], {**asked[-1], "content": _ANOTHER_QUESTION}]
        other_answer = {"role": "assistant", "content": _ANOTHER_ANSWER}
        opened = _after_question(self._chat(marked, where, "prompt", True, tools))
        answered, other = (
            _after_question(self._chat([*marked, last], where, field, False, tools)) for last in (answer, other_answer)
        )
        if not (opened and answered and prompt.endswith(opened) and whole.endswith(answered)):
            prompt_end, in_whole = unescaped(prompt[-40:]), unescaped(whole[len(prompt[:-40]) : len(prompt)])
            kind = "the tokenizer's chat template does not render a conversation as its prompt followed by the answer"
            raise ConfigurationError(
                f"{kind} (the prompt ends in {prompt_end!r}, where the conversation has {in_whole!r})",
                "give the tokenizer a chat_template that does, or use plain strings",
                field=field,
                where=where,
                kind=kind,
            )
        if prompt.removesuffix(opened) != whole.removesuffix(answered):
            warnings.warn(
                "The chat template writes a prompt otherwise once it is answered; prompts are written as for "
                "generation, and answers follow them.",
                stacklevel=2,
            )
        shared = min(_alike(opened, answered), _alike(answered, other))
        text, thought = answered[shared:], _OPEN.search(opened, shared)
        if thought is None:
            return text
        opening, closing = thought[1], thought[1][0] + "/" + thought[1][1:]
        content = str(answer["content"] or "").strip()
        if closing in content:
            said = content.rpartition(closing)[2].strip()
            return content.removeprefix(opening).lstrip("\n") + text[max(text.find(said), 0) + len(said) :]
        warnings.warn(
            f"The chat template ends prompts in {opening!r}, and answers without {closing!r} are trained as what "
            "follows it. Write the thoughts into the answers, or turn them off if the template can "
            "(chat_template_args, such as {enable_thinking: false}).",
            stacklevel=2,
        )
        return text


def _without_thought(answer: Message, closing: str) -> Message:
    """Return an answer without its thought; a thought in the content ends with `closing`."""
    content = answer["content"]
    without = {name: value for name, value in answer.items() if name not in THOUGHTS}
    if content and closing in content:
        without["content"] = content.rpartition(closing)[2].lstrip("\n")
    if without != answer:
        warnings.warn(
            f"The chat template ends prompts in an empty thought ({closing!r}), so the thoughts of answers are left "
            "out. To train on thoughts, turn them on if the template can (chat_template_args, such as "
            "{enable_thinking: true}).",
            stacklevel=2,
        )
    return without


def _after_question(text: str) -> str:
    """Return the text after `_ANOTHER_QUESTION` in a rendered conversation; empty if it is missing."""
    return text.rpartition(_ANOTHER_QUESTION)[2] if _ANOTHER_QUESTION in text else ""


def _alike(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    differ = (number for number, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


# Arguments of `apply_chat_template` itself, or given by the rows.
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
    """Reject arguments that a checkpoint cannot store or that are set elsewhere, and an invalid date."""
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
    """Reject a chat template with invalid Jinja syntax, and arguments that the template does not use."""
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
    """Reject a chat template with invalid Jinja syntax.

    Raises:
        ConfigurationError: The syntax is invalid; the message gives the line and the error.
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
        except Exception:  # templates may raise any error; rendering a row reports it
            continue


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template of a tokenizer asks for today's date."""
    return "strftime_now" in _text(tokenizer)


@lru_cache
def on_day(template: str, day: str) -> str:
    """Return a chat template with a fixed date, such as `2026-01-31`, at midnight."""
    then = datetime.combine(date.fromisoformat(day), time())
    codes = [flag + letter for flag in ("", *"-_0^#") for letter in ascii_letters]
    values = {code: then.strftime(f"%{code}") for code in codes}
    known = {code: value for code, value in values.items() if value != f"%{code}"}
    # A macro replaces the clock that transformers passes to templates; callers cannot replace it.
    clock = (
        "{% macro strftime_now(format) %}{% set known = " + json.dumps(known) + " %}"
        "{% for text in format.split('%%') %}{{ '' if loop.first else '%' }}{% for part in text.split('%') %}"
        "{% if loop.first %}{{ part }}{% elif part[:2] in known %}{{ known[part[:2]] + part[2:] }}"
        "{% elif part[:1] in known %}{{ known[part[:1]] + part[1:] }}{% else %}{{ '%' + part }}{% endif %}"
        "{% endfor %}{% endfor %}{% endmacro %}"
    )
    # A block removes the line break after it; here its own line break, not one at the template's start.
    return clock + "\n" + template


def _text(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""
