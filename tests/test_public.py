"""The public names: imported at their first use, and seen by dir(), help() and type checkers."""

import ast
import importlib
import subprocess
import sys

import pytest

import internvl_ds
from tests.harness.ranks import ROOT, base_env

API = {
    'MyAverageMeter', 'NativeScalerWithGradNormCount', 'auto_resume_helper',
    'convert_22k_head_to_1k', 'get_grad_norm', 'load_checkpoint', 'load_ema_checkpoint',
    'load_pretrained', 'reduce_tensor', 'save_checkpoint', 'initialize', 'register', 'ShardedEma',
    'Preemption', 'init_distributed', 'shutdown', 'get_config',
}  # fmt: skip


def run(code):
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True, text=True, timeout=120, env=base_env(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there_and_in_dir():
    errors = importlib.import_module('internvl_ds.errors')
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert {*API, *(n for n in raised if n[0].isupper())} - {'Sequence', 'Any'} <= {
        *internvl_ds.__all__
    }
    assert {*internvl_ds.__all__} <= {*dir(internvl_ds)}
    for name in internvl_ds.__all__:
        assert getattr(internvl_ds, name).__name__ == name
    with pytest.raises(AttributeError, match='no attribute'):
        internvl_ds.no_such_name  # noqa: B018


def test_the_stub_lists_the_same_names():
    tree = ast.parse((ROOT / 'internvl_ds' / '__init__.pyi').read_text())
    imported = {a.asname for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert imported == {*internvl_ds.__all__}


def test_the_package_is_imported_without_torch_until_a_name_is_used():
    code = 'import sys, internvl_ds; dir(internvl_ds); print("torch" in sys.modules)'
    assert run(code) == 'False\n'


PATHS = {
    'utils': 'save_checkpoint', 'ema': 'ShardedEma', 'preemption': 'Preemption',
    'errors': 'ConfigError', 'config': 'get_config',
}  # fmt: skip


def test_import_paths_of_scripts():
    lines = ['import internvl_ds']
    for path, name in PATHS.items():
        lines.append(f'from internvl_ds.{path} import {name} as it')
        lines.append(f'assert it is internvl_ds.{name}')
    run('\n'.join(lines))
    lines = [f'import internvl_ds.{path}' for path in PATHS]
    lines += [f'assert {name!r} in dir(internvl_ds.{path})' for path, name in PATHS.items()]
    run('\n'.join(lines))


def test_a_type_checker_knows_them(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('import internvl_ds\nreveal_type(internvl_ds.reduce_tensor)\n')
    command = [sys.executable, '-m', 'mypy', str(script)]
    # In the repository, whose check of all files has left what it knows of torch: a minute.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=base_env(), cwd=ROOT
    )
    assert 'def (' in done.stdout, done.stdout + done.stderr
