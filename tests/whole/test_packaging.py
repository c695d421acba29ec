"""What a wheel holds, and that the data files are found in every kind of installation."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from internvl_ds.config.ds.load import load_ds_config, shipped_dir
from internvl_ds.config.tree import find_config_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree, so that no build files are left in the tree itself."""
    source, target = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    for name in ('internvl_ds', 'ds_configs'):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__', '.*')
        )
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '-q', '-w', target, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


@pytest.mark.slow
class TestWheel:
    def test_holds_every_module_and_data_file(self, wheel):
        expected = {
            path.relative_to(ROOT).as_posix()
            for pattern in ('*.py', '*.pyi', 'py.typed', '*.yaml')
            for path in (ROOT / 'internvl_ds').rglob(pattern)
        }
        expected |= {
            f'internvl_ds/ds_configs/{path.name}' for path in (ROOT / 'ds_configs').glob('*.json')
        }
        with zipfile.ZipFile(wheel) as file:
            names = set(file.namelist())

        assert 'internvl_ds/py.typed' in expected
        assert expected - names == set()

    def test_holds_nothing_at_the_top_but_the_package(self, wheel):
        with zipfile.ZipFile(wheel) as file:
            tops = {name.partition('/')[0] for name in file.namelist()}

        assert {top.partition('-')[0].partition('.')[0] for top in tops} == {'internvl_ds'}

    def test_finds_its_data_where_it_is_unpacked(self, wheel, tmp_path):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(tmp_path)
        code = (
            'from internvl_ds.config.ds.load import load_ds_config, shipped_dir\n'
            'from internvl_ds.config.tree import find_config_file\n'
            'from importlib.resources import files\n'
            'assert load_ds_config("zero2")["zero_optimization"]["stage"] == 2\n'
            'assert files("internvl_ds.ds_configs").joinpath("zero2.json").is_file()\n'
            'print(shipped_dir())\n'
            'print(find_config_file("digits_quickstart").parent)\n'
        )
        done = subprocess.run(
            [sys.executable, '-c', code],
            cwd=tmp_path,  # its internvl_ds comes before the installed one
            capture_output=True,
            text=True,
            timeout=120,
        )

        assert done.returncode == 0, done.stderr
        places = done.stdout.splitlines()[-2:]
        package = tmp_path / 'internvl_ds'
        assert places == [str(package / 'ds_configs'), str(package / 'config')]


def test_every_package_is_listed():
    """A package that setup.cfg does not list is missing from the wheel, and nothing says so."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    listed = set(setup['options']['packages'].split())
    there = {
        '.'.join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / 'internvl_ds').rglob('__init__.py')
    }

    assert there | {'internvl_ds.ds_configs'} == listed


def test_ds_configs_are_found_and_are_json():
    names = {path.stem for path in shipped_dir().glob('*.json')}

    assert {'zero2', 'zero3'} <= names
    for path in shipped_dir().glob('*.json'):
        assert load_ds_config(path.stem) == json.loads(path.read_text())


def test_configs_are_found_and_are_yaml():
    for path in find_config_file('digits_quickstart').parent.glob('*.yaml'):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
