"""What a run makes of a world that has changed since its last start: each phase is several runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from internvl_ds.config.tree import get_config
from internvl_ds.dist import preemption
from internvl_ds.dist.rendezvous import rank
from internvl_ds.train import loop, validation


class Stopped(Exception):
    """In place of a kill: every rank leaves the program at once."""


class Starts:
    """Starts the training program again and again, as the same command or another one."""

    def __init__(self, cfg: str, root: str, stage: int) -> None:
        self.cfg, self.root = cfg, Path(root)
        self.ds_config: dict[str, Any] = {'zero_optimization': {'stage': stage}}

    def run(self, output: str, *opts: Any, stop: str | None = None) -> dict[str, Any]:
        """Runs until the end, or until a tag of the name ``stop`` has been saved.

        Returns:
            How it ended, its own lines of this rank's log, and rank 0's files.
        """
        args = Namespace(cfg=self.cfg, output=str(self.root / output), opts=list(map(str, opts)))
        config = get_config(args)
        folder = Path(config.OUTPUT)
        log = folder / f'log_rank{rank()}.txt'
        before = len(log.read_text()) if log.is_file() else 0
        save = loop.save_checkpoint

        def save_and_stop(*values: Any, **more: Any) -> str:
            path = save(*values, **more)
            if Path(path).name == stop:
                raise Stopped
            return path

        loop.save_checkpoint = save_and_stop  # type: ignore[assignment]
        try:
            end = str(loop.run(config, self.ds_config))
        except Exception as error:
            end = f'{type(error).__name__}: {error}'
        finally:
            loop.save_checkpoint = save
        dist.barrier()
        text = log.read_text() if log.is_file() else ''
        told = {'end': end, 'log': text[before:], 'tags': [], 'latest': None, 'metrics': []}
        if folder.is_dir():
            told['tags'] = sorted(path.name for path in folder.glob('ckpt_*'))
        if (folder / 'latest').is_file():
            told['latest'] = (folder / 'latest').read_text()
        if (folder / 'metrics.jsonl').is_file():
            lines = (folder / 'metrics.jsonl').read_text().splitlines()
            told['metrics'] = [json.loads(line) for line in lines]
        dist.barrier()
        return told


def on_rank_0(action: Any) -> None:
    """Changes the world between two starts."""
    if rank() == 0:
        action()
    dist.barrier()


def requeue(cfg: str, root: str, stage: int) -> dict[str, Any]:
    """One run goes on from another's tag, is killed and started again in all ways."""
    starts = Starts(cfg, root, stage)
    told = {'other': starts.run('other', 'TRAIN.EPOCHS', 1)}
    tag = starts.root / 'other' / 'small' / 'ckpt_epoch_0'
    command = ['MODEL.RESUME', tag, 'TRAIN.EPOCHS', 5]
    told['whole'] = starts.run('whole', *command)
    told['first'] = starts.run('new', *command, stop='ckpt_epoch_2')
    told['again'] = starts.run('new', *command)
    explicit = ['TRAIN.AUTO_RESUME', False]
    told['rewound'] = starts.run('new', *command, *explicit, stop='ckpt_epoch_1')
    told['without'] = starts.run('new', 'TRAIN.EPOCHS', 5, stop='ckpt_epoch_2')
    told['evaluated'] = starts.run('new', *command, 'EVAL_MODE', True)
    told['overtaken'] = starts.run('new', *command)
    on_rank_0(lambda: shutil.rmtree(tag))
    told['gone'] = starts.run('new', *command)
    return told


def stop_before_training(cfg: str, root: str, stage: int) -> dict[str, Any]:
    """One rank is asked to stop while the weights that were loaded are evaluated."""
    starts, evaluate = Starts(cfg, root, stage), validation.evaluate
    told = {'first': starts.run('out', 'TRAIN.EPOCHS', 1)}

    def ask_and_evaluate(*args: Any) -> Any:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10 * preemption._INTERVAL)  # until the ranks have agreed on where to stop
        return evaluate(*args)

    preemption._INTERVAL, validation.evaluate = 0.1, ask_and_evaluate  # type: ignore[assignment]
    told['stopped'] = starts.run('out', 'TRAIN.EPOCHS', 2, 'EVAL_LOADED', True)
    return told


