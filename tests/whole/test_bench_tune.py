"""The benchmark of tuning, over a program that answers at once."""

import pytest

from internvl_ds.tools.tune.request import Request
from internvl_ds.tools.tune.tuner import tune
from tests.bench.tune import RESULT, contenders, measure_again
from tests.tools.tune.quick_train import write_launcher


def test_the_result_meets_the_fastest_that_ship_in_rounds(tmp_path, capsys):
    launcher = write_launcher(tmp_path)
    tune(Request('digits_quickstart', launcher, tmp_path / 'tune', trials=7, confirm=1))
    found = contenders(tmp_path / 'tune')
    assert list(found) == [RESULT, 'zero3_offload_optimizer']
    assert 'the result is zero3, which ships' in capsys.readouterr().out
    before = len((tmp_path / 'started').read_text().splitlines())
    seconds = measure_again(tmp_path, tmp_path / 'digits', 2, launcher)
    assert set(seconds) == set(found)
    for lasted in seconds.values():
        assert lasted == pytest.approx([32 / 130] * 2)
    assert len((tmp_path / 'started').read_text().splitlines()) == before + 4
