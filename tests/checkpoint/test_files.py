"""load_checkpoint and load_ema_checkpoint of the original's files, in EVAL_MODE. No processes."""

import logging

import pytest
import torch
from timm.utils import ModelEmaV3

from internvl_ds import load_checkpoint, load_ema_checkpoint
from internvl_ds.errors import CheckpointError, CheckpointMismatch
from tests.harness.model import make_config, make_model

logger = logging.getLogger('test')


def _load(path, model=None):
    config = make_config(EVAL_MODE=True, MODEL__RESUME=str(path))
    model = model or make_model(1)
    return load_checkpoint(config, model, None, None, None, logger), model


@pytest.fixture
def original(tmp_path):
    """A file as the original writes it, its yacs config included."""
    model, average = make_model(2), make_model(3)
    torch.save(
        {
            'model': model.state_dict(),
            'optimizer': torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
            'lr_scheduler': {'t_initial': 10},
            'max_accuracy': 71.5,
            'epoch': 4,
            'config': make_config(),
            'model_ema': average.state_dict(),
            'max_accuracy_ema': 72.5,
            'ema_decay': 0.99,
        },
        tmp_path / 'ckpt_epoch_4.pth',
    )
    return tmp_path / 'ckpt_epoch_4.pth', model, average


def _same(a, b):
    return all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def test_an_original_file_evaluates(original):
    path, saved, _ = original
    accuracy, model = _load(path)
    assert accuracy == 71.5
    assert _same(saved, model)


def test_the_average_of_an_original_file(original):
    path, _, average = original
    config = make_config(EVAL_MODE=True, MODEL__RESUME=str(path))
    ema = ModelEmaV3(make_model(1), decay=0.5)
    assert load_ema_checkpoint(config, ema, logger) == 72.5
    assert _same(average, ema.module)
    assert ema.decay == 0.99


@pytest.mark.parametrize('key', ['module', 'state_dict', None])
def test_other_files_of_weights(tmp_path, key):
    saved = make_model(2)
    state = saved.state_dict()
    accuracy = {'max_accuracy': torch.tensor(60.0)} if key else {}
    torch.save({key: state, 'epoch': 3, **accuracy} if key else state, tmp_path / 'w.pth')
    accuracy, model = _load(tmp_path / 'w.pth')
    assert accuracy == (60.0 if key else 0.0)
    assert _same(saved, model)


def test_what_is_no_state_dict_is_named(tmp_path):
    torch.save({'epoch': 3, 'weights': make_model().state_dict()}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointMismatch, match="w.pth: 'epoch' is a int, not a tensor"):
        _load(tmp_path / 'w.pth')
    (tmp_path / 'broken.pth').write_bytes(b'PK\x03\x04 and no more')
    with pytest.raises(CheckpointError, match=r'broken\.pth: cannot be read'):
        _load(tmp_path / 'broken.pth')


def test_of_an_output_directory_of_the_originals_the_newest_file_is_taken(original):
    path, saved, _ = original
    accuracy, model = _load(path.parent)
    assert accuracy == 71.5
    assert _same(saved, model)
