"""What launch/quickstart.sh runs, under the real deepspeed launcher: train, then resume."""

import json
import re
import sys
from pathlib import Path

import pytest

from internvl_ds.dist.network import free_port
from tests.harness.counts import SOAK
from tests.harness.ranks import run_command

# As launch/quickstart.sh: other CPUs take several times as long in bf16.
BF16 = re.search(r'\b(avx512f|amx_bf16|bf16)\b', Path('/proc/cpuinfo').read_text()) is not None

# The 30 of its YAML, and what it says; fewer where other tests share the two cores.
EPOCHS, ACCURACY = (30, 95) if SOAK else (5, 50)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1300)
def test_the_digits_are_learnt_on_two_ranks_and_a_second_run_resumes(tmp_path):
    digits = [sys.executable, '-m', 'internvl_ds.tools.cli', 'digits', str(tmp_path / 'digits')]
    assert run_command(digits, timeout=60).returncode == 0
    port = str(free_port())
    command = [
        'deepspeed', '--num_gpus', '2', '--no_local_rank', '--master_port', port,
        '--module', 'internvl_ds.train', '--cfg', 'digits_quickstart',
        '--data-path', str(tmp_path / 'digits'), '--output', str(tmp_path / 'out'),
        '--deepspeed_config', 'zero2', *([] if BF16 else ['--amp-opt-level', 'O0']),
    ]  # fmt: skip
    output = tmp_path / 'out' / 'digits_quickstart'

    first = run_command([*command, '--opts', 'TRAIN.EPOCHS', str(EPOCHS)], timeout=900)
    assert first.returncode == 0, first.output[-4000:]
    records = [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]
    assert [record['epoch'] for record in records] == list(range(EPOCHS))
    assert records[-1]['acc1'] >= ACCURACY
    best = max(record['acc1'] for record in records)
    assert f'best top-1 {best:.2f} %' in (output / 'log_rank0.txt').read_text()
    assert {path.name for path in output.glob('ckpt_*')} == {
        f'ckpt_epoch_{EPOCHS - 2}', f'ckpt_epoch_{EPOCHS - 1}', 'ckpt_epoch_best',
        'ckpt_epoch_ema_best',
    }  # fmt: skip
    assert json.loads((output / 'ds_config.json').read_text())['bf16']['enabled'] is BF16
    assert (output / 'curves.png').read_bytes().startswith(b'\x89PNG')

    second = run_command([*command, '--opts', 'TRAIN.EPOCHS', str(EPOCHS + 1)], timeout=300)
    assert second.returncode == 0, second.output[-4000:]
    assert re.search(rf'resuming from \S*/ckpt_epoch_{EPOCHS - 1}\b', second.output)
    lines = (output / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['epoch'] for line in lines] == list(range(EPOCHS + 1))
    assert (output / 'latest').read_text() == f'ckpt_epoch_{EPOCHS}'
