"""The one table of settings that stand in both files, and what is made from the table."""

from __future__ import annotations

import pytest

from internvl_ds.config.ds.check import examine
from internvl_ds.config.ds.pairs import AGREE, COUNTERPARTS, PAIRS, markdown
from internvl_ds.config.ds.resolve import resolve, size_buckets
from internvl_ds.config.ds.schema import find, installed
from internvl_ds.config.tree import default_config, default_of, set_options
from tests.harness.ranks import ROOT


def test_every_key_of_the_table_is_known_to_its_file():
    assert len({pair.pointer for pair in PAIRS}) == len(PAIRS)
    for pair in PAIRS:
        assert default_of(pair.yacs) is not None, pair
        section, _, params = pair.pointer[1:].partition('/params/')
        assert params or find(installed(), section.split('/')), pair


def test_the_documentation_shows_the_table():
    assert markdown().strip() in (ROOT / 'ds_configs' / 'README.md').read_text()


def test_the_documentation_has_a_row_for_what_is_filled():
    lines = markdown().splitlines()
    assert lines[:2] == ['| field | from |', '| --- | --- |']
    assert '| `gradient_clipping` | TRAIN.CLIP_GRAD |' in lines
    assert '| `optimizer.params.lr` | TRAIN.BASE_LR x batch / 512 |' in lines
    assert "| `fp16.loss_scale_window` | GradScaler's: 2000 |" in lines
    assert not any('optimizer.type' in line for line in lines)


@pytest.mark.parametrize('pair', [p for p in PAIRS if p.rule == AGREE], ids=lambda p: p.key)
def test_numbers_that_disagree_are_findings_of_resolve_and_the_same_of_the_check(pair):
    config = set_options(default_config(), {pair.yacs: 3})
    tree = {pair.key: 2}
    resolution = resolve(tree, config, 2)
    assert [(f.pointer, COUNTERPARTS[f.pointer]) for f in resolution.findings] == [
        (pair.pointer, pair.yacs)
    ]
    assert f'{pair.pointer} is 2' in str(resolution.findings[0])
    assert examine(tree, config, 2).findings == resolution.findings


def test_each_fault_has_its_finding_at_once():
    """Two keys left 'auto', and two that disagree: one error each, in the order of resolving."""
    options = {'DATA.BATCH_SIZE': 3, 'TRAIN.CLIP_GRAD': 1.0}
    tree = {'train_micro_batch_size_per_gpu': 2, 'gradient_clipping': 2.0}
    findings = resolve(tree, set_options(default_config(), options), 2).findings
    assert [f.pointer for f in findings] == [f'/{key}' for key in tree]
    autos = {'steps_per_print': 'auto', 'zero_optimization': {'overlap_comm': 'auto'}}
    findings = resolve(autos, default_config(), 2).findings
    assert [f.pointer for f in findings] == ['/steps_per_print', '/zero_optimization/overlap_comm']


def test_a_resolution_that_was_examined_needs_only_the_models_size():
    tree = {'zero_optimization': {'stage': 2, 'allgather_bucket_size': 'auto'}}
    examined = examine(tree, default_config(), 2)
    assert examined.findings == []
    assert size_buckets(examined, 99) == resolve(tree, default_config(), 2, 99)
