"""Feedback records to the exact texts that are tokenized: the user-text format and the chat template, applied."""

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
from prlhf_lightning.data.schema import FeedbackRecord, Message, Text
from prlhf_lightning.data.special_tokens import MARK, TokenEscaper, unescaped
from prlhf_lightning.data.template_coverage import TemplateCoverage, Tools
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.utils.chat_tokens import end_token_ids
from prlhf_lightning.utils.template_limits import TemplateLimitError

_OPEN = re.compile(r"(<[\w:]+>|\[\w+\])\s*\Z")  # the start of a thought
_CLOSED = re.compile(r"(?:<([\w:]+)>\s*(</\1>)|\[(\w+)\]\s*(\[/\3\]))\s*\Z")  # a thought that is empty
_PRINTED_MARK = repr(MARK)[1:-1]  # as templates write it that print a mapping of Python
_LONGEST_CAUSE = 300  # characters of what a template says
_ANOTHER_QUESTION, _ANOTHER_ANSWER = "Qzquestion7", "Azanswer7"  # which no template has in its own text, or changes


@dataclass(frozen=True)
class RenderedRecord:
    """The texts of one record, control tokens that people wrote marked as text (`TokenEscaper`).

    Attributes:
        user_text: Text about the user, empty where there is none.
        prompt: All that stands before the completion, except what the tokenizer adds where `templated` is false.
        chosen: The preferred completion, up to the token that ends it if it is written there, or None.
        rejected: The other completion, or None.
        templated: Whether a chat template wrote these texts, in which case it decided about BOS too.
    """

    user_text: str
    prompt: str
    chosen: str | None
    rejected: str | None
    templated: bool


@dataclass(frozen=True)
class Renderer:
    """Renders records for one tokenizer.

    In messages, in plain strings that become a message, and in texts about users, control tokens are text. Plain
    strings that are used as they stand keep theirs, as they may be conversations rendered already.

    Attributes:
        tokenizer: Holds the chat template.
        chat_template: Whether plain strings are wrapped as one turn of the chat template. Conversations always are.
        user_text_format: How a user's text is written; `{user_text}` stands for it.
        template_args: Further arguments of the chat template.
        template_date: The day that a chat template writes which asks for today's date, or None for today.
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
        """Return the texts of a record that stands at `where`."""
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
        """Return how a text about a user is written; nothing where there is none."""
        return self.user_text_format.replace("{user_text}", self.escaper.escape(text)) if text else ""

    def prompt(self, prompt: Text, where: str, tools: Tools = None, continued: bool = False) -> tuple[str, bool]:
        """Return the text of a prompt, up to where the answer begins, and whether the chat template wrote it.

        Args:
            prompt: A string or a conversation.
            where: Where it stands.
            tools: What may be called in answering it.
            continued: Whether its last message is the beginning of the answer.
        """
        if isinstance(prompt, str) and not self.chat_template:
            if tools:
                raise FeedbackFormatError(
                    f"{where}: field 'tools' stands beside a prompt that is a plain string, which no chat template "
                    "writes; write the prompt as a list of messages, or leave the tools out."
                )
            return prompt, False
        if not self.tokenizer.chat_template:
            raise ConfigurationError(
                f"{where}: the row is a conversation, but the tokenizer has no chat template; use the tokenizer of a "
                "chat model, set its chat_template, or write prompt and completions as plain strings."
            )
        messages, tools = self._messages(prompt, "user"), self.escaper.within(tools)
        text = self._chat(messages, where, "prompt", not continued, tools, continued)
        self._coverage.check(messages, tools, where, ["prompt"] * len(messages))
        return text, True

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """The tokens that end an answer, as text."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(end_token_ids(self.tokenizer)))
        # A word of the vocabulary that ends answers too is no text to look for.
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
        except Exception as error:  # templates raise whatever their authors chose
            said = " ".join(str(error)[:_LONGEST_CAUSE].split())
            fix = "change the roles of the messages or their order"
            if any(message["content"] is None for message in messages):
                fix = 'write "" for the content that is null beside tool calls, if the template cannot take it'
            raise FeedbackFormatError(
                f"{where}: field {field!r} does not fit the tokenizer's chat template ({said}); {fix}."
            ) from error
        return text.replace(_PRINTED_MARK, MARK)

    def _plain_answer(self, text: Text) -> str:
        """Return a plain completion with one end token at most at its end, and no BOS."""
        assert isinstance(text, str)  # as the prompt is
        bos = self.tokenizer.bos_token
        while bos and text.startswith(bos):
            text = text[len(bos) :]
        kept, end = text, ""
        while found := [one for one in self._ends if kept.rstrip().endswith(one)]:
            end = found[0]
            kept = kept.rstrip()[: -len(end)]
        return kept + end if kept else text

    def _answer(self, prompt: str, messages: list[Message], where: str, field: str, tools: Tools) -> str:
        """Return what the template writes for the last message after the prompt, up to the token that ends it."""
        if closed := _CLOSED.search(prompt):
            messages = [*messages[:-1], _without_thought(messages[-1], closed[2] or closed[4])]
        whole = self._chat(messages, where, field, add_generation_prompt=False, tools=tools)
        # What stands before was checked with the prompt, where all of it must be written.
        self._coverage.check(messages, tools, where, ["prompt"] * (len(messages) - 1) + [field], only_last=True)
        content = str(messages[-1]["content"] or "").strip()
        if whole.startswith(prompt):
            text = whole[len(prompt) :]
        else:
            text = self._after_other_prompt(prompt, messages, whole, where, field, tools)
        start = max(text.find(content), 0) + len(content)
        end = self._end.search(text, start if content in text else 0)
        # Many templates write a line break after the end of a turn; generation stops before it, so training does.
        return text[: end.end()] if end else text

    def _after_other_prompt(
        self, prompt: str, messages: list[Message], whole: str, where: str, field: str, tools: Tools
    ) -> str:
        """Return the answer where the template writes a prompt otherwise than it does before an answer.

        It may end prompts in more, such as `<think>` of DeepSeek-R1, or leave the system message out once there is an
        answer, as Mistral's. Generation starts from the prompt, so the answer follows what the two have in common after
        the last message. Thoughts that the template leaves out of answers are kept.
        """
        *asked, answer = messages
        # Another text in place of the last message shows where that message ends: `hi` may stand elsewhere too.
        marked = [*asked[:-1], {**asked[-1], "content": _ANOTHER_QUESTION}]
        other_answer = {"role": "assistant", "content": _ANOTHER_ANSWER}
        opened = _after_question(self._chat(marked, where, "prompt", True, tools))
        answered, other = (
            _after_question(self._chat([*marked, last], where, field, False, tools)) for last in (answer, other_answer)
        )
        if not (opened and answered and prompt.endswith(opened) and whole.endswith(answered)):
            prompt_end, in_whole = unescaped(prompt[-40:]), unescaped(whole[len(prompt[:-40]) : len(prompt)])
            raise ConfigurationError(
                f"{where}: field {field!r}: the tokenizer's chat template does not render a conversation as its prompt "
                f"followed by the answer (the prompt ends in {prompt_end!r}, where the conversation has {in_whole!r}); "
                "give the tokenizer a chat_template that does, or use plain strings."
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
    """Return an answer without its thought, which ends in `closing` if it stands in the content."""
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
    """Return what stands after `_ANOTHER_QUESTION` in a rendered conversation; nothing where that is missing."""
    return text.rpartition(_ANOTHER_QUESTION)[2] if _ANOTHER_QUESTION in text else ""


def _alike(first: str, second: str) -> int:
    """Return how many characters two texts have in common at their start."""
    differ = (number for number, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


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
