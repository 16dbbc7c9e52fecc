"""Model folders with chat templates of every kind, and vLLM's own chat over them."""

from __future__ import annotations

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
