"""What ranks do in test_mirror.py and test_s3.py: train, save with a mirror, go on from it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from internvl_ds import auto_resume_helper
from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.mirror.uploads import uploads
from internvl_ds.checkpoint.tag.discovery import read_latest
from internvl_ds.checkpoint.tag.verify import damage_of_tag
from internvl_ds.dist.rendezvous import rank
from tests.bench.harness import barrier
from tests.checkpoint.mirror.tagging import whole
from tests.engine.stepping import masters
from tests.harness.saving import Run


def lose_and_go_on(root: str, address: str, stage: int, asynchronous: bool) -> dict[str, Any]:
    """A run that saves and loses its OUTPUT, and one that goes on from the mirror."""
    more: dict[str, Any] = {
        'CHECKPOINT__MIRROR': address, 'SAVE_CKPT_NUM': 2, 'CHECKPOINT__ASYNC': asynchronous,
    }  # fmt: skip
    run = Run(stage, 'fp32', f'{root}/out', **more)
    run.steps(0, 2)
    for epoch in range(3):
        run.steps(2 + epoch, 3 + epoch)
        run.save(epoch)
    run.save(2, best='best')
    async_save.wait()
    uploads().finish()
    found: dict[str, Any] = {'mirror': whole(address), 'niceness': None}
    wanted = run.steps(5, 7), masters(run.engine)
    run.close()

    # OUTPUT is another one, empty, and what the weights begin with is another thing too.
    run = Run(stage, 'fp32', f'{root}/new', seed=1, **more)
    path = auto_resume_helper(f'{root}/new', config=run.config)
    found['path'] = path
    run.load(str(path))
    found['same'] = (run.steps(5, 7), masters(run.engine)) == wanted
    found['damage'] = damage_of_tag(Path(str(path)))
    found['latest'] = read_latest(Path(f'{root}/new'))
    run.save(3)
    async_save.wait()
    uploads().finish()
    found['after'] = whole(address)
    barrier()

    # The one at hand is as new as the mirror's; then it is damaged.
    found['at hand'] = auto_resume_helper(f'{root}/new', config=run.config)
    barrier()
    if rank() == 0:
        next(Path(f'{root}/new/ckpt_epoch_3').glob('*optim_states.pt')).write_bytes(b'')
    barrier()
    found['repaired'] = auto_resume_helper(f'{root}/new', config=run.config)
    found['damage'] += damage_of_tag(Path(str(found['repaired'])))
    if rank() == 0:
        shutil.rmtree(f'{root}/out')
    run.close()
    return found


def go_on_without(root: str, address: str) -> dict[str, Any]:
    """A run whose mirror cannot be reached for long."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger('internvl_ds').addHandler(handler)
    more = {'CHECKPOINT__MIRROR': address, 'CHECKPOINT__MIRROR_WAIT': 45.0}
    run = Run(1, 'fp32', f'{root}/out', **more)
    run.steps(0, 2)
    run.save(0)
    run.steps(2, 3)
    run.save(1)
    uploads().finish()
    run.close()
    return {'warnings': lines, 'latest': read_latest(Path(f'{root}/out'))}
