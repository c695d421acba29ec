"""The training program started again: by the same command, by another, in a world that changed."""

import pytest

from tests.harness.ranks import run_ranks
from tests.harness.training import write_folder
from tests.train import restarting
from tests.train.test_loop import timeless, write_config

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture
def start(tmp_path):
    """Runs a function of tests/train/restarting.py on 2 ranks, on images of its own."""
    data = write_folder(tmp_path / 'images', classes=3, train=29, val=7)

    def run(name, changes_data=False):
        more = {'data': str(data)} if changes_data else {}
        told = run_ranks(
            getattr(restarting, name), 2, tmp_path,
            cfg=str(write_config(tmp_path, data)), root=str(tmp_path / 'runs'), stage=1, **more,
        )  # fmt: skip
        ends = [{key: one['end'] for key, one in rank.items()} for rank in told]
        assert ends[0] == ends[1]  # no rank is left alone with an error
        return told[0], tmp_path / 'runs'

    return run


def warnings(told):
    lines = [line for line in told['log'].splitlines() if 'WARNING' in line]
    return [line.partition('WARNING ')[2] for line in lines if 'lr schedule goes on' not in line]


def test_the_same_command_goes_on_where_it_was_whatever_it_resumed_from(start):
    told, root = start('requeue')
    tag, new = root / 'other' / 'small' / 'ckpt_epoch_0', root / 'new' / 'small'

    def resumed_from(name):
        log = told[name]['log']
        weights = [line.partition('Resuming from ')[2] for line in log.splitlines()]
        averages = [line.partition('loaded the EMA of ')[2] for line in log.splitlines()]
        found = [path.rstrip('.') for path in [*weights, *averages] if path]
        assert len(found) == 2
        assert found[0] == found[1]  # the average is of the same tag
        return found[0]

    assert resumed_from('whole') == resumed_from('first') == str(tag)
    assert warnings(told['first']) == []
    assert told['first']['tags'][:2] == ['ckpt_epoch_1', 'ckpt_epoch_2']

    assert resumed_from('again') == str(new / 'ckpt_epoch_2')
    (line,) = warnings(told['again'])
    assert line.startswith(f'{new / "ckpt_epoch_2"} goes before MODEL.RESUME {tag}')
    assert 'TRAIN.AUTO_RESUME False would keep MODEL.RESUME' in line
    # Nothing is lost: also not the line of the epoch whose run was killed before it wrote one.
    assert timeless(told['again']) == timeless(told['whole'])
    assert [record['epoch'] for record in told['again']['metrics']] == [1, 2, 3, 4]

    assert resumed_from('rewound') == str(tag)
    taken, stay = warnings(told['rewound'])
    assert taken.startswith(f'MODEL.RESUME {tag} is taken, and not the newer {new}/ckpt_epoch_4')
    assert 'ckpt_epoch_1 was saved after tags of later training' in stay
    assert 'ckpt_epoch_3, ckpt_epoch_4 stay until this run has come as far' in stay
    assert {'ckpt_epoch_1', 'ckpt_epoch_3', 'ckpt_epoch_4'} <= set(told['rewound']['tags'])
    assert told['rewound']['latest'] == 'ckpt_epoch_1'

    assert resumed_from('without') == str(new / 'ckpt_epoch_1')  # what was saved last
    assert told['without']['latest'] == 'ckpt_epoch_2'
    assert {'ckpt_epoch_1', 'ckpt_epoch_2', 'ckpt_epoch_3'} <= set(told['without']['tags'])
    assert warnings(told['without']) == []  # it was said once

    assert resumed_from('evaluated') == str(tag)  # exactly what was asked for
    assert warnings(told['evaluated']) == []

    assert resumed_from('overtaken') == str(new / 'ckpt_epoch_2')
    epochs = [name for name in told['overtaken']['tags'] if name[-1].isdigit()]
    assert epochs == ['ckpt_epoch_3', 'ckpt_epoch_4']
    assert timeless(told['overtaken'])[1:] == timeless(told['whole'])

    # What it began from may be gone by now.
    assert resumed_from('gone') == str(new / 'ckpt_epoch_4')
    assert 'nothing to train' in told['gone']['log']


@pytest.mark.first
def test_a_run_that_is_to_stop_before_it_trains_leaves_all_as_it_was(start):
    told, _ = start('stop_before_training')
    assert told['stopped']['end'].startswith('Preempted')
    for what in ('tags', 'latest', 'metrics'):
        assert told['stopped'][what] == told['first'][what]
    assert 'Train: [1/2]' not in told['stopped']['log']


