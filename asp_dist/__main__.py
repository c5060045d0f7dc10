"""``python -m asp_dist`` is the ``asp-dist`` command."""

import sys

from asp_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
