"""What a run leaves behind: logs, config.json, metrics.jsonl and curves.png."""

import json
import logging
import math
import resource

import pytest
import torch
from PIL import Image

from internvl_ds.train.reporting.log import MetricsLog, close_log, open_log, write_config
from internvl_ds.train.reporting.plot import plot_curves
from internvl_ds.train.reporting.progress import Progress
from tests.harness.training import small_config


@pytest.fixture
def logger(tmp_path):
    logger = open_log(tmp_path / 'out', rank=0)
    yield logger
    close_log(logger)


def test_each_rank_has_a_file_and_rank_0_a_console(tmp_path, capsys):
    for rank in (0, 1):
        logger = open_log(tmp_path / 'new' / 'out', rank)
        logger.info('hello from %d', rank)
        close_log(logger)
    for rank in (0, 1):
        text = (tmp_path / 'new' / 'out' / f'log_rank{rank}.txt').read_text()
        assert f'hello from {rank}' in text
        assert f'hello from {1 - rank}' not in text
        assert f'rank {rank}' in text
    printed = capsys.readouterr().out
    assert 'hello from 0' in printed
    assert 'hello from 1' not in printed


def test_modules_of_the_package_log_to_the_same_place_once(logger, tmp_path):
    open_log(tmp_path / 'out', rank=0)
    logging.getLogger('internvl_ds.somewhere').warning('said once')
    assert (tmp_path / 'out' / 'log_rank0.txt').read_text().count('said once') == 1


def test_a_resumed_run_appends_to_the_log(tmp_path):
    for text in ('before', 'after'):
        logger = open_log(tmp_path, rank=1)
        logger.info(text)
        close_log(logger)
    lines = (tmp_path / 'log_rank1.txt').read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ['before', 'after']


def test_config_json_is_json_with_every_section(tmp_path):
    config = small_config(tmp_path, AUG__MEAN=(0.1, 0.2, 0.3))
    tree = json.loads(write_config(config, tmp_path).read_text())
    assert tree['DATA']['IMG_SIZE'] == 16
    assert tree['AUG']['MEAN'] == [0.1, 0.2, 0.3]
    assert tree['MODEL']['KWARGS']['depth'] == 2
    assert tree['AUG']['CUTMIX_MINMAX'] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json']


def test_metrics_are_one_json_object_per_epoch(tmp_path):
    log = MetricsLog(tmp_path / 'metrics.jsonl')
    assert log.read() == []
    log.append({'epoch': 0, 'acc1': 50.0})
    log.append({'epoch': 1, 'acc1': 60.0, 'train_loss': math.nan})
    lines = log.path.read_text().splitlines()
    assert json.loads(lines[0]) == {'epoch': 0, 'acc1': 50.0}
    assert json.loads(lines[1], parse_constant=pytest.fail)['train_loss'] is None


def test_a_resumed_run_repeats_no_epoch(tmp_path):
    log = MetricsLog(tmp_path / 'metrics.jsonl')
    for epoch in range(4):
        log.append({'epoch': epoch, 'run': 'first'})
    log.drop_from(2)
    log.append({'epoch': 2, 'run': 'second'})
    assert [(r['epoch'], r['run']) for r in log.read()] == [
        (0, 'first'), (1, 'first'), (2, 'second'),
    ]  # fmt: skip


def test_a_line_cut_short_by_a_kill_does_not_spoil_the_file(tmp_path):
    log = MetricsLog(tmp_path / 'metrics.jsonl')
    log.append({'epoch': 0})
    with log.path.open('a') as file:
        file.write('{"epoch": 1, "acc')
    log.drop_from(1)
    log.append({'epoch': 1, 'acc1': 5.0})
    assert [json.loads(line)['epoch'] for line in log.path.read_text().splitlines()] == [0, 1]


def test_curves_are_a_png_that_can_be_read_at_any_time(tmp_path):
    records = [
        {'epoch': 0, 'train_loss': 2.0, 'val_loss': 1.9, 'acc1': 30.0, 'acc5': 80.0},
        {'epoch': 1, 'train_loss': None},
        {'epoch': 2, 'train_loss': 1.0, 'val_loss': 1.1, 'acc1': 70.0, 'acc5': 99.0, 'ema_acc1': 1},
    ]
    path = plot_curves(records, tmp_path / 'curves.png')
    with Image.open(path) as image:
        assert image.format == 'PNG'
        assert image.width > 600
        assert len(image.convert('L').getcolors()) > 10
    assert [p.name for p in tmp_path.iterdir()] == ['curves.png']


def test_curves_of_a_run_without_evaluations(tmp_path):
    assert plot_curves([{'epoch': 0, 'train_loss': 1.0}], tmp_path / 'curves.png').is_file()


def test_the_record_of_a_run_that_was_killed_before_it_wrote_it_is_added(tmp_path):
    log, last = MetricsLog(tmp_path / 'metrics.jsonl'), {'epoch': 1, 'acc1': 5.0}
    log.drop_from(2, last)  # it is of another run: nothing was trained here yet
    assert log.read() == []
    log.append({'epoch': 0})
    for _ in range(2):
        log.drop_from(2, last)
        assert log.read() == [{'epoch': 0}, last]
    log.drop_from(1, {})
    assert log.read() == [{'epoch': 0}]


