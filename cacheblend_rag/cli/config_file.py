"""``serve --config FILE``: options in a file, as vLLM has it, ours among them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cacheblend_rag.cli.output import nothing_else_on_stdout
from cacheblend_rag.errors import ConfigError

_CONFIG = "--config"


def with_file(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Our options and vLLM's, of the command line and of its file.

    What the file says stands in front, so the command line wins. vLLM would do that later: behind
    what we add, and behind our checks.

    Args:
        parser: of our options.

    Raises:
        ConfigError: the file can't be read, or there are several.
    """
    args, theirs = parser.parse_known_args(list(arguments))
    path, theirs = without_file(theirs)
    if path is None:
        return args, theirs
    words = _words(path, parser._option_string_actions, quiet=args.print_command)
    args, words = parser.parse_known_args(words)
    if without_file(words)[0] is not None:
        raise ConfigError(f"{_CONFIG} {path}: it names another file as config; give one file")
    parser.parse_known_args(list(arguments), args)
    model, rest = model_of(theirs)
    in_file, words = _without_model(words)
    if model is None and not any(word.partition("=")[0] == "--model" for word in rest):
        model = in_file
    return args, [*([] if model is None else [model]), *words, *rest]


def without_file(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file that ``--config`` names, and the other words.

    Raises:
        ConfigError: it is given without a file, or twice.
    """
    found, rest, left = list[str](), list[str](), iter(words)
    for word in left:
        name, has_value, value = word.partition("=")
        if name == _CONFIG:
            found.append(value if has_value else next(left, ""))
        else:
            rest.append(word)
    if len(found) > 1:
        raise ConfigError(f"{_CONFIG} is given {len(found)} times; vLLM reads one file")
    if found and (not found[0] or found[0].startswith("--")):
        raise ConfigError(f"{_CONFIG} names no file; write {_CONFIG} FILE.yaml")
    return (found[0] if found else None), rest


def model_of(theirs: Sequence[str]) -> tuple[str | None, list[str]]:
    """The model, where it stands in front of vLLM's options, and these."""
    if theirs and not theirs[0].startswith("-"):
        return theirs[0], list(theirs[1:])
    return None, list(theirs)


def _words(path: str, ours: Mapping[str, argparse.Action], *, quiet: bool) -> list[str]:
    from cacheblend_rag.engine.launch import allowed_plugins, config_words

    # vLLM's parser loads plugins, which is done once in a process.
    os.environ["VLLM_PLUGINS"] = allowed_plugins()
    path = os.path.expanduser(path)
    with nothing_else_on_stdout(quiet):
        words = config_words(path)
    _refuse_switches(path, ours)
    dashed = {word: word.replace("_", "-") for word in words if word.startswith("--")}
    return [dashed[word] if dashed.get(word) in ours else word for word in words]


def _refuse_switches(path: str, ours: Mapping[str, argparse.Action]) -> None:
    """A YAML ``off`` is false, which vLLM's reader leaves out: ``mode: off`` would be no word."""
    import yaml

    for name, value in yaml.safe_load(Path(path).read_text(encoding="utf-8")).items():
        option = ours.get("--" + name.replace("_", "-"))
        if option is not None and option.nargs != 0 and (value is None or isinstance(value, bool)):
            raise ConfigError(
                f"{_CONFIG} {path}: {name} is read as {value}; put its value in quotes, such as "
                '"off"'
            )


def _without_model(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """vLLM takes a model of the file where the command line has none, and warns of ``--model``."""
    if "--model" not in words:
        return None, list(words)
    at = words.index("--model")
    return words[at + 1], [*words[:at], *words[at + 2 :]]
