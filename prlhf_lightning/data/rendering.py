"""Feedback records to the exact texts that are tokenised: the user-text format and the chat template, applied."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.records import FeedbackRecord, Message, Text
from prlhf_lightning.data.template_coverage import TemplateCoverage, Tools
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError


@dataclass(frozen=True)
class RenderedRecord:
    """The texts of one record.

    Attributes:
        user_text: Text about the user, empty where there is none.
        prompt: All that stands before the completion, except BOS where `templated` is false.
        chosen: The preferred completion, with what the chat template writes after it, or None.
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

    Attributes:
        tokenizer: Holds the chat template.
        chat_template: Whether plain strings are wrapped as one turn of the chat template. Conversations always are.
        user_text_format: How a user's text is written; `{user_text}` stands for it.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: bool
    user_text_format: str
    _coverage: TemplateCoverage = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_coverage", TemplateCoverage(self._plain_chat))
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

    def __call__(self, record: FeedbackRecord, where: str) -> RenderedRecord:
        """Return the texts of a record that stands at `where`."""
        user_text = self.user_text(record.user_text)
        prompt, templated = self.prompt(record.prompt, where, record.tools)
        if not templated:
            return RenderedRecord(user_text, prompt, record.chosen, record.rejected, False)  # type: ignore[arg-type]
        messages = _messages(record.prompt, "user")
        chosen, rejected = (
            None
            if text is None
            else self._answer(prompt, messages + _messages(text, "assistant"), where, name, record.tools)
            for text, name in zip((record.chosen, record.rejected), record.fields, strict=True)
        )
        return RenderedRecord(user_text, prompt, chosen, rejected, True)

    def user_text(self, text: str | None) -> str:
        """Return how a text about a user is written; nothing where there is none."""
        return self.user_text_format.replace("{user_text}", text) if text else ""

    def prompt(self, prompt: Text, where: str, tools: Tools = None) -> tuple[str, bool]:
        """Return the text of a prompt, up to where the answer begins, and whether the chat template wrote it."""
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
        messages = _messages(prompt, "user")
        text = self._chat(messages, where, "prompt", add_generation_prompt=True, tools=tools)
        self._coverage.check(messages, tools, where, ["prompt"] * len(messages))
        return text, True

    def _plain_chat(self, messages: list[Message], tools: Tools) -> str:
        return self._chat(messages, "", "prompt", add_generation_prompt=False, tools=tools)

    def _chat(
        self, messages: list[Message], where: str, field: str, add_generation_prompt: bool, tools: Tools = None
    ) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # templates raise whatever their authors chose
            fix = "change the roles of the messages or their order"
            if any(message["content"] is None for message in messages):
                fix = 'write "" for the content that is null beside tool calls, if the template cannot take it'
            raise FeedbackFormatError(
                f"{where}: field {field!r} does not fit the tokenizer's chat template ({error}); {fix}."
            ) from error
        return text

    def _answer(self, prompt: str, messages: list[Message], where: str, field: str, tools: Tools = None) -> str:
        """Return what the template writes for the last message after the rendered prompt."""
        whole = self._chat(messages, where, field, add_generation_prompt=False, tools=tools)
        self._coverage.check(messages, tools, where, ["prompt"] * (len(messages) - 1) + [field])
        if not whole.startswith(prompt):
            raise ConfigurationError(
                f"{where}: field {field!r}: the tokenizer's chat template does not render a conversation as its "
                f"prompt followed by the answer (the prompt ends in {prompt[-40:]!r}, where the conversation has "
                f"{whole[len(prompt[:-40]) : len(prompt)]!r}); give the tokenizer a chat_template that does, or use "
                "plain strings."
            )
        answer = whole[len(prompt) :]
        # Many templates write a line break after the end-of-turn token; generation stops before it, so training does.
        return answer.rstrip() if answer.rstrip().endswith(self.tokenizer.eos_token) else answer


def _messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text
