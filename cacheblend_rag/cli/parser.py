"""Arguments of a command, and what was probably meant where one is wrong."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_CHOICE = re.compile(r"invalid choice: '(?P<given>.*?)' \(choose from (?P<known>.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """Refuses what is left over itself, since it knows its own options; ``argparse`` leaves that to
    the parser above.
    """

    refuses_rest = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if rest and self.refuses_rest:
            self.error(self._unknown(rest))
        return found, rest

    def error(self, message: str) -> NoReturn:
        if match := _CHOICE.search(message):
            known = [word.strip("' ") for word in match["known"].split(",")]
            message += meant(match["given"], known)
        super().error(message)

    def _unknown(self, rest: Sequence[str]) -> str:
        name = rest[0].partition("=")[0]
        if not name.startswith("-"):
            return f"not expected: {' '.join(rest)}. Put a text of several words into quotes"
        hint = meant(name, self._option_string_actions) or f". {self.prog} --help lists all"
        return f"there is no option {name}{hint}"


def meant(given: str, known: Iterable[str]) -> str:
    """What to add to a message about a name that is not known; empty if none is like it."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f". Did you mean {close[0]}?" if close else ""
