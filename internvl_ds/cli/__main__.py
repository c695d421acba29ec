"""Runs the command as ``python -m internvl_ds.cli``, where the console script is not on PATH."""

import sys

from internvl_ds.cli import main

if __name__ == '__main__':
    sys.exit(main())
