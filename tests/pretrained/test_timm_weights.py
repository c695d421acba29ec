"""MODEL.PRETRAINED 'timm': the weights of the model's own tag, from a hub on loopback."""

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained.timm_weights import address_of
from tests.checkpoint.sources.test_downloads import cache, hub, server  # noqa: F401

SMALL = {'embed_dim': 24, 'depth': 1, 'num_heads': 2}
TAG = 'vit_tiny_patch16_224.augreg_in21k'

LOADS = f"""
import json, logging, sys, timm
from internvl_ds.config import default_config
from internvl_ds.utils import load_pretrained
logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stdout)
model = timm.create_model({TAG!r}, num_classes=3, **{SMALL!r})
config = default_config()
config.MODEL.PRETRAINED = 'timm'
config.TRAIN.RAND_INIT_FT_HEAD = True
report = load_pretrained(config, model, logging.getLogger('x'))
print('ANSWER', json.dumps([report.path, report.matched, model.norm.weight.tolist()]))
"""


def test_the_tag_of_a_model_comes_from_the_hub_and_then_from_its_cache(server, hub):  # noqa: F811
    source = timm.create_model(TAG, num_classes=21843, **SMALL).state_dict()
    source['norm.weight'] = torch.arange(24.0)
    content = safetensors.torch.save(source)
    hub.add('model.safetensors', content, repository=f'timm/{TAG}')
    expected = [f'hf-hub:timm/{TAG}', 1.0, source['norm.weight'].tolist()]
    assert hub(script=LOADS) == [expected]
    asked = len(server.asked)
    assert hub(script=LOADS, HF_HUB_OFFLINE='1') == [expected]
    assert len(server.asked) == asked


@pytest.mark.parametrize(('settings', 'address'), [
    ({'hf_hub_id': 'timm/a.b'}, 'hf-hub:timm/a.b'),
    ({'hf_hub_id': 'org/a', 'hf_hub_filename': 'x.bin'}, 'hf-hub:org/a:x.bin'),
    ({'url': 'https://x.org/a-01234567.pth'}, 'https://x.org/a-01234567.pth'),
    ({'hf_hub_id': 'timm/a', 'url': 'https://x/a.npz', 'custom_load': True}, 'hf-hub:timm/a'),
])  # fmt: skip
def test_the_address(settings, address):
    model = nn.Linear(2, 2)
    model.pretrained_cfg = {'architecture': 'a', **settings}
    assert address_of(model) == address


def test_a_model_without_weights_is_refused():
    model = timm.create_model('resnet10t', num_classes=2)
    model.pretrained_cfg = {**model.pretrained_cfg, 'hf_hub_id': None, 'url': ''}
    with pytest.raises(PretrainedError, match=r'no weights of resnet10t.*: MODEL.NAME may be one'):
        address_of(model)
    model.pretrained_cfg = {**model.pretrained_cfg, 'url': 'https://a/b.npz', 'custom_load': True}
    with pytest.raises(PretrainedError, match='in a format of their own'):
        address_of(model)
    with pytest.raises(PretrainedError, match="'timm', and Linear is no model of timm"):
        address_of(nn.Linear(2, 2))
