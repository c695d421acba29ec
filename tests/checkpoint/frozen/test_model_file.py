"""Model states taken apart and put together: pure."""

from collections import OrderedDict

import pytest
import torch

from internvl_ds.checkpoint.frozen.model_file import KEY, join, split

SHAPES = {'a': (2, 3), 'frozen.x': (4,), 'seen': (), 'frozen.y': (5, 2), 'again': (4,)}


def state(stage):
    """What DeepSpeed writes at a stage; 'again' is a further name of 'frozen.x'."""
    tensors = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    tensors['again'] = tensors['frozen.x']
    module = OrderedDict(tensors)
    module._metadata = {'': {'version': 1}}
    frozen = {name: tensors[name] for name in ('frozen.x', 'frozen.y')}
    if stage == 3:
        module.update({name: torch.empty(0) for name in SHAPES if name != 'seen'})
        frozen = {name: tensor.reshape(-1)[:2].clone() for name, tensor in frozen.items()}
    return {
        'module': module,
        'global_steps': 3,
        'frozen_param_shapes': {n: torch.Size(SHAPES[n]) for n in frozen} if stage > 1 else None,
        'frozen_param_fragments': frozen if stage > 1 else None,
    }


@pytest.mark.parametrize('stage', [0, 2, 3])
def test_what_is_taken_apart_is_put_together_as_it_was(stage):
    before = state(stage)
    left, out = split(before, {'frozen.x', 'frozen.y'}, {'again': 'frozen.x'}, sharded=stage == 3)
    assert list(out) == ['frozen.x', 'frozen.y']
    assert list(left['module']) == ['a', 'seen']
    # As exclude_frozen_parameters has it, for DeepSpeed's own readers.
    assert left['frozen_param_fragments'] is None
    assert left['frozen_param_shapes'] == {name: torch.Size(SHAPES[name]) for name in out}
    after = join(left, out)
    assert KEY not in after
    assert list(after['module']) == list(before['module'])
    assert after['module']._metadata == {'': {'version': 1}}
    for part in ('module', 'frozen_param_fragments'):
        for name, tensor in (before[part] or {}).items():
            assert torch.equal(after[part][name], tensor), (part, name)
    assert after['frozen_param_shapes'] == before['frozen_param_shapes']
    assert stage == 3 or after['module']['again'] is after['module']['frozen.x']


@pytest.mark.parametrize('stage', [1, 3])
def test_what_the_file_cannot_hold_stays(stage):
    before = state(stage)
    part = before['frozen_param_fragments' if stage == 3 else 'module']
    part['frozen.y'] = part['frozen.y'].to(torch.complex128)
    left, out = split(before, {'frozen.x', 'frozen.y'}, {'again': 'frozen.x'}, sharded=stage == 3)
    assert list(out) == ['frozen.x']
    after = join(left, out)
    assert list(after['module']) == list(before['module'])
    part = after['frozen_param_fragments' if stage == 3 else 'module']
    assert part['frozen.y'].dtype == torch.complex128
