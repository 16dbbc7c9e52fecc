"""Find the indexed chunks inside a prompt by their token ids, in any order and at any position.

Hashes propose where a chunk may stand, equal token ids decide. There are two kinds of proposals:

* *Anchors*, hashes of 16 consecutive tokens at tokens 8, 72, 136, ... of a chunk and, last, 24
  tokens before its end. They find heads, tails and inner parts too (``parts``). Text that repeats
  gives far more of them than one can follow, so the rarest are followed first, up to a budget.
* *Rungs*, hashes of a growing part of a chunk from its token 8 on: the part's length gains one
  binary digit of the whole length at each rung, the largest first (a part of 352 tokens has the
  rungs 256, 320, 352). Climbing them at a place of the prompt leads to a chunk that stands there
  for longest, in as many steps as there are digits and however many chunks begin in the same way
  (``wholes``).

So the work is bounded for every text, and no chunk that stands in the prompt whole can be crowded
out by others. Most prompts need none of that: their chunks stand apart, whole but for a few tokens
at the ends, and every anchor is of one of them (``plain``).

Names of arrays end in what they have a value for: U distinct hashes, A anchors and rungs, P places
in the prompt, D diagonals (one chunk laid on the prompt with one shift), S spans.
"""

from cacheblend_rag.locate.arrays import Ids
from cacheblend_rag.locate.hashes import ANCHOR_MARGIN, ANCHOR_WIDTH, window_hashes
from cacheblend_rag.locate.index import ChunkIndex
from cacheblend_rag.locate.spans import Match

__all__ = ["ANCHOR_MARGIN", "ANCHOR_WIDTH", "ChunkIndex", "Ids", "Match", "window_hashes"]
