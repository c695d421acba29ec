"""What fits, by the plan and by what the first trial told of the machine."""

from typing import NamedTuple

from internvl_ds.tools.tune.memory_filter import MemoryLimits

GB = 10**9


class Need(NamedTuple):
    device: int
    host: int


def test_a_gpu_and_its_host_are_two_memories():
    limits = MemoryLimits.of({'device': 'NVIDIA H100', 'device_bytes': 80 * GB,
                              'host_bytes': 100 * GB, 'baseline_bytes': 5 * GB})  # fmt: skip
    assert limits.lacks(Need(80 * GB, 100 * GB)) == ''
    assert limits.lacks(Need(81 * GB, 1)) == (
        "needs 81.0 GB of the device's memory, and 80.0 GB are there"
    )
    assert limits.lacks(Need(1, 120 * GB)) == (
        "needs 120.0 GB of a rank's host memory, and 100.0 GB are there"
    )


def test_on_a_cpu_both_are_one_and_the_program_itself_counts():
    limits = MemoryLimits.of({'device': 'cpu', 'device_bytes': 8 * GB, 'host_bytes': 8 * GB,
                              'baseline_bytes': GB})  # fmt: skip
    assert limits.lacks(Need(4 * GB, 3 * GB)) == ''
    assert limits.lacks(Need(5 * GB, 3 * GB)) == (
        "needs 9.0 GB of a rank's memory, and 8.0 GB are there"
    )
