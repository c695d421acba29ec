"""The training program on real ranks: what a run writes, and that a resumed one is the same run."""

import json
import re

import pytest
import torch
from torch import nn

from internvl_ds.checkpoint.formats.state_json import read_state
from internvl_ds.dist.network import free_port
from internvl_ds.train.__main__ import parse_args
from internvl_ds.train.objective.criterion import build_criterion
from tests.harness import training
from tests.harness.ranks import run_command, run_ranks
from tests.harness.training import small_config, write_folder

# Of a start, before a load.
PARTS = ['checks', 'data', 'model', 'engine']

# What depends on the clock alone.
_TIMES = ('images_per_s', 'seconds')


def told_parts(log):
    """The parts of the start, of the one line that tells them, and that they are all of it."""
    ((whole, parts),) = re.findall(
        r'INFO the first update came (\S+) s after the process began: (.*)\n', log
    )
    seconds = {name: float(number) for name, number in re.findall(r'([a-z ]+) ([\d.]+)', parts)}
    assert sum(seconds.values()) == pytest.approx(float(whole), abs=0.1)
    return [name.strip() for name in seconds]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('images'), classes=3, train=29, val=7)


def write_config(folder, data, **values):
    """A YAML file: 2 epochs of 7 micro-batches on 2 ranks, so that the last group is short."""
    settings = {
        'DATA__BATCH_SIZE': 2,
        'TRAIN__EPOCHS': 2,
        'TRAIN__WARMUP_EPOCHS': 0,
        'TRAIN__BASE_LR': 0.1,
        'TRAIN__ACCUMULATION_STEPS': 4,
        'TRAIN__EMA__ENABLE': True,
        'TRAIN__EMA__DECAY': 0.5,
        'AUG__REPROB': 0.5,
        'MODEL__DROP_PATH_RATE': 0.2,
        'SAVE_CKPT_NUM': 2,
        'PRINT_FREQ': 2,
    }
    path = folder / 'small.yaml'
    path.write_text(small_config(data, **{**settings, **values}).dump())
    return path


def train(tmp_path, cfg, output, stage, *opts, level='O0', ranks=2):
    ds_config = tmp_path / f'stage{stage}.json'
    ds_config.write_text(json.dumps({'zero_optimization': {'stage': stage}}))
    opts = ['AMP_OPT_LEVEL', level, 'AMP_TYPE', 'bfloat16', *opts]
    return run_ranks(
        training.train_on_ranks, ranks, tmp_path,
        cfg=str(cfg), output=str(tmp_path / output), opts=opts, ds_config=str(ds_config),
    )  # fmt: skip


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('stage', [0, 2])
def test_the_originals_default_precision_trains(tmp_path, data, stage):
    cfg = write_config(tmp_path, data, TRAIN__BASE_LR=0.05)
    result, _ = train(tmp_path, cfg, 'out', stage, 'AMP_TYPE', 'float16', level='')
    first, last = (record['train_loss'] for record in result['metrics'])
    assert last < first
    log = (tmp_path / 'out' / 'small' / 'log_rank0.txt').read_text()
    assert f'trains in torch_autocast float16 at ZeRO stage {stage}, loss scale 65536' in log
    assert 'loss_scale 65536 ' in log


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_that_diverges_saves_and_stops(tmp_path, data):
    cfg = write_config(
        tmp_path, data, TRAIN__BASE_LR=1e38,
        TRAIN__MAX_CONSECUTIVE_OVERFLOWS=2, TRAIN__SAVE_ON_OVERFLOW=True,
    )  # fmt: skip
    ds_config = tmp_path / 'stage1.json'
    ds_config.write_text(json.dumps({'zero_optimization': {'stage': 1}}))
    texts = run_ranks(
        training.train_on_ranks, 2, tmp_path, expect_failure=True,
        cfg=str(cfg), output=str(tmp_path / 'out'), opts=[], ds_config=str(ds_config),
    )  # fmt: skip
    (text,) = (text for text in texts if 'GradientOverflow: update' in text)  # all have it alike
    assert '2 updates in a row were skipped' in text
    assert 'lower TRAIN.BASE_LR' in text
    output = tmp_path / 'out' / 'small'
    assert (output / 'ckpt_epoch_overflow' / 'manifest.json').is_file()
    assert (output / 'latest').read_text().strip() == 'ckpt_epoch_0'  # the epoch before
    # It goes on inside the epoch, at the update that was skipped.
    state = read_state(output / 'ckpt_epoch_overflow' / 'state.json')
    position = read_state(output / 'ckpt_epoch_overflow' / 'loop_rank_1.json')['loop']
    assert state['epoch'] == 1
    assert state['step'] * 4 == position['micro_batches']


