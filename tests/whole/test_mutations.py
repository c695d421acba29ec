"""The faults of `tests.bench.mutations` still fit the code, and its verdicts are right."""

import ast
import subprocess
import sys
from collections import Counter

import pytest

from tests.bench.mutants import MUTANTS
from tests.bench.mutations import (
    CAUGHT,
    ERROR,
    ROOT,
    SURVIVED,
    Mutant,
    NotApplicable,
    Verdict,
    mutants_of,
    place_of,
    summary_of,
    table_of,
)
from tests.harness.ranks import base_env


def test_every_fault_changes_what_its_file_does_and_names_tests_that_are_there():
    """Of each that does not the whole list is printed: code has moved, or is no more."""
    wrong = []
    trees = {}
    for mutant in MUTANTS:
        try:
            path, text = place_of(mutant, ROOT)
            trees[path] = trees.get(path) or ast.dump(ast.parse(path.read_text()))
            if ast.dump(ast.parse(text)) == trees[path]:
                wrong.append(f'{mutant.room}: {mutant.old!r}: only its form changes')
        except (NotApplicable, SyntaxError) as error:
            wrong.append(f'{mutant.old!r}: {error}')
        missing = [test for test in mutant.tests if not (ROOT / test.split('::')[0]).exists()]
        wrong += [f'{mutant.room}: {mutant.old!r}: there is no {test}' for test in missing]
    assert not wrong, '\n'.join(wrong)


def test_there_are_enough_and_none_stands_there_twice():
    assert len(MUTANTS) >= 100
    twice = Counter((mutant.room, mutant.old, mutant.new) for mutant in MUTANTS)
    assert [what for what, count in twice.items() if count > 1] == []
    assert sum(bool(mutant.why) for mutant in MUTANTS) <= 0.05 * len(MUTANTS)


JUDGE = """
import sys
from pathlib import Path
from tests.bench.mutations import judge, mutants_of
patches = [('a + b', to) for to in ('a - b', 'b + a', 'a +')]
patches += [('no more', 'x'), ('a + b', 'c')]
for mutant in mutants_of('sums', 'test_sums.py', patches):
    verdict = judge(mutant, Path(sys.argv[1]))
    print(verdict.result, '-', verdict.detail.splitlines()[0] if verdict.detail else '')
"""


def test_a_fault_is_caught_by_a_test_survives_without_one_and_is_taken_back(tmp_path):
    code = 'def add(a, b):\n    return a + b\n'
    for folder in ('internvl_ds', 'tests'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / '__init__.py').touch()
    (tmp_path / 'internvl_ds' / 'sums.py').write_text(code)
    test = 'from internvl_ds.sums import add\ndef test_add():\n    assert add(2, 1) == 3\n'
    (tmp_path / 'tests' / 'test_sums.py').write_text(test)
    done = subprocess.run(
        [sys.executable, '-c', JUDGE, str(tmp_path)],
        cwd=ROOT, env=base_env(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    caught, survived, broken, gone, fails = done.stdout.splitlines()
    assert caught == f'{CAUGHT} - tests/test_sums.py::test_add'
    assert survived == f'{SURVIVED} - '
    assert broken.startswith(f'{ERROR} - pytest ended with status 2')
    assert gone.startswith(f"{ERROR} - sums: 'no more' stands there nowhere")
    assert fails == f'{CAUGHT} - tests/test_sums.py::test_add'
    assert (tmp_path / 'internvl_ds' / 'sums.py').read_text() == code


def test_a_survivor_needs_a_reason_and_few_may_be():
    plain, explained = mutants_of('room', 'test_x.py', [('a|b', 'c'), ('d', 'e', 'it is the same')])
    caught = [Verdict(plain, CAUGHT, 'a test', 1.0)] * 19
    assert summary_of([*caught, Verdict(explained, SURVIVED, explained.why, 1.0)])[1]
    assert not summary_of([*caught, Verdict(plain, SURVIVED, '', 1.0)])[1]
    assert not summary_of([*caught, Verdict(plain, ERROR, 'x', 1.0)])[1]
    text, good = summary_of([*caught, *[Verdict(explained, SURVIVED, '', 1.0)] * 2])
    assert not good
    assert text.startswith('19 caught, 2 survived, 0 error: 90.5% caught')
    assert r'| `a\|b` -> `c` | caught | a test | 1.0 |' in table_of(caught[:1])


@pytest.mark.parametrize('old', ['nowhere', 'x = 1', 'y = 2'])
def test_what_stands_there_twice_or_not_at_all_is_not_applied(tmp_path, old):
    room = tmp_path / 'internvl_ds' / 'room'
    room.mkdir(parents=True)
    (room / 'a.py').write_text('x = 1\n')
    (room / 'b.py').write_text('x = 1\ny = 2\n')
    with pytest.raises(NotApplicable):
        place_of(Mutant('room', old, old if old == 'y = 2' else 'z', ()), tmp_path)
    assert place_of(Mutant('room', 'y = 2', 'y = 3', ()), tmp_path)[0] == room / 'b.py'
