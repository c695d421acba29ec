"""What a rank does in test_hostile_files.py: harms a file, has it read, and looks at itself."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from internvl_ds import auto_resume_helper, load_checkpoint, load_ema_checkpoint, load_pretrained
from internvl_ds.checkpoint.formats.export import write_original
from internvl_ds.checkpoint.formats.rng import rng_state
from internvl_ds.checkpoint.sources.classes import saved_classes
from internvl_ds.config.ds.check import check, require_right
from internvl_ds.config.ds.load import load_ds_config
from internvl_ds.config.ds.resolve import resolve_or_raise
from internvl_ds.config.tree import default_config, get_config
from internvl_ds.errors import InternvlDsError
from internvl_ds.tools.cli import main as command
from internvl_ds.tools.tune.records import Records
from internvl_ds.tools.tune.search_space import parse_space, read_space
from internvl_ds.tools.tune.session import same_settings
from internvl_ds.tools.tune.trial import _measured
from internvl_ds.train.position import Position
from internvl_ds.train.reporting.log import MetricsLog
from tests.harness import hostile
from tests.harness.hostile import peak, restart_peak
from tests.harness.killing import state_digest
from tests.harness.model import make_model, set_values
from tests.harness.saving import Run, logger

MEGABYTES, HANGS = 300, 'hangs'
_CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]')
_ROW = {
    'trial': 0, 'kind': 'search', 'name': 'n', 'key': 'k', 'labels': {}, 'ds_config': {},
    'opts': {}, 'status': 'ok', 'seconds': 1.0, 'bench': {'images_per_s': 5.0},
}  # fmt: skip


def seconds_here() -> float:
    """The limit of one case: 5 s of a quick core, in proportion on a slower one."""
    start = time.process_time()
    for _ in range(10_000_000):
        pass
    return max(5.0, 25 * (time.process_time() - start))


class Hang(BaseException):
    """A case that took longer than it may."""


class Kind(NamedTuple):
    """One kind of file: where a good one lies, what is done to it, and who reads it."""

    path: Path
    harms: tuple[hostile.Harm, ...]
    readers: tuple[Callable[[], Any], ...]
    after: Callable[[], Any] | None = None


def read_text_files(stage: int, work: Path) -> dict[str, Kind]:
    """The kinds of files that are no part of a checkpoint."""
    run, ds, metrics = work / 'run.yaml', work / 'ds.json', work / 'metrics.jsonl'
    run.write_text(
        'DATA: {BATCH_SIZE: 16}\nMODEL: {TYPE: timm, KWARGS: {a: 1}}\nTRAIN: {BASE_LR: 1.e-4}\n'
        'AUG: {SCALE: [0.1, 1.0]}\nSEED: 5\nBASE: [""]\n'
    )
    ds.write_text(
        json.dumps(
            {
                'train_batch_size': 16,
                'zero_optimization': {'stage': stage, 'reduce_bucket_size': 5000},
                'bf16': {'enabled': False},
                'gradient_clipping': 5.0,
            }
        )
    )
    metrics.write_text(''.join(json.dumps({'epoch': e, 'loss': 0.5}) + '\n' for e in range(5)))
    records = work / 'trials.jsonl'
    records.write_text(json.dumps(_ROW) + '\n' + json.dumps(_ROW) + '\n')
    settings, bench = work / 'settings.json', work / 'bench.json'
    settings.write_text(json.dumps({'cfg': {'a': 1}}))
    bench.write_text(json.dumps({'images_per_s': 5.0, 'images_per_s_range': [1.0, 2.0]}))
    space = work / 'space.json'
    space.write_text(json.dumps({'axes': {'a': {'x': {'opts': {'SEED': 1}}}}}))

    def resolved() -> None:
        config = default_config()
        config.DATA.BATCH_SIZE = 16
        tree = load_ds_config(ds)
        require_right(check(tree, config, 1))  # as `initialize` does
        resolve_or_raise(tree, config, 1)

    def trial() -> None:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            _measured(bench)  # `measure` makes an outcome of these

    def metrics_read() -> None:
        with contextlib.suppress(OSError, ValueError):  # `for_show` makes a warning of these
            MetricsLog(metrics).read()

    texts = (*hostile.NOISE, hostile.special, hostile.text)
    of_json = (*texts, *[hostile.json_altered] * 6)
    words = ['config', 'check', str(ds), '--cfg', str(run), '--world-size', '1', '--show', '--json']
    return {
        'YAML': Kind(
            run,
            (*texts, *[hostile.text] * 4, *[hostile.yaml_altered] * 6),
            (lambda: get_config(Namespace(cfg=str(run), opts=['SEED', '3'])),),
        ),
        'ds_config': Kind(ds, of_json, (resolved, lambda: cli(*words))),
        'metrics.jsonl': Kind(metrics, of_json, (metrics_read,)),
        'trials.jsonl': Kind(records, of_json, (lambda: Records(work).spent(),)),
        'settings.json': Kind(settings, of_json, (lambda: same_settings(work, {'cfg': {'a': 1}}),)),
        'space.json': Kind(space, of_json, (lambda: parse_space(read_space(space), 16),)),
        'bench.json': Kind(bench, of_json, (trial,)),
    }


def cli(*words: str) -> int:
    """A command, whose status is one of its own, and whose words obey no terminal."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        status = command(list(words))
    assert status in (0, 1, 2, 3), status
    found = _CONTROL.search(told.getvalue())
    assert found is None, f'{found and found[0]!r} is printed'
    return 0 if words[1] == 'diff' and status == 1 else status


