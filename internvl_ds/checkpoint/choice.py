"""Which checkpoint a run goes on from: MODEL.RESUME, or what its OUTPUT holds. All ranks agree."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from yacs.config import CfgNode

from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.formats.state_json import state_of
from internvl_ds.checkpoint.load_context import Load
from internvl_ds.checkpoint.mirror.fetching import fetch_newer
from internvl_ds.checkpoint.sources import downloads
from internvl_ds.checkpoint.sources.open_weights import open_weights
from internvl_ds.checkpoint.tag import discovery, sweep
from internvl_ds.checkpoint.tag.manifest import epoch_of, step_of
from internvl_ds.checkpoint.tag.verify import Seen, damage, share_of
from internvl_ds.config.counts import require_counts
from internvl_ds.config.mirror import mirror_of
from internvl_ds.config.tree import checkpoint_option, default_config, get_option
from internvl_ds.dist.group import current_group
from internvl_ds.dist.rendezvous import exchange, rank, world_size
from internvl_ds.engine.registry import last_config
from internvl_ds.errors import CheckpointError, CheckpointNotFound, ConfigError, PretrainedError
from internvl_ds.files.addresses import is_address, shown
from internvl_ds.files.yaml_text import parse_yaml

_log = logging.getLogger(__name__)

Find = Callable[[Mapping[str, str]], discovery.Resume | None]


class _Last:
    """The last settings and their choice: the average is loaded from the source of the weights."""

    settings: tuple[str, str, bool, bool] | None = None
    path: Path | None = None
    mirrored: Path | None = None  # the OUTPUT whose mirror was looked into


def auto_resume_helper(output_dir: str, *, config: CfgNode | None = None) -> str | None:
    """The newest checkpoint in a directory, for MODEL.RESUME. Collective: every rank calls it.

    The newest is what was saved last; every rank gets the same answer. Its checksums are verified;
    a damaged tag is passed over with a warning. What dead saves left is swept away. Where
    CHECKPOINT.MIRROR has a newer whole tag of this OUTPUT, that is fetched into it.

    Args:
        output_dir: the directory.
        config: its CHECKPOINT time limits hold, and its mirror of OUTPUT. Without it no mirror, and
            the limits of the environment (INTERNVL_DS_RENDEZVOUS_TIMEOUT and
            INTERNVL_DS_IO_TIMEOUT, seconds), else those that the last `internvl_ds.initialize` was
            given, else the defaults.

    Returns:
        A tag's path; None when there is no such directory, or no checkpoint was ever in it.

    Raises:
        CheckpointNotFound: when checkpoints were there and no whole one is left.
    """
    async_save.wait()
    load = Load(_limits_without_config() if config is None else config, _log)
    age = checkpoint_option(load.config, 'LEFTOVER_AGE')
    load.from_rank_0('sweep', lambda: _sweep(Path(output_dir), age))
    newest = _newest_of_both(load, Path(output_dir))
    if newest is None:
        return None
    if newest.warning and rank() == 0:
        _log.warning(newest.warning)
    return str(newest.path)


def _limits_without_config() -> CfgNode:
    """The time limits of a call that has no config: see `auto_resume_helper`."""
    config = default_config()
    for key in ('RENDEZVOUS_TIMEOUT', 'IO_TIMEOUT'):
        config.CHECKPOINT[key] = checkpoint_option(last_config() or config, key)
        if seconds := os.environ.get(f'INTERNVL_DS_{key}'):
            if not seconds.isdecimal():
                raise ConfigError(f'INTERNVL_DS_{key} is {seconds!r}; it takes whole seconds')
            config.CHECKPOINT[key] = int(seconds)
    require_counts(config, ('CHECKPOINT',))
    return config


def choose(config: CfgNode, logger: logging.Logger, *, as_before: bool = False) -> Path | None:
    """The tag or file to load; None for an address. Collective: every rank calls it.

    MODEL.RESUME names a tag, a file, or an output directory, whose newest tag is taken. Where a run
    trains with TRAIN.AUTO_RESUME, a newer tag in OUTPUT goes before MODEL.RESUME: the same command,
    started again, goes on where it was. Of two tags in one directory the one saved later is newer;
    else one whose run went on from this same MODEL.RESUME, or one further in training. A tag of
    OUTPUT that was saved as ``best`` is taken as it was asked for.

    Args:
        config: MODEL.RESUME, OUTPUT, TRAIN.AUTO_RESUME, EVAL_MODE and CHECKPOINT are read.
        logger: gets a warning where another tag than MODEL.RESUME is taken, or is newer.
        as_before: take what was taken for the same settings last, as long as it is there.

    Raises:
        CheckpointNotFound: when nothing is there.
        CheckpointError: when the tag that is asked for by its name is not whole.
    """
    last = current_group().part(_Last)
    load = Load(config, logger)
    settings = (
        str(config.MODEL.RESUME),
        str(get_option(config, 'OUTPUT', '')),
        bool(get_option(config, 'EVAL_MODE', False)),
        bool(get_option(config, 'TRAIN.AUTO_RESUME', True)),
    )
    if as_before and last.settings == settings:
        path = last.path
        if path is None or load.from_rank_0('resume as before', path.exists):
            return path
    last.path = _choose(load, *settings)
    last.settings = settings
    return last.path


def newer_than_best(config: CfgNode) -> str | None:
    """OUTPUT's newest tag, if MODEL.RESUME is OUTPUT's best tag and was saved before; else None.
    Collective: every rank calls it.
    """
    load, output, resume = Load(config, _log), Path(config.OUTPUT), Path(config.MODEL.RESUME)

    def sequence_of_best() -> int | None:
        header = discovery.header_or_none(discovery.present(resume))
        inside = os.path.realpath(resume.parent) == os.path.realpath(output)
        return header.sequence if header and inside and epoch_of(resume.name) is None else None

    best = load.from_rank_0('look at MODEL.RESUME', sequence_of_best)
    if best is None:
        return None
    newest = auto_resume_helper(str(output), config=config)

    def is_newer() -> bool:
        header = discovery.header_or_none(Path(newest or ''))
        return header is not None and header.sequence > best

    return newest if newest and load.from_rank_0('compare with best', is_newer) else None


def fetch_resume(load: Load) -> Path:
    """The file that MODEL.RESUME is the address of. Collective: every rank calls it."""

    def download() -> Path:
        try:
            return Path(downloads.local(str(load.config.MODEL.RESUME), load.config))
        except PretrainedError as error:
            raise CheckpointError(str(error)) from error

    return load.agree('download', download)


def _choose(
    load: Load, resume: str, output: str, evaluates: bool, auto_resume: bool
) -> Path | None:
    if not resume:
        raise CheckpointNotFound('MODEL.RESUME is empty: set it to a checkpoint')

    def find(damages: Mapping[str, str]) -> discovery.Resume | None:
        newest = discovery.newest(Path(output), damages)
        if newest is None or newest.path.is_file() or not _is_newer(newest.path, resume):
            return None
        return newest

    def find_or_none() -> str | None:
        with contextlib.suppress(CheckpointNotFound):
            newest = find({})
            return None if newest is None else str(newest.path)
        return None

    if output and not evaluates and auto_resume:
        if mirror_of(load.config) and current_group().part(_Last).mirrored != Path(output):
            with contextlib.suppress(CheckpointNotFound):  # told below
                _newest_of_both(load, Path(output))
        try:
            newest = _find_verified(load, find)
        except CheckpointNotFound as error:
            load.logger.warning('%s It is set: %s is taken', error, shown(resume))
            newest = None
        if newest is not None:
            if newest.warning:
                load.logger.warning(newest.warning)
            load.logger.warning(
                f'{newest.path} goes before MODEL.RESUME {shown(resume)}, as the newer '
                '(TRAIN.AUTO_RESUME False would keep MODEL.RESUME)'
            )
            return newest.path
    elif output and not evaluates:
        newer = load.from_rank_0('find newest', find_or_none)
        if newer is not None:
            load.logger.warning(
                f'MODEL.RESUME {shown(resume)} is taken, and not the newer {newer}: '
                'TRAIN.AUTO_RESUME is False'
            )
    return _resolve(load, resume)


def _is_newer(tag: Path, resume: str) -> bool:
    """Whether a tag of OUTPUT takes precedence over MODEL.RESUME: see `choose`."""
    rival = discovery.present(Path(resume))
    if os.path.isdir(rival) and not discovery.is_tag(rival):
        with contextlib.suppress(CheckpointError):  # told when it is loaded, if it is
            newest = discovery.newest(rival)
            rival = rival if newest is None else newest.path
    ours, theirs = discovery.header_or_none(tag), discovery.header_or_none(rival)
    output = os.path.realpath(tag.parent)
    if ours and theirs and os.path.realpath(rival.parent) == output:
        # Who names a tag that was saved as best means that one.
        return ours.sequence > theirs.sequence and epoch_of(rival.name) is not None
    origin = _resumed_from(tag)
    if origin == _place(resume):
        return True
    position, rival_position = _position(tag), _position(rival)
    if position is not None and rival_position is not None:
        return position > rival_position
    return os.path.dirname(origin) == output  # it went on from this OUTPUT before


def _position(path: Path) -> tuple[int, int] | None:
    """How far in training a tag or file was saved: whole epochs, updates; None if not known.

    Of a tag that is not there any more its name says so.
    """
    epoch, step = epoch_of(path.name), step_of(path.name)
    if header := discovery.header_or_none(path):
        epoch, step = header.epoch, header.step
    elif os.path.isfile(path):
        with contextlib.suppress(PretrainedError):  # told when it is loaded
            epoch = open_weights(str(path)).get('epoch')
    return (epoch + (step is None), step or 0) if isinstance(epoch, int) else None


def _resumed_from(tag: Path) -> str:
    """The MODEL.RESUME of the run that saved a tag, from the tag's configuration; or ''."""
    try:
        tree = parse_yaml(state_of(tag).get('config') or '')
    except (CheckpointError, ValueError):  # told when it is loaded
        return ''
    resume = get_option(tree, 'MODEL.RESUME', '')
    return _place(str(resume)) if resume else ''


