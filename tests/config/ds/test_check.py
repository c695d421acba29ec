"""Faulty ds_configs, each with the one finding that it should give; and right ones, with none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from yacs.config import CfgNode

from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds.check import check, require_right
from internvl_ds.config.ds.diagnostics import ERROR, WARNING, pointer_of
from internvl_ds.config.ds.load import load_ds_config, shipped_dir
from internvl_ds.config.ds.schema import find, installed, walk
from internvl_ds.config.ds.validate_keys import misfit
from internvl_ds.config.tree import default_config, merge_opts
from internvl_ds.errors import ConfigError
from tests.harness.ds_tables import CONTRADICTIONS, DEPRECATED, RIGHT, TYPES, TYPOS, zero

RANKS = 2


def config_of(values: dict[str, Any]) -> CfgNode:
    config = default_config()
    merge_opts(config, [part for key, value in values.items() for part in (key, value)])
    config.freeze()
    return config


FAULTS = [
    *((tree, {}, {}, pointer, words) for tree, pointer, words in (*TYPOS, *TYPES)),
    *CONTRADICTIONS,
]


def test_the_table_is_long_enough():
    assert len(FAULTS) + len(DEPRECATED) >= 150


def ident(value: Any) -> str:
    return json.dumps(value)[:60]


@pytest.mark.parametrize(
    ('tree', 'values', 'in_code', 'pointer', 'words'), FAULTS, ids=[ident(f[0]) for f in FAULTS]
)
def test_a_fault_gives_one_error_at_its_place(tree, values, in_code, pointer, words):
    before = copy.deepcopy(tree)
    found = check(tree, config_of(values), RANKS, **in_code)
    assert [(f.pointer, f.severity) for f in found] == [(pointer, ERROR)], list(map(str, found))
    assert words in str(found[0])
    assert json.dumps(tree) == json.dumps(before)  # nothing was changed


@pytest.mark.parametrize(('tree', 'pointer', 'words'), DEPRECATED, ids=str)
def test_a_deprecated_key_gives_a_warning_with_its_successor(tree, pointer, words):
    found = check(tree, config_of({}), RANKS)
    assert [(f.pointer, f.severity) for f in found] == [(pointer, WARNING)]
    assert words in str(found[0])


@pytest.mark.parametrize('name', RIGHT)
def test_what_is_right_gives_no_finding_and_deepspeed_takes_it(name):
    tree, values, in_code = RIGHT[name]
    config = config_of(values)
    assert check(tree, config, RANKS, **in_code) == []
    resolved = ds.resolve_or_raise(tree, config, RANKS)
    resolved['train_batch_size'] //= RANKS  # DeepSpeed's own check sees one rank here
    made = DeepSpeedConfig(resolved)
    assert made.zero_optimization_stage == tree.get('zero_optimization', {}).get('stage', 0)
    # What it resolves to is right as well, and stays so once the yacs config has adopted it.
    ds.adopt(config, ds.resolve_or_raise(tree, config, RANKS))
    assert check(ds.resolve_or_raise(tree, config, RANKS), config, RANKS, **in_code) == []


def test_more_than_thirty_are_right():
    assert len(RIGHT) > 40


LEVELS = [(level, amp) for level in ('', 'O0', 'O1', 'O2') for amp in ('float16', 'bfloat16')]


@pytest.mark.parametrize('path', sorted(shipped_dir().glob('*.json')), ids=lambda p: p.stem)
def test_what_ships_gives_no_finding_at_any_level_that_it_supports(path):
    tree, supported = load_ds_config(path), 0
    for level, amp in LEVELS:
        config = config_of({'AMP_OPT_LEVEL': level, 'AMP_TYPE': amp})
        try:
            ds.precision(tree, config)
        except ConfigError:
            continue  # it states another precision
        supported += 1
        in_json = 'optimizer' in tree
        assert check(tree, config, 8, optimizer_in_code=not in_json) == []
    assert supported


def test_no_json_of_deepspeeds_package_gives_a_false_alarm():
    """A ds_config is an object with at least one key that the schema's top level has."""
    package = Path(deepspeed.__file__).parent
    known, left_out, looked_at = installed().keys or {}, [], []
    for path in sorted(package.rglob('*.json')):
        tree = json.loads(path.read_text())
        if not isinstance(tree, dict) or not tree.keys() & known.keys():
            left_out.append(path.name)
            continue
        looked_at.append(path.name)
        assert check(tree, config_of({}), RANKS) == [], path
    assert len(looked_at) >= 4  # the autotuner's templates, a stage each
    assert len(left_out) <= 1  # the ranges of a disk benchmark


