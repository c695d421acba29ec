"""Learning rates, parameter groups and schedules: what each tensor is really trained with."""

import logging
import math

import pytest
import timm
import timm.optim
import torch
from torch import nn

from internvl_ds.errors import ConfigError
from internvl_ds.train.model import build_model
from internvl_ds.train.optim import (
    accumulation_steps,
    build_optimizer,
    build_scheduler,
    param_groups,
    scaled_lrs,
    told_lrs,
    updates_per_epoch,
)
from tests.harness.training import small_config

# A cosine's height after the warm-up of 10 of 50 micro-batches.
FALLEN = 0.5 * (1 + math.cos(math.pi / 5))


class Deformable(nn.Module):
    """Names of a deformable convolution's parameters, as InternImage has them."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Linear(2, 3)
        self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(3, 2))
        self.plain = nn.Linear(2, 2)
        self.table = nn.Parameter(torch.zeros(4, 4))

    def no_weight_decay_keywords(self):
        return {'tabl'}

    def lr_decay_keywards(self, ratio):  # InternImage's spelling
        return {'plain': ratio**2}


def by_name(groups, key):
    return {name: group[key] for group in groups for name in group['param_names']}


def lr_of(optimizer):
    return by_name(optimizer.param_groups, 'lr')


def small_model(tmp_path, **values):
    config = small_config(tmp_path, **values)
    torch.manual_seed(0)
    return config, build_model(config)


def test_lrs_grow_with_batch_ranks_and_accumulation(tmp_path):
    config = small_config(
        tmp_path, DATA__BATCH_SIZE=64, TRAIN__BASE_LR=1e-3, TRAIN__WARMUP_LR=1e-6,
        TRAIN__MIN_LR=1e-5, TRAIN__ACCUMULATION_STEPS=2,
    )  # fmt: skip
    assert scaled_lrs(config, 4) == pytest.approx((1e-3, 1e-6, 1e-5))
    assert scaled_lrs(config, 16) == pytest.approx((4e-3, 4e-6, 4e-5))
    assert config.TRAIN.BASE_LR == 1e-3  # a resumed run must not scale what was scaled


@pytest.mark.parametrize(('steps', 'effective', 'updates'), [(0, 1, 10), (1, 1, 10), (4, 4, 3)])
def test_a_short_last_group_is_an_update(tmp_path, steps, effective, updates):
    config = small_config(tmp_path, TRAIN__ACCUMULATION_STEPS=steps)
    assert accumulation_steps(config) == effective
    assert updates_per_epoch(config, 10) == updates


def test_vectors_biases_and_exempt_names_have_no_weight_decay(tmp_path):
    config, model = small_model(tmp_path)
    groups = param_groups(model, config, 1e-3)
    decay = by_name(groups, 'weight_decay')
    # one a tensor, in the model's order: what the original's checkpoints have
    assert [group['params'] for group in groups] == [[p] for p in model.parameters()]
    assert decay['blocks.0.attn.qkv.weight'] == 0.05
    for name in ('blocks.0.attn.qkv.bias', 'norm.weight', 'pos_embed', 'cls_token'):
        assert decay[name] == 0.0
    assert set(decay) == {name for name, _ in model.named_parameters()}


def test_names_stand_beside_their_own_tensors(tmp_path):
    config, model = small_model(tmp_path, TRAIN__LR_LAYER_DECAY=True)
    parameters = dict(model.named_parameters())
    for group in build_optimizer(config, model, 1e-3).param_groups:
        assert len(group['params']) == len(group['param_names'])
        for name, parameter in zip(group['param_names'], group['params'], strict=True):
            assert parameters[name] is parameter


def test_frozen_parameters_are_not_given_to_the_optimizer(tmp_path):
    config, model = small_model(tmp_path, TRAIN__OPTIMIZER__FREEZE_BACKBONE=True)
    groups = param_groups(model, config, 1e-3)
    assert sorted(by_name(groups, 'lr')) == ['head.bias', 'head.weight']


def test_layer_decay_scales_the_top_of_the_schedule_only(tmp_path):
    config, model = small_model(
        tmp_path, DATA__BATCH_SIZE=512, TRAIN__LR_LAYER_DECAY=True,
        TRAIN__LR_LAYER_DECAY_RATIO=0.5, TRAIN__BASE_LR=1e-2, TRAIN__WARMUP_LR=1e-3,
        TRAIN__MIN_LR=1e-4, TRAIN__EPOCHS=10, TRAIN__WARMUP_EPOCHS=2,
    )  # fmt: skip
    lrs = scaled_lrs(config, 1)
    optimizer = build_optimizer(config, model, lrs.base)
    # embedding, two blocks, then norm and head: depth 0 .. 3
    scale = {'patch_embed.proj.weight': 1 / 8, 'blocks.1.mlp.fc1.weight': 1 / 2, 'head.weight': 1}
    for name, factor in scale.items():
        assert lr_of(optimizer)[name] == pytest.approx(1e-2 * factor), 'without any scheduler'
    scheduler = build_scheduler(config, optimizer, 5, lrs)
    for count, share in ((0, 0), (5, 0.5), (10, 1), (50, 0)):
        scheduler.step_update(count)
        for name, factor in scale.items():
            top = 1e-2 * factor if count < 10 else 1e-4 + (1e-2 * factor - 1e-4) * FALLEN
            foot = 1e-3 if count < 10 else 1e-4
            expected = foot + (top - foot) * share
            assert lr_of(optimizer)[name] == pytest.approx(expected), (count, name)


FAMILIES = [
    'beit_base_patch16_224', 'coatnet_0_224', 'convnext_atto', 'deit_tiny_distilled_patch16_224',
    'densenet121', 'efficientnet_b0', 'eva02_tiny_patch14_224', 'levit_128s', 'mixer_s32_224',
    'mobilenetv3_small_050', 'regnety_002', 'resnet18', 'swin_tiny_patch4_window7_224',
    'vit_tiny_patch16_224', 'xcit_nano_12_p16_224',
]  # fmt: skip


@pytest.mark.parametrize('name', FAMILIES)
def test_layers_of_a_family_are_timms_own(tmp_path, name):
    config = small_config(
        tmp_path, TRAIN__LR_LAYER_DECAY=True, TRAIN__LR_LAYER_DECAY_RATIO=0.75,
        TRAIN__WEIGHT_DECAY=0.1,
    )  # fmt: skip
    with torch.device('meta'):
        model = timm.create_model(name)
    exempt = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    theirs = timm.optim.param_groups_layer_decay(
        model, weight_decay=0.1, no_weight_decay_list=exempt, layer_decay=0.75
    )
    expected = {p: (g['lr_scale'], g['weight_decay']) for g in theirs for p in g['params']}
    groups = param_groups(model, config, 1.0)
    got = {p: (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    assert got == expected
    assert len({lr for lr, _ in got.values()}) > 3


def test_a_family_without_layers_is_refused_by_name(tmp_path):
    config = small_config(tmp_path, TRAIN__LR_LAYER_DECAY=True)
    with torch.device('meta'):
        model = timm.create_model('poolformer_s12')
    with pytest.raises(ConfigError, match=r"MetaFormer has neither .* nor timm's group_matcher"):
        param_groups(model, config, 1.0)


def test_deformable_parameters_and_the_model_s_own_tables(tmp_path):
    config = small_config(
        tmp_path, TRAIN__OPTIMIZER__DCN_LR_MUL=0.1, TRAIN__LR_LAYER_DECAY=True,
        TRAIN__LR_LAYER_DECAY_RATIO=0.5,
    )  # fmt: skip
    groups = param_groups(Deformable(), config, 1.0)
    lr, decay = by_name(groups, 'lr'), by_name(groups, 'weight_decay')
    assert lr['offset.weight'] == lr['center_feature_scale_proj_weight'] == pytest.approx(0.1)
    assert lr['plain.weight'] == pytest.approx(0.25)
    assert lr['table'] == 1.0
    assert decay['table'] == 0.0
    assert decay['plain.weight'] == 0.05


def test_without_layer_decay_the_multiplier_is_not_used_and_a_warning_says_so(tmp_path, caplog):
    config = small_config(tmp_path, TRAIN__OPTIMIZER__DCN_LR_MUL=0.1)
    with caplog.at_level(logging.WARNING):
        lr = by_name(param_groups(Deformable(), config, 1.0), 'lr')
    assert set(lr.values()) == {1.0}
    assert 'DCN_LR_MUL 0.1 is not used: as in the original it takes TRAIN.LR_LAYER_D' in caplog.text


def test_a_model_that_does_not_say_how_deep_its_parameters_are(tmp_path):
    config = small_config(tmp_path, TRAIN__LR_LAYER_DECAY=True)
    with pytest.raises(ConfigError, match=r'LR_LAYER_DECAY True: Linear has neither lr_decay_keyw'):
        param_groups(nn.Linear(2, 2), config, 1.0)


def test_the_log_says_what_the_batch_makes_of_the_learning_rates(tmp_path):
    config = small_config(
        tmp_path, DATA__BATCH_SIZE=64, TRAIN__BASE_LR=1e-3, TRAIN__WARMUP_LR=1e-6,
        TRAIN__MIN_LR=1e-5, TRAIN__ACCUMULATION_STEPS=2,
    )  # fmt: skip
    assert told_lrs(config, 16, scaled_lrs(config, 16)) == (
        'learning rates are for 512 images; an update has 2048 (DATA.BATCH_SIZE 64 x 16 ranks x 2 '
        'micro-batches), so they are times 4: TRAIN.BASE_LR 0.001 -> 0.004, TRAIN.WARMUP_LR 1e-06 '
        '-> 4e-06, TRAIN.MIN_LR 1e-05 -> 4e-05'
    )


def test_adamw_takes_its_settings(tmp_path):
    config, model = small_model(
        tmp_path, TRAIN__OPTIMIZER__BETAS=[0.8, 0.9], TRAIN__OPTIMIZER__EPS=1e-6
    )
    optimizer = build_optimizer(config, model, 3e-3)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group['lr'], group['betas'], group['eps']) == (3e-3, (0.8, 0.9), 1e-6)


def test_sgd_is_nesterov_with_the_configured_momentum(tmp_path):
    config, model = small_model(
        tmp_path, TRAIN__OPTIMIZER__NAME='sgd', TRAIN__OPTIMIZER__MOMENTUM=0.7
    )
    groups = build_optimizer(config, model, 0.1).param_groups
    assert {(g['momentum'], g['nesterov']) for g in groups} == {(0.7, True)}
    assert {g['weight_decay'] for g in groups} == {0.0, 0.05}


def test_linear_probing_sgd_has_no_nesterov_and_the_decay_of_the_original(tmp_path):
    """The original gives SGD a decay of 0, and its groups, whose own decay goes before."""
    config, model = small_model(
        tmp_path, TRAIN__OPTIMIZER__NAME='sgd_linear_probing', TRAIN__WEIGHT_DECAY=0.03
    )
    groups = build_optimizer(config, model, 0.1).param_groups
    assert {(g['momentum'], g['nesterov']) for g in groups} == {(0.9, False)}
    assert {g['weight_decay'] for g in groups} == {0.0, 0.03}


def test_other_optimizers_come_from_timm(tmp_path):
    config, model = small_model(tmp_path, TRAIN__OPTIMIZER__NAME='lamb')
    optimizer = build_optimizer(config, model, 1e-3)
    assert type(optimizer).__name__ == 'Lamb'
    assert set(lr_of(optimizer)) == {name for name, _ in model.named_parameters()}
    config.TRAIN.OPTIMIZER.NAME = 'adamm'
    with pytest.raises(ConfigError, match=r"TRAIN\.OPTIMIZER\.NAME 'adamm'"):
        build_optimizer(config, model, 1e-3)


def lrs_of_schedule(tmp_path, name, updates, **values):
    config, model = small_model(
        tmp_path, DATA__BATCH_SIZE=512, TRAIN__BASE_LR=1.0, TRAIN__WARMUP_LR=0.2,
        TRAIN__MIN_LR=0.05, TRAIN__EPOCHS=10, TRAIN__WARMUP_EPOCHS=2,
        TRAIN__LR_SCHEDULER__NAME=name, **values,
    )  # fmt: skip
    lrs = scaled_lrs(config, 1)
    optimizer = build_optimizer(config, model, lrs.base)
    scheduler = build_scheduler(config, optimizer, 10, lrs)
    seen = []
    for count in updates:
        scheduler.step_update(count)
        assert len(set(lr_of(optimizer).values())) == 1
        seen.append(optimizer.param_groups[0]['lr'])
    return seen


def test_cosine_warms_up_then_follows_the_whole_run_s_cosine(tmp_path):
    # at 20 of 100 updates the cosine, counted from the first update, has begun to fall
    expected = [0.2, 0.6, 0.05 + 0.95 * 0.5 * (1 + 0.8090169943749475), 0.525, 0.05]
    seen = lrs_of_schedule(tmp_path, 'cosine', [0, 10, 20, 50, 100])
    assert seen == pytest.approx(expected)


def test_linear_falls_to_one_percent_at_the_last_update(tmp_path):
    seen = lrs_of_schedule(tmp_path, 'linear', [0, 10, 20, 60, 99, 100])
    assert seen == pytest.approx([0.2, 0.6, 1.0, 0.505, 0.01 + 0.99 / 80, 0.01])


def test_linear_is_relative_to_each_layer_s_own_lr(tmp_path):
    config, model = small_model(
        tmp_path, DATA__BATCH_SIZE=512, TRAIN__BASE_LR=1.0, TRAIN__EPOCHS=10,
        TRAIN__WARMUP_EPOCHS=0, TRAIN__LR_SCHEDULER__NAME='linear', TRAIN__LR_LAYER_DECAY=True,
        TRAIN__LR_LAYER_DECAY_RATIO=0.5,
    )  # fmt: skip
    optimizer = build_optimizer(config, model, 1.0)
    before = lr_of(optimizer)
    build_scheduler(config, optimizer, 10, scaled_lrs(config, 1)).step_update(100)
    assert len(set(before.values())) == 4
    assert lr_of(optimizer) == pytest.approx({n: 0.01 * lr for n, lr in before.items()})


def test_step_falls_every_decay_epochs(tmp_path):
    seen = lrs_of_schedule(
        tmp_path, 'step', [20, 49, 50, 80], TRAIN__LR_SCHEDULER__DECAY_EPOCHS=3,
        TRAIN__LR_SCHEDULER__DECAY_RATE=0.5,
    )  # fmt: skip
    assert seen == pytest.approx([1.0, 1.0, 0.5, 0.25])


def test_an_unknown_schedule_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"TRAIN\.LR_SCHEDULER\.NAME is 'cosin'"):
        lrs_of_schedule(tmp_path, 'cosin', [0])
