"""The tuner over a program that answers at once: what it runs, skips, keeps and concludes."""

import csv
import json
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from internvl_ds.config.tree import default_config, merge_opts
from internvl_ds.errors import ConfigError, InternvlDsError
from internvl_ds.tools.plan.sizes import can_recompute
from internvl_ds.tools.tune.request import Request
from internvl_ds.tools.tune.tuner import tune, updates_for
from tests.tools.tune.fates import OnlyStage0
from tests.tools.tune.quick_train import write_launcher

STAGES = {
    label: {'ds_config': {'zero_optimization': {'stage': int(label)}}} for label in ('1', '2', '3')
}
BATCHES = {
    '16x1': {'micro_batch': 16, 'accumulation': 1},
    '8x2': {'micro_batch': 8, 'accumulation': 2},
}


@pytest.fixture
def request_(tmp_path):
    """Tunes the digits quickstart over stages 1 to 3 and two batches: six configurations."""
    space = tmp_path / 'space.json'
    space.write_text(json.dumps({'axes': {'stage': STAGES, 'batch': BATCHES}}))
    return Request(
        'digits_quickstart', write_launcher(tmp_path), tmp_path / 'tune', space=space, confirm=2
    )


def started(request):
    """What ran, in order: the ds_config and the settings of each."""
    path = request.output.parent / 'started'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def statuses(result):
    return Counter((row.kind, row.status) for row in result.rows)


def test_it_finds_the_fastest_and_writes_all_that_is_promised(request_):
    result = tune(request_)
    assert result.winner.name == 'stage=3 batch=8x2'
    # As configured is zero0, and three of the six are zero1, zero2 and zero3: none runs twice.
    assert statuses(result) == {
        ('base', 'ok'): 1, ('shipped', 'ok'): 6, ('search', 'ok'): 3, ('final', 'ok'): 10,
    }  # fmt: skip
    assert len(started(request_)) == 20
    assert result.names[result.standings[0].key] == 'stage=3 batch=8x2'
    assert result.names[result.reference] in ('zero3', 'zero3_offload_optimizer', 'zero3_offload')
    assert result.standings[0].ratios == pytest.approx([155 / 130] * 2)
    assert {result.names[s.key] for s in result.standings} >= {'zero0, as configured'}

    output = request_.output
    tuned = json.loads((output / 'ds_config.tuned.json').read_text())
    assert tuned == {
        'train_micro_batch_size_per_gpu': 8,
        'gradient_accumulation_steps': 2,
        'zero_optimization': {'stage': 3},
    }
    assert result.words == [
        '--deepspeed_config', str(output / 'ds_config.tuned.json'),
        '--opts', 'DATA.BATCH_SIZE', '8', 'TRAIN.ACCUMULATION_STEPS', '2',
    ]  # fmt: skip
    summary = json.loads((output / 'result.json').read_text())
    assert summary['winner'] == 'stage=3 batch=8x2'
    assert summary['trials'] == {'ok': 20}
    assert len(list(csv.DictReader((output / 'trials.csv').open()))) == 20
    with Image.open(output / 'tuned.png') as image:
        assert image.width == 900
    for _, opts in started(request_):
        assert (opts['TRAIN.AUTO_RESUME'], opts['MODEL.PRETRAINED']) == ('false', '')


def test_started_again_it_repeats_nothing_and_goes_on(request_):
    few = replace(request_, trials=3, confirm=1)
    first = tune(few)
    assert statuses(first)['final', 'ok'] == 3
    ran = len(started(request_))
    assert tune(few).winner == first.winner
    assert len(started(request_)) == ran
    # With more trials there are other finalists, who are measured side by side.
    more = tune(replace(request_, trials=40, confirm=1))
    assert more.winner.name == 'stage=3 batch=8x2'
    assert len(started(request_)) == ran + 7 + 5
    before = [row for row in more.rows if row.kind != 'final']
    assert len({row.key for row in before}) == len(before) == 10


def test_what_the_plan_says_cannot_fit_is_a_row_and_never_started(request_):
    result = tune(request_, OnlyStage0)
    assert statuses(result) == {
        ('base', 'ok'): 1, ('shipped', 'no room'): 6, ('search', 'no room'): 3,
    }  # fmt: skip
    assert len(started(request_)) == 1
    row = next(row for row in result.rows if row.name == 'zero3')
    assert row.error == "needs 1000000.1 GB of a rank's memory, and 10.0 GB are there"
    assert result.words == ['--deepspeed_config', str(request_.output / 'ds_config.tuned.json')]


