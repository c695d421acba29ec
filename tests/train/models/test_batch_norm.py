"""The batch norm over ranks, beside torch's on one, and in engines of every stage and precision."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.utils import distribute_bn
from torch import nn

from internvl_ds.errors import ConfigError
from internvl_ds.train.models.batch_norm import SyncBatchNorm, distribute_statistics, synchronize
from tests.harness.ranks import run_ranks
from tests.harness.training import write_folder
from tests.train.models import distributing, norming
from tests.train.models.tiny import difference

PRECISIONS = [
    ('O0', 'float16'), ('O1', 'float16'), ('O1', 'bfloat16'), ('O2', 'float16'), ('O2', 'bfloat16'),
]  # fmt: skip


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_have_the_statistics_of_the_whole_batch(tmp_path):
    cells = [(stage, *precision) for precision in PRECISIONS for stage in range(4)]
    cells.sort(key=lambda cell: cell[1:] == ('O2', 'float16'))  # DeepSpeed remembers an fp16 engine
    for result in run_ranks(norming.beside_plain, 2, tmp_path, cells=cells, root=tmp_path):
        # The mean is up to 75 deviations, and so is its rounding of 2^-24 in x - mean: 5e-6. What
        # follows are differences of few terms: twice that.
        assert all(value < 1e-5 for value in result['alone'].values()), result['alone']
        for cell, got in zip(cells, result['engines'], strict=True):
            assert got['dtypes'] == ['torch.float32', 'torch.int64'], cell
            # float32 sums of 8 images: a few roundings of 6e-8 (bfloat16 has 2e-3).
            assert got['off'] < 1e-6, cell
            assert got['average_off'] < 1e-6, cell
            # Two backward passes of some hundred sums in a row, 6e-8 each as a random walk.
            assert got['weights_off'] < 5e-6, cell
            assert list(got['resumed'].values()) == [[], []], cell


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('stage', [0, 3])
def test_statistics_are_those_of_all_ranks_before_evaluation_and_saving(tmp_path, stage):
    data = write_folder(tmp_path / 'images', classes=3, train=29, val=7)
    ranks = run_ranks(
        distributing.epochs, 2, tmp_path, data=str(data), output=str(tmp_path / 'out'), stage=stage
    )
    for kind in ('module', 'average'):
        own = [torch.tensor(of_rank[''][kind]) for of_rank in ranks]
        assert not torch.equal(*own)
        for rank, of_rank in enumerate(ranks):
            for how, expected in (('reduce', (own[0] + own[1]) / 2), ('broadcast', own[0])):
                got = of_rank[how]
                assert torch.equal(torch.tensor(got[kind]), expected), (kind, how, rank)
                in_tag = 'tag' if kind == 'module' else 'tag average'
                assert torch.equal(torch.tensor(got[in_tag]), expected), (in_tag, how, rank)


@pytest.mark.parametrize('reduce', [True, False])
def test_buffers_are_those_that_timm_distributes(reduce, monkeypatch):
    model = nn.Sequential(nn.BatchNorm2d(2), BatchNormAct2d(3), nn.Linear(2, 2))
    model.register_buffer('running', torch.zeros(1))
    seen = []

    def note(buffer, *_, **__):
        seen.append(buffer)

    monkeypatch.setattr(torch.distributed, 'all_reduce', note)
    monkeypatch.setattr(torch.distributed, 'broadcast', note)
    distribute_bn(model, 2, reduce)
    theirs = [id(buffer) for buffer in seen]
    seen.clear()
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr('deepspeed.comm.broadcast', note)
    distribute_statistics(model.named_buffers(), 'broadcast')
    assert [id(buffer) for buffer in seen] == theirs


def test_on_one_rank_it_is_torchs_own():
    torch.manual_seed(0)
    plain, norm = nn.BatchNorm1d(6, eps=1e-6), SyncBatchNorm(6)
    assert list(norm.state_dict()) == list(nn.SyncBatchNorm(6).state_dict())
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(9, 6)
    assert torch.equal(plain(x), norm(x))
    assert torch.equal(plain.eval()(x), norm.eval()(x))
    assert all(torch.equal(plain.state_dict()[n], t) for n, t in norm.state_dict().items())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_statistics_stay_in_float32_when_a_module_is_cast(dtype):
    norm = SyncBatchNorm(6)
    norm(torch.randn(9, 6) + 100)
    before = norm.running_mean.clone()
    module = nn.Sequential(norm).to(dtype)
    assert torch.equal(norm.running_mean, before)
    assert norm.weight.dtype == dtype
    with torch.no_grad():
        assert module.eval()(torch.randn(3, 6, dtype=dtype)).dtype == dtype
    assert norm.double().running_mean.dtype == torch.float64
    assert SyncBatchNorm(6).to('meta').running_var.is_meta


def test_half_precision_sums_are_float32s():
    torch.manual_seed(0)
    x = (torch.randn(4096, 6) * 0.1 + 5).bfloat16()
    norm = SyncBatchNorm(6).bfloat16()
    norm(x)
    want = nn.BatchNorm1d(6).double()
    want(x.double())
    assert difference(norm.running_mean, want.running_mean) < 1e-6
    assert difference(norm.running_var, want.running_var) < 1e-6


def test_statistics_that_were_cast_all_the_same_are_refused():
    norm = SyncBatchNorm(6)
    norm.running_mean.data = norm.running_mean.bfloat16()  # as data_types.buffer_dtype does
    with pytest.raises(ConfigError, match=r'bfloat16.*data_types\.buffer_dtype'):
        norm(torch.randn(9, 6))


@pytest.mark.parametrize('momentum', [0.1, 0.02, None])
@pytest.mark.parametrize(
    ('make', 'shape'),
    [
        (nn.BatchNorm1d, (9, 6)),
        (nn.BatchNorm1d, (4, 6, 5)),
        (nn.BatchNorm2d, (4, 6, 5, 3)),
        (nn.BatchNorm3d, (4, 6, 2, 3, 3)),
        (BatchNormAct2d, (4, 6, 5, 3)),
    ],
)
@pytest.mark.parametrize('more', [{}, {'affine': False}, {'track_running_stats': False}])
def test_a_synchronized_norm_is_the_one_that_it_was(make, shape, momentum, more):
    torch.manual_seed(0)
    plain = make(6, momentum=momentum, **more)
    model = nn.Sequential(copy.deepcopy(plain))
    assert synchronize(model) == 1
    assert isinstance(model[0], SyncBatchNorm)
    assert repr(model[0].state_dict()) == repr(plain.state_dict())
    for _ in range(3):
        x = torch.randn(shape)
        assert torch.equal(plain(x), model(x))
    assert torch.equal(plain.eval()(x), model.eval()(x))
    assert repr(model[0].state_dict()) == repr(plain.state_dict())
    assert synchronize(model) == 0


def test_a_norm_of_unknown_code_is_not_synchronized():
    class Other(nn.BatchNorm2d):
        def forward(self, x):
            return x

    with pytest.raises(ConfigError, match=r'MODEL\.SYNC_BN: 0 \(Other\): no batch norm of'):
        synchronize(nn.Sequential(Other(6)))


@pytest.mark.ranks
def test_two_ranks_train_a_convolutional_net_as_one_does_on_the_whole_batch(tmp_path):
    (alone,) = run_ranks(norming.train_convolutions, 1, tmp_path, stages=[0], level='O0')
    cells = run_ranks(norming.train_convolutions, 2, tmp_path, stages=[0, 1, 3], level='O0')
    for result in cells:
        for stage, values in result.items():
            for name, value in values.items():
                # Three updates through ten layers of sums of hundreds of products, 6e-8 each.
                assert value == pytest.approx(alone['0'][name], rel=1e-4, abs=1e-5), (stage, name)
    halves = run_ranks(norming.train_convolutions, 2, tmp_path, stages=[0, 1, 3], level='O2')
    for result in halves:
        for stage, values in result.items():
            for name, value in values.items():
                # bfloat16 has 2^-9 a rounding.
                assert value == pytest.approx(alone['0'][name], rel=0.1, abs=0.1), (stage, name)


@pytest.mark.ranks
def test_batch_norms_that_a_half_precision_engine_cannot_compute_are_refused(tmp_path):
    for said in run_ranks(norming.refusals, 2, tmp_path):
        for stage in ('0', '1', '3'):
            assert said[stage].startswith(
                '14 batch norms have weights in half precision and running statistics in float32'
            ), said
            assert 'conv1.1 (BatchNormAct2d)' in said[stage] or 'bn1 (' in said[stage], said
            assert 'AMP_OPT_LEVEL O1' in said[stage]
