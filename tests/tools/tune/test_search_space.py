"""Spaces: what is built in, what a file can say, and what each combination stands for."""

import json

import pytest

from internvl_ds.errors import ConfigError
from internvl_ds.tools.tune.search_space import (
    Choice,
    SearchSpace,
    batch_pairs,
    default_space,
    merged,
    parse_space,
    read_space,
)

IMAGES = 16


def parse(axes, **more):
    return parse_space({'axes': axes, **more}, IMAGES)


@pytest.mark.parametrize(
    ('images', 'even', 'pairs'),
    [
        (1, False, [(1, 1)]),
        (16, False, [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)]),
        (16, True, [(16, 1), (8, 2), (4, 4), (2, 8)]),
        (12, False, [(12, 1), (6, 2), (3, 4), (1, 12)]),  # 4 is more than half of 6
        (7, False, [(7, 1), (1, 7)]),
    ],
)
def test_pairs_keep_the_product_and_halve_the_micro_batch(images, even, pairs):
    assert batch_pairs(images, even) == pairs


def test_merging_is_section_by_section_and_null_removes():
    tree = {'a': 1, 'zero': {'stage': 1, 'x': 2}, 'gone': 3}
    patch = {'zero': {'stage': 2}, 'gone': None, 'new': {'y': {'z': 1}}}
    assert merged(tree, patch) == {'a': 1, 'zero': {'stage': 2, 'x': 2}, 'new': {'y': {'z': 1}}}
    assert tree == {'a': 1, 'zero': {'stage': 1, 'x': 2}, 'gone': 3}


def test_the_built_in_space_tries_each_axis_only_where_it_means_something():
    space = default_space(IMAGES, ranks=2)
    every = list(space.combinations())
    assert len({json.dumps(labels, sort_keys=True) for labels in every}) == len(every)
    by_stage = {stage: [e for e in every if e['stage'] == stage] for stage in '0123'}
    assert all(set(e) == {'stage', 'batch', 'recompute'} for e in by_stage['0'])
    assert all('offload' in e and 'offload3' not in e for e in by_stage['2'])
    assert {e['offload3'] for e in by_stage['3']} == {'none', 'optimizer', 'all'}
    # batches x recomputation, then x buckets x overlap x offload
    assert [len(by_stage[stage]) for stage in '0123'] == [10, 180, 180, 270]


def test_one_rank_on_a_cpu_has_neither_stages_nor_offload_to_try():
    axes = default_space(IMAGES, ranks=1, offload=False, recompute=False).axes
    assert {name: list(choices) for name, choices in axes.items()} == {
        'stage': ['0'],
        'batch': ['16x1', '8x2', '4x4', '2x8', '1x16'],
    }


def test_labels_become_a_ds_config_and_settings():
    space = default_space(IMAGES, ranks=2)
    labels = {
        'stage': '3', 'batch': '8x2', 'bucket': '5M', 'overlap': 'off', 'offload3': 'all',
        'recompute': 'yes',
    }  # fmt: skip
    base = {'zero_optimization': {'stage': 1, 'round_robin_gradients': True}, 'steps_per_print': 9}
    ds_config, opts = space.build(base, labels)
    to_host = {'device': 'cpu', 'pin_memory': True}
    assert ds_config == {
        'steps_per_print': 9,
        'zero_force_ds_cpu_optimizer': False,
        'train_micro_batch_size_per_gpu': 8,
        'gradient_accumulation_steps': 2,
        'zero_optimization': {
            'stage': 3, 'reduce_bucket_size': 5_000_000, 'allgather_bucket_size': 5_000_000,
            'overlap_comm': False, 'offload_optimizer': to_host, 'offload_param': to_host,
        },
    }  # fmt: skip
    assert opts == {
        'DATA.BATCH_SIZE': 8,
        'TRAIN.ACCUMULATION_STEPS': 2,
        'TRAIN.USE_CHECKPOINT': True,
    }
    assert base['zero_optimization']['stage'] == 1


