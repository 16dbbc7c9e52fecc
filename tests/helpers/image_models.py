"""Blends text on models that take images, in a process of its own: transformers looks for
torchvision once, when it is imported.

    python image_models.py FOLDER NAME ...

Prints a JSON object: of each model how far it is off at ratio 1, as ``blends_as_the_reference``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import untried

FAILED = "failed"
STAND_INS = Path(__file__).parent / "stand_ins"


def main(folder: Path, names: list[str]) -> None:
    """For each of ``names``, make the model and the reference over its text part, and compare. One
    that fails says why in its place. A name may be followed by ``compiled``.
    """
    from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import (
        Ernie4_5_VLRotaryEmbedding,
    )
    from vllm.multimodal import encoder_budget

    def tokens_of_images(*others: Any, mm_counts: Any, **more: Any) -> dict[str, int]:
        return dict.fromkeys(mm_counts, 16)

    encoder_budget.get_mm_max_toks_per_item = tokens_of_images  # it asks what the stand-ins lack
    # a GPU calls the latter; on a CPU vLLM calls it with one argument too many
    Ernie4_5_VLRotaryEmbedding.forward_cpu = Ernie4_5_VLRotaryEmbedding.forward_native
    bear_with_numba()
    errors = {}
    for name in names:
        try:
            errors[name] = error_of(name, folder)
        except Exception as error:
            errors[name] = f"{FAILED}: {error!r} {traceback.format_exc(limit=-4)}"
            torch.set_default_dtype(torch.float32)  # a failed loading leaves the model's behind
    sys.stdout.write(json.dumps(errors) + "\n")


def bear_with_numba() -> None:
    """vLLM looks at the attributes of all modules when a worker starts. One of llvmlite's says that
    it has any attribute there is; numba brings it, and Kimi's images need numba.
    """
    from llvmlite.binding import ffi

    library = type(ffi.lib)
    found = library.__getattr__

    def honest(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return found(self, name)

    library.__getattr__ = honest


def error_of(name: str, folder: Path) -> str:
    """How far a model is off at ratio 1."""
    from blending import PARTS, PREFIX, blends_as_the_reference
    from engines import start_in_process
    from reference import Reference
    from renamed import RENAMED, make_renamed
    from tiny import SEEING, as_published, make, make_seeing, make_text_of

    options: dict[str, Any] = {"skip_mm_profiling": True, "skip_tokenizer_init": False}
    name, _, compiled = name.partition(" ")
    if compiled:
        options["enforce_eager"] = False
    if name in SEEING:
        reference = Reference(make(SEEING[name][0], folder), PREFIX)
        path = make_seeing(name, folder)
    elif name in RENAMED:
        path, model, takes_images = make_renamed(name, folder)
        reference = Reference(model, PREFIX, takes_images=takes_images)
        options |= RENAMED[name].options
    else:
        path = make_text_of(name, folder)
        reference = Reference(path, PREFIX, takes_images=True)
        path = as_published(name, path)
    with start_in_process(path, prefix=PREFIX, **options) as blend:
        chosen = blend._engine._llm.llm_engine.model_config  # type: ignore[attr-defined]
        # older vLLMs do not say so
        assert getattr(chosen, "supports_multimodal_inputs", chosen.is_multimodal_model)
        assert blend.model_check.passed, blend.model_check.detail
        blend.ingest([p.ids for p in PARTS if p.stored], progress=False)
        return blends_as_the_reference(blend, reference)


if __name__ == "__main__":
    untried.lift()
    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(str(STAND_INS))
    main(Path(sys.argv[1]), sys.argv[2:])
