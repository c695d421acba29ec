"""Which device a rank takes, with accelerators that this machine does not have."""

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


def test_more_ranks_than_devices_are_an_error_that_says_what_is_visible(monkeypatch):
    monkeypatch.setattr(device, 'get_accelerator', lambda: Accelerator('cuda', 2))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5')
    words = r'^local rank 2 has no device: this host shows 2 \(CUDA_VISIBLE_DEVICES=4,5\)'
    with pytest.raises(ConfigError, match=words):
        device.take_device(2)
