"""A .pth of the head alone, on a backbone from PRETRAINED: evaluated, trained on, or refused."""

import logging

import pytest
import torch

from internvl_ds import load_checkpoint, load_pretrained
from internvl_ds.errors import CheckpointMismatch
from internvl_ds.train.data import build_loaders
from internvl_ds.train.model import build_model
from tests.harness.ranks import run_ranks
from tests.harness.training import write_folder
from tests.train.models import heading
from tests.train.models.tiny import backbone_file, head_file, images, tiny_config, tiny_model

_log = logging.getLogger('test')


@pytest.fixture(params=['intern_vit_6b', 'clip_vit'])
def kind(request):
    return request.param


def load(kind, head, backbone=None, **values):
    config = tiny_config(kind, PRETRAINED=str(backbone or ''), MODEL__RESUME=str(head), **values)
    config.EVAL_MODE = True
    model = build_model(config)
    load_checkpoint(config, model, None, None, None, _log)
    return model.eval()


@pytest.mark.parametrize('target', ['cls_patch_concat', 'attention_pooling'])
def test_both_files_together_are_the_whole_model(tmp_path, kind, target):
    source = tiny_model(kind, CLS_TARGET=target)
    backbone, head = backbone_file(tmp_path, source), head_file(tmp_path, source)

    model = load(kind, head, backbone, CLS_TARGET=target)

    assert all(torch.equal(model.state_dict()[n], t) for n, t in source.state_dict().items())
    assert torch.equal(model(images()), source(images()))


def test_pretrained_may_be_the_head_alone(tmp_path, kind):
    source = tiny_model(kind)
    backbone, head = backbone_file(tmp_path, source), head_file(tmp_path, source)
    config = tiny_config(kind, PRETRAINED=str(backbone), MODEL__PRETRAINED=str(head))
    model = build_model(config)

    report = load_pretrained(config, model, _log)

    assert all(torch.equal(model.state_dict()[n], t) for n, t in source.state_dict().items())
    assert (report.matched, report.missing) == (1.0, ())


def test_a_head_without_its_backbone_is_refused(tmp_path, kind):
    head = head_file(tmp_path, tiny_model(kind))
    with pytest.raises(CheckpointMismatch, match=r'keys are not in it: .*embed'):
        load(kind, head)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'head.bias': None}, r'1 keys are not in it: head\.bias$'),
        ({'norm.running_var': None}, r'1 keys are not in it: norm\.running_var$'),
        ({'heads.bias': torch.ones(5)}, r'1 keys are not in the model: heads\.bias$'),
        ({'head.bias': torch.ones(6)}, r'head\.bias \(6,\) -> \(5,\)$'),
    ],
)
def test_anything_else_than_the_backbone_must_be_in_it(tmp_path, change, message):
    source = tiny_model()
    backbone, head = backbone_file(tmp_path, source), head_file(tmp_path, source)
    state = torch.load(head)['model'] | change
    torch.save({'model': {n: t for n, t in state.items() if t is not None}}, head)
    with pytest.raises(CheckpointMismatch, match=message):
        load('intern_vit_6b', head, backbone)


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
def test_training_begins_with_the_head_at_every_stage(tmp_path):
    source = tiny_model()
    backbone_file(tmp_path, source)
    head_file(tmp_path, source)
    cells = [(stage, level, False) for stage in range(4) for level in ('O0', 'O2')]
    cells += [(3, 'O0', True), (3, 'O2', True)]
    results = run_ranks(heading.begin_from_head, 2, tmp_path, cells=cells, root=tmp_path)
    for cell, got in zip(cells, results[0], strict=True):
        assert got['wrong'] == [], cell
        assert got['masters'] == [], cell  # in float32, where the weights are bfloat16
        assert got['trained'] == ['head.bias', 'head.weight', 'norm.bias', 'norm.weight'], cell
        assert got['statistics'] == 'torch.float32', cell
        # 320 draws: the standard deviation of theirs is 0.01 / sqrt(640) = 4 %; four times that.
        assert got['std'] == pytest.approx(0.01, rel=0.16), cell
        assert got['start'] == [0, 0.0, 0], cell
        assert got['moved'], cell
        assert 'holds no optimizer' in got['refused'], cell


@pytest.mark.ranks
@pytest.mark.slow
def test_the_program_evaluates_and_trains_with_both_files(tmp_path):
    data = write_folder(tmp_path / 'data', classes=5, train=20, val=15, side=28)
    source = tiny_model()
    backbone_file(tmp_path, source)
    head_file(tmp_path, source)
    config = heading.program_config(str(data), str(tmp_path))
    right = sum(
        int((source(x).argmax(1) == y).sum()) for x, y, *_ in build_loaders(config, 0, 1).val
    )
    (evaluated, trained, resumed), _ = run_ranks(
        heading.evaluate_and_train, 2, tmp_path, data=data, root=tmp_path
    )
    assert evaluated == pytest.approx(100 * right / 15)
    assert resumed >= trained
    log = (tmp_path / 'program' / 'log_rank0.txt').read_text()
    assert f'loaded the head of {tmp_path}/head.pth, which has no optimizer' in log
    assert 'resuming from' in log.partition('which has no optimizer')[2]
    assert 'is random' not in log
