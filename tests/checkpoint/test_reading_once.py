"""A start reads the bytes of a tag once for their checksums, on all ranks of a host together."""

import pytest

from tests.checkpoint import reading
from tests.harness.ranks import run_ranks


@pytest.mark.ranks
def test_a_start_compares_each_file_once_and_another_load_compares_again(tmp_path):
    stages = [1, 3]
    first, other = run_ranks(reading.resume, 2, tmp_path, output=tmp_path, stages=stages)
    for stage, mine, theirs in zip(stages, first, other, strict=True):
        shards = {name for name in mine['files'] if name.endswith(('_states.pt', '.safetensors'))}
        assert len(shards) >= 5, mine['files']
        for when in ('start', 'again'):
            read = [name for name in mine[when] + theirs[when] if name != 'state.json']
            assert set(read) >= shards, (stage, when)
            assert len(read) == len(set(read)), (stage, when, read)
