"""The layers that are a model's classifier."""

import pytest
import timm
import torch
from torch import nn

from internvl_ds.pretrained.classifier import classifier_layers


class Own(nn.Module):
    """A model that knows nothing of timm's attributes."""

    def __init__(self, head):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.head = head


class Asked(Own):
    def get_classifier(self):
        return self.body, self.head


@pytest.mark.parametrize(
    ('name', 'layers'),
    [
        ('test_vit', ('head',)),
        ('test_resnet', ('fc',)),
        ('test_convnext', ('head.fc',)),
        ('dla46x_c', ('fc',)),
        ('caformer_s18', ('head.fc.fc2',)),
        ('deit_tiny_distilled_patch16_224', ('head', 'head_dist')),
        ('volo_d1_224', ('head', 'aux_head')),
        ('crossvit_tiny_240', ('head.0', 'head.1')),
    ],
)
@pytest.mark.parametrize('classes', [3, 0])
def test_of_timms_models(name, layers, classes):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=classes)
    found = classifier_layers(model)
    if classes:
        assert found == layers
    else:
        assert not set(found) & set(layers)


def test_of_a_model_whose_settings_say_nothing():
    with torch.device('meta'):
        model = timm.create_model('test_resnet')
    model.pretrained_cfg = {}
    assert classifier_layers(model) == ('fc',)


def test_of_other_models():
    assert classifier_layers(Own(nn.Linear(2, 3))) == ('head',)
    assert classifier_layers(Own(nn.Sequential(nn.Dropout(), nn.Linear(2, 3)))) == ('head.1',)
    assert classifier_layers(Own(nn.Identity())) == ()
    assert classifier_layers(nn.Linear(2, 3)) == ()
    assert classifier_layers(Asked(nn.Linear(2, 3))) == ('body', 'head')
