"""An engine in a process of its own, as prefill and decode have: vLLM keeps one set of connectors
for a process. It answers requests that come line by line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
OURS = {
    "kv_connector": "CacheBlendConnector",
    "kv_connector_module_path": "cacheblend_rag.engine.connector",
    "kv_role": "kv_both",
}
MARK = "ANSWER "  # of a line that is no log


def hand_over(folder: Path) -> dict[str, Any]:
    """A connector that hands KV over through a folder."""
    return {
        "kv_connector": "HandOverConnector",
        "kv_connector_module_path": "hand_over",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def ours(**extra: Any) -> dict[str, Any]:
    return {**OURS, "kv_connector_extra_config": extra}


class Answer(NamedTuple):
    """``first``: the log-probabilities of the first token."""

    token_ids: list[int]
    first: list[float]
    params: Mapping[str, Any]
    cached: int

    @property
    def report(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.params["cacheblend"]
        return found

    def is_like(self, other: Answer) -> bool:
        """But for rounding."""
        apart = (torch.tensor(self.first) - torch.tensor(other.first)).abs().max()
        return self.token_ids[:1] == other.token_ids[:1] and bool(apart < 2e-3)


class Engine:
    """vLLM in another process, with these connectors.

    Args:
        processes: vLLM's worker is in one of its own, too.
        variables: of the environment.
    """

    def __init__(
        self,
        model: Path,
        *connectors: Mapping[str, Any],
        processes: bool = False,
        log: Path,
        **variables: str,
    ) -> None:
        whole = dict(connectors[0])
        if len(connectors) > 1:
            held = {"connectors": [dict(one) for one in connectors]}
            whole = {**OURS, "kv_connector": "MultiConnector", "kv_connector_extra_config": held}
            del whole["kv_connector_module_path"]
        paths = [ROOT, ROOT / "kernels", ROOT / "integrations", ROOT / "tests" / "helpers"]
        paths += [Path(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        mine = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            **variables,
        }
        self._log = log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(model), json.dumps(whole)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                env={**os.environ, **mine},
            )

    def ask(self, ids: tuple[int, ...], params: Mapping[str, Any] | None = None) -> Answer:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([ids, params]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                return Answer(*json.loads(line[len(MARK) :]))
        raise RuntimeError(self._log.read_text()[-4000:])

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._process.stdout.close()


def main(model: str, connector: str) -> None:
    from engines import SHARE
    from tiny import VOCAB
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_logprobs=VOCAB,
        enforce_eager=True,
        kv_transfer_config=KVTransferConfig(**json.loads(connector)),
        **{"block_size": 32, **SHARE},
    )
    for line in sys.stdin:
        ids, params = json.loads(line)
        sampling = SamplingParams(
            max_tokens=1 if (params or {}).get("do_remote_decode") else 4,
            temperature=0.0,
            ignore_eos=True,
            logprobs=-1,
            detokenize=False,
            extra_args=None if params is None else {"kv_transfer_params": params},
        )
        prompt: Any = {"prompt_token_ids": ids}
        [output] = llm.generate(prompt, sampling, use_tqdm=False)
        answer = output.outputs[0]
        first = [answer.logprobs[0][token].logprob for token in range(VOCAB)]
        found = [list(answer.token_ids), first, output.kv_transfer_params, output.num_cached_tokens]
        sys.stdout.write(f"{MARK}{json.dumps(found)}\n")
        sys.stdout.flush()
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
