"""The program's lr at every update is the original's, to the bit."""

import itertools

import pytest

from internvl_ds.engine.lr_schedule import LrSchedule
from internvl_ds.train.optim import build_optimizer, build_scheduler, scaled_lrs
from tests.harness.ranks import run_ranks
from tests.harness.training import write_folder
from tests.train import lr_program
from tests.train.lr_program import EPOCHS, config_of, layered, plain_lrs

BATCHES, RANKS = 11, 3


@pytest.mark.parametrize('dcn', [None, 0.3])
@pytest.mark.parametrize('decay', [False, True])
@pytest.mark.parametrize('steps', [0, 1, 2, 4])
@pytest.mark.parametrize('name', ['cosine', 'step', 'linear'])
def test_each_update_has_the_lr_that_the_original_has(tmp_path, name, steps, decay, dcn):
    config = config_of(tmp_path, name, steps, decay, dcn)
    lrs = scaled_lrs(config, RANKS)
    optimizer = build_optimizer(config, layered(config), lrs.base)
    scheduler = build_scheduler(config, optimizer, BATCHES, lrs)
    group = max(1, steps)
    schedule = LrSchedule.of(scheduler, 'original', group)
    got = []
    for come, (_, index) in enumerate(itertools.product(range(EPOCHS), range(BATCHES)), 1):
        if (index + 1) % group == 0:
            groups = optimizer.param_groups
            got.append({name: g['lr'] for g in groups for name in g['param_names']})
            assert schedule.is_due(skipped=True, whole=True)
            schedule.move(0, come, groups)
        elif index + 1 == BATCHES:  # an update of fewer, which the original does not make
            assert not schedule.is_due(skipped=False, whole=False)
    wanted = plain_lrs(config, BATCHES, RANKS)
    assert got == wanted
    assert len({tuple(lrs.values()) for lrs in wanted}) > 3
    assert len(set(wanted[-1].values())) == (1, 4, 5)[decay + (decay and dcn is not None)]


@pytest.mark.first
@pytest.mark.ranks
def test_the_program_trains_with_the_lr_of_the_original(tmp_path):
    data = write_folder(tmp_path, classes=3, train=29, val=7)  # 7 micro-batches on each rank
    cells = [
        (0, 'cosine', 1, False, None), (1, 'cosine', 4, True, 0.3), (3, 'step', 2, True, None),
        (2, 'linear', 4, False, 0.3),
    ]  # fmt: skip
    for results in run_ranks(
        lr_program.follow, 2, tmp_path, data=str(data), output=str(tmp_path / 'out'), cells=cells
    ):
        for cell, result in zip(cells, results, strict=True):
            assert len(result['got']) == 3 * (7 // cell[2])
            assert result['got'] == result['wanted'], cell


@pytest.mark.ranks
def test_a_tag_of_an_earlier_version_goes_on_and_the_log_says_how(tmp_path):
    cells = [(0, 0, 'cosine'), (1, 1, 'cosine'), (3, 3, 'cosine'), (1, 3, 'cosine'),
             (0, 0, 'linear'), (2, 2, 'linear'), (3, 1, 'linear')]  # fmt: skip
    results = run_ranks(lr_program.go_on_from_earlier, 2, tmp_path, root=str(tmp_path), cells=cells)
    for cell, result in zip(cells, results[0], strict=True):
        if cell[2] == 'cosine':  # as it was saved
            assert result['got'] == result['wanted'], cell
            said = 'the lr schedule counts updates, as when it was saved, and not micro-batches fr'
        else:  # by the schedule of now, at the place of whole updates
            tops = {name: 0.05 if 'stem' in name else 0.1 for name in result['got'][0]}
            for index, lrs in enumerate(result['got']):
                share = (7 + 2 * index - 4) / 12
                wanted = {name: top - (top - top * 0.01) * share for name, top in tops.items()}
                assert lrs == wanted, cell
            said = 'its lr schedule is of another kind than the configured LinearSchedule'
        assert any(said in text for text in result['warned']), cell
