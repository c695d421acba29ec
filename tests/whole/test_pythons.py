"""Tags that one Python saves and another loads, with the code as it is."""

import os
import sys

import pytest

from tests.harness import pythons


@pytest.mark.ranks
@pytest.mark.slow
def test_what_any_python_here_saves_any_other_loads(tmp_path):
    """Those that INTERNVL_DS_PYTHONS lists, as PATH lists folders, or that can share packages."""
    named = os.environ.get('INTERNVL_DS_PYTHONS', '').split(os.pathsep)
    others = [*filter(None, named), *pythons.sharing(tmp_path)]
    if not others:
        pytest.skip('no other Python of this minor version, and INTERNVL_DS_PYTHONS names none')
    found = pythons.pairs([sys.executable, *others], tmp_path, few=True)
    print(pythons.text_of(found))
    assert len(found) >= 4
    assert found == {pair: [] for pair in found}


def test_the_table_says_which_pairs_do_not_work_and_why():
    text = pythons.text_of(
        {
            ('3.11.2', '3.11.2'): [],
            ('3.11.2', '3.13.0'): ['py3.11.2/bf16_zero1, same layout: CheckpointError: refused'],
            ('3.13.0', '3.11.2'): [],
            ('3.13.0', '3.13.0'): [],
        }
    )
    assert text.splitlines() == [
        'saved under \\ loaded under  3.11.2  3.13.0',
        '3.11.2                      ok      '
        '1 wrong: py3.11.2/bf16_zero1, same layout: CheckpointError: refused',
        '3.13.0                      ok      ok',
    ]
