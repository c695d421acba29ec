"""Files whose bytes are as the save before wrote them are linked into a tag that is whole."""

import pytest

from internvl_ds.checkpoint.tag.manifest import FORMAT, FORMAT_APART, FORMAT_LINKED, is_shared
from tests.checkpoint import linking
from tests.harness.ranks import run_ranks


@pytest.mark.ranks
def test_the_same_state_saved_again_is_linked_and_every_reader_agrees(tmp_path):
    for found in run_ranks(linking.repeat, 2, tmp_path, root=str(tmp_path)):
        for stage, got in found.items():
            first, second, third = got['files']
            assert first == second, stage
            kept = [name for name, inode in third.items() if first.get(name) == inode]
            assert len(kept) == (stage == '1'), stage  # which shares what is frozen
            assert all(map(is_shared, kept)), stage
            one, two, three = got['saves']
            assert got['linked'] == [{}, {one: 'ckpt_epoch_best'}, {}], stage
            others = FORMAT_APART if stage == '1' else FORMAT
            assert got['formats'] == [others, FORMAT_LINKED, others], stage
            assert len({one, two, three}) == 3
            assert got['damage'] == [[], [], []], stage
            assert got['copied'] == [[], []], stage
            assert got['third'] == [], stage
            assert got['links'] == 1, stage
            assert got['sizes'][0] == got['sizes'][1] > 0  # the disk must have room for all
            assert [v for k, v in got.items() if k.startswith('into')] == (
                [[[], True]] if stage != '0' else []
            ), stage


@pytest.mark.ranks
def test_only_what_is_on_disk_byte_for_byte_is_linked(tmp_path):
    for found in run_ranks(linking.harm, 2, tmp_path, root=str(tmp_path)):
        del found['last']
        assert found == {
            'first': [False, []],
            'after damage': [False, []],
            'after repair': [True, []],
            'gone': [False, []],
            'a symbolic link': [False, []],
            'another OUTPUT': [False, []],
            'and there again': [True, []],
            'over': [],
        }
