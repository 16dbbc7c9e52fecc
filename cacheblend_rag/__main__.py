"""``python -m cacheblend_rag`` is ``cacheblend``."""

import sys

from cacheblend_rag.cli import main

if __name__ == "__main__":
    sys.exit(main())
