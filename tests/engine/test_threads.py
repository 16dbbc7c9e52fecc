"""Threads of PyTorch's own, in engines of this process."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from engines import start_in_process
from tiny import Words, make

pytestmark = pytest.mark.vllm


def test_the_program_sets_how_many_threads_pytorch_has(tiny_models: Path) -> None:
    """vLLM plans attention for as many as a new thread has by default, and computes it with as many
    as the program set.
    """
    words = Words(3)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with start_in_process(make("llama", tiny_models)) as blend:
            answers = []
            asks = threading.Thread(
                target=lambda: answers.append(blend.generate(words(60), max_tokens=2))
            )
            asks.start()
            asks.join()
            assert len(answers) == 1 and len(answers[0].token_ids) == 2
    finally:
        torch.set_num_threads(before)