@pytest.mark.ranks
def test_an_epoch_shorter_than_an_update_is_refused(tmp_path, data):
    cfg = write_config(tmp_path, data, TRAIN__ACCUMULATION_STEPS=8)
    texts = run_ranks(
        training.train_on_ranks, 2, tmp_path, expect_failure=True,
        cfg=str(cfg), output=str(tmp_path / 'out'), opts=[], ds_config=None,
    )  # fmt: skip
    words = 'TRAIN.ACCUMULATION_STEPS is 8, but an epoch has 7 micro-batches'
    assert [words in text for text in texts].count(True) == 1


def timeless(result):
    return [{k: v for k, v in r.items() if k not in _TIMES} for r in result['metrics']]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(('stage', 'level'), [(1, 'O0'), (3, 'O2')])
def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path, data, stage, level):
    cfg = write_config(tmp_path, data, DATA__IMG_ON_MEMORY=stage == 3)
    whole, other_rank = train(tmp_path, cfg, 'whole', stage, level=level)
    assert whole == other_rank
    assert [record['epoch'] for record in whole['metrics']] == [0, 1]
    assert whole['best'] == max(record['acc1'] for record in whole['metrics'])
    for name in (
        'ckpt_epoch_0', 'ckpt_epoch_1', 'ckpt_epoch_best', 'ckpt_epoch_ema_best', 'config.json',
        'curves.png', 'ds_config.json', 'latest', 'log_rank0.txt', 'log_rank1.txt',
    ):  # fmt: skip
        assert name in whole['files']

    tag = str(tmp_path / 'whole' / 'small' / 'ckpt_epoch_0')
    opts = ['MODEL.RESUME', tag, 'EVAL_LOADED', 'True']
    resumed = train(tmp_path, cfg, 'resumed', stage, *opts, level=level)[0]
    assert timeless(resumed) == timeless(whole)[1:]
    log, first, other = (
        (tmp_path / output / 'small' / f'log_rank{rank}.txt').read_text()
        for output, rank in (('resumed', 0), ('whole', 0), ('whole', 1))
    )
    assert told_parts(first) == [*PARTS, 'first update']
    assert told_parts(log) == [*PARTS, 'load', 'evaluation', 'first update']
    assert 'the first update came' not in other
    record = whole['metrics'][0]
    for words, key in (('network', 'acc1'), ('ema network', 'ema_acc1')):
        line = f'Accuracy of the {words} on the 7 test images: {record[key]:.1f}%'
        assert log.index(line) < log.index('Train: [1/2]')
    assert 'test images' not in first
    assert resumed['best'] == whole['best']

    # The same command once more finds its own last epoch, and nothing is left to do.
    again = train(tmp_path, cfg, 'whole', stage, level=level)[0]
    assert again['metrics'] == whole['metrics']
    assert 'nothing to train' in (tmp_path / 'whole' / 'small' / 'log_rank0.txt').read_text()


@pytest.mark.ranks
@pytest.mark.slow
def test_an_epoch_goes_on_inside_on_another_number_of_ranks(tmp_path, data):
    cfg = write_config(tmp_path, data, TRAIN__EPOCHS=1)
    opts = ['TRAIN.SAVE_STEPS', '1', 'CHECKPOINT.KEEP_STEPS', '5']
    result = train(tmp_path, cfg, 'two', 1, *opts)[0]
    # 7 micro-batches in groups of 4 and 3; after the second the epoch's own tag follows.
    assert [name for name in result['files'] if '_step_' in name] == ['ckpt_epoch_0_step_1']
    tag = str(tmp_path / 'two' / 'small' / 'ckpt_epoch_0_step_1')
    opts = ['MODEL.RESUME', tag, 'TRAIN.ACCUMULATION_STEPS', '2']
    result = train(tmp_path, cfg, 'four', 2, *opts, ranks=4)[0]
    # 16 of 29 images have been seen: two micro-batches of 8, of which 4 ranks have 3.
    log = (tmp_path / 'four' / 'small' / 'log_rank0.txt').read_text()
    assert 'saved by 2 ranks; random numbers are drawn anew' in log
    assert 'epoch 0 goes on after micro-batch 2 of 3' in log
    assert 'WARNING the epoch goes on' not in log
    assert [record['epoch'] for record in result['metrics']] == [0]


@pytest.mark.ranks
def test_epochs_are_those_of_a_plain_loop_over_all_ranks_images(tmp_path, data):
    for results in run_ranks(
        training.follow_plain_loop, 2, tmp_path,
        data=str(data), output=str(tmp_path / 'out'), stages=[0, 1, 2, 3],
    ):  # fmt: skip
        for stage, result in enumerate(results):
            assert result['warned'] == [], stage
            assert result['updates'] == [6, 6], stage
            assert result['moved'] > 1e-3, stage
            assert result['differs'] < 1e-5 * result['moved'] + 1e-7, stage
            assert result['loss'][0] == pytest.approx(result['loss'][1], rel=1e-5), stage
            assert result['lr'][0] == pytest.approx(result['lr'][1]), stage


