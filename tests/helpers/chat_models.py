"""Model folders with chat templates of every kind, and vLLM's own chat over them."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fake_engine import MODEL, renderer

MISTRAL_FILES = ("tekken_240718.json", "tekken_240911.json")
# as Gemma 2's: no system message, and user and assistant in turn
NO_SYSTEM = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}<turn>{{ message['role'] + '\n' + message['content'] | trim }}</turn>\n{% endfor %}\
<turn>model\n"""
# as Llama 3.2's and Granite's
DATED = """<|im_start|>system\nToday Date: {{ strftime_now("%d %b %Y") }}\n\n\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}<|im_end|>\n\
{% for message in messages %}{% if message['role'] != 'system' %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}<|im_start|>assistant\n"""
# as Qwen3's
THINKING = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"""
# as SmolLM3's: the prompt prefix has it too
THINKING_HEAD = "{% if enable_thinking %}/think{% else %}/no_think{% endif %}\n" + THINKING

# as Qwen3's, with tools, calls and what tools said
TOOLS = """{% if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}Tools:
{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}{% if not (tools and message.role == 'system') %}\
<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n{% endif %}\
{% if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>\
{% else %}{{ message.content or '' }}{% endif %}\
{% for call in message.tool_calls or [] %}<tool_call>\
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"""
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def with_tools(folder: Path) -> Path:
    """The embedded model's folder with that template, each mark of which is one token."""
    with_template(folder, TOOLS)
    described = json.loads((folder / "tokenizer.json").read_text())
    first = max(described["model"]["vocab"].values()) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for number, mark in enumerate(MARKS):
        row = {"id": first + number, "content": mark, "special": False, **plain}
        described["added_tokens"].append(row)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


def with_template(folder: Path, template: str | None) -> Path:
    """The embedded model's folder, without its weights, with another chat template."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def with_tekken(folder: Path, name: str) -> Path:
    """A folder with Mistral's own tokenizer, as its repositories have it."""
    import mistral_common

    shutil.copy(MODEL / "config.json", folder / "config.json")
    [package] = mistral_common.__path__
    shutil.copy(Path(package) / "data" / name, folder / "tekken.json")
    return folder


def own_chat(
    folder: Path, messages: Sequence[Mapping[str, Any]], mode: str = "auto", **arguments: Any
) -> tuple[int, ...]:
    """What vLLM's ``LLM.chat`` computes for messages."""
    from vllm import LLM

    vllm: Any = renderer(str(folder), mode)
    llm: Any = SimpleNamespace(renderer=vllm, model_config=vllm.model_config, chat_template=None)
    found = LLM._preprocess_chat(llm, [list(messages)], chat_template_kwargs=arguments)
    return tuple(found[0]["prompt_token_ids"])


def server_chat(
    folder: Path,
    messages: Sequence[Mapping[str, Any]],
    tools: Mapping[str, Any],
    mode: str = "auto",
    parser: str = "hermes",
    **arguments: Any,
) -> tuple[int, ...]:
    """What vLLM's server computes for a chat request to the model in a folder."""
    return rendered_by_server(renderer(str(folder), mode), messages, tools, parser, **arguments)


def rendered_by_server(
    vllm: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Mapping[str, Any],
    parser: str = "hermes",
    **arguments: Any,
) -> tuple[int, ...]:
    """Token ids by the code of vLLM's server, as it stands, over this renderer of it."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers.online_renderer import OnlineRenderer

    online = OnlineRenderer(
        vllm.model_config,
        vllm,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        enable_auto_tools=True,
        tool_parser=parser,
    )
    given = {name: value for name, value in tools.items() if value is not None}
    request = ChatCompletionRequest(
        messages=copy.deepcopy(list(messages)), chat_template_kwargs=arguments or None, **given
    )
    found: Any = asyncio.run(online.render_chat(request))
    return tuple(found[1][0]["prompt_token_ids"])
