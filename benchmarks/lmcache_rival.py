"""Time to first token of LMCache's CacheBlend, on vLLM 0.26 by a shim, and of plain vLLM.

    pip install --no-deps lmcache==0.5.3
    pip install uvicorn==0.54.0 aiofile==3.12.3 sortedcontainers cryptography
    python benchmarks/lmcache_rival.py --shape llama-8b --size 6x1024

**LMCache 0.5.3 cannot blend on stock vLLM 0.26**: nobody hands its blender the model, and its
kernel for one layer's KV does not know vLLM's layout. What runs is LMCache plus our ``shim``, no
setup that its authors support: say so beside every figure. The shim's copies are plain torch, two
kernels a layer where a native one would be one. Figures of an H100:
``results/latency_ahead_h100_2026-11-25.md``.

It needs this project's environment with vLLM 0.26 and torch 2.11, which LMCache's binaries load on;
without ``--no-deps`` pip replaces packages of vLLM's.

A prompt is a prompt prefix, the chunks and a question, LMCache's separator between them; plain vLLM
gets the same tokens. The chunks are stored by sending them once; each round then shuffles them and
asks anew. Both engines are eager, without vLLM's prefix cache, in turn in processes of their own.
Modes:

- ``lmcache R``: recomputes the share R, less two costs of LMCache that are not blending (``Costs``)
- ``lmcache R as shipped``: with them
- ``miss``: nothing to reuse or to save, which is what LMCache's engine costs by itself

Each request but a miss must be found whole and blended; KV written to vLLM's cache is read back;
layer 0's reused K, which depends on token and position only, is compared with fresh K after a
shuffle. What fails ends the run with its traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from shapes import COMMON, SHAPES, Words, size

BLENDABLE = [name for name, s in SHAPES.items() if s["model_type"] in ("llama", "qwen2", "qwen3")]
SEPARATOR = (674, 674, 220)  # LMCache's " # # " in Llama 3's vocabulary, less the token it drops
HEAD = 48
TOLERANCE = 0.05  # of K, for bfloat16's rounding; K at a wrong position is some 1 apart
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_LOCAL_CPU": "True",
    "LMCACHE_MAX_LOCAL_CPU_SIZE": "3",  # GB
    "LMCACHE_ENABLE_BLENDING": "True",
    "LMCACHE_USE_LAYERWISE": "True",
    "LMCACHE_BLEND_CHECK_LAYERS": "1",
    "LMCACHE_BLEND_RECOMPUTE_RATIOS": "0.15",
}


class Row(NamedTuple):
    """One request."""

    ttft_s: float
    hit: int  # tokens that LMCache's lookup found
    cached: int  # tokens that vLLM was told not to compute
    recomputed: int | None = None  # tokens that the blender recomputed, if it blended


@dataclass
class Watch:
    """What is seen of LMCache while it serves."""

    hits: list[int] = field(default_factory=list)  # one a request
    recomputed: list[int] = field(default_factory=list)  # tokens, one a blend
    checking: bool = False
    read_back: bool | None = None  # did vLLM's cache hold what was written?
    distance: float = math.inf  # of layer 0's reused K from fresh K, relative
    compared: int = 0  # tokens of that


class Mode(NamedTuple):
    """How LMCache serves a request; without a ratio there is nothing to reuse."""

    ratio: float | None
    tuned: bool = True


# The shim


def shim(watch: Watch) -> None:
    """What LMCache 0.5.3 needs to blend on vLLM 0.26."""
    import lmcache.c_ops as ops
    import lmcache.v1.token_database as token_database
    from lmcache.integration.vllm.utils import ENGINE_NAME
    from lmcache.v1.compute.models.utils import VLLMModelTracker
    from vllm.v1.worker.gpu_worker import Worker

    initialize = Worker.initialize_from_config

    def registered(self: Any, *args: Any, **kwargs: Any) -> Any:
        VLLMModelTracker.register_model(ENGINE_NAME, self.model_runner.get_model())
        return initialize(self, *args, **kwargs)

    Worker.initialize_from_config = registered
    ops.single_layer_kv_transfer = transfer(ops, watch)
    # random weights have no tokenizer; it is asked for the separator, less its first token
    tokenizer = SimpleNamespace(encode=lambda _: [0, *SEPARATOR])
    token_database.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _: tokenizer)


def transfer(ops: Any, watch: Watch) -> Callable[..., None]:
    """``single_layer_kv_transfer`` for a layer with K and V side by side in its last axis.

    vLLM 0.26 has [block, token, head, 2 * dim] or [block, head, token, 2 * dim], and strides of its
    own; all are indexed through a view.
    """
    import torch

    formats = ops.EngineKVFormat
    last: list[Any] = [None, None]

    def move(
        buffer: Any, layer: Any, slots: Any, direction: Any, layout: Any, token_major: bool = False
    ) -> None:
        assert layout in (formats.NL_X_NB_BS_NH_CS, formats.NL_X_NB_NH_BS_CS), layout
        pages = layer if layout == formats.NL_X_NB_BS_NH_CS else layer.transpose(1, 2)
        block, dim = pages.shape[1], pages.shape[3] // 2
        if last[0] is not slots:  # one request's slots serve all its layers
            last[:] = slots, (torch.div(slots, block, rounding_mode="floor"), slots % block)
        at = last[1]
        k, v = buffer.unbind(1 if token_major else 0)
        k, v = (part.view(-1, pages.shape[2], dim) for part in (k, v))
        if direction == ops.TransferDirection.H2D:
            pages[..., :dim].index_put_(at, k)
            pages[..., dim:].index_put_(at, v)
            if watch.checking:
                same = torch.equal(pages[at], torch.cat([k, v], dim=-1))
                watch.read_back = same and watch.read_back is not False
        else:
            held = pages[at]
            k.copy_(held[..., :dim])
            v.copy_(held[..., dim:])

    return move


def observe(watch: Watch) -> None:
    """Let LMCache note hits and blends; changes nothing that it does."""
    from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorV1Impl
    from lmcache.v1.compute.blend.blender import LMCBlender

    match, process = LMCacheConnectorV1Impl.get_num_new_matched_tokens, LMCBlender.process_qkv

    def matched(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.hits.append(match(self, *args, **kwargs))
        return watch.hits[-1]

    def processed(self: Any, q: Any, k: Any, v: Any, residual: Any, layer: int, *args: Any) -> Any:
        result = process(self, q, k, v, residual, layer, *args)
        if layer in self.common_metadata.check_layers:
            watch.recomputed.append(len(self.metadata.imp_indices))
        if layer == 0 and watch.checking:
            fresh, held = result[1].float(), self.gpu_connector.get_kv(0)[0].float()
            kept = held.abs().sum(1) > 0  # separators are zeros: LMCache stores none
            watch.distance = float((held - fresh)[kept].norm() / fresh[kept].norm())
            watch.compared = int(kept.sum())
        return result

    LMCacheConnectorV1Impl.get_num_new_matched_tokens = matched
    LMCBlender.process_qkv = processed


class Costs:
    """Two costs of LMCache 0.5.3, within the time to first token, that are not blending.

    It logs a warning for each chunk and layer of a hit (a pin undone twice). And its cos/sin table
    stays where it was made, and is copied whole to the GPU for each layer if that is the CPU.
    """

    def __init__(self, blender: Any) -> None:
        import torch

        self._rope = blender.layerwise_model.fused_rotary_emb
        self._shipped = self._rope.cos_sin_cache
        self.device = self._shipped.device
        self._moved = self._shipped.cuda() if torch.cuda.is_available() else self._shipped

    def take(self, away: bool) -> None:
        """Take them away, or put them back."""
        self._rope.cos_sin_cache = self._moved if away else self._shipped
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("lmcache"):
                logging.getLogger(name).setLevel(logging.ERROR if away else logging.INFO)


# Each engine, in a process of its own


class Asker:
    """An engine, and prompts for it: the same random chunks in either process."""

    def __init__(self, args: argparse.Namespace, folder: str, **options: Any) -> None:
        from vllm import LLM

        chunks, tokens = args.size
        self.reusable = HEAD + chunks * (tokens + len(SEPARATOR))
        longest = self.reusable + len(SEPARATOR) + args.question_tokens + 64
        self._llm = LLM(  # all of a prompt in one step
            folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            enforce_eager=True, enable_prefix_caching=False, async_scheduling=False,
            max_model_len=longest, max_num_batched_tokens=max(8192, longest), max_num_seqs=8,
            gpu_memory_utilization=args.gpu_memory_utilization,
            attention_backend=args.attention_backend, **options,
        )  # fmt: skip
        self._words, self._question = Words(args.shape), args.question_tokens
        self._parts = [self._words(n) for n in (HEAD, *[tokens] * chunks)]

    def shuffle(self) -> None:
        head, *chunks = self._parts
        self._words.draw.shuffle(chunks)
        self._parts = [head, *chunks]

    def ask(self, *, new: bool = False) -> tuple[float, int]:
        """Seconds to the first token, and the tokens that vLLM was told not to compute.

        Args:
            new: chunks that nobody has seen, which LMCache is not to save.
        """
        from vllm import SamplingParams

        parts = [self._words(len(part)) for part in self._parts] if new else self._parts
        tokens = [t for part in parts for t in part + SEPARATOR] + [*self._words(self._question)]
        extra = {"kv_transfer_params": {"lmcache.skip_save": True}} if new else None
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=extra)
        start = time.perf_counter()
        (output,) = self._llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        return time.perf_counter() - start, output.num_cached_tokens


def modes_of(ratios: Sequence[float]) -> dict[str, Mode]:
    modes = {f"lmcache {ratio:g}": Mode(ratio) for ratio in ratios}
    modes[f"lmcache {ratios[0]:g} as shipped"] = Mode(ratios[0], tuned=False)
    return {**modes, "miss": Mode(None)}


def lmcache(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    from importlib.metadata import version

    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    watch = Watch()
    shim(watch)
    observe(watch)
    connector = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
    asker = Asker(args, folder, kv_transfer_config=connector)
    adapter = get_kv_transfer_group()._lmcache_engine
    assert not adapter._manager._init_failed, adapter._manager._init_failed_reason
    costs = Costs(adapter.blender)

    def served(mode: Mode) -> Row:
        costs.take(mode.tuned)
        if mode.ratio is not None:
            adapter.blender.common_metadata.recomp_ratios = [mode.ratio]
        watch.recomputed.clear()
        seconds, cached = asker.ask(new=mode.ratio is None)
        hit, wanted = watch.hits[-1], 0 if mode.ratio is None else asker.reusable
        assert hit == cached == wanted, f"found {hit} tokens, reused {cached}, not {wanted}"
        assert len(watch.recomputed) == bool(wanted), f"blended {len(watch.recomputed)} times"
        return Row(seconds, hit, cached, *watch.recomputed)

    served(Mode(None))  # allocates and compiles
    asker.ask()  # stores the chunks
    watch.checking = True
    asker.shuffle()
    served(Mode(args.ratios[0]))
    watch.checking = False
    assert watch.read_back, "vLLM's cache does not hold what was written to it"
    assert watch.distance < TOLERANCE, f"reused K is {watch.distance:.3f} from fresh K"

    modes = modes_of(args.ratios)
    rows: dict[str, list[Row]] = {name: [] for name in modes}
    for turn in range(args.rounds + 1):  # the first warms up
        asker.shuffle()
        for name, mode in modes.items():
            row = served(mode)
            if turn:
                rows[name].append(row)
    about = (
        f"LMCache {version('lmcache')} plus our shim, not a setup of its authors; "
        f"{asker.reusable} tokens to reuse; its cos/sin table was on {costs.device}\n"
        f"checks: KV written is read back; layer 0's K, reused against fresh, "
        f"{watch.distance:.4f} apart over {watch.compared} tokens"
    )
    return {"about": about, "rows": rows}


def plain(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    import torch
    import vllm

    asker, rows = Asker(args, folder), []
    for turn in range(args.rounds + 2):  # two warm up
        asker.shuffle()
        seconds, cached = asker.ask()
        if turn > 1:
            rows.append(Row(seconds, 0, cached))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    about = f"vLLM {vllm.__version__}, torch {torch.__version__}, {device}"
    return {"about": about, "rows": {"plain": rows}}


ENGINES = {"lmcache": lmcache, "plain": plain}


def child(args: argparse.Namespace) -> None:
    """Measure one engine and leave what came of it in a file."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**COMMON, **SHAPES[args.shape]}))
        try:
            result = ENGINES[args.engine](args, folder)
        except Exception:
            result = {"error": traceback.format_exc()}
    args.result.write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # LMCache's threads outlive the engine


