"""The one list of what a PyTorch file may name, and the form in which enums are written."""

import enum
import io
import pickle
import pickletools
from collections import OrderedDict

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from yacs.config import CfgNode

from internvl_ds.checkpoint.formats import outline
from internvl_ds.checkpoint.formats.allowed import (
    PortablePickle,
    _enum_member,
    allowed_globals,
    reason_of,
    refused_class,
)


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def read(value):
    file = io.BytesIO()
    torch.save({'value': value}, file)
    file.seek(0)
    with torch.serialization.safe_globals(allowed_globals()):
        return torch.load(file, weights_only=True)['value']


def test_the_lists_are_these_and_no_others():
    """A longer list must be meant: whatever stands there, a file may call."""
    allowed = [entry if isinstance(entry, tuple) else (entry, None) for entry in allowed_globals()]
    assert {(f'{what.__module__}.{what.__qualname__}', name) for what, name in allowed} == {
        ('deepspeed.runtime.fp16.loss_scaler.LossScaler', None),
        ('deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler', None),
        ('deepspeed.utils.tensor_fragment.fragment_address', None),
        ('deepspeed.runtime.zero.config.ZeroStageEnum', None),
        (f'{_enum_member.__module__}._enum_member', 'builtins.getattr'),
        ('argparse.Namespace', None),
        ('collections.OrderedDict', 'yacs.config.CfgNode'),
    }
    assert set(outline._KNOWN) == {
        ('torch._utils', '_rebuild_tensor_v2'),
        ('torch._utils', '_rebuild_parameter'),
        ('torch._tensor', '_rebuild_from_type_v2'),
        ('torch', 'Tensor'),
        ('torch', 'Size'),
        ('collections', 'OrderedDict'),
        ('__builtin__', 'set'),
        ('deepspeed.runtime.zero.config', 'ZeroStageEnum'),
        ('deepspeed.runtime.fp16.loss_scaler', 'LossScaler'),
        ('deepspeed.runtime.fp16.loss_scaler', 'DynamicLossScaler'),
        ('deepspeed.utils.tensor_fragment', 'fragment_address'),
    }


@pytest.mark.parametrize(
    ('module', 'name'),
    [('builtins', 'getattr'), ('builtins', 'eval'), ('os', 'system'), ('torch', 'load')],
)
def test_the_outlines_unpickler_knows_nothing_else(module, name):
    with pytest.raises((KeyError, pickle.UnpicklingError)):
        outline._Unpickler(io.BytesIO()).find_class(module, name)


def test_a_member_of_deepspeeds_enum_as_python_3_11_2_pickles_it_is_read():
    assert read(Call(getattr, ZeroStageEnum, 'gradients')) is ZeroStageEnum.gradients


@pytest.mark.parametrize(
    ('owner', 'name'),
    [
        (ZeroStageEnum, 'mro'),
        (ZeroStageEnum, '__class__'),
        (ZeroStageEnum, 2),
        (torch.nn.Linear, 'forward'),
        ([1], 'append'),
        ('text', 'join'),
        (torch.ones(3), 'backward'),
        (OrderedDict, 'fromkeys'),
        (torch.ones(3).numpy().dtype, 'type'),
    ],
    ids=str,
)
def test_getattr_of_anything_else_is_refused(owner, name):
    with pytest.raises(pickle.UnpicklingError) as caught:
        read(Call(getattr, owner, name))
    reason = refused_class(caught.value) or reason_of(caught.value)
    assert reason
    assert '\n' not in reason


def test_the_class_of_a_refused_object_is_named_in_one_line():
    with pytest.raises(pickle.UnpicklingError) as caught:
        read(Call(io.StringIO, 'text'))
    assert refused_class(caught.value) == '_io.StringIO'


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('only this\n', 'only this'),
        ('torch advises\nthis.\n\nthe cause,\nin words\n\nmore advice', 'the cause, in words'),
    ],
)
def test_a_reason_is_the_cause_in_one_line_without_torchs_advice(text, reason):
    assert reason_of(pickle.UnpicklingError(text)) == reason


def test_a_config_is_read_as_plain_data():
    assert type(read(CfgNode({'A': 1}))) is OrderedDict


def test_enums_are_written_alike_under_every_python(monkeypatch):
    """Python 3.11.0 to 3.11.3 would write a call of getattr (cpython's issue 96843)."""
    by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(enum.Enum, '__reduce_ex__', by_name)
    file = io.BytesIO()
    torch.save({'stage': ZeroStageEnum.weights}, file, pickle_module=PortablePickle)
    file.seek(0)
    stream = torch.PyTorchFileReader(file).get_record('data.pkl')
    names = {value for opcode, value, _ in pickletools.genops(stream) if opcode.name == 'GLOBAL'}
    assert names == {'deepspeed.runtime.zero.config ZeroStageEnum'}
    file.seek(0)
    with torch.serialization.safe_globals(allowed_globals()):
        assert torch.load(file, weights_only=True) == {'stage': ZeroStageEnum.weights}