def test_a_log_that_cannot_be_opened_is_a_warning(tmp_path, capsys):
    (tmp_path / 'log_rank0.txt').mkdir()
    (tmp_path / 'log_rank1.txt').mkdir()
    for rank in (0, 1):
        logger = open_log(tmp_path, rank)
        logger.info('on %d', rank)
        close_log(logger)
    printed = capsys.readouterr()
    assert f'{tmp_path / "log_rank0.txt"}: cannot be written' in printed.out
    assert 'on 0' in printed.out
    assert f'{tmp_path / "log_rank1.txt"}: cannot be written' in printed.err


def test_a_log_on_a_full_disk_is_told_once(tmp_path, capsys):
    logger = open_log(tmp_path, 0)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))  # as a full disk or a quota does
    try:
        for number in range(3):
            logger.info('line %d', number)
        close_log(logger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    printed = capsys.readouterr()
    assert [line.rpartition(' ')[2] for line in printed.out.splitlines()] == ['0', '1', '2']
    assert printed.err.count('cannot be written ([Errno 27] File too large)') == 1
    assert 'Traceback' not in printed.err


def test_no_log_is_written_through_a_link(tmp_path, capsys):
    victim, metrics = tmp_path / 'victim', tmp_path / 'metrics.jsonl'
    victim.write_text('precious')
    (tmp_path / 'log_rank0.txt').symlink_to(victim)
    metrics.symlink_to(victim)
    logger = open_log(tmp_path, 0)
    logger.info('hello')
    close_log(logger)
    with pytest.raises(OSError, match='metrics'):
        MetricsLog(metrics).append({'epoch': 0})
    assert victim.read_text() == 'precious'
    assert f'{tmp_path}/log_rank0.txt: cannot be written' in capsys.readouterr().out
    MetricsLog(metrics).drop_from(0)  # as a run does that begins: the link goes
    MetricsLog(metrics).append({'epoch': 0})
    assert json.loads(metrics.read_text()) == {'epoch': 0}
    assert victim.read_text() == 'precious'


def test_curves_replace_a_link_and_leave_nothing_beside_them(tmp_path):
    victim = tmp_path / 'victim'
    victim.write_text('precious')
    for name in ('.curves.tmp.png', 'curves.png'):
        (tmp_path / name).symlink_to(victim)
    plot_curves([{'epoch': 0, 'train_loss': 1.0}], tmp_path / 'curves.png')
    assert victim.read_text() == 'precious'
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        '.curves.tmp.png', 'curves.png', 'victim',
    ]  # fmt: skip


def progress_lines(tmp_path, logger, steps, **values):
    config = small_config(tmp_path, TRAIN__EPOCHS=3, **values)
    progress = Progress(config, 1, len(steps), 2, logger)
    for loss, norm in steps:
        norm = None if norm is None else torch.tensor(norm)
        progress.step(torch.tensor(loss), norm, 1e-3, 1024.0, norm is not None and norm.isinf())
    progress.close()
    text = (tmp_path / 'out' / 'log_rank0.txt').read_text()
    return progress, [line for line in text.splitlines() if 'Train:' in line]


def test_lines_come_at_the_configured_distance_and_at_the_end(tmp_path, logger):
    steps = [(float(i), float(i)) for i in range(6)]
    progress, lines = progress_lines(tmp_path, logger, steps, PRINT_FREQ=4)
    assert [line.split('Train: ')[1].split()[0] for line in lines] == [
        '[1/3][0/6]', '[1/3][4/6]', '[1/3][5/6]',
    ]  # fmt: skip
    assert 'loss 4.0000 (2.0000)' in lines[1]
    assert 'grad_norm 4.0000 (2.0000/1.4142)' in lines[1]
    for part in ('eta 0:', 'lr 1.000e-03', 'loss_scale 1024', 'img/s', 'mem ', ' MiB'):
        assert part in lines[1]
    assert progress.losses.avg == 2.5
    assert progress.images_per_second > 0


def test_without_a_distance_there_is_a_line_at_the_end_only(tmp_path, logger):
    _, lines = progress_lines(tmp_path, logger, [(1.0, 1.0)] * 6, PRINT_FREQ=0)
    assert [line.split('Train: ')[1].split()[0] for line in lines] == ['[1/3][5/6]']


def test_norms_between_lines_enter_the_meter_and_overflows_do_not(tmp_path, logger):
    steps = [(1.0, None), (1.0, 2.0), (1.0, None), (1.0, math.inf), (1.0, None), (1.0, 4.0)]
    progress, lines = progress_lines(tmp_path, logger, steps, PRINT_FREQ=100)
    assert len(lines) == 2
    assert (progress.norms.avg, progress.norms.val) == (3.0, 4.0)
    assert 'skipped 1' in lines[-1]


def test_a_loss_that_is_reused_for_the_next_step_is_read_in_time(tmp_path, logger):
    config = small_config(tmp_path, PRINT_FREQ=100)
    progress = Progress(config, 0, 3, 1, logger)
    norm = torch.tensor(1.0)
    for value in (1.0, 2.0, 3.0):
        norm.fill_(value)  # an engine may hand out the same tensor again
        progress.step(torch.tensor(0.0), norm, 0.0, 1.0, False)
    assert progress.norms.avg == 2.0


def test_metrics_that_cannot_be_read_are_left_as_they_are(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"epoch": 0}\n\xff\n')
    with pytest.raises(ValueError, match='invalid start byte'):
        MetricsLog(path).drop_from(1)
    assert path.read_bytes() == b'{"epoch": 0}\n\xff\n'
