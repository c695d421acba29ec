"""load_pretrained under zero.Init on real ranks, beside a plain module: the same bit for bit."""

import pytest
import torch

from tests.harness.model import PERSISTENT, make_model
from tests.harness.ranks import run_ranks
from tests.pretrained import pretraining
from tests.pretrained.pretraining import CASES, write_case, write_sources


def _require_same(tmp_path, ranks, jobs):
    results = run_ranks(pretraining.compare_with_plain, ranks, tmp_path, jobs=jobs)
    for result in results:
        for job, got in zip(jobs, result, strict=True):
            for what in ('same', 'rest', 'changed', 'reports', 'random'):
                assert got[what], (what, job)
            assert got['matched'] > 0.9, job


@pytest.mark.ranks
@pytest.mark.parametrize('ranks', [2, 4])
def test_every_step_under_zero_init(tmp_path, ranks):
    readers = 'one' if ranks == 4 else 'all'
    jobs = [
        {'path': str(write_case(case, tmp_path)), 'case': case, 'readers': readers}
        for case in CASES
    ]
    _require_same(tmp_path, ranks, jobs)


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize('ranks', [2, 4])
def test_every_source_under_zero_init(tmp_path, ranks):
    jobs = [
        {'path': path, 'case': 'sizes', 'readers': readers, 'dtype': 'bfloat16'}
        for path in write_sources(tmp_path).values()
        for readers in ('all', 'one')
    ]
    _require_same(tmp_path, ranks, jobs)


@pytest.mark.ranks
def test_tags_of_every_stage_and_their_averages(tmp_path):
    run_ranks(pretraining.save_tags, 2, tmp_path, root=tmp_path)
    jobs = [
        {
            'path': str(tmp_path / str(stage) / 'ckpt_epoch_0'), 'case': 'sizes', 'ema': ema,
            'readers': 'all' if stage % 2 else 'one',
        }
        for stage in range(4)
        for ema in (False, True)
    ]  # fmt: skip
    _require_same(tmp_path, 2, jobs)


@pytest.mark.ranks
@pytest.mark.parametrize('ranks', [2, 4])
def test_a_partitioned_22k_head_gives_its_rows(tmp_path, ranks):
    for result in run_ranks(pretraining.convert_partitioned, ranks, tmp_path):
        assert result['same']
        assert result['shape'] == [1000, 7]
        assert result['slice'] == -(-7000 // ranks)
        assert result['trained'] == [True, False, 1000]


@pytest.mark.ranks
def test_training_goes_on_alike(tmp_path):
    path = str(write_case('same', tmp_path))
    for plain, partitioned in run_ranks(pretraining.train_after, 2, tmp_path, path=path):
        assert plain == partitioned


@pytest.mark.ranks
def test_an_engine_that_has_not_trained_takes_them_as_its_module_would_have(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(make_model(5).state_dict(), path)
    pairs = [*((s, 'fp32') for s in (0, 1, 2, 3, PERSISTENT)), *((s, 'bf16') for s in (0, 2, 3))]
    for result in run_ranks(
        pretraining.load_into_engines, 2, tmp_path, path=str(path), pairs=pairs
    ):  # fmt: skip
        for name, (engine, module, trained, refusal) in result.items():
            assert engine, name
            assert module, name
            assert trained, name
            assert 'load_pretrained after the first update' in refusal, name


@pytest.mark.ranks
def test_ranks_with_other_files_are_an_error_on_all(tmp_path):
    path, other = write_case('same', tmp_path), tmp_path / 'other.pth'
    state = torch.load(path)['model']
    torch.save({k: v for k, v in state.items() if 'norm' not in k}, other)
    texts = run_ranks(
        pretraining.disagree, 2, tmp_path,
        path=str(path), other=str(other), missing=str(tmp_path / 'none.pth'),
    )  # fmt: skip
    for different, missing in texts:
        assert different.startswith('RankError: load_pretrained: rank 1 would load')
        assert 'none.pth: no such file' in missing
    assert 'rank 1' in texts[0][1]