def paths_of(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(tree, dict):
        return []
    here = [(*path, key) for key in tree]
    return here + [p for key, value in tree.items() for p in paths_of(value, (*path, key))]


def renamed(tree: dict[str, Any], path: tuple[str, ...], name: str) -> dict[str, Any]:
    """A copy in which the last key of a path is called otherwise, at the same place."""
    key, *rest = path
    return {
        (name if k == key and not rest else k): renamed(v, tuple(rest), name)
        if k == key and rest else v
        for k, v in tree.items()
    }  # fmt: skip


@pytest.mark.parametrize('name', RIGHT)
def test_any_key_misspelt_in_a_right_one_is_the_one_finding(name):
    tree, values, in_code = RIGHT[name]
    config, schema = config_of(values), installed()
    for path in paths_of(tree):
        half = len(path[-1]) // 2
        typo = path[-1][:half] + path[-1][half - 1 :]  # a letter twice
        wanted = [pointer_of((*path[:-1], typo))]
        known, block = find(schema, path), find(schema, path[:-1])
        if not (known or (block and block.keys == {} and path[1:2] == ('params',))):
            wanted = []  # DeepSpeed takes what stands there as it is
        found = check(renamed(tree, path, typo), config, RANKS, **in_code)
        assert [f.pointer for f in found] == wanted, list(map(str, found))


# What is a fault without more beside it, and so would give two findings.
INCOMPLETE_ALONE = ('optimizer', 'scheduler', 'bfloat16')


def test_any_known_key_with_a_value_of_a_wrong_type_gives_the_one_error():
    config, tried = config_of({'AMP_OPT_LEVEL': 'O0'}), 0
    for path, key in walk(installed()):
        wrong = [v for v in ({'x': 1}, [[]], 'word', -1e6, None, True) if misfit(v, key.value)]
        if path[0] in INCOMPLETE_ALONE or key.refused or not wrong:
            continue
        for value in wrong:
            if key.keys is not None and isinstance(value, dict):
                continue
            tree: Any = value
            for name in reversed(path):
                tree = {name: tree}
            found = check(tree, config, RANKS)
            assert [(f.pointer, f.severity) for f in found] == [(pointer_of(path), ERROR)], tree
            tried += 1
    assert tried > 500


def test_require_right_raises_with_every_error_and_logs_the_warnings(caplog):
    tree = {'gradient_cliping': 1.0, **zero(2, cpu_offload=False, overlap_comm='yes')}
    with pytest.raises(ConfigError) as caught:
        require_right(check(tree, config_of({}), RANKS))
    first, *rest = str(caught.value).splitlines()
    assert first == 'the ds_config has 2 errors:'
    assert rest[0].strip().startswith('/gradient_cliping: unknown key')
    assert rest[1].strip().startswith('/zero_optimization/overlap_comm: is "yes"')
    assert not caplog.records

    require_right(check(zero(2, cpu_offload=False), config_of({}), RANKS))
    assert '/zero_optimization/cpu_offload: is deprecated' in caplog.text


def test_one_error_is_told_in_one_line_with_both_places():
    with pytest.raises(ConfigError, match=r'^/gradient_clipping: is "1"; .* \[TRAIN\.CLIP_GRAD\]$'):
        require_right(check({'gradient_clipping': '1'}, config_of({}), RANKS))


def test_two_faults_give_two_findings():
    tree = {'zero_optimisation': {'stge': 3, 'overlap_comm': 'yes'}, 'fp16': {'enabled': 1}}
    assert [f.pointer for f in check(tree, config_of({}), RANKS)] == [
        '/zero_optimisation', '/zero_optimisation/stge', '/zero_optimisation/overlap_comm',
        '/fp16/enabled',
    ]  # fmt: skip


def test_a_tree_with_the_originals_keys_alone_will_do():
    assert check(zero(1), CfgNode({'DATA': {'BATCH_SIZE': 4}}), RANKS) == []
