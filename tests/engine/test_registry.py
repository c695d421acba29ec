"""initialize, register and finding an engine, on 2 real ranks; the exported names."""

import inspect
import json

import pytest

import internvl_ds
import internvl_ds.utils
from tests.dist import talking
from tests.harness import saving
from tests.harness.ranks import run_ranks

TEN = (
    'load_checkpoint', 'load_ema_checkpoint', 'load_pretrained', 'save_checkpoint',
    'NativeScalerWithGradNormCount', 'auto_resume_helper', 'reduce_tensor', 'get_grad_norm',
    'MyAverageMeter', 'convert_22k_head_to_1k',
)  # fmt: skip

SIGNATURES = {
    'load_checkpoint': 'config, model, optimizer, lr_scheduler, scaler, logger',
    'load_ema_checkpoint': 'config, model_ema, logger',
    'load_pretrained': 'config, model, logger',
    'save_checkpoint': 'config, epoch, model, max_accuracy, optimizer, lr_scheduler, scaler, '
    'logger, model_ema=None, max_accuracy_ema=None, ema_decay=None, best=None',
    'auto_resume_helper': 'output_dir',
    'reduce_tensor': 'tensor',
    'get_grad_norm': 'parameters, norm_type=2',
    'MyAverageMeter': 'max_len=-1',
    'convert_22k_head_to_1k': 'model, logger',
    'initialize': 'config, model, optimizer=None, ds_config=None',
    'register': 'engine',
}


def _positional(function) -> str:
    parts = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is not p.KEYWORD_ONLY:
            parts.append(p.name if p.default is p.empty else f'{p.name}={p.default!r}')
    return ', '.join(parts)


@pytest.mark.parametrize('module', [internvl_ds, internvl_ds.utils])
def test_the_ten_names_and_two_more_are_exported_with_their_signatures(module):
    for name in TEN:
        assert hasattr(module, name)
    for name, expected in SIGNATURES.items():
        assert _positional(getattr(module, name)) == expected
    call = _positional(module.NativeScalerWithGradNormCount.__call__)
    assert call == (
        'self, loss, optimizer, clip_grad=None, parameters=None, create_graph=False, '
        'update_grad=True'
    )


@pytest.mark.first
@pytest.mark.ranks
def test_an_engine_is_found_from_its_module_and_either_optimizer(tmp_path):
    for result in run_ranks(talking.engine_from_any, 2, tmp_path):
        assert result == {'0': True, '1': True, '2': True, '3': True}


@pytest.mark.ranks
@pytest.mark.parametrize(('stage', 'from_file'), [(0, False), (2, True)])
def test_an_engine_of_plain_deepspeed(tmp_path, stage, from_file):
    folder = str(tmp_path) if from_file else None
    for result in run_ranks(talking.plain_engine, 2, tmp_path, stage=stage, folder=folder):
        assert 'internvl_ds.register(engine)' in result['unknown']
        # With SGD and lr 1 the weights move by the gradient that was applied. The ds_config's
        # gradient_clipping is 0.1, and the calls said clip_grad=None and 0.02.
        norm, moved = result['unclipped']
        assert norm > 0.1
        assert moved == pytest.approx(norm, rel=1e-4)
        assert result['registered']
        norm, moved = result['clipped']
        assert norm > 0.1
        assert moved == pytest.approx(0.02, rel=1e-3)  # both clip to 0.02 * norm / (norm + 1e-6)
        assert result['wrong'] == 'EngineNotFound: register() takes a DeepSpeedEngine, not a Net'


@pytest.mark.ranks
def test_what_initialize_refuses(tmp_path):
    for result in run_ranks(talking.refusals, 1, tmp_path):
        assert '/fp16 (AMP_OPT_LEVEL O2 with AMP_TYPE float16): the cpu device' in result['fp16']
        assert 'AMP_OPT_LEVEL O1, torch autocast in float16, works there' in result['fp16']
        assert '/bf16/check_grad_overflow is false' in result['unchecked']
        assert '/zero_optimization/compute_grad_norm' in result['no norm']
        assert '/optimizer section and an optimizer was passed' in result['two optimizers']
        assert 'TRAIN.ACCUMULATION_STEPS is 2' in result['contradiction']
        assert 'pass it as lr_scheduler=' in result['scheduler not passed']
        assert 'build it with t_in_epochs=False' in result['epoch scheduler']
        assert '/managed_gradient_accumulation' in result['unmanaged']
        for stage in (0, 1):
            message = f'/data_types/grad_accum_dtype fp32 with bf16 at ZeRO stage {stage} is not'
            assert message in result[f'fp32 accumulation {stage}']
        assert '/optimizer section with bf16 at ZeRO stage 0' in result['fused']
        assert 'shift, the first parameter, is torch.float64' in result['first dtype']
        assert result['second order'].startswith('ConfigError: create_graph=True')


@pytest.mark.ranks
def test_the_resolved_ds_config_is_recorded(tmp_path):
    run_ranks(
        saving.train_and_save, 1, tmp_path,
        stages=[1], precision='fp32', root=tmp_path,
    )  # fmt: skip
    recorded = json.loads((tmp_path / 'zero1' / 'ds_config.json').read_text())
    assert recorded['train_micro_batch_size_per_gpu'] == 8
    assert recorded['gradient_accumulation_steps'] == 2
    assert recorded['zero_optimization']['stage'] == 1
