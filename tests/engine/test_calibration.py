"""``auto``: what was calibrated is what requests get."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import start
from small_set import prepare, write
from tiny import Words, make

from cacheblend_rag import BlendConfig, cli
from cacheblend_rag.calibration import Calibration, find, usual_path
from cacheblend_rag.cli import calibrate
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.evaluate import calibrate as choice

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("in_process"),
]

words = Words(41)
CHUNK = words(90)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHEBLEND_HOME", str(tmp_path))
    return tmp_path


def test_auto_takes_what_was_calibrated(tiny_models: Path) -> None:
    model, prompt = make("llama", tiny_models), (*words(8), *CHUNK, *words(12))
    config = BlendConfig(ingest_prefix=(), blend_if="always", recompute_ratio="auto")
    with start(model, config=config) as blend:
        blend.ingest([CHUNK], progress=False)
        assert blend.calibration is None
        assert blend.generate(prompt, max_tokens=1).report.recompute_ratio == 0.5
        found = Calibration(
            fingerprint=blend.info.fingerprint, version="0", ratio=0.4,
            selector="hkvd", propagation_length=4, changed_allowed=0.2, changed=0.1,
            mean_ratio=0.4, questions=9,
        )  # fmt: skip
    found.save(usual_path(found.fingerprint))
    with start(model, config=config) as blend:
        assert blend.calibration == found
        blend.ingest([CHUNK], progress=False)
        report = blend.generate(prompt, max_tokens=1).report
        assert (report.recompute_ratio, report.selector) == (0.4, "hkvd")
        fixed = blend.generate(prompt, max_tokens=1, recompute_ratio=0.2, selector="query").report
        assert (fixed.recompute_ratio, fixed.selector) == (0.2, "query")
    replace(found, fingerprint="00" * 32).save(Path("other.json").absolute())
    try:
        with pytest.raises(ConfigError, match="other weights"):
            start(model, config=replace(config, calibration="other.json"))
    finally:
        Path("other.json").unlink()


@pytest.mark.slow
def test_the_command_chooses_and_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CACHEBLEND_HOME")
    prepare(monkeypatch)
    few = ("query@0.15", "query@0.15~64")
    monkeypatch.setattr(choice, "CANDIDATES", few)
    monkeypatch.setattr(calibrate, "CANDIDATES", few)
    data, file = write(tmp_path / "valley.jsonl", passages=2), tmp_path / "auto.json"
    given = ["--data", str(data), "--out", str(tmp_path / "out"), "--file", str(file), "--json"]
    more = [
        "--limit",
        "4",
        "--group",
        "4",
        "--max-tokens",
        "4",
        "--engine-arg",
        "max_model_len=2048",
    ]
    assert cli.main(["calibrate", *given, *more, "--changed", "1"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    kept = find(json.loads(file.read_text())["fingerprint"], str(file))
    assert kept is not None and told["row"] in few
    assert kept.mean_ratio == pytest.approx(0.15, abs=0.003) and kept.data == ("valley",)
    assert kept.questions > 0 and kept.changed == told["changed"]
