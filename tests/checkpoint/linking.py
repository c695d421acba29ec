"""What ranks do in test_linking.py: saves of a state that is as it was at the save before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from timm.utils import ModelEmaV3

from internvl_ds import load_ema_checkpoint
from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.checkpoint_engine import install_writer
from internvl_ds.checkpoint.tag.discovery import read_header
from internvl_ds.checkpoint.tag.verify import damage_of_tag
from internvl_ds.dist.rendezvous import rank
from internvl_ds.engine.ema import ShardedEma
from tests.bench.harness import barrier
from tests.checkpoint.frozen.freezing import evaluated, run_of, save
from tests.checkpoint.proving import same, weights
from tests.harness.elastic import ADAM, full_state, logger


def written(tag: Path) -> dict[str, int]:
    """The inode of each file that holds tensors."""
    kinds = ('.pt', '.safetensors')
    return {p.name: p.stat().st_ino for p in sorted(tag.iterdir()) if p.suffix in kinds}


def repeat(root: str) -> dict[str, Any]:
    """By stage: the best epoch, then the same as an epoch, then one update of the weights."""
    found: dict[str, Any] = {}
    for stage in (0, 1, 3):
        output = Path(f'{root}/{stage}')
        run = run_of(stage, str(output), 'once' if stage == 1 else 'keep', ASYNC=stage > 1)
        ema: Any = ModelEmaV3(run.engine.module, 0.5) if stage == 0 else None
        ema = ema or ShardedEma(run.engine, 0.5)
        run.steps(0, 2)
        ema.update(*[run.engine.module][: stage == 0])
        tags = [save(run, 0, ema, best='best')]
        tags.append(save(run, 0, ema))
        want, state = weights(run), full_state(run.engine, ADAM)
        writer = install_writer(run.engine)
        async_save.wait()
        sizes = [writer.last_size, sum(e.size for e in writer.entries.values())]
        run.steps(2, 3)
        tags.append(save(run, 1, ema))
        after = weights(run)
        async_save.wait()
        barrier()
        got: dict[str, Any] = {'sizes': sizes, 'files': [written(tag) for tag in tags]}
        got['linked'] = [read_header(tag).linked for tag in tags]
        got['saves'] = [read_header(tag).save for tag in tags]
        got['formats'] = [read_header(tag).format for tag in tags]
        got['damage'] = [damage_of_tag(tag) for tag in tags]
        barrier()
        if rank() == 0:
            shutil.rmtree(tags[0])  # as retention does
            shutil.copytree(tags[1], output / 'copy' / 'ckpt_epoch_0')
        barrier()
        copied = output / 'copy' / 'ckpt_epoch_0'
        got['copied'] = [damage_of_tag(copied), same(evaluated(copied), want)]
        got['links'] = max(p.stat().st_nlink for p in tags[1].glob('*_states.pt'))
        run.engine.destroy()
        for other in ((stage + 1) % 4,) if stage else ():
            again = run_of(other, f'{root}/other', seed=9)
            again.load(str(tags[1]))
            average = ShardedEma(again.engine, 0.9)
            load_ema_checkpoint(again.config, average, logger)
            now = [same(weights(again), want), full_state(again.engine, ADAM) == state]
            got[f'into {other}'] = now
            again.engine.destroy()
        got['third'] = same(evaluated(tags[2]), after)
        found[str(stage)] = got
    return found


def harm(root: str) -> dict[str, Any]:
    """Earlier files that are damaged, gone or replaced; another OUTPUT; a script's own save."""
    run = run_of(1, f'{root}/a')
    run.steps(0, 1)
    name = f'zero_pp_rank_{rank()}_mp_rank_00_optim_states.pt'
    found: dict[str, Any] = {}

    def again(what: str, number: int, output: str = 'a') -> Path:
        run.config.OUTPUT = f'{root}/{output}'
        before = found.get('last')
        tag = save(run, number)
        found[what] = [written(tag)[name] == before, damage_of_tag(tag)]
        found['last'] = written(tag)[name]
        barrier()
        return tag

    tag = again('first', 0)
    with (tag / name).open('r+b') as file:  # the size and even the time may be as they were
        status = os.fstat(file.fileno())
        file.seek(-200, os.SEEK_END)
        byte = file.read(1)
        file.seek(-200, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(tag / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    barrier()
    tag = again('after damage', 1)
    again('after repair', 2)
    (Path(run.config.OUTPUT) / 'ckpt_epoch_2' / name).unlink()
    barrier()
    tag = again('gone', 3)
    (tag / name).unlink()
    (tag / name).symlink_to(f'../ckpt_epoch_1/{name}')
    barrier()
    again('a symbolic link', 4)
    tag = again('another OUTPUT', 5, 'b')
    tag = again('and there again', 6, 'b')
    # DeepSpeed's own call writes over a tag; the other one keeps its file.
    run.steps(1, 2)
    run.engine.save_checkpoint(run.config.OUTPUT, tag=tag.name)
    barrier()
    found['over'] = damage_of_tag(tag.with_name('ckpt_epoch_5'))
    run.engine.destroy()
    return found
