"""The benchmark: its statistics and its measuring without ranks, and all of it in small on two."""

import json
import time
from pathlib import Path

import pytest
import torch

from tests.bench import (
    bridge,
    build,
    checkpoint,
    elastic,
    ema,
    frozen,
    loader,
    loads,
    loop,
    memory,
    pretrained,
    saves,
    start,
)
from tests.bench.figures import (
    Pair,
    paired_ratios,
    ratios_report,
    ratios_table,
    seconds_report,
    seconds_table,
    summary,
    verdict,
)
from tests.bench.harness import Contender, measure


def test_a_summary_is_the_median_and_the_range():
    assert summary([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert summary([4.0, 1.0, 3.0, 2.0]) == (2.5, 1.0, 4.0)
    with pytest.raises(ValueError, match='no samples'):
        summary([])


def test_ratios_are_taken_round_by_round():
    # A slow second round slows both: the ratio does not see it.
    assert paired_ratios([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match='2 and 1 samples'):
        paired_ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ('value', 'target', 'expected'),
    [(1.0, None, ''), (1.0, 1.0, 'met'), (0.9, 1.0, 'met'), (1.1, 1.0, 'missed')],
)
def test_a_target_is_an_upper_bound(value, target, expected):
    assert verdict(value, target) == expected


def test_reports_hold_all_samples_and_judge_the_median_ratio():
    samples = {'a': [1.0, 3.0, 2.0], 'b': [2.0, 2.0, 2.0]}
    report = seconds_report(samples)
    assert report['a'] == {'median': 2.0, 'min': 1.0, 'max': 3.0, 'samples': [1.0, 3.0, 2.0]}
    pairs = [Pair('a', 'b', 0.9), Pair('b', 'a')]
    assert ratios_report(samples, pairs) == [
        {'a': 'a', 'b': 'b', 'median': 1.0, 'min': 0.5, 'max': 1.5, 'target': 0.9,
         'verdict': 'missed'},
        {'a': 'b', 'b': 'a', 'median': 1.0, 'min': 2 / 3, 'max': 2.0, 'target': None,
         'verdict': ''},
    ]  # fmt: skip
    with pytest.raises(KeyError):
        ratios_report(samples, [Pair('a', 'c')])


def test_tables_are_aligned_markdown():
    samples = {'a': [1.0], 'longer': [2.0]}
    assert seconds_table(seconds_report(samples)).splitlines() == [
        '| seconds | median |   min |   max |',
        '| ------- | -----: | ----: | ----: |',
        '| a       |  1.000 | 1.000 | 1.000 |',
        '| longer  |  2.000 | 2.000 | 2.000 |',
    ]
    assert ratios_table(ratios_report(samples, [Pair('a', 'longer', 0.4)])).splitlines() == [
        '| paired ratio | median |  min |  max | target |        |',
        '| ------------ | -----: | ---: | ---: | -----: | -----: |',
        '| a / longer   |   0.50 | 0.50 | 0.50 | <= 0.4 | missed |',
    ]


def order_of(rounds: int, seed: int) -> tuple[list[str], dict[str, list[float]]]:
    """What `measure` calls, in order, and what it returns."""
    calls: list[str] = []
    contenders = {
        name: Contender(
            run=lambda name=name: calls.append(name),
            prepare=lambda name=name: calls.append(f'prepare {name}'),
        )
        for name in 'abc'
    }
    samples = measure(contenders, rounds, seed)
    return calls, samples


def test_each_round_measures_everything_once_in_an_order_of_its_own():
    calls, samples = order_of(rounds=8, seed=1)
    assert calls[::2] == [f'prepare {name}' for name in calls[1::2]]
    names = calls[1::2]
    rounds = [names[start : start + 3] for start in range(0, len(names), 3)]
    assert len(rounds) == 9  # the first is not counted
    assert all(sorted(names) == ['a', 'b', 'c'] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 2
    assert {name: len(seconds) for name, seconds in samples.items()} == dict.fromkeys('abc', 8)
    assert order_of(8, 1)[0] == calls  # as all ranks do
    assert order_of(8, 2)[0] != calls


def test_a_contender_may_time_its_parts_itself():
    assert measure({'a': Contender(lambda: {'x': 1.0, 'y': 2.0})}, rounds=2) == {
        'a: x': [1.0, 1.0],
        'a: y': [2.0, 2.0],
    }


def test_memory_that_was_let_go_again_counts():
    size = 64 << 20

    def take_and_let_go() -> None:
        taken = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.05)
        del taken

    assert size * 0.9 < memory.peak_growth(take_and_let_go) < size * 1.5
    assert memory.peak_growth(lambda: None) < size * 0.1


def test_targets_are_judged_only_at_the_size_that_they_were_set_for(monkeypatch):
    pairs = {
        'ratios': [{'target': 1.0, 'verdict': 'met'}],
        'memory': {'load': {'target': 0.1, 'verdict': 'missed'}},
    }
    monkeypatch.setattr(checkpoint, 'run_ranks', lambda *_, **__: [json.loads(json.dumps(pairs))])
    options = checkpoint._parse([])
    small, large = (checkpoint.measure_one(size, 1, options) for size in (25, 100))
    assert small['ratios'] == [{'target': None, 'verdict': ''}]
    assert small['memory']['load'] == {'target': None, 'verdict': ''}
    assert large == pairs


@pytest.mark.ranks
@pytest.mark.slow
def test_the_whole_benchmark_in_small(tmp_path, capsys):
    folder, figures = tmp_path / 'disk', tmp_path / 'figures.json'
    folder.mkdir()
    checkpoint.main(
        [
            *('--params', '1', '--stages', '1', '--rounds', '2', '--profile'),
            *('--json', str(figures), '--folder', str(folder)),
        ]
    )
    report = json.loads(figures.read_text())
    (entry,) = report['configurations']
    assert (report['rounds'], entry['stage'], entry['ranks']) == (2, 1, 2)
    assert entry['tensors'] == 174
    assert 0.9e6 < entry['parameters'] < 1.2e6
    pairs = (*saves.PAIRS, *loads.PAIRS)
    assert [(r['a'], r['b']) for r in entry['ratios']] == [pair[:2] for pair in pairs]
    names = {name for pair in pairs for name in pair[:2]}
    assert names <= entry['seconds'].keys()
    for measured in entry['seconds'].values():
        assert len(measured['samples']) == 2
        assert 0 < measured['min'] <= measured['median'] <= measured['max']
    assert entry['memory'].keys() == loads.MEMORY_TARGETS.keys()
    assert all(text for text in entry['profiles'].values())
    printed = capsys.readouterr().out
    assert all(f'| {name} ' in printed for name in entry['seconds'])
    assert not list(Path(folder).iterdir())  # nothing stays on the disk


@pytest.mark.ranks
@pytest.mark.slow
def test_a_move_to_another_world_size_is_measured_both_ways(tmp_path):
    entry = elastic.move(1, 2, 1, 1, tmp_path)
    assert entry['seconds'].keys() == {'ours', 'convert and load', 'same layout'}
    assert [(r['a'], r['b']) for r in entry['ratios']] == [pair[:2] for pair in elastic.PAIRS]
    assert entry['memory'] > 0
    assert '2 -> 1 ranks' in elastic.tables(entry)


@pytest.mark.ranks
@pytest.mark.slow
def test_the_bridge_is_measured_beside_a_bare_loop(tmp_path, capsys):
    figures = tmp_path / 'figures.json'
    bridge.main(
        [
            *('--model', 'test_vit', '--batch', '2', '--steps', '1', '--rounds', '2'),
            *('--stages', '0', '2', '--precisions', 'bf16', '--json', str(figures)),
        ]
    )
    report = json.loads(figures.read_text())
    assert [entry['stage'] for entry in report] == [0, 2]
    for entry in report:
        assert entry['seconds'].keys() == {'bridge', 'bare engine'}
        assert len(entry['seconds']['bridge']['samples']) == 2
    assert capsys.readouterr().out.count('| bridge / bare engine |') == 2


@pytest.mark.ranks
@pytest.mark.slow
def test_pretrained_weights_are_measured_plain_and_partitioned(tmp_path, capsys):
    figures = tmp_path / 'figures.json'
    pretrained.main(
        [
            *('--params', '1', '--rounds', '2', '--json', str(figures)),
            *('--folder', str(tmp_path)),
        ]
    )
    report = json.loads(figures.read_text())
    assert len(report['plain']['seconds']['load_pretrained']['samples']) == 2
    assert report['plain']['memory'] >= 0
    assert report['partitioned']['memory'] > 0
    assert 'zero.Init on 2 ranks' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['figures.json']


@pytest.mark.ranks
@pytest.mark.slow
def test_the_average_is_measured_beside_gathering(tmp_path, capsys):
    figures = tmp_path / 'figures.json'
    ema.main(['--params', '1', '--rounds', '2', '--json', str(figures)])
    report = json.loads(figures.read_text())
    assert report['seconds'].keys() == {'sharded', 'gather and average on rank 0'}
    assert report['memory'] > 0
    assert 'memory of the average a rank' in capsys.readouterr().out


@pytest.mark.ranks
def test_a_probes_tag_is_its_trained_part_and_a_constant(tmp_path):
    """Whatever is frozen: that much is written, and so a tag of 6B is known from a small one."""
    small, large = (frozen.measure(size, 1, tmp_path / str(size)) for size in (0.2, 3))
    assert large['frozen bytes'] > 8 * small['frozen bytes']
    for how in ('once', 'omit'):
        rests = [frozen.constant(found, how) for found in (small, large)]
        # Names and shapes of as many tensors; alignments to 64 bytes; digits of the shapes.
        assert rests[0] == pytest.approx(rests[1], rel=0.05), how
        assert large['keep']['bytes'] > large['frozen bytes'] > 20 * large[how]['bytes'], how
    assert large['once']['frozen'] > 0.99 * large['frozen bytes']


@pytest.mark.ranks
def test_a_build_is_measured_whole_and_in_slices(capsys):
    build.main(['--params', '2'])
    out = capsys.readouterr().out
    assert '2 ranks' in out
    whole, slices = (
        line for line in out.splitlines() if line.startswith(('| whole', '| in slices'))
    )
    assert float(whole.split('|')[-2]) >= 23.6 > float(slices.split('|')[-2])


@pytest.mark.slow
def test_the_training_loader_is_measured_beside_timms(tmp_path, capsys):
    figures = tmp_path / 'figures.json'
    loader.main(
        [
            *('--images', '16', '--batch', '2', '--workers', '1', '--width', '40'),
            *('--rounds', '2', '--json', str(figures), '--folder', str(tmp_path)),
        ]
    )
    report = json.loads(figures.read_text())
    assert [(r['a'], r['b']) for r in report['ratios']] == [pair[:2] for pair in loader.PAIRS]
    for name, measured in report['seconds'].items():
        assert len(measured['samples']) == 2
        assert report['images a second'][name] > 0
    assert 'training loader: steady / timm.data.create_loader: steady' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['figures.json']


@pytest.mark.ranks
@pytest.mark.slow
def test_the_loop_is_measured_beside_the_originals_and_timms(tmp_path, capsys):
    figures = tmp_path / 'figures.json'
    loop.main(
        [
            *('--model', 'test_vit', '--img', '32', '--batch', '2', '--updates', '3'),
            *('--width', '40', '--workers', '0', '--stages', '1', '--rounds', '2'),
            *('--json', str(figures), '--folder', str(tmp_path)),
        ]
    )
    (entry,) = json.loads(figures.read_text())
    assert [(r['a'], r['b']) for r in entry['ratios']] == [pair[:2] for pair in loop.PAIRS]
    assert all(len(measured['samples']) == 2 for measured in entry['seconds'].values())
    assert all(rate > 0 for rate in entry['rates'].values())
    assert "training program: updates / timm's train.py, DDP: updates" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['figures.json']


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak_only  # nine starts of programs
def test_a_start_is_measured_beside_plain_scripts(tmp_path, capsys):
    figures = tmp_path / 'figures.json'
    start.main(
        [
            *('--params', '1', '--stages', '1', '--ranks', '1', '--workers', '0', '--rounds', '1'),
            *('--json', str(figures), '--folder', str(tmp_path)),
        ]
    )
    (entry,) = json.loads(figures.read_text())
    assert entry['seconds'].keys() == {start.OURS, start.DDP, start.DEEPSPEED}
    assert 'imports' in entry['parts']
    assert 'load' in entry['parts']
    assert entry['parts'] in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['figures.json']
