"""Which device a rank takes, with accelerators that this machine does not have."""

import importlib
import logging
import os
import subprocess
import sys

import pytest

from internvl_ds.dist import device, process_group
from internvl_ds.dist.group import current_group
from internvl_ds.errors import ConfigError
from internvl_ds.tools.cli import main
from tests.harness.model import make_config


class Accelerator:
    def __init__(self, name, count):
        self.name, self.count, self.current = name, count, None

    def device_name(self):
        return self.name

    def device_count(self):
        return self.count

    def set_device(self, index):
        self.current = index


@pytest.mark.parametrize(
    ('name', 'count', 'local_rank', 'index'),
    [
        ('cuda', 8, 0, 0),
        ('cuda', 8, 7, 7),
        ('cuda', 1, 3, 0),  # each rank sees its own
        ('xpu', 4, 2, 2),
        ('cpu', 1, 3, 3),
    ],
)
def test_a_rank_takes_the_device_of_its_number_or_the_only_one(
    monkeypatch, name, count, local_rank, index
):
    accelerator = Accelerator(name, count)
    monkeypatch.setattr(device, 'get_accelerator', lambda: accelerator)
    assert device.take_device(local_rank) == index
    assert accelerator.current == (None if name == 'cpu' else index)


@pytest.mark.parametrize(
    ('name', 'before', 'after'),
    [
        ('cuda', {}, device._SETTINGS),
        ('cuda', {'PYTORCH_CUDA_ALLOC_CONF': 'max_split_size_mb:64'}, 'max_split_size_mb:64'),
        ('cuda', {'PYTORCH_ALLOC_CONF': 'max_split_size_mb:64'}, None),
        ('cpu', {}, None),
    ],
)
def test_memory_grows_in_segments_unless_the_user_has_said_how(monkeypatch, name, before, after):
    for key in ('PYTORCH_CUDA_ALLOC_CONF', 'PYTORCH_ALLOC_CONF'):
        monkeypatch.delenv(key, raising=False)
    for key, value in before.items():
        monkeypatch.setenv(key, value)
    seen = []
    accelerator = Accelerator(name, 2)
    accelerator.set_device = lambda _: seen.append(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))
    monkeypatch.setattr(device, 'get_accelerator', lambda: accelerator)
    device.take_device(0)
    assert os.environ.pop('PYTORCH_CUDA_ALLOC_CONF', None) == after
    if after == device._SETTINGS:
        assert after.startswith('expandable_segments:True')
        # In another process: torch keeps its settings.
        code = f'import torch; torch._C._accelerator_setAllocatorSettings({after!r})'
        subprocess.run([sys.executable, '-c', code], check=True, timeout=180)
    assert seen == ([] if name == 'cpu' else [after])  # set before the device is touched


def test_page_locked_memory_is_exact_where_torch_can_give_that(monkeypatch):
    for exact_from, large in ((128 << 20, 200 << 20), (None, 256 << 20)):
        monkeypatch.setattr(device, '_EXACT_FROM', exact_from)
        sizes = [device.locked_bytes(n) for n in (0, 4096, 3 << 20, 200 << 20)]
        assert sizes == [0, 4096, 4 << 20, large]


def test_more_ranks_than_devices_are_an_error_that_says_what_is_visible(monkeypatch):
    monkeypatch.setattr(device, 'get_accelerator', lambda: Accelerator('cuda', 2))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5')
    words = r'^local rank 2 has no device: this host shows 2 \(CUDA_VISIBLE_DEVICES=4,5\)'
    with pytest.raises(ConfigError, match=words):
        device.take_device(2)


LAUNCHERS = {
    'torchrun': {'RANK': '6', 'WORLD_SIZE': '8', 'LOCAL_RANK': '2', 'TORCHELASTIC_RUN_ID': 'x'},
    'deepspeed': {'RANK': '6', 'WORLD_SIZE': '8', 'LOCAL_RANK': '2'},
    'srun': {
        'SLURM_PROCID': '6', 'SLURM_NTASKS': '8', 'SLURM_LOCALID': '2', 'SLURM_STEP_ID': '0',
        'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'a,b', 'SLURM_STEP_NUM_TASKS': '8',
    },
}  # fmt: skip


class Joined(Exception):
    """Instead of joining the others."""


@pytest.mark.parametrize('launcher', LAUNCHERS)
@pytest.mark.parametrize(('count', 'index'), [(4, 2), (8, 2), (1, 0)])
def test_the_device_is_set_before_anything_else_and_deepspeed_is_told_its_index(
    monkeypatch, launcher, count, index
):
    calls, accelerator = [], Accelerator('cuda', count)
    for key in [*os.environ]:
        if key.startswith(('SLURM_', 'OMPI_', 'PMI', 'TORCHELASTIC_')):
            monkeypatch.delenv(key)
    for key in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'GLOO_SOCKET_IFNAME'):
        monkeypatch.setenv(key, '')  # to be as it was afterwards
        monkeypatch.delenv(key)
    own = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29500', 'PYTORCH_CUDA_ALLOC_CONF': 'x:1'}
    for key, value in {**LAUNCHERS[launcher], **own}.items():
        monkeypatch.setenv(key, value)

    def join(launch, limit):
        calls.append(['join', launch.rank, os.environ['LOCAL_RANK']])
        raise Joined

    accelerator.set_device = lambda index: calls.append(['set_device', index])
    monkeypatch.setattr(device, 'get_accelerator', lambda: accelerator)
    monkeypatch.setattr(process_group, '_join', join)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.setattr(current_group(), 'hook', None)
    with pytest.raises(Joined):
        process_group.init_distributed()
    assert calls == [['set_device', index], ['join', 6, str(index)]]


@pytest.mark.parametrize('emulates', [True, False])
def test_bf16_that_is_emulated_is_a_warning_of_initialize(monkeypatch, caplog, emulates):
    module = importlib.import_module('internvl_ds.engine.initialize')
    monkeypatch.setattr(device, 'emulates_bf16', lambda name: emulates)
    config = make_config(AMP_OPT_LEVEL='O2', AMP_TYPE='bfloat16')
    with caplog.at_level(logging.WARNING, 'internvl_ds'):
        module._resolve(config, [], None, {}, False)
    assert ('this GPU has no bfloat16' in caplog.text) == emulates


@pytest.mark.parametrize('level', ['O0', 'O2'])
def test_bf16_that_is_emulated_is_a_warning_of_config_check(monkeypatch, capsys, level):
    monkeypatch.setattr(device, 'emulates_bf16', lambda name: True)
    opts = 'AMP_OPT_LEVEL', level, 'AMP_TYPE', 'bfloat16'
    words = 'zero1', '--cfg', 'digits_quickstart', '--world-size', '1', '--opts', *opts
    assert main(['config', 'check', *words]) == 0
    assert ('warning  this GPU has no bfloat16' in capsys.readouterr().out) == (level == 'O2')
