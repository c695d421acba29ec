"""What a result says: the words to use it, its JSON, and the table of the finals."""

import json

from internvl_ds.tools.tune.candidates import Subject
from internvl_ds.tools.tune.final_rounds import standings
from internvl_ds.tools.tune.records import BASE, FINAL, HANG, OK, SEARCH, SHIPPED, Row
from internvl_ds.tools.tune.result import as_json, make_result, table_rows, write_result
from internvl_ds.tools.tune.search_space import SearchSpace, batch_choice

SPACE = SearchSpace({'batch': {'4x4': batch_choice(4, 4)}})


def row(key, name, kind, speed, number=-1, status=OK):
    bench = {'images_per_s': speed, 'peak_bytes': 1_500_000_000} if status == OK else {}
    return Row(0, kind, name, key, {}, {}, {}, status, seconds=2.0, bench=bench, round=number)


def result_in(tmp_path):
    rows = [
        row('k0', 'as configured', BASE, 10.0), row('k1', 'zero1', SHIPPED, 8.0),
        row('k2', 'batch=4x4', SEARCH, 12.0), row('k3', 'batch=1x16', SEARCH, 0.0, status=HANG),
        row('k0', 'as configured', FINAL, 10.0, 0), row('k2', 'batch=4x4', FINAL, 13.0, 0),
        row('k0', 'as configured', FINAL, 8.0, 1), row('k2', 'batch=4x4', FINAL, 8.8, 1),
    ]  # fmt: skip
    subject = Subject('digits_quickstart', None, ['SEED', '1'], {}, 2)
    winner = subject.proposal(SPACE, {'batch': '4x4'})
    return make_result(
        rows,
        standings([each for each in rows if each.kind == FINAL], ['k0', 'k2']),
        'k0',
        {'k0': 'zero0', 'k1': 'zero1'},
        winner,
        tmp_path / 'my tune',
        ['SEED', '1'],
        subject.differing(winner),
    )


def test_it_names_everything_that_is_needed(tmp_path):
    result = result_in(tmp_path)
    assert result.winner.name == 'batch=4x4'
    assert result.words == [
        '--deepspeed_config', f'{tmp_path}/my tune/ds_config.tuned.json',
        '--opts', 'SEED', '1', 'DATA.BATCH_SIZE', '4', 'TRAIN.ACCUMULATION_STEPS', '4',
    ]  # fmt: skip
    assert table_rows(result) == [
        ('batch=4x4', '10.9', '1.20', '1.10-1.30', '1.50'),
        ('zero0, as configured', '9.0', '1.00', '1.00-1.00', '1.50'),
    ]
    answer = json.loads(json.dumps(as_json(result)))
    assert (answer['winner'], answer['reference']) == ('batch=4x4', 'zero0, as configured')
    assert answer['trials'] == {'ok': 7, 'hang': 1}
    assert answer['seconds'] == 16.0
    assert [final['name'] for final in answer['finals']] == ['batch=4x4', 'zero0, as configured']


def test_its_files_are_whole(tmp_path):
    result = result_in(tmp_path)
    write_result(result, tmp_path)
    assert json.loads((tmp_path / 'ds_config.tuned.json').read_text()) == result.ds_config
    assert json.loads((tmp_path / 'result.json').read_text()) == as_json(result)
    assert {path.name for path in tmp_path.iterdir()} == {
        'ds_config.tuned.json', 'result.json', 'tuned.png',
    }  # fmt: skip
