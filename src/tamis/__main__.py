"""`python -m tamis`: the `tamis` command, also where nothing is installed."""

import sys

from tamis.cli import main

if __name__ == "__main__":
    sys.exit(main())
