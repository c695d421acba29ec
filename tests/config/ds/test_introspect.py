"""What the installed DeepSpeed reads of a ds_config is found, whatever it comes to read."""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.runtime import config as ds_runtime_config
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

from internvl_ds.config.ds import introspect as ds_probe
from internvl_ds.config.ds.introspect import keys_in_source, keys_read
from internvl_ds.config.ds.schema import BOOL, NUMBER, build, find


def test_keys_are_found_by_every_way_to_read_them():
    reads = keys_read()
    assert reads['wall_clock_breakdown',].defaults == [False]
    assert reads['zero_optimization',].model is not None  # by **
    assert reads['optimizer', 'type'].defaults == []  # by in keys()
    assert reads['tensorboard',].model is not None  # in a model of models
    assert reads['aio',].takes_null
    assert not reads['flops_profiler',].takes_null
    assert reads['pipeline',].copied  # by items()
    # only where the section is on, and another block is there
    assert reads['data_efficiency', 'data_sampling', 'curriculum_learning'].copied
    assert ('sequence_parallel_size',) in reads  # by deepspeed.initialize
    assert reads['amp',].refused.startswith('NVIDIA Apex AMP integration has been removed')
    assert reads['zero_optimization', 'mics_shard_size'].refused


def test_a_top_level_key_that_a_version_reads_is_known_with_its_type(monkeypatch):
    read_before = ds_runtime_config.get_dump_state

    def reads_more(tree: dict[str, Any]) -> Any:
        if 'halt' in tree and tree['halt'].get('enabled', False) is True:
            tree['halt'].get('after', 1.5)
        return read_before(tree)

    assert find(build(), ('halt',)) is None
    monkeypatch.setattr(ds_runtime_config, 'get_dump_state', reads_more)
    halt = find(build(), ('halt',))
    assert halt is not None
    assert halt.complete
    kinds = {name: key.value.kinds for name, key in (halt.keys or {}).items()}
    assert kinds == {'enabled': (BOOL,), 'after': (NUMBER,)}


def test_reading_leaves_deepspeed_as_it_was():
    before = DeepSpeedConfigModel.__init__, ds_runtime_config.dist, deepspeed.utils.logger.disabled
    keys_read()
    after = DeepSpeedConfigModel.__init__, ds_runtime_config.dist, deepspeed.utils.logger.disabled
    assert after == before


def test_keys_of_a_functions_source():
    def reads(config: dict[str, Any], other: dict[str, Any]) -> Any:
        if 'a' in config and 'b' in config.keys():  # noqa: SIM118
            other.get('y')
            return config['c'], config.get('d', other['x']), config.pop(_MARK)  # type: ignore[name-defined] # noqa: F821
        return None

    reads.__module__ = ds_probe.__name__
    assert sorted(keys_in_source(reads, 'config')) == [ds_probe._MARK, 'a', 'b', 'c', 'd']
