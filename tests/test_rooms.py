"""The order of the rooms, as pyproject.toml has it, and the size of what stands in them."""

import ast
import subprocess
import sys
from pathlib import Path

import grimp

from tests.harness.ranks import ROOT, base_env

PACKAGE = ROOT / 'internvl_ds'
GROUND = {'__init__.py', '__init__.pyi', 'utils', 'errors.py', 'files', 'metrics.py', 'py.typed'}


def test_no_import_runs_up_a_floor():
    command = [str(Path(sys.executable).parent / 'lint-imports'), '--no-cache']
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=base_env(), cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_import_runs_in_a_circle():
    graph = grimp.build_graph('internvl_ds', cache_dir=None, exclude_type_checking_imports=True)
    circles = []
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if chain := graph.find_shortest_chain(imported, module):
                circles.append(' -> '.join([module, *chain]))
    assert circles == []


def test_the_top_of_the_package_is_its_rooms():
    entries = {path.name for path in PACKAGE.iterdir()} - {'__pycache__'}
    assert entries >= GROUND
    assert len(entries - GROUND) <= 9, sorted(entries - GROUND)


def test_files_functions_and_rooms_are_of_a_size_to_read():
    wrong = []
    folders: dict[Path, int] = {}
    for path in PACKAGE.rglob('*.py'):
        text = path.read_text()
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != '__init__.py')
        if (lines := text.count('\n')) > 350:
            wrong.append(f'{path}: {lines} lines')
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > 70:
                    wrong.append(f'{path}: {node.name} has {lines} lines')
    wrong += [f'{folder}: {count} modules' for folder, count in folders.items() if count > 16]
    assert wrong == []


def test_pytest_alone_runs_one_test_on_ranks_of_each_subject():
    marks: dict[Path, int] = {}
    for path in (ROOT / 'tests').rglob('test_*.py'):
        text = path.read_text()
        if 'mark.ranks' in text and path.parent.name != 'whole':
            marks[path] = text.count('\n@pytest.mark.first\n')
    assert sum(marks.values()) > 35
    assert {path: count for path, count in marks.items() if count > 1} == {}
