"""What failures are expected to cost, and the interval of saves that loses least."""

import pytest

from internvl_ds.tools.plan.failures import failures
from tests.harness.model import make_config

HOUR = 3600.0


def test_without_a_setting_no_other_interval_loses_less():
    best = failures(make_config(), 20.0, hosts=16, hours=500)
    assert best.between == 500 * HOUR / 16
    assert best.setting == ''

    def cost(interval):
        return 20.0 / interval + interval / 2 / best.between

    assert best.saving + best.lost == pytest.approx(cost(best.interval))
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert cost(factor * best.interval) > cost(best.interval)


@pytest.mark.parametrize(
    ('opts', 'interval', 'setting'),
    [
        ({'TRAIN__SAVE_OVERHEAD': 0.01}, 2000, 'TRAIN.SAVE_OVERHEAD 0.01'),
        ({'TRAIN__SAVE_MINUTES': 5.0}, 300, 'TRAIN.SAVE_MINUTES 5'),
    ],
)
def test_a_setting_says_the_interval(opts, interval, setting):
    expected = failures(make_config(**opts), 20.0, hosts=2, hours=100)
    assert expected.interval == pytest.approx(interval)
    assert expected.setting == setting
    assert f'as {setting} has it' in expected.words


def test_the_words_name_what_to_set():
    assert failures(make_config(), 12.0, hosts=64, hours=1000).words == (
        'Of 64 hosts one fails every 15.6 h on average. With a save every 19.4 min '
        '(TRAIN.SAVE_MINUTES 19.4), which loses least, a failure costs 9.68 min of work and the '
        'start: 1 % of the time, beside 1 % for saves at the most.'
    )
