"""Lives of a rank in test_checkpoint_kills.py: each resumes, trains, and saves until it is killed.

Two programs: a script's loop, and the training program. Both tell in a file of events, one JSON
object a line, what they found, the digest of their state after every update, and when each save
began and returned.
"""

from __future__ import annotations

import atexit
import faulthandler
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from internvl_ds import auto_resume_helper, load_ema_checkpoint
from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.tag.manifest import tag_name
from internvl_ds.dist.process_group import init_distributed
from internvl_ds.dist.rendezvous import rank
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.train import loop
from internvl_ds.train.reporting.log import MetricsLog
from tests.harness.saving import Run, logger
from tests.harness.training import small_config
from tests.harness.whole_state import whole_state

UPDATES_PER_EPOCH = 3  # of the script
SAVES = 4  # after which a life that is not killed ends; best, ema_best and epoch are three
# Must be in no file of a tag.
PASSWORD = 'hunter2'
_ADDRESS = f'https://me:{PASSWORD}@127.0.0.1/w.pth?{PASSWORD}'
_CALLS = ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.chmod', 'shutil.rmtree')

_write = os.write  # without the count


def state_digest(run: Any) -> str:
    """Of all that a resume has to bring back on this rank, bit for bit."""
    digest = hashlib.sha256()
    optimizer_state = [
        (key, value)
        for tensors in run.engine.basic_optimizer.state.values()
        for key, value in sorted(tensors.items())
    ]
    parts = [
        *wrapper_of(run.engine).masters().items(),
        *optimizer_state,
        *run.ema._shards.items(),
        *run.ema._buffers.items(),
        ('counts', [run.engine.global_steps, run.ema.num_updates, run.scheduler.state_dict()]),
    ]
    for name, value in parts:
        digest.update(str(name).encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def whole_digest(run: Any) -> str:
    """The same of all ranks, without padding, which is what memory held. Every rank calls it."""
    masters, moments = whole_state(run.engine)
    ema = run.ema
    counts = [run.engine.global_steps, ema.num_updates, run.scheduler.state_dict()]
    digest = hashlib.sha256(repr(counts).encode())
    for part in (masters, *moments.values(), dict(ema.whole_tensors())):
        for name, value in sorted(part.items()):
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                value = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.hexdigest()


class FileCalls:
    """Counts what this process does to files below a directory; kills it at the n-th."""

    def __init__(self, root: str) -> None:
        self.root, self.count, self.fatal, self.on = root, 0, -1, False
        sys.addaudithook(self._audited)
        for name in ('write', 'fsync'):
            setattr(os, name, self._counted(getattr(os, name)))

    def _audited(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event in _CALLS and str(args[0]).startswith(self.root):
            self._step()

    def _counted(self, call: Any) -> Any:
        def counted(*args: Any) -> Any:
            if self.on:
                self._step()
            return call(*args)

        return counted

    def _step(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class Teller:
    """Writes the events of one rank, and arms what kills it.

    Args:
        folder: where the events go.
        output: OUTPUT.
        plan: ``save``: the number of the save to be killed in, from 1; ``victim``: a rank or
            'all'; ``call``: the file call of that save that is the last, 0 for a kill from outside.
    """

    def __init__(self, folder: Path, output: str, plan: dict[str, Any]) -> None:
        self.folder, self.plan, self.saves = folder, plan, 0
        self.calls = FileCalls(output)
        self.file = os.open(folder / f'events_{rank()}', os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, what: str, **values: Any) -> None:
        event = {'what': what, 'calls': self.calls.count, 'at': time.monotonic(), **values}
        _write(self.file, json.dumps(event).encode() + b'\n')

    def save(self, call: Callable[[], Any], key: int, tag: str, counted: bool) -> Any:
        """Runs a save, with its events; ends the life in place of one too many."""
        self.saves += 1
        if self.saves > SAVES:
            self.end()
        if self.saves == self.plan['save']:
            if self.plan['call'] and self.plan['victim'] in (rank(), 'all'):
                self.calls.fatal = self.calls.count + self.plan['call']
            (self.folder / f'due_{rank()}').touch()
        self.calls.on = True
        self('begin', key=key, tag=tag, counted=counted)
        result = call()
        self('return', key=key, tag=tag, counted=counted)
        return result

    def end(self) -> None:
        """Ends a life that nobody killed."""
        async_save.wait()
        self('waited')
        os._exit(0)


def live(action: Callable[[], object]) -> None:
    """Ends a fork as the interpreter ends a program: its hooks run, and say what went wrong."""
    status = 0
    faulthandler.register(signal.SIGQUIT)  # what all threads do, into its log
    try:
        action()
    except BaseException:
        status = 1
        kind, value, traceback = sys.exc_info()
        sys.last_type, sys.last_value, sys.last_traceback = kind, value, traceback
        sys.excepthook(kind, value, traceback)  # type: ignore[arg-type]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def script(output: str, stage: int, folder: Path, plan: dict[str, Any]) -> None:
    """A script's loop: resume what there is, then an update and a save, again and again."""
    init_distributed()
    tell = Teller(folder, output, plan)
    run = Run(
        stage, 'fp32', output, CHECKPOINT__ASYNC=plan['async'], SAVE_CKPT_NUM=2,
        CHECKPOINT__ASYNC_COPY='overlap',
        MODEL__PRETRAINED=_ADDRESS, CHECKPOINT__FROZEN='once',
    )  # fmt: skip
    tag = auto_resume_helper(output, config=run.config)  # which sweeps
    best = Path(output, 'ckpt_epoch_best')
    if plan['best'] and best.exists():
        run.load(str(best))
        load_ema_checkpoint(run.config, run.ema, logger)
        tell('best', key=run.engine.global_steps, digest=whole_digest(run))
    if tag is not None:
        run.load(tag)
        load_ema_checkpoint(run.config, run.ema, logger)
    first = run.engine.global_steps
    tell('resumed', key=first, digest=whole_digest(run), tag=tag, best=best.exists())
    for key in range(first + 1, first + (plan.get('updates') or SAVES) + 1):
        run.steps(key - 1, key)
        tell('update', key=key, digest=whole_digest(run))
        if plan.get('updates'):  # the run that is never interrupted, and saves nothing
            continue
        epoch, step = divmod(key, UPDATES_PER_EPOCH)
        at: dict[str, Any] = {'epoch': epoch, 'step': step} if step else {'epoch': epoch - 1}
        if plan['best']:
            name = tag_name(at['epoch'], 'best', None)
            tell.save(lambda: run.save(at['epoch'], best='best'), key, name, False)
        name = tag_name(at['epoch'], None, at.get('step'))
        tell.save(lambda: run.save(**at), key, name, True)
    tell.end()


def program(output: str, stage: int, folder: Path, plan: dict[str, Any]) -> None:
    """The training program, which saves by its own rules: epochs, updates, what is best."""
    init_distributed()
    tell = Teller(folder, output, plan)
    config = small_config(
        Path(plan['data']), OUTPUT=output, DATA__BATCH_SIZE=2, DATA__NUM_WORKERS=plan['workers'],
        TRAIN__EPOCHS=plan['epochs'], TRAIN__WARMUP_EPOCHS=0, TRAIN__BASE_LR=0.1,
        TRAIN__ACCUMULATION_STEPS=4, TRAIN__EMA__ENABLE=True, TRAIN__EMA__DECAY=0.5,
        AUG__REPROB=0.5, MODEL__DROP_PATH_RATE=0.2, SAVE_CKPT_NUM=2,
        CHECKPOINT__ASYNC=plan['async'], TRAIN__SAVE_STEPS=int(plan['steps']),
    )  # fmt: skip
    save, train, passed = loop.save_checkpoint, loop._train, loop._pass_boundary
    state_of: list[Any] = []

    def save_and_tell(config: Any, epoch: int, engine: Any, *args: Any, **more: Any) -> str:
        if plan.get('updates'):
            return ''
        best, step = more['best'], more['step']
        return tell.save(
            lambda: save(config, epoch, engine, *args, **more),
            engine.global_steps, tag_name(epoch, best, step), best is None,
        )  # fmt: skip

    def train_and_tell(state: Any) -> float:
        state_of.append(state)
        tell(
            'resumed', key=state.engine.global_steps, digest=whole_digest(state),
            tag=state.config.MODEL.RESUME, best=Path(output, 'ckpt_epoch_best').exists(),
        )  # fmt: skip
        return train(state)

    def pass_and_tell(state: Any, epoch: int, progress: Any) -> None:
        records = MetricsLog(Path(output) / 'metrics.jsonl').read() if rank() == 0 else []
        tell(
            'update', key=state.engine.global_steps, digest=whole_digest(state), epoch=epoch,
            records=[{k: v for k, v in r.items() if k not in _TIMES} for r in records],
        )  # fmt: skip
        passed(state, epoch, progress)

    loop.save_checkpoint, loop._train = save_and_tell, train_and_tell  # type: ignore[assignment]
    loop._pass_boundary = pass_and_tell
    if not plan['plots']:
        loop.plot_curves = lambda *_: None  # type: ignore[assignment]
    loop.run(config, {'zero_optimization': {'stage': stage}})
    tell.end()


_TIMES = ('images_per_s', 'seconds')  # which depend on the clock alone
PROGRAMS = {'script': script, 'program': program}