def rename_classes(cfg: str, data: str, root: str, stage: int) -> dict[str, Any]:
    """Class folders get other names between two starts."""
    starts, folder = Starts(cfg, root, stage), Path(data)
    told = {'first': starts.run('out', 'TRAIN.EPOCHS', 1)}
    tag = starts.root / 'out' / 'small' / 'ckpt_epoch_0'

    def rename() -> None:
        for split in ('train', 'val'):
            (folder / split / 'class_0').rename(folder / split / 'zebra')

    on_rank_0(rename)
    anyway = ['DATA.CHECK_CLASS_NAMES', False]
    evaluate = ['EVAL_MODE', True, 'MODEL.RESUME', tag]
    told['evaluated'] = starts.run('eval', *evaluate)
    told['evaluated anyway'] = starts.run('eval', *evaluate, *anyway)
    told['resumed'] = starts.run('out', 'TRAIN.EPOCHS', 2)
    told['resumed anyway'] = starts.run('out', 'TRAIN.EPOCHS', 2, *anyway)
    told['as now'] = starts.run('eval', 'EVAL_MODE', True, 'MODEL.RESUME', tag.parent)
    tuned = ['MODEL.PRETRAINED', tag, 'TRAIN.EPOCHS', 1]
    told['pretrained'] = starts.run('tuned', *tuned)
    on_rank_0(lambda: shutil.copytree(folder / 'train' / 'zebra', folder / 'train' / 'cat'))
    on_rank_0(lambda: shutil.copytree(folder / 'val' / 'zebra', folder / 'val' / 'cat'))
    added = ['MODEL.NUM_CLASSES', 4]
    told['added'] = starts.run('out', 'TRAIN.EPOCHS', 3, *added)
    return told


def change_images(cfg: str, data: str, root: str, stage: int) -> dict[str, Any]:
    """The data set grows, is exchanged, or gets another seed, while an epoch is under way."""
    starts, folder = Starts(cfg, root, stage), Path(data) / 'train' / 'class_0'
    first = min(folder.iterdir())
    opts = ['TRAIN.EPOCHS', 1, 'TRAIN.SAVE_STEPS', 1]
    changes = {
        'same': lambda: None,
        'exchanged': lambda: first.rename(folder / 'zzz.png'),
        'grown': lambda: shutil.copy(folder / 'zzz.png', folder / 'one_more.png'),
        'seed': lambda: None,
    }
    told = {}
    for name, change in changes.items():
        starts.run(name, *opts, stop='ckpt_epoch_0_step_1')
        on_rank_0(change)
        told[name] = starts.run(name, *opts, *(['SEED', 1] if name == 'seed' else []))
    return told


def write_nothing_for_show(cfg: str, root: str, stage: int) -> dict[str, Any]:
    """Everything but the checkpoints is in the way of something, and then the checkpoints are."""
    starts = Starts(cfg, root, stage)
    folder = starts.root / 'out' / 'small'
    names = ['curves.png', 'metrics.jsonl', 'config.json', 'ds_config.json', 'log_rank1.txt']

    def block() -> None:
        for name in names:
            (folder / name / 'x').mkdir(parents=True)
        (starts.root / 'file').touch()

    on_rank_0(block)
    monitor = {'enabled': True, 'output_path': str(starts.root / 'file'), 'job_name': 'x'}
    starts.ds_config |= {'tensorboard': monitor, 'csv_monitor': monitor}
    told = {'blocked': starts.run('out', 'TRAIN.EPOCHS', 2)}
    events = starts.root / 'events' / 'x'
    starts.ds_config = {
        'zero_optimization': {'stage': stage},
        'csv_monitor': {'enabled': True, 'output_path': str(events.parent), 'job_name': 'x'},
    }
    on_rank_0(lambda: (events / 'Train_Samples_lr.csv').mkdir(parents=True))
    told['events'] = starts.run('events', 'TRAIN.EPOCHS', 1)
    told['no output'] = starts.run('file/out', 'TRAIN.EPOCHS', 1)
    return told


def frequencies(cfg: str, root: str, stage: int) -> dict[str, Any]:
    """0 where it is a distance means at the end only; what means nothing is refused."""
    starts = Starts(cfg, root, stage)
    zeros = ['EVAL_FREQ', 0, 'SAVE_FREQ', 0, 'PRINT_FREQ', 0]
    told = {'zeros': starts.run('zeros', 'TRAIN.EPOCHS', 3, *zeros)}
    for key in (
        'EVAL_FREQ',
        'SAVE_FREQ',
        'PRINT_FREQ',
        'TRAIN.SAVE_STEPS',
        'CHECKPOINT.KEEP_EVERY',
    ):
        told[key] = starts.run('refused', key, -1)
    return told
