"""trials.jsonl and trials.csv: what survives, and what they say."""

import csv
import io
import json
from dataclasses import replace

import pytest

from internvl_ds.errors import ConfigError
from internvl_ds.tools.tune.records import (
    BASE,
    CRASH,
    FINAL,
    NO_ROOM,
    OK,
    SEARCH,
    Records,
    Row,
    csv_text,
)

BENCH = {
    'images_per_s': 100.0,
    'images_per_s_range': [90.0, 110.0],
    'seconds_per_update': 0.32,
    'peak_bytes': 2_000_000_000,
    'micro_batch': 8,
    'accumulation': 2,
}
ROW = Row(0, BASE, 'as configured', 'k0', {}, {}, {}, OK, seconds=12.04, bench=BENCH)


def test_rows_are_there_again_with_all_they_say(tmp_path):
    records = Records(tmp_path)
    failed = Row(1, SEARCH, 'stage=3', 'k1', {'stage': '3'}, {'a': 1}, {}, CRASH, 3.0, 'ValueError')
    final = replace(ROW, trial=2, kind=FINAL, round=0, after=2)
    for row in (ROW, failed, final):
        records.append(row)
    again = Records(tmp_path)
    assert again.rows == [ROW, failed, final]
    assert list(again.measured()) == ['k0', 'k1']
    assert again.measured()['k0'] is again.rows[0]  # not the one of the finals
    assert again.spent() == pytest.approx(27.08)
    assert [row.speed for row in again.rows] == [100.0, 0.0, 100.0]


def test_a_half_written_last_line_is_dropped_and_written_over(tmp_path):
    Records(tmp_path).append(ROW)
    path = tmp_path / 'trials.jsonl'
    whole = path.read_text()
    path.write_text(whole + whole[:30])
    records = Records(tmp_path)
    assert records.rows == [ROW]
    assert path.read_text() == whole
    records.append(replace(ROW, trial=1))
    assert [row.trial for row in Records(tmp_path).rows] == [0, 1]


@pytest.mark.parametrize('line', ['{"trial": 1}', 'text', '[]'])
def test_another_broken_line_is_an_error(tmp_path, line):
    (tmp_path / 'trials.jsonl').write_text(f'{line}\n')
    with pytest.raises(ConfigError, match=r'trials.jsonl, line 1: is no trial'):
        Records(tmp_path)


def test_the_table_has_a_line_a_row(tmp_path):
    lacking = Row(-1, SEARCH, 'batch=16x1', 'k2', {}, {}, {'A.B': 1}, NO_ROOM, error='needs "9" GB')
    rows = [ROW, lacking, replace(ROW, trial=1, kind=FINAL, round=2)]
    first, second, third = csv.DictReader(io.StringIO(csv_text(rows)))
    assert first['images_per_s'] == '100.0'
    assert (first['images_per_s_min'], first['images_per_s_max']) == ('90.0', '110.0')
    assert (first['peak_bytes'], first['seconds'], first['round']) == ('2000000000', '12.0', '')
    assert (second['status'], second['error']) == (NO_ROOM, 'needs "9" GB')
    assert (second['images_per_s'], json.loads(second['opts'])) == ('', {'A.B': 1})
    assert third['round'] == '2'
    assert not lacking.started