@pytest.mark.ranks
@pytest.mark.parametrize('ema', [True, False])
@pytest.mark.parametrize('stage', [2, 3])
def test_evaluation_finds_the_accuracy_that_training_reported(tmp_path, data, stage, ema):
    cfg = write_config(tmp_path, data, TRAIN__EPOCHS=1, TRAIN__EMA__ENABLE=ema)
    trained = train(tmp_path, cfg, 'out', stage)[0]
    evaluated = train(tmp_path, cfg, 'out', stage, 'EVAL_MODE', 'True')[0]
    assert evaluated['best'] == trained['metrics'][0]['acc1']
    if ema:
        log = (tmp_path / 'out' / 'small' / 'log_rank0.txt').read_text()
        averaged = trained['metrics'][0]['ema_acc1']
        assert f'evaluation, EMA: top-1 {averaged:.2f} %' in log


@pytest.mark.ranks
@pytest.mark.slow
def test_the_ds_configs_monitor_gets_the_epochs_numbers(tmp_path, data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = write_config(tmp_path, data)
    ds_config = tmp_path / 'monitored.json'
    ds_config.write_text(
        json.dumps(
            {'tensorboard': {'enabled': True, 'output_path': str(tmp_path), 'job_name': 'tb'}}
        )
    )
    result = run_ranks(
        training.train_on_ranks, 2, tmp_path,
        cfg=str(cfg), output=str(tmp_path / 'out'), opts=['AMP_OPT_LEVEL', 'O0'],
        ds_config=str(ds_config),
    )[0]  # fmt: skip
    events = EventAccumulator(str(tmp_path / 'tb')).Reload()
    written = [event.value for event in events.Scalars('Epoch/acc1')]
    assert written == pytest.approx([record['acc1'] for record in result['metrics']])
    assert len(events.Scalars('Train/Samples/lr')) == 2 * 2  # two updates in each of two epochs


@pytest.mark.ranks
@pytest.mark.slow
def test_linear_probing_changes_the_head_alone(tmp_path, data):
    cfg = write_config(
        tmp_path, data, TRAIN__EPOCHS=1, TRAIN__OPTIMIZER__FREEZE_BACKBONE=True,
        TRAIN__OPTIMIZER__NAME='sgd',
    )  # fmt: skip
    result = train(tmp_path, cfg, 'out', 1)[0]
    assert result['metrics'][0]['grad_norm'] > 0
    log = (tmp_path / 'out' / 'small' / 'log_rank0.txt').read_text()
    assert '0.00 M of them trained' in log


@pytest.mark.ranks
@pytest.mark.slow
def test_a_rank_that_fails_ends_the_program_with_its_reason(tmp_path, data):
    cfg = write_config(tmp_path, data, MODEL__NUM_CLASSES=10)
    port = str(free_port())
    job = run_command(
        [
            'deepspeed', '--num_gpus', '2', '--no_local_rank', '--master_port', port,
            '--module', 'internvl_ds.train', '--cfg', str(cfg), '--output', str(tmp_path / 'out'),
        ],
        timeout=120,
    )  # fmt: skip
    assert job.returncode != 0
    assert 'MODEL.NUM_CLASSES 10' in job.output
    assert 'MODEL.NUM_CLASSES 10' in (tmp_path / 'out' / 'small' / 'log_rank1.txt').read_text()


def test_flags_that_are_not_given_leave_the_yaml_alone():
    args = vars(parse_args(['--cfg', 'digits_quickstart']))
    assert args.pop('cfg') == 'digits_quickstart'
    assert set(args.values()) == {None}


def test_the_launchers_own_flags_are_taken():
    args = parse_args(
        ['--cfg', 'x', '--local_rank=1', '--deepspeed', '--deepspeed_config', 'zero2']
    )
    assert (args.local_rank, args.deepspeed_config) == (1, 'zero2')
    assert parse_args(['--cfg', 'x', '--local-rank', '3']).local_rank == 3
    args = parse_args(['--cfg', 'x', '--local-rank', '0', '--launcher', 'slurm', '--use-zero'])
    assert (args.launcher, args.local_rank, args.use_zero) == ('slurm', 0, True)


@pytest.mark.parametrize('flag', ['--batchsize', '--batch', '--accumulation-step'])
def test_an_unknown_or_shortened_flag_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        parse_args(['--cfg', 'x', flag, '4'])
    assert flag in capsys.readouterr().err


def test_the_loss_fits_the_targets(tmp_path):
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    label, soft = torch.tensor([0]), torch.tensor([[0.9, 0.05, 0.05]])
    config = small_config(tmp_path, MODEL__LABEL_SMOOTHING=0.15)
    smoothed = build_criterion(config, soft_targets=False)(logits, label)
    mixed = build_criterion(config, soft_targets=True)(logits, soft)
    assert smoothed == pytest.approx(mixed.item())  # 0.85 + 0.15 / 3 on the label
    config.MODEL.LABEL_SMOOTHING = 0.0
    plain = build_criterion(config, soft_targets=False)(logits, label)
    assert plain == pytest.approx(nn.functional.cross_entropy(logits, label).item())