class Fuzz:
    """An engine, its checkpoints, and one harm after another."""

    def __init__(self, root: str, stage: int) -> None:
        self.seconds = seconds_here()
        self.output, self.work = Path(root, 'out'), Path(root, 'work')
        self.run = Run(stage, 'fp32', str(self.output), SAVE_CKPT_NUM=5)
        self.loop = Position()
        self.run.steps(0, 1)
        self.run.save(0, loop=self.loop)
        self.run.steps(1, 2)
        self.loop.micro_batches = 3
        self.tag = Path(self.run.save(1, step=4, loop=self.loop, class_names=['a', 'b']))
        self.latest = self.output / 'latest'
        self.kinds = {**self.checkpoints(), **read_text_files(stage, self.work)}
        self.kept = Path(root, 'kept')
        self.kept.mkdir()
        for folder in (self.output, self.work):
            shutil.copytree(folder, self.kept / folder.name)
        self.load(self.tag)
        wrong: list[str] = []
        for name, kind in self.kinds.items():  # else a refusal would show nothing
            for number, read in enumerate(kind.readers):
                try:
                    status = read()
                    assert not isinstance(status, int) or status in (0, 3), status
                except Exception as error:
                    wrong.append(f'{name}, reader {number}: {error}')
        assert not wrong, wrong
        self.load(self.tag)  # `config check` draws random numbers, in what is a process of its own

    def checkpoints(self) -> dict[str, Kind]:
        """The kinds of files of checkpoints."""
        tag, output = str(self.tag), str(self.output)
        self.work.mkdir()
        original, legacy = self.work / 'file.pth', self.work / 'old.pth'
        write_original(self.tag, original)
        whole = torch.load(original, weights_only=False)
        weights = whole['model']
        torch.save(whole, legacy, _use_new_zipfile_serialization=False)
        tensors, part = self.work / 'file.safetensors', self.work / 'part.safetensors'
        save_file(
            {n: t.clone() for n, t in weights.items()}, tensors, {'class_names': '["a", "b"]'}
        )
        shutil.copy(tensors, part)
        binary = self.work / 'file.bin'
        torch.save(weights, binary)
        index = self.work / 'model.safetensors.index.json'
        index.write_text(
            json.dumps({'weight_map': dict.fromkeys(weights, part.name), 'metadata': {}})
        )
        in_plain = self.work / 'global_step1'
        in_plain.mkdir()
        for path in self.tag.glob('*.pt'):
            shutil.copy(path, in_plain)
        noise, special, text = hostile.NOISE, hostile.special, hostile.text
        by_tag = (
            lambda: auto_resume_helper(output),
            lambda: self.load(self.tag),
            lambda: self.load(self.tag, EVAL_MODE=True),
            lambda: self.load_ema(self.tag),
            lambda: self.load_pretrained(tag),
            lambda: cli('ckpt', 'verify', output, '--all'),
            lambda: cli('ckpt', 'list', output),
            lambda: cli('ckpt', 'show', tag),
            lambda: cli('ckpt', 'export', tag, str(self.work / 'exported.pth')),
            lambda: saved_classes(tag),
        )
        by_file = (lambda p: self.load(p), lambda p: self.load_pretrained(str(p)))
        by_file += (
            lambda p: self.load(p, EVAL_MODE=True),
            lambda p: cli('ckpt', 'diff', str(p), tag),
        )
        of = lambda path: tuple((lambda f=f: f(path)) for f in by_file)  # noqa: E731
        rehash = lambda: hostile.rehash(self.tag)  # noqa: E731
        pickles = (hostile.pickled, hostile.code, *[hostile.torch_altered] * 3)
        kinds = {
            'latest': Kind(self.latest, (*noise, special, special, text), by_tag),
            'manifest.json': Kind(
                self.tag / 'manifest.json',
                (*noise, special, text, *[hostile.manifest_altered] * 8),
                by_tag,
            ),
            'a folder': Kind(self.tag, (hostile.entry,), by_tag[-5:-1] + by_tag[:2]),
            'plain tag': Kind(
                next(in_plain.glob('*mp_rank_00_model_states.pt')),
                (*noise, special, *pickles),
                tuple((lambda f=f: f(in_plain)) for f in by_file),
            ),
            'plain optimizer': Kind(
                next(in_plain.glob('*optim_states.pt')),
                (*noise, special, *pickles),
                of(in_plain)[:1],
            ),
            'pth': Kind(original, (*noise, special, *pickles, *pickles), of(original)),
            'old pth': Kind(legacy, (*noise, special, *pickles), of(legacy)),
            'bin': Kind(binary, (*noise, special, *pickles), of(binary)[1:2]),
            'safetensors': Kind(
                tensors,
                (*noise, special, *[hostile.header_altered] * 6),
                (*of(tensors)[1:], lambda: saved_classes(str(tensors))),
            ),
            'index.json': Kind(
                index,
                (*noise, special, text, *[hostile.json_altered] * 6),
                (*of(index)[1:2], of(index)[3], lambda: saved_classes(str(index))),
            ),
        }
        for path in sorted(self.tag.iterdir()):
            if path.name == 'manifest.json':
                continue
            harms: tuple[hostile.Harm, ...] = (*noise, special)
            kinds[path.name] = Kind(path, harms, by_tag)
            if path.suffix == '.json':
                harms = (text, *[hostile.json_altered] * 6)
            elif path.suffix == '.pt':
                harms = (*pickles, flip_of(path))
            else:
                harms = (hostile.header_altered,)
            kinds[f'{path.name}, rehashed'] = Kind(path, harms, by_tag, rehash)
        return kinds

    def config(self, **values: Any) -> Any:
        config = self.run.config.clone()
        config.defrost()
        set_values(config, values)
        return config

    def load(self, path: Path, **values: Any) -> None:
        config, run = self.config(MODEL__RESUME=str(path), **values), self.run
        load_checkpoint(
            config, run.engine.module, run.optimizer, run.scheduler, run.scaler, logger,
            loop=self.loop, class_names=['a', 'b'],
        )  # fmt: skip

    def load_ema(self, path: Path) -> None:
        load_ema_checkpoint(self.config(MODEL__RESUME=str(path)), self.run.ema, logger)

    def load_pretrained(self, path: str) -> None:
        load_pretrained(self.config(MODEL__PRETRAINED=path), make_model(), logger)

    def digest(self) -> str:
        """Of all that a load may change."""
        more = [self.loop.state_dict(), rng_state(), self.run.scaler.state_dict()]
        module = (
            self.run.engine.module.state_dict()
            if self.run.engine.zero_optimization_stage() < 3
            else {}
        )
        values = hashlib.sha256(repr(more).encode())
        for tensor in module.values():
            values.update(tensor.numpy().tobytes())
        return state_digest(self.run) + values.hexdigest()

    def case(self, kind: str, r: random.Random) -> tuple[str, str | None]:
        """One harm, one reader: what was done, and what went wrong (None: nothing)."""
        path, harms, readers, after = self.kinds[kind]
        what = f'{kind}: {r.choice(harms)(r, path)}'
        number = r.randrange(len(readers))
        what = f'{what}, reader {number}'
        if after is not None:
            after()
        before = self.digest()
        resident = restart_peak()
        start, wrong, refused = time.process_time(), None, True
        try:
            with limit(self.seconds):
                readers[number]()
            refused = False
        except InternvlDsError as error:
            if _CONTROL.search(str(error)) or len(str(error)) > 20_000:
                wrong = f'an error that cannot be shown: {str(error)[:500]!r}'
        except Hang:
            return what, HANGS  # in the middle of whatever it was: nothing goes on from there
        except BaseException as error:  # SystemExit too
            wrong = f'raw {type(error).__name__}: {str(error)[:300]} {place_of(error)}'
        seconds, grown = time.process_time() - start, (peak() - resident) >> 20
        if seconds > self.seconds:
            wrong = wrong or f'took {seconds:.1f} s'
        if grown > MEGABYTES:
            wrong = wrong or f'took {grown} MB'
        if hostile.mark_of(path).exists():
            wrong, _ = 'code ran', hostile.mark_of(path).unlink()
        changed = self.digest() != before
        if changed and refused:
            wrong = wrong or 'refused, and the state has changed'
        self.restore(path)
        if changed:
            try:
                self.load(self.tag)
                self.load_ema(self.tag)
            except InternvlDsError as error:
                raise AssertionError(f'{what} ({wrong}), and then the good tag: {error}') from error
        self.slowest = max(getattr(self, 'slowest', (0.0, '')), (seconds, what))
        self.largest = max(getattr(self, 'largest', (0, '')), (grown, what))
        return what, wrong

    def restore(self, path: Path) -> None:
        """Puts the good files back: those of the folder that a harm can reach."""
        folder = self.output if self.output in path.parents else self.work
        if folder is self.work and path.parent == self.work:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else None
            path.unlink(missing_ok=True)
            shutil.copy2(self.kept / 'work' / path.name, path)
            return
        shutil.rmtree(folder)
        shutil.copytree(self.kept / folder.name, folder)