def apart(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """What ``child`` left; ends the run with the traceback, or its log's end, where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
        command += ["--result", str(result)]
        with log.open("w") as sink:
            subprocess.run(command, stdout=sink, stderr=sink, env={**ENVIRONMENT, **os.environ})
        if not result.exists():
            sys.exit(f"{engine} died; its log ends:\n{log.read_text(errors='replace')[-6000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
    if "error" in found:
        sys.exit(f"{engine} failed:\n{found['error']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=BLENDABLE, default="llama-8b")
    parser.add_argument("--size", type=size, default=(6, 1024), metavar="NxT")
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.6)
    parser.add_argument("--attention-backend", default="FLASH_ATTN")
    # for this script's own use
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        child(args)
    show({engine: apart(engine, args) for engine in ENGINES}, args)


def show(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    print(results["plain"]["about"], time.strftime("%Y-%m-%d"))
    print(results["lmcache"]["about"])
    print(f"{args.shape}, {'x'.join(map(str, args.size))} tokens of chunks, {args.rounds} rounds")
    rows = {name: [Row(*r) for r in of] for e in results.values() for name, of in e["rows"].items()}
    full = statistics.median(r.ttft_s for r in rows["plain"])
    print(f"{'mode':26}{'TTFT ms':>10}{'plain/mode':>12}{'hit':>8}{'recomputed':>12}")
    for name, of_mode in rows.items():
        took, last = statistics.median(r.ttft_s for r in of_mode), of_mode[-1]
        recomputed = "-" if last.recomputed is None else str(last.recomputed)
        print(f"{name:26}{took * 1e3:10.1f}{full / took:12.2f}{last.hit:8}{recomputed:>12}")


if __name__ == "__main__":
    main()