def test_without_a_stage_the_base_keeps_its_zero_section():
    space = SearchSpace(
        {'bucket': {'big': Choice({'zero_optimization': {'reduce_bucket_size': 9}})}}
    )
    ds_config, _ = space.build({'zero_optimization': {'stage': 2}}, {'bucket': 'big'})
    assert ds_config == {'zero_optimization': {'stage': 2, 'reduce_bucket_size': 9}}


def test_a_file_says_axes_conditions_and_batches(tmp_path):
    path = tmp_path / 'space.json'
    tree = {
        'axes': {
            'stage': {
                '1': {'ds_config': {'zero_optimization': {'stage': 1}}},
                '3': {'ds_config': {'zero_optimization': {'stage': 3}}},
            },
            'batch': {'half': {'micro_batch': 8, 'accumulation': 2}},
            'prefetch': {'default': {}, 'none': {'opts': {'DATA.NUM_WORKERS': 0}}},
        },
        'only': {'prefetch': {'stage': ['3']}},
    }
    path.write_text(json.dumps(tree))
    space = parse_space(read_space(path), IMAGES)
    assert list(space.combinations()) == [
        {'stage': '1', 'batch': 'half'},
        {'stage': '3', 'batch': 'half', 'prefetch': 'default'},
        {'stage': '3', 'batch': 'half', 'prefetch': 'none'},
    ]
    assert space.axes['batch']['half'].opts == {'DATA.BATCH_SIZE': 8, 'TRAIN.ACCUMULATION_STEPS': 2}
    path.write_text('{')
    with pytest.raises(ConfigError, match=r'space.json: cannot be read as JSON'):
        read_space(path)


@pytest.mark.parametrize(
    ('tree', 'words'),
    [
        ([], 'the file holds'),
        ({}, '/axes holds None'),
        ({'axes': {}}, '/axes is empty'),
        ({'axes': {'a': {}}}, '/axes/a has no choices'),
        ({'axes': {'a': {'x': 1}}}, '/axes/a/x holds 1'),
        ({'axes': {'a': {'x': {}}}, 'axis': {}}, '/axis: unknown key; axes, only'),
        ({'axes': {'a': {'x': {'dsconfig': {}}}}}, '/axes/a/x/dsconfig: unknown key'),
        ({'axes': {'a': {'x': {'opts': []}}}}, '/axes/a/x/opts holds'),
        (
            {'axes': {'a': {'x': {'ds_config': {'train_micro_batch_size_per_gpu': 4}}}}},
            'train_micro_batch_size_per_gpu is set by "micro_batch"',
        ),
        ({'axes': {'a': {'x': {'opts': {'DATA.BATCH_SIZE': 4}}}}}, 'DATA.BATCH_SIZE is set by'),
        ({'axes': {'a': {'x': {'ds_config': {'train_batch_size': 4}}}}}, 'keeps the global batch'),
        ({'axes': {'a': {'x': {'micro_batch': 8}}}}, '/axes/a/x/accumulation is None'),
        ({'axes': {'a': {'x': {'micro_batch': True, 'accumulation': 16}}}}, 'micro_batch is True'),
        (
            {'axes': {'a': {'x': {'micro_batch': 8, 'accumulation': 4}}}},
            'micro_batch 8 x accumulation 4 is 32, and 16 images',
        ),
        ({'axes': {'a': {'x': {}}}, 'only': {'b': {}}}, '/only/b: there is no such axis'),
        ({'axes': {'a': {'x': {}}}, 'only': {'a': {'a': ['x']}}}, 'an axis that comes before a'),
        (
            {'axes': {'a': {'x': {}}, 'b': {'y': {}}}, 'only': {'b': {'a': ['z']}}},
            "/only/b/a is ['z']; it has to be a list of x",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tree, words):
    with pytest.raises(ConfigError) as caught:
        parse_space(tree, IMAGES)
    assert words in str(caught.value)