def _place(resume: str) -> str:
    return shown(resume) if is_address(resume) else os.path.realpath(resume)


def _sweep(output: Path, age: float) -> None:
    try:
        sweep.sweep(output, age=age)
    except OSError as error:  # someone who may only read: it stays as it is
        _log.info('%s: leftovers of dead saves are not swept: %s', output, error)


def _newest(load: Load, output: Path) -> discovery.Resume | None:
    return _find_verified(load, lambda damages: discovery.newest(output, damages))


def _newest_of_both(load: Load, output: Path) -> discovery.Resume | None:
    """As `_newest`; what CHECKPOINT.MIRROR has of newer tags is in ``output`` then."""
    if not mirror_of(load.config) or output != Path(get_option(load.config, 'OUTPUT', '')):
        return _newest(load, output)
    failure, newest = None, None
    try:
        newest = _newest(load, output)
    except CheckpointNotFound as error:
        failure = error
    fetched = fetch_newer(load, output, newest.path if newest else None)
    current_group().part(_Last).mirrored = output
    if fetched is not None:
        return discovery.Resume(fetched, None)
    if failure is not None:
        raise failure
    return newest


def _find_verified(load: Load, find: Find) -> discovery.Resume | None:
    """What ``find`` finds on rank 0, with right checksums. Collective: every rank calls it.

    ``find`` gets the names of the tags to pass over, and what is wrong with each.
    """
    damages: dict[str, str] = {}

    def answer() -> list[str | None] | None:
        newest = find(damages)
        return None if newest is None else [str(newest.path), newest.warning]

    while True:
        newest = load.from_rank_0('find newest', answer)
        if newest is None:
            return None
        path, warning = Path(newest[0]), newest[1]
        reports = exchange('verify newest', _damage_of_share(path), load.io_timeout)
        reasons = [reason for report in reports for reason in report]
        if not reasons:
            return discovery.Resume(path, warning)
        current_group().part(Seen).forget()
        damages[path.name] = '; '.join(reasons[:3])


def _damage_of_share(path: Path) -> list[str]:
    if path.is_file():
        return []
    try:
        manifest = discovery.read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    if manifest is None:
        return []
    names = share_of(manifest.files, rank(), world_size())
    current_group().part(Seen).look(path, names)
    return damage(path, manifest, names)


def _resolve(load: Load, resume: str) -> Path | None:
    """The tag or file that MODEL.RESUME names, the same on all ranks; None for an address."""

    def find() -> tuple[str, bool]:
        path = discovery.resolve(resume)
        return str(path), path.is_file() or discovery.is_tag(path)

    if is_address(resume):
        return None
    path, is_tag = load.from_rank_0('resolve resume', find)
    if is_tag:
        return Path(path)
    newest = _newest(load, Path(path))
    if newest is None:
        raise CheckpointNotFound(f'{path}: a directory without any checkpoint')
    if newest.warning:
        load.logger.warning(newest.warning)
    return newest.path
