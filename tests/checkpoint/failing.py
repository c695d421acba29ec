"""What ranks do in test_checkpoint_failures.py: saves that cannot be written or waited for."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.formats.ema_files import EmaFiles
from internvl_ds.checkpoint.tag.discovery import newest
from internvl_ds.checkpoint.tag.output_lock import LOCK
from internvl_ds.config.tree import get_config, merge_opts
from internvl_ds.dist.network import free_port
from internvl_ds.dist.process_group import init_distributed, shutdown
from internvl_ds.dist.rendezvous import rank
from internvl_ds.train.loop import run as run_program
from tests.harness.calls import message_of, on_rank_0
from tests.harness.killing import state_digest
from tests.harness.saving import Run


def _size(directory: str) -> int:
    return sum(p.stat().st_size for p in Path(directory).rglob('*') if p.is_file())


def _left(root: str) -> list[str]:
    """What is there, but for what a run keeps as long as it lasts."""
    kept = ('ds_config.json', LOCK)
    return sorted(p.name for p in Path(root).iterdir() if p.name not in kept)


def full_disk(stage: int, root: str, in_background: bool) -> dict[str, Any]:
    """On a file system of its own: too small for a second save, then full in the middle of it."""
    run = Run(stage, 'fp32', root, SAVE_CKPT_NUM=5, CHECKPOINT__ASYNC=in_background)

    def save(epoch: int) -> None:
        run.save(epoch)
        async_save.wait()

    run.steps(0, 1)
    save(0)
    saved, saved_state = _size(f'{root}/ckpt_epoch_0'), state_digest(run)
    filler = Path(root, 'filler')

    def leave_free(size: int) -> None:
        filler.write_bytes(b'')
        filler.write_bytes(b'x' * (shutil.disk_usage(root).free - size))

    run.steps(1, 2)
    on_rank_0(lambda: leave_free(saved // 2))
    results: dict[str, Any] = {'refused': message_of(lambda: save(1)), 'left refused': _left(root)}
    # Enough for the bytes, not for the blocks of so many small files: the check lets it begin.
    on_rank_0(lambda: leave_free(saved + 8192))
    results.update(full=message_of(lambda: save(1)), left_full=_left(root))
    results['latest'] = Path(root, 'latest').read_text()
    run.steps(2, 3)  # training goes on
    on_rank_0(filler.unlink)
    save(2)
    results['left'] = _left(root)
    run.close()
    fresh = Run(stage, 'fp32', f'{root}/other', seed=3)
    fresh.load(f'{root}/ckpt_epoch_0')
    fresh.ema.load_shard(EmaFiles(Path(root, 'ckpt_epoch_0')))
    results['first tag intact'] = state_digest(fresh) == saved_state
    fresh.close()
    return results


def read_only(root: str) -> dict[str, Any]:
    """The file system of OUTPUT turns read-only, as after a disk error, and comes back."""
    run = Run(1, 'fp32', root)
    run.steps(0, 1)
    run.save(0)
    # Mounted once more over itself: the run has a file open there, so that the first mount stays.
    on_rank_0(lambda: subprocess.run(['mount', '--bind', root, root], check=True))
    try:
        on_rank_0(lambda: subprocess.run(['mount', '-o', 'remount,bind,ro', root], check=True))
        error = message_of(lambda: run.save(1))
        run.steps(1, 2)
    finally:
        on_rank_0(lambda: subprocess.run(['umount', root], check=True))
    left = _left(root)
    run.save(1)
    return {'error': error, 'left': left, 'after': _left(root)}


def one_rank_is_limited(stage: int, root: str, in_background: bool) -> dict[str, Any]:
    """Rank 1 may write files of 4 KiB only, as under a quota: its shard fails in the middle."""
    run = Run(stage, 'fp32', root, CHECKPOINT__ASYNC=in_background)
    run.steps(0, 1)
    run.save(0)
    async_save.wait()
    run.steps(1, 2)  # else its shard would be linked
    _limit_files(4096 if rank() == 1 else None)
    own = message_of(lambda: run.save(1))
    run.steps(2, 3)
    next_call = message_of(lambda: run.save(2))
    _limit_files(None)
    background_error = message_of(async_save.wait)
    left = _left(root)
    run.save(3)
    async_save.wait()
    return {
        'own': own,
        'next': next_call,
        'background': background_error,
        'left': left,
        'after': _left(root),
        'latest': Path(root, 'latest').read_text(),
    }


def changes_its_directory(root: str) -> str:
    """While a save in the background is under way, of an OUTPUT that is relative."""
    os.chdir(root)
    run = Run(1, 'fp32', 'out', CHECKPOINT__ASYNC=True)
    path = run.save(0)
    os.chdir('/')
    async_save.wait()
    return path


def _limit_files(size: int | None) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


def program(root: str, how: str) -> None:
    """A user's script that saves in the background and ends in some way; for run_program."""
    init_distributed()
    run = Run(1, 'fp32', root, CHECKPOINT__ASYNC=True)
    run.steps(0, 1)
    run.save(0)
    if how == 'fails':
        async_save.wait()
        _limit_files(5000 if rank() == 1 else None)
    run.steps(1, 2)
    if how == 'terminated':
        _slow_down_writes()
    run.save(1)
    Path(root, f'saved_{rank()}').touch()
    if how == 'handles SIGTERM':
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if how in ('terminated', 'handles SIGTERM'):
        Path(root, f'ready_{rank()}').touch()
        while True:
            time.sleep(0.01)
    if how == 'leaves the group':
        torch.distributed.destroy_process_group()
    if how == 'shuts down':
        shutdown()


