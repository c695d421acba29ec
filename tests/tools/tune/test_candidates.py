"""Candidates: which two are the same, and what the training program is given for each."""

import json

import pytest

from internvl_ds.config.ds import resolve as ds
from internvl_ds.errors import ConfigError
from internvl_ds.tools.tune.candidates import Subject
from internvl_ds.tools.tune.search_space import Choice, SearchSpace, batch_choice

SPACE = SearchSpace(
    {
        'stage': {str(s): Choice({'zero_optimization': {'stage': s}}) for s in range(4)},
        'batch': {'16x1': batch_choice(16, 1), '4x4': batch_choice(4, 4)},
    }
)


def subject(ds_config=None, *opts):
    return Subject('digits_quickstart', None, opts, ds_config or {}, 2)


@pytest.mark.parametrize('opts', [(), ('AMP_OPT_LEVEL', 'O0'), ('AMP_TYPE', 'float16')])
def test_a_proposal_can_be_one_of_those_that_ship(opts):
    those = {each.name: each.key for each in subject(None, *opts).shipped}
    assert list(those) == [
        'zero0', 'zero1', 'zero2', 'zero3', 'zero2_offload', 'zero3_offload_optimizer',
        'zero3_offload',
    ]  # fmt: skip
    assert len(set(those.values())) == 7
    assert subject(None, *opts).base.key == those['zero0']
    for stage in range(4):
        labels = {'stage': str(stage), 'batch': '16x1'}
        assert subject(None, *opts).proposal(SPACE, labels).key == those[f'zero{stage}']
    other = subject(None, *opts).proposal(SPACE, {'stage': '1', 'batch': '4x4'})
    assert other.key not in those.values()


def test_what_is_given_resolves_to_the_configured_global_batch():
    for ds_config in ({}, {'train_batch_size': 32}, {'train_micro_batch_size_per_gpu': 16}):
        candidate = subject(ds_config).proposal(SPACE, {'stage': '3', 'batch': '4x4'})
        assert candidate.resolved['train_batch_size'] == 32
        assert (candidate.config.DATA.BATCH_SIZE, candidate.config.TRAIN.ACCUMULATION_STEPS) == (
            4,
            4,
        )
        assert candidate.name == 'stage=3 batch=4x4'


def test_a_base_with_its_own_batch_gives_it_to_all():
    small = subject(
        {'train_micro_batch_size_per_gpu': 2, 'gradient_accumulation_steps': 3},
        'DATA.BATCH_SIZE', '2',
    )  # fmt: skip
    assert small.images() == 6
    assert {each.resolved['train_batch_size'] for each in small.shipped} == {12}
    space = SearchSpace({'x': {'y': Choice({'steps_per_print': 7})}})
    proposal = small.proposal(space, {'x': 'y'})
    assert (proposal.resolved['train_batch_size'], proposal.resolved['steps_per_print']) == (12, 7)


def test_only_what_the_configuration_does_not_say_already_has_to_be_given():
    same = subject().proposal(SPACE, {'stage': '1', 'batch': '16x1'})
    assert subject().differing(same) == {}
    other = subject().proposal(SPACE, {'stage': '1', 'batch': '4x4'})
    assert subject().differing(other) == {'DATA.BATCH_SIZE': 4, 'TRAIN.ACCUMULATION_STEPS': 4}


def test_a_result_can_be_given_to_the_training_program():
    candidate = subject().proposal(SPACE, {'stage': '1', 'batch': '4x4'})
    content = json.loads(json.dumps(candidate.ds_config))
    config = subject().configured(subject().differing(candidate))
    assert ds.resolve_or_raise(content, config, 2) == candidate.resolved


def test_before_the_ranks_are_known_the_base_is_as_it_was_given():
    base = Subject('digits_quickstart', None, (), {'train_batch_size': 64}, 0).base
    assert (base.ds_config, base.resolved) == ({'train_batch_size': 64}, {})


def test_contradictions_are_errors():
    space = SearchSpace({'half': {'fp16': Choice({'fp16': {'enabled': True}})}})
    with pytest.raises(ConfigError, match='AMP_OPT_LEVEL'):
        subject().proposal(space, {'half': 'fp16'})
