"""LlamaIndex's messages as the prompts that our engine takes. No text is changed."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from cacheblend_rag import PromptError

# names that chat templates know, for those that only LlamaIndex uses
_ROLES = {
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}


def to_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Roles and texts for the model's chat template.

    Raises:
        PromptError: a message holds something other than text.
    """
    return [{"role": _ROLES.get(m.role, m.role.value), "content": _text(m)} for m in messages]


def _text(message: ChatMessage) -> str:
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise PromptError(
                f"a message has a {type(block).__name__}, and only text can be served here; "
                "for images, audio or tool calls use another LLM"
            )
    return message.content or ""
