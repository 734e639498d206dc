"""`python -m nodepass`: the same as the `nodepass` command."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from .cli.main import main

        code = main()
    except KeyboardInterrupt:  # while the command line itself is being imported
        code = 130
    sys.exit(code)
