"""Stands in for internvl_ds.train where tuning itself is tested: its speeds are arithmetic.

Stage s with micro-batch m has 100 + 10 s images per second, and 25 more where m is 8.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.harness.ranks import ROOT


def write_launcher(folder: Path) -> list[str]:
    """The words that launch it; each start adds its ds_config and settings to ``started``."""
    path = folder / 'launch.sh'
    path.write_text(
        f'# in place of internvl_ds.train\ncd {ROOT}\n'
        f'exec {sys.executable} -m tests.tools.tune.quick_train --started {folder}/started "$@"\n'
    )
    return ['bash', str(path)]


def main() -> None:
    """Reads a trial's arguments, notes that it was started, and writes bench.json."""
    parser = argparse.ArgumentParser()
    for name in ('--cfg', '--output', '--deepspeed_config', '--data-path', '--started'):
        parser.add_argument(name)
    parser.add_argument('--opts', nargs='+')
    args = parser.parse_args()
    ds_config = json.loads(Path(args.deepspeed_config).read_text())
    opts = dict(zip(args.opts[0::2], args.opts[1::2], strict=True))
    with Path(args.started).open('a') as started:
        started.write(json.dumps([ds_config, opts]) + '\n')
    stage = ds_config.get('zero_optimization', {}).get('stage', 0)
    micro = int(opts.get('DATA.BATCH_SIZE', 16))
    speed = 100.0 + 10 * stage + 25 * (micro == 8)
    bench = {
        'images_per_s': speed,
        'images_per_s_range': [speed - 1, speed + 1],
        'seconds_per_update': 32 / speed,
        'peak_bytes': 10**9 - 10**8 * stage,
        'baseline_bytes': 10**8,
        'ranks': 2,
        'device': 'cpu',
        'device_bytes': 10**10,
        'host_bytes': 10**10,
    }
    folder = Path(args.output) / 'digits_quickstart'
    folder.mkdir(parents=True)
    (folder / 'bench.json').write_text(json.dumps(bench))


if __name__ == '__main__':
    main()
