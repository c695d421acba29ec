"""Which device a rank takes, with accelerators that this machine does not have."""

import os
import subprocess
import sys

import pytest

from internvl_ds.dist import device
from internvl_ds.errors import ConfigError


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
        subprocess.run([sys.executable, '-c', code], check=True, timeout=60)
    assert seen == ([] if name == 'cpu' else [after])  # set before the device is touched


def test_more_ranks_than_devices_are_an_error_that_says_what_is_visible(monkeypatch):
    monkeypatch.setattr(device, 'get_accelerator', lambda: Accelerator('cuda', 2))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5')
    words = r'^local rank 2 has no device: this host shows 2 \(CUDA_VISIBLE_DEVICES=4,5\)'
    with pytest.raises(ConfigError, match=words):
        device.take_device(2)
