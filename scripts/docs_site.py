"""What ``make docs`` adds to docs/: README, CONTRIBUTING and benchmarks/results, and their links.

MkDocs calls these functions (``hooks`` in mkdocs.yml). A link between any two of these files works
where they lie in the repository; here it is turned into one that works on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "benchmarks/results/*")

_TARGET = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages and pictures from outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to other files as they lie on the site."""
    here = page.file.src_uri
    is_outside = not (ROOT / "docs" / here).exists()
    folder = posixpath.dirname(here if is_outside else f"docs/{here}")
    start = posixpath.dirname(here)

    def on_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1])).removeprefix("docs/")
        return posixpath.relpath(target, start or ".")

    return _TARGET.sub(on_site, markdown)