def test_a_planner_that_fails_leaves_nothing_out(request_, capsys):
    def no_plan(config, gpu):
        assert not gpu
        raise RuntimeError('no such model')

    result = tune(replace(request_, trials=2, confirm=0), no_plan)
    assert statuses(result) == {('base', 'ok'): 1, ('shipped', 'ok'): 1}
    assert 'not left out: zero1: no such model' in capsys.readouterr().err


def test_without_finals_the_trials_decide(request_):
    result = tune(replace(request_, confirm=0))
    assert result.winner.name == 'stage=3 batch=8x2'
    assert len(started(request_)) == 10


def test_the_finals_have_no_more_rounds_than_the_time_is_enough_for(request_, capsys):
    first = tune(replace(request_, trials=5, confirm=1))
    spent = sum(row.seconds for row in first.rows)
    ran = len(started(request_))
    again = tune(replace(request_, trials=5, confirm=50, budget=spent))
    assert 'the time is up after 1 of 50 rounds' in capsys.readouterr().err
    assert (again.winner, len(started(request_))) == (first.winner, ran)
    assert len(again.standings[0].ratios) == 1


def test_without_time_only_the_first_trial_runs(request_):
    result = tune(replace(request_, budget=0.001))
    assert [row.kind for row in result.rows] == ['base']
    assert result.winner.name == 'as configured'


def test_contradictions_of_a_space_are_rows_too(request_):
    axes = {'half': {'fp16': {'ds_config': {'fp16': {'enabled': True}}}, 'bf16': {}}}
    request_.space.write_text(json.dumps({'axes': axes}))
    result = tune(replace(request_, confirm=0))
    refused = [row for row in result.rows if row.status == 'refused']
    assert [row.labels for row in refused] == [{'half': 'fp16'}]
    assert 'AMP_OPT_LEVEL' in refused[0].error
    assert len(started(request_)) == 7


def test_unknown_settings_of_a_space_are_told_before_they_are_tried(request_):
    axes = {'size': {'big': {'opts': {'DATA.BATCHSIZE': 8}}}}
    request_.space.write_text(json.dumps({'axes': axes}))
    with pytest.raises(ConfigError, match=r'space.json: /axes/size/big: .*DATA.BATCHSIZE'):
        tune(request_)
    assert started(request_) == []
    axes = {'size': {'half': {'micro_batch': 8, 'accumulation': 1}}}
    request_.space.write_text(json.dumps({'axes': axes}))
    with pytest.raises(ConfigError, match=r'space.json: /axes/size/half: .* is 8, and 16 images'):
        tune(request_)


def test_a_first_trial_that_fails_ends_it_with_the_log(request_, tmp_path):
    broken = tmp_path / 'broken.sh'
    broken.write_text('# internvl_ds.train\necho starting\necho "ValueError: no data"; exit 3\n')
    request = replace(request_, launcher=['bash', str(broken)])
    with pytest.raises(InternvlDsError) as caught:
        tune(request)
    text = str(caught.value)
    assert 'does not run (crash: ValueError: no data)' in text
    assert text.endswith('trials/000/log.txt:\n    starting\n    ValueError: no data')
    assert not (request.output / 'trials.jsonl').exists()


def test_other_ranks_than_expected_and_other_settings_are_refused(request_):
    with pytest.raises(ConfigError, match='--ranks is 4, and the launcher starts 2'):
        tune(replace(request_, ranks=4, trials=1, confirm=0))
    tune(replace(request_, ranks=2, trials=1, confirm=0))
    with pytest.raises(ConfigError, match=r'--cfg/DATA/BATCH_SIZE was 16 and is 32'):
        tune(replace(request_, opts=['DATA.BATCH_SIZE', '32']))


def test_the_built_in_space_is_searched_as_far_as_the_trials_go(request_):
    result = tune(replace(request_, space=None, trials=11, confirm=0))
    searched = [row for row in result.rows if row.kind == 'search']
    assert len(searched) == 4
    assert all('offload' not in row.labels for row in searched)  # a CPU has no other memory
    assert all('recompute' in row.labels for row in searched)


@pytest.mark.parametrize(('seconds', 'updates'), [(0.001, 100), (0.1, 30), (2.0, 10)])
def test_updates_take_about_three_seconds(seconds, updates):
    assert updates_for(seconds) == updates


@pytest.mark.parametrize(
    ('factory', 'can'),
    [('', True), ('tests.harness.training:brightness', False), ('no.module:model', False)],
)
def test_whether_a_model_can_recompute(factory, can):
    config = default_config()
    merge_opts(config, ['MODEL.TYPE', 'timm', 'MODEL.NAME', 'vit_tiny_patch16_224'])
    merge_opts(config, ['MODEL.FACTORY', factory])
    assert can_recompute(config) is can
