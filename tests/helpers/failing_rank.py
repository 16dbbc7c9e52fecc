"""vLLM's worker, whose second rank can't do what the file that ``ORDER`` names says. A worker is
another process: it takes what it imports along, and nothing that a test has patched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.worker.cpu_worker import CPUWorker

from cacheblend_rag.engine.blend import Blender
from cacheblend_rag.engine.ingest import Ingestor
from cacheblend_rag.engine.torch_executor import TorchExecutor

ORDER = "CACHEBLEND_TEST_FAILS"


def _failing(work: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        if Path(os.environ[ORDER]).read_text() == name and get_tensor_model_parallel_rank() == 1:
            raise MemoryError(f"no memory on purpose in {name}")
        return work(*args, **options)

    return run


for _kind, _name in [
    (Blender, "_load"),
    (TorchExecutor, "__init__"),
    (TorchExecutor, "layer"),
    (TorchExecutor, "ask"),
    (Blender, "_choose"),
    (Ingestor, "_run_prefix"),
]:
    setattr(_kind, _name, _failing(getattr(_kind, _name), _name))


class FailingWorker(CPUWorker):
    """It only has to be imported where workers run."""
