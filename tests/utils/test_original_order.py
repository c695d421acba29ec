"""The two orders of save_checkpoint's arguments: the bound calls, without a save."""

import inspect

import pytest

import internvl_ds
from internvl_ds import ConfigError
from internvl_ds.checkpoint import save
from internvl_ds.utils import save_checkpoint

SHARED = ('config', 3, 'model', 81.5, 'optimizer', 'scheduler', 'scaler', 'logger')
NONE = (None, None, None)


@pytest.fixture(autouse=True)
def saves(monkeypatch):
    """The calls that reach the save, as {argument: value}."""
    calls, signature = [], inspect.signature(save.save_checkpoint)

    def note(*args, **kwargs):
        calls.append(dict(signature.bind(*args, **kwargs).arguments))

    monkeypatch.setattr(save, 'save_checkpoint', note)
    return calls


@pytest.mark.parametrize(
    ('args', 'kwargs', 'wanted'),
    [
        # this package's order
        ((), {}, {}),
        (('ema', 79.0, 0.9, 'best'), {}, {'best': 'best'}),
        (('ema', 79.0, 0.9, None), {}, {'best': None}),
        (('ema', 79.0, 0.9), {'best': 'best', 'step': 4}, {'best': 'best', 'step': 4}),
        # the original's
        (('ema', 79.0, 0.9, *NONE, 'best'), {}, {'best': 'best'}),
        (('ema', 79.0, 0.9, *NONE, None), {}, {'best': None}),
        (('ema', 79.0, 0.9, *NONE), {}, {}),
        (('ema', 79.0, 0.9, None, None), {}, {}),
        (('ema', 79.0, 0.9, *NONE), {'best': 'ema_best'}, {'best': 'ema_best'}),
        (('ema', 79.0, 0.9, None), {'best': 'ema_best'}, {'best': 'ema_best'}),
        (('ema',), {'model_ems': None, 'best': 'best'}, {'best': 'best'}),
        # both at once, and not in contradiction
        (('ema', 79.0, 0.9, 'best'), {'model_ems': None}, {'best': 'best'}),
    ],
)
def test_either_order_reaches_the_save(saves, args, kwargs, wanted):
    save_checkpoint(*SHARED, *args, **kwargs)
    parameters = list(inspect.signature(internvl_ds.save_checkpoint).parameters)
    shared = dict(zip(parameters, (*SHARED, *args[:3]), strict=False))
    assert saves == [{**shared, **wanted}]


@pytest.mark.parametrize(
    ('args', 'kwargs', 'words'),
    [
        (('ema', 1.0, 0.9, 'best', None, None, None), {}, "first is 'best', which is `best`"),
        (('ema', 1.0, 0.9, 'best', 'best'), {}, "pass best='best' by name"),
        (('ema', 1.0, 0.9, 'best'), {'best': 'best'}, 'best is given by name, and by position'),
        (('ema', 1.0, 0.9, *NONE, 'best'), {'best': 'best'}, 'best is given by name, and by pos'),
        (('ema', 1.0, 0.9, None, None), {'model_ems': 1}, 'model_ems is given by name, and by p'),
        (('ema', 1.0, 0.9, *NONE, None, 7), {}, '16 arguments by position; it takes 12, or 15'),
        (('ema', 1.0, 0.9, *NONE, 7), {}, "best is 7; it is a name such as 'best', or None"),
        ((), {'best': True}, 'best is True; it is a name'),
        (('ema', 1.0, 0.9, ['a model']), {}, 'model_ems is a list, and a tag does not keep it'),
        (('ema', 1.0, 0.9, None, 71.0), {}, 'max_accuracy_ems is a float, and a tag does not'),
        ((), {'ems_model_num': 0}, 'ems_model_num is a int, and a tag does not keep it'),
    ],
)
def test_what_is_ambiguous_or_would_be_dropped_is_refused(saves, args, kwargs, words):
    with pytest.raises(ConfigError) as raised:
        save_checkpoint(*SHARED, *args, **kwargs)
    assert words in str(raised.value)
    assert saves == []


def test_the_signature_is_the_missions():
    parameters = inspect.signature(save_checkpoint).parameters.values()
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position[-4:] == ['model_ema', 'max_accuracy_ema', 'ema_decay', 'best']
    assert internvl_ds.save_checkpoint is save_checkpoint


# The original's own arguments, in its order.
ORIGINAL = {
    'auto_resume_helper': 'output_dir',
    'convert_22k_head_to_1k': 'model logger',
    'get_grad_norm': 'parameters norm_type',
    'load_checkpoint': 'config model optimizer lr_scheduler scaler logger',
    'load_ema_checkpoint': 'config model_ema logger',
    'load_pretrained': 'config model logger',
    'reduce_tensor': 'tensor',
    'MyAverageMeter': 'max_len',
    'NativeScalerWithGradNormCount': '',
}


@pytest.mark.parametrize('name', ORIGINAL)
def test_the_other_names_take_the_originals_arguments_in_its_order(name):
    parameters = inspect.signature(getattr(internvl_ds, name)).parameters.values()
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == ORIGINAL[name].split()


def test_the_scaler_is_called_with_the_originals_arguments():
    call = inspect.signature(internvl_ds.NativeScalerWithGradNormCount.__call__).parameters
    wanted = ['self', 'loss', 'optimizer', 'clip_grad', 'parameters', 'create_graph', 'update_grad']
    assert list(call) == wanted
