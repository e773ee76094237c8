"""Short conversations as a chat template writes them, from which its control tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prlhf_lightning.template_limits import TemplateLimitError, limit_templates

limit_templates()  # whatever renders conversations imports this module

#: Stand for a question, an answer and a system message; no template has them in its own text, or changes them.
QUESTION, ANSWER, SYSTEM = "Qzquestion7", "Azanswer7", "Szsystem7"


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> str:
    """Return a conversation as the chat template writes it; nothing where it refuses it or leaves a message out.

    Where the template does not take it as it is, contents are given as lists of parts, which templates of multimodal
    models ask for, and a system message is put before it, without which some templates take no conversation.

    Args:
        tokenizer: The tokenizer, with or without a chat template.
        messages: The conversation. All contents are strings.
        tools: What may be called, or None.

    Raises:
        TemplateLimitError: The template computes without end.
    """
    if not tokenizer.chat_template:
        return ""
    starts: list[list[dict[str, Any]]] = [[]]
    if messages[0]["role"] != "system":
        starts.append([{"role": "system", "content": SYSTEM}])
    for start in starts:
        whole = [*start, *messages]
        as_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in whole]
        for form in (whole, as_parts):
            try:
                text = str(tokenizer.apply_chat_template(form, tools=tools, tokenize=False))
            except TemplateLimitError:
                raise
            except Exception:  # templates raise whatever their authors chose
                continue
            if all(message["content"] in text for message in messages):
                return text
    return ""