def _slow_down_writes() -> None:
    write = os.write

    def slow(descriptor: int, data: Any) -> int:
        time.sleep(0.5)
        return write(descriptor, data)

    os.write = slow


def start_program(root: Path, how: str) -> list[subprocess.Popen]:
    """Starts `program` on two ranks; returns their processes."""
    from tests.harness.ranks import ROOT, base_env

    port = str(free_port())
    code = f'from tests.checkpoint.failing import program; program({str(root)!r}, {how!r})'
    processes = []
    for r in range(2):
        env = base_env(
            RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
        )  # fmt: skip
        with Path(f'{root}.log_{r}').open('wb') as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, '-c', code],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd=ROOT,
                    start_new_session=True,
                )
            )
    return processes


def locked_and_vanished(root: str, cfg: str) -> dict[str, Any]:
    """Another job holds one OUTPUT, for a script and the training program; another one vanishes."""
    config = get_config(Namespace(cfg=cfg, output=root, opts=['CHECKPOINT.LOCK_WAIT', '0']))
    program = message_of(lambda: run_program(config))
    taken, shared = Run(1, 'fp32', config.OUTPUT), Path(config.OUTPUT)
    merge_opts(taken.config, ['CHECKPOINT.LOCK_WAIT', '0'])
    script, left = message_of(lambda: taken.save(0)), _left(config.OUTPUT)
    merge_opts(taken.config, ['CHECKPOINT.SHARED_OUTPUT', 'True'])
    taken.save(0)
    results = {'program': program, 'script': script, 'left': left, 'shared': _left(str(shared))}
    taken.close()
    run = Run(1, 'fp32', f'{root}/share/out')
    run.save(0)
    on_rank_0(lambda: Path(root, 'share').rename(f'{root}/away'))
    results['vanished'] = message_of(lambda: run.save(1))
    results['made anew'] = Path(root, 'share').exists()
    on_rank_0(lambda: Path(root, 'away').rename(f'{root}/share'))
    run.steps(0, 1)
    run.save(1)
    results['after'] = _left(f'{root}/share/out')
    run.close()
    return results


def latest_in_the_way(root: str) -> dict[str, Any]:
    """`latest` cannot be written: something else has the name."""
    run = Run(1, 'fp32', root, SAVE_CKPT_NUM=5)
    run.save(0)
    latest = Path(root, 'latest')
    on_rank_0(lambda: (latest.unlink(), latest.mkdir()))
    error, left = message_of(lambda: run.save(1)), _left(root)
    found = newest(Path(root))
    on_rank_0(latest.rmdir)
    run.save(1)
    run.close()
    return {'error': error, 'left': left, 'found': str(found and found.path), 'after': _left(root)}
