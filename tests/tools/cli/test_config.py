"""internvl-ds config check: what it prints, and its exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from internvl_ds.config.ds.load import shipped_dir
from internvl_ds.tools.cli import main
from internvl_ds.tools.cli.config import annotated

OPTIONS = ('--cfg', 'digits_quickstart', '--world-size', '2')


@pytest.fixture
def write(tmp_path):
    def write(tree: Any, name: str = 'ds.json') -> str:
        path = tmp_path / name
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        return str(path)

    return write


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = main(['config', 'check', *words])
    return status, capsys.readouterr().out


def test_every_shipped_one_is_right_in_one_call(capsys):
    names = sorted(path.stem for path in shipped_dir().glob('zero?.json'))
    status, out = run(capsys, *names, *OPTIONS)
    assert (status, out.splitlines()) == (0, [f'{name}: no errors' for name in names])


def test_each_finding_is_a_line_and_errors_are_status_1(capsys, write):
    tree = {'gradient_cliping': 1, 'zero_optimization': {'stage': 2, 'cpu_offload': False}}
    path = write(tree)
    before = Path(path).read_bytes()
    status, out = run(capsys, 'zero1', path, *OPTIONS, '--show')
    assert status == 1
    lines = out.splitlines()
    assert lines[0] == 'zero1: no errors'
    at = lines.index(f'{path}: 1 error, 1 warning')
    assert lines[at + 1 : at + 3] == [
        '  error    /gradient_cliping: unknown key; the nearest known key is /gradient_clipping',
        '  warning  /zero_optimization/cpu_offload: is deprecated; use offload_optimizer',
    ]
    assert Path(path).read_bytes() == before


def test_warnings_alone_are_status_0(capsys, write):
    path = write({'zero_optimization': {'stage': 2, 'cpu_offload': False}})
    status, out = run(capsys, path, *OPTIONS)
    assert (status, out.splitlines()[0]) == (0, f'{path}: 1 warning')


def test_the_yaml_and_the_opts_count(capsys, write):
    path = write({'train_micro_batch_size_per_gpu': 8})
    status, out = run(capsys, path, *OPTIONS)
    assert status == 1
    assert '[DATA.BATCH_SIZE]' in out or 'DATA.BATCH_SIZE is' in out
    assert run(capsys, path, *OPTIONS, '--opts', 'DATA.BATCH_SIZE', '8')[0] == 0


def test_an_optimizer_in_the_json_is_right_where_the_code_makes_none(capsys, write):
    tree = {
        'zero_optimization': {'stage': 1},
        'optimizer': {'type': 'AdamW', 'params': {'lr': 1e-3}},
        'scheduler': {'type': 'WarmupLR', 'params': {'warmup_num_steps': 10}},
    }
    path = write(tree)
    status, out = run(capsys, path, *OPTIONS)
    assert status == 1
    assert '/optimizer section' in out
    assert '/scheduler section' in out  # the training program makes one too
    options = (*OPTIONS, '--opts', 'TRAIN.BASE_LR', '5e-4', '--optimizer-in-json')
    assert run(capsys, path, *options)[0] == 0


def test_show_gives_every_value_its_origin(capsys, write):
    path = write({'gradient_accumulation_steps': 4, 'zero_optimization': {'stage': 3}})
    status, out = run(capsys, path, *OPTIONS, '--opts', 'TRAIN.ACCUMULATION_STEPS', '4', '--show')
    assert status == 0
    first, *lines = out.splitlines()
    assert first == f'{path}: no errors'
    leaves = [line for line in lines if line.rstrip(' {},').count(':') and '{' not in line]
    assert leaves
    for line in leaves:
        assert '  // ' in line, line
    text = '\n'.join(line.partition('  // ')[0] for line in lines)
    shown = json.loads(text)
    assert shown['gradient_accumulation_steps'] == 4
    assert shown['train_batch_size'] == 8 * shown['train_micro_batch_size_per_gpu']
    assert shown['zero_optimization']['stage'] == 3


def test_json_has_the_findings_the_resolved_tree_and_the_origins(capsys, write):
    path = write({'zero_optimization': {'stage': 4}})
    status, out = run(capsys, path, 'zero2', *OPTIONS, '--json', '--show')
    assert status == 1
    wrong, right = json.loads(out)['files']
    assert wrong == {
        'file': path,
        'findings': [{
            'pointer': '/zero_optimization/stage',
            'message': 'is 4; it takes 0, 1, 2, 3',
            'severity': 'error',
            'yacs': '',
        }],
        'resolved': None,
        'origins': None,
    }  # fmt: skip
    assert (right['file'], right['findings']) == ('zero2', [])
    assert right['resolved']['zero_optimization']['stage'] == 2
    assert set(right['origins']) >= {'/train_batch_size', '/bf16/enabled'}


def test_a_file_that_is_no_json_is_an_error_of_that_file(capsys, write):
    path = write('{"train_batch_size": 8,}')
    status, out = run(capsys, path, 'zero2', *OPTIONS)
    assert status == 1
    assert 'cannot be read as JSON' in out
    assert 'zero2: no errors' in out
    twice = write('{"gradient_clipping": 1, "gradient_clipping": 2}', 'twice.json')
    assert 'key stated twice: gradient_clipping' in run(capsys, twice, *OPTIONS)[1]


def test_annotated_is_json_with_origins_at_the_ends_of_lines():
    tree = {'a': 1, 'b': {'c/d': [1, 2], 'e': {}}, 'f': 'x'}
    origins = {'/a': 'here', '/b/c~1d': 'there', '/b/e': 'nowhere'}
    assert annotated(tree, origins).splitlines() == [
        '{',
        '  "a": 1,           // here',
        '  "b": {',
        '    "c/d": [1, 2],  // there',
        '    "e": {}         // nowhere',
        '  },',
        '  "f": "x"',
        '}',
    ]


@pytest.mark.parametrize(
    ('words', 'status', 'stream', 'said'),
    [
        (('zero2', *OPTIONS), 0, 'stdout', 'zero2: no errors'),
        (('wrong', *OPTIONS), 1, 'stdout', 'error    /gradient_cliping: unknown key'),
        (('zero9', *OPTIONS), 2, 'stderr', 'zero9: no such file, and none ships by that name'),
    ],
)
def test_the_installed_commands_exit_status(write, words, status, stream, said):
    path = write({'gradient_cliping': 1.0})
    command = [str(Path(sys.executable).parent / 'internvl-ds'), 'config', 'check']
    words = tuple(path if word == 'wrong' else word for word in words)
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert said in getattr(done, stream)
    if status < 2:
        assert len(done.stdout.splitlines()) == 1 + status  # DeepSpeed's own words go to stderr


@pytest.mark.parametrize(
    'words',
    [
        ('zero2', '--cfg', 'digits_quickstart'),
        ('zero2', '--world-size', '2'),
        ('zero2', '--cfg', 'digits_quickstart', '--world-size', '0'),
        OPTIONS,
    ],
)
def test_wrong_usage_is_status_2(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(['config', 'check', *words])
    assert caught.value.code == 2