def test_other_class_folders_are_refused_before_anything_is_done(start):
    told, root = start('rename_classes', changes_data=True)
    tag = root / 'out' / 'small' / 'ckpt_epoch_0'
    refusal = (
        f'CheckpointMismatch: {tag}: trained on other classes than those of now: class 0 was '
        "'class_0', and is 'class_1' (3 classes then, 3 now; gone: class_0; new: zebra)"
    )
    for name in ('evaluated', 'resumed', 'pretrained'):
        assert told[name]['end'].startswith(refusal)
        assert 'set DATA.CHECK_CLASS_NAMES False' in told[name]['end']
        assert 'Train:' not in told[name]['log']
        assert 'top-1' not in told[name]['log']
    for name in ('evaluated anyway', 'resumed anyway'):
        (line,) = warnings(told[name])
        assert "class 0 was 'class_0', and is 'class_1'" in line
        assert 'top-1' in told[name]['log']
    assert told['evaluated anyway']['end'] == '0.0'
    # What is saved then keeps the names of now.
    assert 'top-1' in told['as now']['log']
    assert warnings(told['as now']) == []
    assert (
        "class 0 was 'class_1', and is 'cat' (3 classes then, 4 now; new: cat)"
        in told['added']['end']
    )


def test_an_epoch_whose_order_of_images_changed_is_begun_anew(start):
    told, _ = start('change_images', changes_data=True)
    assert warnings(told['same']) == []
    assert 'epoch 0 goes on after micro-batch 4 of 7' in told['same']['log']
    for name, difference in (
        ('exchanged', "{'file names': "),
        ('grown', "{'images': (29, 30), "),
        ('seed', "{'SEED': (0, 1)}"),
    ):
        (line,) = warnings(told[name])
        assert line.startswith('the epoch is begun anew: after 4 of its micro-batches')
        assert difference in line
        assert 'goes on after micro-batch' not in told[name]['log']
        assert 'Train: [0/1][0/7]' in told[name]['log']
        assert [record['epoch'] for record in told[name]['metrics']] == [0]


def test_what_is_only_for_show_ends_no_run(start):
    told, root = start('write_nothing_for_show')
    out = root / 'out' / 'small'
    blocked = told['blocked']
    assert float(blocked['end']) >= 0
    assert {'ckpt_epoch_0', 'ckpt_epoch_1', 'ckpt_epoch_best'} <= set(blocked['tags'])
    # Once each, over two epochs. Rank 1 has no log to say it in.
    paths = ['config.json', root / 'file' / 'x', 'ds_config.json', 'metrics.jsonl', 'curves.png']
    told_of = [line.partition(': cannot be written (')[0] for line in warnings(blocked)]
    assert told_of == [str(out / path) for path in paths]
    assert sorted(path.name for path in out.glob('.*')) == []
    (line,) = warnings(told['events'])
    assert line.startswith(
        "the events of the ds_config's monitors: cannot be written (IsADirectory"
    )
    assert 'ckpt_epoch_0' in told['events']['tags']
    # The record comes after the save, so that nothing about it can keep an epoch from being saved.
    events = root / 'events' / 'small'
    manifest = events / 'ckpt_epoch_0' / 'manifest.json'
    assert (events / 'metrics.jsonl').stat().st_mtime_ns >= manifest.stat().st_mtime_ns
    # But where no checkpoint could be saved, nothing is trained.
    assert told['no output']['end'].startswith(f'ConfigError: OUTPUT {root / "file" / "out"}')


def test_a_distance_of_0_means_the_end_only(start):
    told, _ = start('frequencies')
    zeros = told.pop('zeros')
    assert zeros['tags'] == ['ckpt_epoch_2', 'ckpt_epoch_best', 'ckpt_epoch_ema_best']
    assert ['acc1' in record for record in zeros['metrics']] == [False, False, True]
    lines = [line for line in zeros['log'].splitlines() if 'Train: ' in line]
    assert [line.partition('Train: ')[2].split()[0] for line in lines] == [
        f'[{epoch}/3][6/7]' for epoch in range(3)
    ]
    for key, refused in told.items():
        assert refused['end'] == f'ConfigError: {key} is -1; it takes a number of at least 0'
        assert refused['tags'] == []