def flip_of(path: Path) -> hostile.Harm:
    """A flip in the pickle at the front, not in the tensors: the checksum is made right."""

    def harm(r: random.Random, path: Path) -> str:
        data = bytearray(path.read_bytes())
        at = r.randrange(min(len(data), 3000))
        data[at] ^= 1 << r.randrange(8)
        path.write_bytes(data)
        return f'bit flipped at {at}'

    return harm


def place_of(error: BaseException) -> str:
    trace, places = error.__traceback__, []
    while trace is not None:
        places.append(f'{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}')
        trace = trace.tb_next
    return ' '.join(places[-6:])


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Ends a block that computes so long; one that waits gets longer, for machines under load."""

    def stop(*_: Any) -> None:
        raise Hang

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, 1), (signal.ITIMER_REAL, signal.SIGALRM, 6))
    for timer, number, times in timers:
        signal.signal(number, stop)
        signal.setitimer(timer, seconds * times)
    try:
        yield
    finally:
        for timer, *_ in timers:
            signal.setitimer(timer, 0)


def fuzz(root: str, stage: int, cases: int, seed: int) -> dict[str, Any]:
    """So many cases, over all kinds in turn."""
    quiet = logging.Handler(logging.DEBUG)
    quiet.emit = lambda record: record.getMessage() and None  # type: ignore[method-assign]
    logging.getLogger().addHandler(quiet)
    os.environ['HOSTILE_MARK'] = f'{root}/ran'
    fuzz = Fuzz(root, stage)
    print(f'seed {seed}, stage {stage}', flush=True)
    kinds, done, failures = list(fuzz.kinds), Counter(), []
    start, cpu = time.monotonic(), time.process_time()
    for number in range(cases):
        kind = kinds[number % len(kinds)]
        what, wrong = fuzz.case(kind, random.Random(f'{seed} {stage} {number}'))
        done[kind] += 1
        if wrong is not None:
            failures.append(f'case {number}: {what}: {wrong}')
            print(failures[-1], flush=True)
        if wrong == HANGS:
            break
    fuzz.run.close()
    return {
        'seed': seed, 'cases': cases, 'seconds': round(time.monotonic() - start, 1),
        'cpu': round(time.process_time() - cpu, 1),
        'kinds': dict(done), 'slowest': fuzz.slowest, 'largest MB': fuzz.largest,
        'failures': failures,
    }  # fmt: skip
