"""Building the configured model, and freezing what is not to be trained."""

import logging
from argparse import Namespace

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.tree import default_config, find_config_file, get_config
from internvl_ds.errors import ConfigError
from internvl_ds.train.model import build_model, classifier_of, input_dtype, set_train_mode
from tests.harness.training import Brightness, small_config


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


class Levels(nn.Module):
    """Parameter names as in the original's hierarchical models; no classifier head."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList(nn.Linear(2, 2) for _ in range(11))


def levels(config):
    return Levels()


def checkpointed(asked):
    model = Levels()
    model.with_cp = asked
    return model


def by_attribute(config):
    return checkpointed(config.TRAIN.USE_CHECKPOINT)


def by_item(config):
    return checkpointed(config['TRAIN']['USE_CHECKPOINT'])


def by_get(config):
    return checkpointed(config.TRAIN.get('USE_CHECKPOINT'))


def by_clone(config):
    return checkpointed(config.clone().TRAIN.USE_CHECKPOINT)


def no_module(config):
    return 'a string'


def test_a_timm_model_takes_size_classes_and_kwargs(tmp_path):
    model = build_model(small_config(tmp_path))
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert len(model.blocks) == 2


def test_the_same_seed_builds_the_same_weights(tmp_path):
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(build_model(small_config(tmp_path)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_drop_path_reaches_the_model(tmp_path):
    model = build_model(small_config(tmp_path, MODEL__DROP_PATH_RATE=0.2))
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_a_model_that_has_no_image_size_is_built_without(tmp_path):
    model = build_model(small_config(tmp_path, MODEL__NAME='resnet10t', MODEL__KWARGS={}))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_a_setting_that_the_model_lacks_is_said(tmp_path, caplog):
    logging.getLogger('internvl_ds').propagate = True
    config = small_config(
        tmp_path, MODEL__NAME='vgg11', MODEL__KWARGS={}, MODEL__DROP_PATH_RATE=0.1
    )
    with torch.device('meta'):
        build_model(config)
    assert 'MODEL.DROP_PATH_RATE 0.1 is not used' in caplog.text


def test_a_factory_is_called_with_the_config(tmp_path):
    config = small_config(tmp_path, MODEL__FACTORY='tests.harness.training:brightness')
    model = build_model(config)
    assert isinstance(model, Brightness)
    assert model.head.out_features == 3


@pytest.mark.parametrize(
    ('factory', 'message'),
    [
        ('tests.harness.training.brightness', 'not of the form'),
        ('no_such_package:build', 'no_such_package'),
        ('tests.harness.training:no_such_function', 'has no function no_such_function'),
        ('tests.train.test_model:no_module', 'returned a str'),
    ],
)
def test_a_factory_that_cannot_be_used_is_named(tmp_path, factory, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(small_config(tmp_path, MODEL__FACTORY=factory))
    assert factory in str(caught.value)


def test_an_unknown_type_says_what_there_is():
    config = default_config()
    config.MODEL.TYPE = 'intern_vit'
    with pytest.raises(ConfigError, match=r"'intern_vit'.*'intern_vit_6b'.*'timm'.*MODEL\.FACTORY"):
        build_model(config)


def test_an_unknown_timm_name_suggests_near_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"'vit_tiny_patch16_244'.*vit_tiny_patch16_224"):
        build_model(small_config(tmp_path, MODEL__NAME='vit_tiny_patch16_244'))


def test_a_keyword_that_the_model_refuses_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r'MODEL\.KWARGS depht=2'):
        build_model(small_config(tmp_path, MODEL__KWARGS={'depht': 2}))


def test_linear_probing_trains_the_head_only(tmp_path):
    model = build_model(small_config(tmp_path, TRAIN__OPTIMIZER__FREEZE_BACKBONE=True))
    assert trained(model) == ['head.weight', 'head.bias']


def test_a_frozen_backbone_stays_in_eval_mode(tmp_path):
    config = small_config(
        tmp_path, MODEL__NAME='resnet10t', MODEL__KWARGS={}, TRAIN__OPTIMIZER__FREEZE_BACKBONE=True
    )
    model = build_model(config)
    statistics = model.bn1.running_mean.clone()
    set_train_mode(model, model, True)
    model(torch.randn(4, 3, 32, 32))
    assert torch.equal(model.bn1.running_mean, statistics)
    assert classifier_of(model).training
    set_train_mode(model, model, None)
    assert model.bn1.training


def test_numbers_freeze_the_levels_of_that_number_alone(tmp_path):
    config = small_config(
        tmp_path,
        MODEL__FACTORY='tests.train.test_model:levels',
        TRAIN__OPTIMIZER__FREEZE_BACKBONE=[0, 1],
    )
    assert trained(build_model(config)) == [
        f'levels.{i}.{kind}' for i in range(2, 11) for kind in ('weight', 'bias')
    ]


@pytest.mark.parametrize(
    ('freeze', 'message'),
    [([99], 'levels.99'), (list(range(11)), 'no parameter to train'), (True, 'Levels')],
)
def test_freezing_nothing_or_everything_is_an_error(tmp_path, freeze, message):
    config = small_config(
        tmp_path,
        MODEL__FACTORY='tests.train.test_model:levels',
        TRAIN__OPTIMIZER__FREEZE_BACKBONE=freeze,
    )
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(config)
    assert 'FREEZE_BACKBONE' in str(caught.value)


def test_activation_checkpointing_is_switched_on_or_refused(tmp_path):
    config = small_config(tmp_path, TRAIN__USE_CHECKPOINT=True)
    assert build_model(config).grad_checkpointing
    config.MODEL.FACTORY = 'tests.harness.training:brightness'
    with pytest.raises(ConfigError, match=r'TRAIN\.USE_CHECKPOINT True: Brightness'):
        build_model(config)
    for name in ('attribute', 'item', 'get', 'clone'):
        config.MODEL.FACTORY = f'tests.train.test_model:by_{name}'
        assert build_model(config).with_cp
    assert type(config.TRAIN) is CfgNode
    assert 'reads' not in vars(config.TRAIN)


def test_images_take_the_dtype_of_the_weights():
    model = nn.Linear(2, 2)
    assert input_dtype(model) == torch.float32
    assert input_dtype(model.to(torch.bfloat16)) == torch.bfloat16


@pytest.mark.parametrize(
    ('name', 'parameters', 'trained_parameters'),
    [
        ('digits_quickstart', (4e5, 6e5), None),
        ('vit_base_patch16_224_finetune', (86e6, 87e6), None),
        ('vit_intern300m_448_linear_probe', (300e6, 310e6), 1024 * 1000 + 1000),
    ],
)
def test_the_configs_that_ship_build_their_models(name, parameters, trained_parameters):
    config = get_config(Namespace(cfg=name))
    with torch.device('meta'):  # the shapes are all that is asked for
        model = build_model(config)
    total = sum(p.numel() for p in model.parameters())
    assert parameters[0] < total < parameters[1]
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert left == (trained_parameters or total)
    assert find_config_file(name).read_text().startswith('#')


@pytest.mark.parametrize(
    ('opts', 'words'),
    [
        ({'MODEL__KWARGS': {'embed_dim': 25, 'num_heads': 2}}, 'AssertionError: dim should be'),
        ({'MODEL__KWARGS': {'depth': 'x'}}, 'failed: TypeError: '),
        ({'MODEL__KWARGS': {'act_layer': 'nope'}}, "KeyError: 'nope'"),
        ({'MODEL__NAME': 'vit_tiny_patch16_224.nope'}, 'RuntimeError: Invalid pretrained tag'),
        ({'MODEL__NAME': 'local-dir:/nowhere'}, 'FileNotFoundError: '),
        ({'MODEL__KWARGS': {'num_classes': 7}}, 'set MODEL.NUM_CLASSES in its place'),
        ({'MODEL__KWARGS': {'pretrained': True}}, 'set MODEL.PRETRAINED in its place'),
    ],
)
def test_what_timm_cannot_build_is_one_line(tmp_path, opts, words):
    with pytest.raises(ConfigError) as caught:
        build_model(small_config(tmp_path, **opts))
    text = str(caught.value)
    assert text.startswith(('MODEL.NAME ', 'MODEL.KWARGS '))
    assert words in text
    assert '\n' not in text
