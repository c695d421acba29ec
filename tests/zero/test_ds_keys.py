"""Each key of a ds_config that is said to train right does: the numbers of plain PyTorch."""

from __future__ import annotations

import math

import pytest

from internvl_ds.config.ds.diagnostics import pointer_of
from internvl_ds.config.ds.fates import RIGHT, fate_of
from internvl_ds.config.ds.schema import installed, walk
from tests.harness.model import OLD_DEEPSPEED, make_model
from tests.harness.plain_loop import reference
from tests.harness.ranks import run_ranks
from tests.zero import ds_keys

# Shown elsewhere, by the test files named; a key stands for those below it.
ELSEWHERE = {
    '/bf16': 'tests/engine/test_grad_scaler.py',
    '/bf16/check_grad_overflow': 'tests/config/ds/test_unsupported.py',
    '/bf16/immediate_grad_update': 'tests/engine/test_grad_scaler.py',
    '/fp16': 'tests/engine/test_grad_scaler.py, tests/engine/test_overflow.py',
    '/checkpoint/tag_validation': 'tests/checkpoint',
    '/comet': 'needs an account', '/wandb': 'needs an account',
    '/tensorboard': 'tests/train/test_train_restart.py',
    '/data_types': 'tests/config/ds/test_unsupported.py, tests/engine/test_accumulation.py',
    '/gradient_accumulation_steps': 'tests/engine/test_accumulation.py',
    '/gradient_clipping': 'tests/engine/test_grad_scaler.py',
    '/managed_gradient_accumulation': 'tests/config/ds/test_unsupported.py',
    '/optimizer': 'tests/engine/test_optimizer_trial.py',
    '/scheduler': 'tests/engine/test_scheduling.py',
    '/torch_autocast': 'tests/engine/test_grad_scaler.py',
    '/train_batch_size': 'tests/config/ds/test_resolve.py',
    '/train_micro_batch_size_per_gpu': 'tests/config/ds/test_resolve.py',
    '/zero_allow_untested_optimizer': 'tests/config/ds/test_auto_values.py',
    '/zero_force_ds_cpu_optimizer': 'tests/config/ds/test_cross_checks.py',
    '/zero_optimization/offload_optimizer/ratio': 'needs DeepSpeedCPUAdam',
    '/zero_optimization/stage': 'tests/engine/test_grad_scaler.py',
    '/zero_optimization/compute_grad_norm': 'tests/config/ds/test_unsupported.py',
    '/zero_optimization/legacy_stage1': 'tests/config/ds/test_check.py',
    '/zero_optimization/cpu_offload': 'an old name', '/zero_optimization/cpu_offload_param': 'one',
    '/zero_optimization/cpu_offload_use_pin_memory': 'an old name',
    '/zero_optimization/stage3_gather_fp16_weights_on_model_save': 'an old name',
}  # fmt: skip


def distance(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    return math.dist([v for name in a for v in a[name]], [v for name in a for v in b[name]])


def test_every_key_that_is_said_to_be_right_is_tried_here_or_named():
    tried = {name.partition(' at ')[0] for name in ds_keys.cases()} | set(ELSEWHERE)
    for path, key in walk(installed()):
        fate = fate_of(path)[1]
        if key.refused or key.keys or key.name != path[-1] or fate is None or fate.kind != RIGHT:
            continue
        above = {pointer_of(path[:depth]) for depth in range(1, len(path) + 1)}
        parents = {p for p in above if p in tried} | {
            p.rpartition('/')[0] for p in tried if p.startswith(f'{pointer_of(path[:-1])}/')
        } & above
        assert parents, pointer_of(path)


@pytest.mark.ranks
@pytest.mark.slow
def test_each_setting_gives_the_weights_of_plain_pytorch(tmp_path):
    wanted = reference('fp32', ds_keys.STEPS, ds_keys.CLIP, sgd=True)['weights']
    start = {n: p.detach().flatten().tolist() for n, p in make_model().named_parameters()}
    wrong = {}
    for found in run_ranks(ds_keys.train_all, 2, tmp_path, folder=tmp_path, timeout=600):
        for name, weights in found.items():
            if isinstance(weights, str):
                # An earlier DeepSpeed does not read some, or does them wrong.
                if not (OLD_DEEPSPEED and weights.startswith('ConfigError')):
                    wrong[name] = weights
                continue
            way = distance({n: wanted[n] for n in weights}, start)
            share = distance(weights, wanted) / way
            if share > 1e-5:  # sums in another order
                wrong[name] = f'{share:.1e} of the way off'
    assert not wrong, '\n'.join(f'{name}: {text}' for name, text in wrong.items())
