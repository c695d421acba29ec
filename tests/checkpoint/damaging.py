"""What ranks do in test_checkpoint_damage.py: damage a tag in every way, and try to load it."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from internvl_ds import auto_resume_helper, load_ema_checkpoint
from internvl_ds.checkpoint.tag.discovery import read_manifest
from internvl_ds.checkpoint.tag.hashing import hash_file
from internvl_ds.checkpoint.tag.manifest import Manifest
from tests.harness.calls import message_of, on_rank_0
from tests.harness.killing import state_digest
from tests.harness.saving import Payload, Run, caught_warnings, logger


def flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


DAMAGES: tuple[Callable[[Path, Path], None], ...] = (flip, truncate, remove, swap)


def _resume(output: str) -> tuple[str | None, list[str]]:
    """What auto resume finds, and the warnings of this package meanwhile."""
    caught: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: caught.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger('internvl_ds')
    package.addHandler(handler)
    try:
        found = auto_resume_helper(output)
    finally:
        package.removeHandler(handler)
    return found and Path(found).name, caught


def every_damage(stage: int, root: str) -> dict[str, Any]:
    """Each file of the newest tag, damaged in each way: what resume takes and what loads say."""
    run = Run(stage, 'fp32', root, SAVE_CKPT_NUM=5)
    run.steps(0, 1)
    older = Path(run.save(0))
    run.steps(1, 2)
    torch.rand(1)  # so that the files with the generators' states differ too
    newest = Path(run.save(1))
    kept = Path(f'{root}-kept')
    on_rank_0(lambda: shutil.copytree(newest, kept))
    results: dict[str, Any] = {}
    before = state_digest(run)
    for name in sorted(p.name for p in kept.iterdir()):
        for harm in DAMAGES:
            on_rank_0(lambda n=name, h=harm: h(newest / n, older / n))
            taken, warnings = _resume(root)
            by_name = message_of(lambda: run.load(str(newest)))
            if by_name == 'no error':
                by_name = message_of(lambda: load_ema_checkpoint(run.config, run.ema, logger))
            results[f'{harm.__name__} {name}'] = {
                'taken': taken,
                'warnings': warnings,
                'by name': by_name,
            }
            on_rank_0(lambda: shutil.copytree(kept, newest, dirs_exist_ok=True))
    results['untouched'] = before == state_digest(run)
    results['whole again'] = _resume(root)[0]
    run.close()
    return results


def payloads(stage: int, root: str, target: str) -> dict[str, str]:
    """Files of ours that carry a pickle, with a manifest that agrees with them."""
    run = Run(stage, 'fp32', root)
    run.steps(0, 1)
    tag = Path(run.save(0))
    kept = Path(f'{root}-kept')
    on_rank_0(lambda: shutil.copytree(tag, kept))
    messages = {}
    for name in sorted(p.name for p in kept.iterdir()):
        if name == 'manifest.json':
            continue

        def poison(path: Path = tag / name) -> None:
            if path.suffix == '.pt':
                torch.save({**torch.load(path, weights_only=False), 'x': Payload(target)}, path)
            else:
                path.write_bytes(pickle.dumps(Payload(target)))
            manifest = read_manifest(tag)
            assert manifest is not None
            files = {**manifest.files, path.name: hash_file(path)}
            text = Manifest(manifest.header, files).to_text()
            (tag / 'manifest.json').write_text(text)

        on_rank_0(poison)
        messages[name] = message_of(lambda: run.load(str(tag)))
        if messages[name] == 'no error':
            messages[name] = message_of(lambda: load_ema_checkpoint(run.config, run.ema, logger))
        on_rank_0(lambda: shutil.copytree(kept, tag, dirs_exist_ok=True))
    run.close()
    return messages


def plain_tag(root: str) -> dict[str, Any]:
    """A tag of plain DeepSpeed: loaded, with a warning."""
    run = Run(2, 'fp32', root)
    run.steps(0, 1)
    run.engine.save_checkpoint(root, tag='global_step1')
    with caught_warnings() as warnings:
        run.load(f'{root}/global_step1')
    run.close()
    return {'warnings': warnings}
