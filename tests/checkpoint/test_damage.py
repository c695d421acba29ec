"""A damaged file of any kind is found and named, and auto resume takes the older tag."""

import pytest

from tests.checkpoint import damaging
from tests.harness.ranks import run_ranks


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('stage', [1, 3])
def test_every_damage_to_every_file_is_found_and_named(tmp_path, stage):
    ranks = run_ranks(damaging.every_damage, 2, tmp_path, stage=stage, root=tmp_path / 'out')
    for results in ranks:
        # Shards of 2 ranks, the average of 2 ranks, state.json and the manifest.
        assert len({name.split()[1] for name in results if ' ' in name}) >= 7
        for what, got in results.items():
            if not what.startswith(('flip', 'truncate', 'remove', 'swap')):
                continue
            name = what.split()[1]
            if what == 'swap manifest.json':
                name = 'ckpt_epoch_1'  # each file then differs from what it says
            assert got['taken'] == 'ckpt_epoch_0', what
            assert got['by name'].startswith('CheckpointError: '), (what, got)
            assert name in got['by name'], (what, got)
        assert results['untouched']
        assert results['whole again'] == 'ckpt_epoch_1'
    for what, got in ranks[0].items():
        if what.startswith(('flip', 'truncate', 'remove', 'swap')):
            text = '\n'.join(got['warnings'])
            assert 'resuming from ckpt_epoch_0 instead' in text, (what, text)
            assert (what.split()[1] if 'swap manifest' not in what else 'ckpt_epoch_1') in text


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize('stage', [1, 3])
def test_a_pickle_in_any_file_runs_no_code(tmp_path, stage):
    for messages in run_ranks(
        damaging.payloads, 2, tmp_path,
        stage=stage, root=tmp_path / 'out', target=tmp_path / 'owned',
    ):  # fmt: skip
        for name, message in messages.items():
            assert message.startswith('CheckpointError: '), (name, message)
            assert name in message, message
            if name.endswith('.pt'):
                assert 'refused, because it holds more than tensors and plain data' in message
    assert not (tmp_path / 'owned').exists()


@pytest.mark.ranks
def test_a_tag_of_plain_deepspeed_is_loaded_with_a_warning(tmp_path):
    for result in run_ranks(damaging.plain_tag, 2, tmp_path, root=tmp_path):
        assert any('it could not be verified' in text for text in result['warnings'])
