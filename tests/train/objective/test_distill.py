"""TRAIN.DISTILL: an epoch with a teacher beside timm's own task, and what is refused."""

import json
import logging

import pytest
import timm
import torch

from internvl_ds.checkpoint.formats.compare import contents_of
from internvl_ds.errors import ConfigError, PretrainedError
from internvl_ds.train.objective.distill import build_teacher
from tests.harness import training
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config, write_folder
from tests.train.objective.following import follow_plain_loop, require_same_epoch

TEACHER = 'test_efficientnet'  # with batch norms, and another mean of images than the student


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('images'), classes=3, train=29, val=7)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    torch.manual_seed(3)
    model = timm.create_model(TEACHER, num_classes=3)
    for name, tensor in model.state_dict().items():
        if name.endswith('running_mean'):
            tensor.normal_(std=0.1)
        elif tensor.dim() > 1:
            tensor *= 3
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save(model.state_dict(), path)
    return path


def distil(weights, **more):
    return {
        'TRAIN__DISTILL__TEACHER': TEACHER, 'TRAIN__DISTILL__PRETRAINED': str(weights),
        **{f'TRAIN__DISTILL__{key}': value for key, value in more.items()},
    }  # fmt: skip


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ('stage', 'more'),
    [
        (0, {'ALPHA': 0.7, 'TEMPERATURE': 3.0}),
        (3, {'ALPHA': 0.7, 'TEMPERATURE': 3.0}),
        (3, {'ALPHA': 0.4, 'TYPE': 'hard'}),
    ],
)
def test_an_epoch_is_that_of_a_plain_loop(tmp_path, data, weights, stage, more):
    half = (0.5, 0.5, 0.5)  # what timm's task takes for the student's
    opts = {**distil(weights, **more), 'AUG__MEAN': half, 'AUG__STD': half}
    for result in run_ranks(
        follow_plain_loop, 2, tmp_path, data=str(data), output=str(tmp_path / 'out'), stage=stage,
        opts=opts,
    ):  # fmt: skip
        require_same_epoch(result)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(('level', 'stage'), [('O1', 1), ('O2', 3)])
def test_a_resumed_run_loads_its_teacher_again(tmp_path, data, weights, level, stage):
    values = {**distil(weights), 'TRAIN__EPOCHS': 2, 'TRAIN__WARMUP_EPOCHS': 0}
    cfg = tmp_path / 'small.yaml'
    cfg.write_text(small_config(data, DATA__BATCH_SIZE=2, SAVE_CKPT_NUM=2, **values).dump())
    ds_config = tmp_path / 'ds.json'
    ds_config.write_text(json.dumps({'zero_optimization': {'stage': stage}}))
    opts = ['AMP_OPT_LEVEL', level, 'AMP_TYPE', 'bfloat16']

    def train(output, *more):
        return run_ranks(
            training.train_on_ranks, 2, tmp_path, cfg=str(cfg), output=str(tmp_path / output),
            opts=[*opts, *more], ds_config=str(ds_config),
        )[0]['metrics']  # fmt: skip

    def timeless(record):
        return {k: v for k, v in record.items() if k not in ('images_per_s', 'seconds')}

    whole = train('whole')
    tag = tmp_path / 'whole' / 'small' / 'ckpt_epoch_0'
    assert not any('bn1' in name for name in contents_of(tag).tensors)  # the teacher's
    (resumed,) = train('resumed', 'MODEL.RESUME', str(tag))
    assert timeless(resumed) == timeless(whole[1])


def test_a_teacher_of_other_classes_is_refused(tmp_path, weights):
    config = small_config(tmp_path, MODEL__NUM_CLASSES=5, **distil(weights))
    with pytest.raises(PretrainedError, match=f"DISTILL.TEACHER '{TEACHER}': .*3 classes in the"):
        build_teacher(config, logging.getLogger('test'))
    headless = {n: t for n, t in torch.load(weights).items() if 'classifier' not in n}
    torch.save(headless, tmp_path / 'headless.pth')
    config.TRAIN.DISTILL.PRETRAINED = str(tmp_path / 'headless.pth')
    with pytest.raises(ConfigError, match=r'random weights: .* has no classifier.weight, .* 5'):
        build_teacher(config, logging.getLogger('test'))
    config.TRAIN.DISTILL.PRETRAINED = str(weights)
    config.MODEL.NUM_CLASSES = 3
    teacher = build_teacher(config, logging.getLogger('test'))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert config.MODEL.NAME == 'vit_tiny_patch16_224'  # the student's
