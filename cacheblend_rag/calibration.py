"""What ``recompute_ratio="auto"`` stands for on one model: chosen and measured by ``calibrate``.

A calibration is found by the fingerprint of the weights: one that somebody made here, else one that
ships with this package, in ``calibrations/``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from cacheblend_rag.config import UNCALIBRATED_RATIO, BlendConfig
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.models import cache_home
from cacheblend_rag.undo import on_failure

FORMAT = 1
SHIPPED = Path(__file__).parent / "calibrations"
_FIX = "Make it anew: cacheblend calibrate MODEL --data FILE"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A choice, and what it costs on questions that had no part in it.

    Attributes:
        fingerprint: of the weights it was made with.
        model: what these were called: the name of a folder, or a hub name.
        version: of this package.
        ratio, selector, selector_options, propagation_length: as in ``BlendConfig``.
        changed_allowed: share of answers that might differ from a full prefill's, as asked for.
        changed: share of answers that did.
        mean_ratio: share of the tokens of chunks that was recomputed for them.
        questions: how many there were.
        data: the files that they came from.
    """

    fingerprint: str
    version: str
    ratio: float
    selector: str
    selector_options: Mapping[str, Any] = field(default_factory=dict)
    propagation_length: int = 0
    changed_allowed: float
    changed: float
    mean_ratio: float
    questions: int
    data: tuple[str, ...] = ()
    model: str = ""

    def to_plain(self) -> dict[str, Any]:
        """As a table."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all; folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"format": FORMAT, **self.to_plain()}
        unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
        with on_failure(lambda: unfinished.unlink(missing_ok=True)):
            unfinished.write_text(json.dumps(data, indent=1), encoding="utf-8")
            unfinished.replace(path)


def from_plain(data: Mapping[str, Any]) -> Calibration:
    """The calibration that ``to_plain`` wrote."""
    return Calibration(**{**data, "data": tuple(data["data"])})


def resolved(
    config: BlendConfig, calibration: Calibration | None, asked: Container[str] = ()
) -> BlendConfig:
    """``config`` with a number for a ratio, that of ``auto`` where nothing was calibrated.

    ``asked``: options that a call or a request gave itself, which no calibration changes.
    """
    if config.recompute_ratio != "auto":
        return config
    if calibration is None:
        return replace(config, recompute_ratio=UNCALIBRATED_RATIO)
    chosen: dict[str, Any] = {
        "selector": calibration.selector,
        "selector_options": calibration.selector_options,
        "propagation_length": calibration.propagation_length,
    }
    if "selector" in asked:  # another selector knows other options
        del chosen["selector_options"]
    own = {name: value for name, value in chosen.items() if name not in asked}
    return replace(config, recompute_ratio=calibration.ratio, **own)


def ratio_of(config: BlendConfig) -> float:
    """The ratio of a configuration that was ``resolved``."""
    assert config.recompute_ratio != "auto"
    return float(config.recompute_ratio)


def sent(
    config: BlendConfig, calibration: Calibration | None, asked: Container[str] = ()
) -> BlendConfig:
    """What an engine's requests ask for: ``auto`` where a controller decides in the engine.
    ``asked``: as for ``resolved``.
    """
    found = resolved(config, calibration, asked)
    return replace(found, recompute_ratio="auto") if config.is_controlled else found


def usual_path(fingerprint: str) -> Path:
    """Where the calibration of these weights is kept."""
    return in_folder(cache_home() / "calibrations", fingerprint)


def in_folder(folder: Path, fingerprint: str) -> Path:
    """The file of the calibration of these weights in a folder of them."""
    return folder / f"{fingerprint[:32]}.json"


def find(fingerprint: str, file: str | None = None) -> Calibration | None:
    """The calibration of these weights: ``file``, else at its usual place, else the one that ships;
    None if there is none. What nobody named and is of no use is warned of, and counts as absent.

    Raises:
        ConfigError: the file is absent, no calibration, or of another model or format.
    """
    if file:
        return _of(fingerprint, Path(file))
    for place in (usual_path(fingerprint), in_folder(SHIPPED, fingerprint)):
        try:
            if place.exists():
                return _of(fingerprint, place)
        # Of another version, or damaged: it must not keep an engine from starting that may not even
        # ask for it.
        except (ConfigError, OSError) as error:
            warnings.warn(f"Left out: {error}", RuntimeWarning, stacklevel=3)
    return None


def _of(fingerprint: str, path: Path) -> Calibration:
    found = _read(path)
    if found.fingerprint != fingerprint:
        raise ConfigError(
            f"the calibration {path} is of other weights ({found.fingerprint[:16]}, these are "
            f"{fingerprint[:16]}). {_FIX}"
        )
    return found


def _read(path: Path) -> Calibration:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.pop("format")
        if version != FORMAT:
            raise ConfigError(f"the calibration {path} has format {version}, not {FORMAT}. {_FIX}")
        found = from_plain(data)
        resolved(BlendConfig(recompute_ratio="auto"), found)  # raises ConfigError
    except OSError as error:
        raise ConfigError(f"the calibration {path} cannot be read: {error}. {_FIX}") from error
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no calibration ({error!r}). {_FIX}") from error
    return found
