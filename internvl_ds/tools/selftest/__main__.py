"""``internvl-ds selftest`` for launchers that start a module, and tell it a local rank."""

import sys

from internvl_ds.tools.cli import main

if __name__ == '__main__':
    sys.exit(main(['selftest', *sys.argv[1:]]))
