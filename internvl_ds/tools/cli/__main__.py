"""The command as ``python -m internvl_ds.tools.cli``, where the console script is not on PATH."""

import sys

from internvl_ds.tools.cli import main

if __name__ == '__main__':
    sys.exit(main())
