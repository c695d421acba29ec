"""save_checkpoint, load_checkpoint and load_ema_checkpoint on 2 real ranks."""

import re

import pytest

from internvl_ds.dist.network import free_port
from tests.harness import saving
from tests.harness.model import OFFLOAD, PERSISTENT, trained
from tests.harness.ranks import run_command, run_ranks

STAGES = trained([0, 1, 2, 3, OFFLOAD, PERSISTENT])


@pytest.mark.ranks
@pytest.mark.parametrize(
    ('precision', 'ranks'),
    [
        ('fp32', 2), ('fp16', 2), ('bf16', 2), ('autocast_fp16', 2), ('autocast_bf16', 2),
        ('fp32', 4),
    ],
)  # fmt: skip
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, precision, ranks):
    settings = {'stages': STAGES, 'precision': precision, 'root': tmp_path}
    whole = run_ranks(saving.train_and_save, ranks, tmp_path, **settings)
    resumed = run_ranks(saving.resume_and_go_on, ranks, tmp_path, **settings)
    for stage in map(str, STAGES):
        for before, after in zip(whole, resumed, strict=True):
            a, b = before[stage], after[stage]
            assert b['path'] == a['path'] == str(tmp_path / f'zero{stage}' / 'ckpt_epoch_3')
            assert b['next'] == a['next'], stage
            assert b['masters'] == a['masters'], stage
            assert b['ema'] == a['ema'], stage
            assert b['accuracy'] == 81.5
            assert b['accuracy_ema'] == 79.25
            assert b['start_epoch'] == 4
            updates, micro_batches = b['counts']
            assert updates == 10
            assert micro_batches % 2 == 0  # the accumulation phase: at a boundary


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_eval_mode_loads_the_tag_that_was_asked_for(tmp_path, precision):
    results = run_ranks(
        saving.evaluate_by_name, 2, tmp_path,
        stages=STAGES, precision=precision, root=tmp_path,
    )  # fmt: skip
    for stage in map(str, STAGES):
        for result in results:
            got = result[stage]
            assert got['latest'] == 'ckpt_epoch_1'
            assert got['first'] != got['second']
            assert got['got'] == got['first'], stage
            assert got['plain'] == got['first'], stage
            assert got['accuracy'] == 50.0
            assert got['start_epoch'] == 0


@pytest.mark.ranks
@pytest.mark.parametrize('stage', [1, 3])
def test_a_save_on_rank_0_alone_names_the_missing_rank(tmp_path, stage):
    texts = run_ranks(
        saving.save_on_rank_0_only, 2, tmp_path,
        expect_failure=True, stage=stage, root=tmp_path / 'out',
    )  # fmt: skip
    assert 'RankError: save_checkpoint: rank 0 waited 3 s and rank 1 on ' in texts[0]
    assert 'remove an `if rank == 0` around it' in texts[0]
    assert [path.name for path in (tmp_path / 'out').glob('ckpt_*')] == ['ckpt_epoch_slow']
    # once for the save that rank 1 came to late, and once for the one that it does not come to
    warning = r'save_checkpoint: rank 0 has waited 1 s, and rank 1 on \S+ \(pid \d+\) has not come'
    assert 2 <= len(re.findall(warning, texts[0])) <= 3  # or one more, on a busy machine
    assert 'if dist.get_rank() == 0`, remove that condition' in texts[0]
    assert texts[0].rfind('has waited 1 s') < texts[0].find('waited 3 s')


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak_only  # as above, under a launcher; test_loop.py has one whose rank fails
@pytest.mark.parametrize('stage', [1, 3])
def test_a_job_that_saves_on_rank_0_alone_ends_with_a_status_that_says_so(tmp_path, stage):
    script = tmp_path / 'train.py'
    script.write_text(
        'from internvl_ds.dist.process_group import init_distributed\n'
        'from tests.harness.saving import save_on_rank_0_only\n'
        'init_distributed()\n'
        f'save_on_rank_0_only({stage}, {str(tmp_path / "out")!r})\n'
    )
    launcher = ['deepspeed', '--num_gpus', '2', '--no_local_rank', '--master_port']
    job = run_command([*launcher, str(free_port()), str(script)], timeout=120)
    assert job.returncode not in (0, None), job.output[-3000:]
    assert 'rank 0 waited 3 s and rank 1 on ' in job.output
    assert '[ended after' not in job.output


@pytest.mark.ranks
@pytest.mark.parametrize('best', [None, 'best'])
def test_ranks_that_save_different_epochs_are_told(tmp_path, best):
    messages = run_ranks(
        saving.save_with_another_epoch, 2, tmp_path,
        root=tmp_path / 'out', best=best,
    )  # fmt: skip
    for message in messages:
        assert message.startswith('RankError: save_checkpoint: the ranks came with different (tag')
        for epoch in (0, 1):
            assert f"['ckpt_epoch_{epoch if best is None else best}', {epoch}, " in message
    assert not list((tmp_path / 'out').glob('ckpt_*'))


@pytest.mark.ranks
@pytest.mark.parametrize('stage', [1, 3])
def test_a_rank_that_cannot_write_fails_the_save_on_all_and_training_goes_on(tmp_path, stage):
    results = run_ranks(
        saving.save_that_fails_on_rank_1, 2, tmp_path,
        stage=stage, root=tmp_path / 'out',
    )  # fmt: skip
    for result in results:
        assert 'No space left on device' in result['error']
        assert result['error'].startswith('CheckpointError')
        assert result['left'] == ['ckpt_epoch_2']  # SAVE_CKPT_NUM is 1; epoch 0 stayed until then
        assert result['latest'] == 'ckpt_epoch_2'
    assert 'rank 1' in results[0]['error']


@pytest.mark.ranks
def test_what_cannot_be_loaded_says_why(tmp_path):
    for messages in run_ranks(saving.load_errors, 2, tmp_path, root=tmp_path):
        assert messages['missing'].startswith('CheckpointNotFound')
        assert 'ckpt_epoch_9: no such checkpoint' in messages['missing']
        assert 'has ckpt_epoch_0' in messages['missing']
        assert messages['empty'].startswith('CheckpointNotFound: MODEL.RESUME is empty')
        assert 'nowhere: no such checkpoint' in messages['no directory']
        assert 'saving.py: cannot be read' in messages['pth']
        assert messages['model'].startswith('CheckpointMismatch')
        assert '0.weight' in messages['model']
        assert 'stem.weight' in messages['model']
        assert messages['no engine'].startswith('EngineNotFound')
        assert 'it can be a ShardedEma or timm' in messages['ema type']
        assert 'use internvl_ds.ShardedEma(engine, decay)' in messages['partitioned ema']
        # another layout, and other parameter groups, are loaded
        loaded = ['stage', 'touched', 'whole ema', 'other ema', 'ema loaded']
        loaded += [f'{what} {stage}' for what in ('groups', 'group state') for stage in (0, 2)]
        assert {name: messages[name] for name in loaded} == dict.fromkeys(loaded, 'no error')
        assert messages['decay 0'] == messages['decay 2'] == '[0.01]'  # the running group's own


@pytest.mark.ranks
def test_retention_leaves_exactly_the_newest_epoch_tags(tmp_path):
    # (SAVE_CKPT_NUM, SAVE_FREQ, epochs of this run): each run goes on in the same directory.
    runs = [(1, 1, range(0, 3)), (3, 1, range(3, 7)), (3, 2, range(7, 13)), (1, 2, range(13, 17))]
    results = run_ranks(
        saving.retain, 2, tmp_path,
        root=tmp_path / 'out', runs=[(keep, freq, list(epochs)) for keep, freq, epochs in runs],
    )  # fmt: skip
    saved: list[int] = []
    expected = []
    for keep, freq, epochs in runs:
        for epoch in epochs:
            if epoch % freq == 0:
                saved.append(epoch)
                expected.append([f'ckpt_epoch_{e}' for e in sorted(saved[-keep:])])
                saved = saved[-keep:]
    for result in results:
        assert result['epoch_tags'] == expected
        assert result['others'] == ['ckpt_epoch_best', 'ckpt_epoch_ema_best']
        assert result['latest'] == 'ckpt_epoch_16'
        assert result['hidden'] == []


@pytest.mark.ranks
def test_a_rewound_run_keeps_what_it_saves_and_resumes_from_it(tmp_path):
    results = run_ranks(saving.rewind, 2, tmp_path, root=tmp_path / 'out')
    for result in results:
        # 8 and 9 are later training; without an explicit word they stay until it is done again
        tags = ['ckpt_epoch_4', 'ckpt_epoch_8', 'ckpt_epoch_9']
        assert result == {'tags': tags, 'newest': 'ckpt_epoch_4'}


@pytest.mark.ranks
def test_a_script_that_is_started_again_goes_on_from_its_own_output(tmp_path):
    results = run_ranks(saving.start_again, 2, tmp_path, stages=[0, 2, 3], root=tmp_path)
    for result in results:
        for found in result.values():
            assert found['asked'][0] != found['saved'][0]
            assert found['first'] == found['explicit'] == found['asked']
            assert found['again'] == found['saved']  # weights, average, epoch, accuracies
            assert found['first said'] == []
            assert 'ckpt_epoch_1 goes before MODEL.RESUME' in found['again said'][0]
            assert 'and not the newer' in found['explicit said'][0]


@pytest.mark.ranks
def test_a_tag_of_plain_deepspeed_loads_and_ours_loads_plainly(tmp_path):
    for result in run_ranks(saving.interchange, 2, tmp_path, stages=STAGES, root=tmp_path):
        for stage in map(str, STAGES):
            assert result[stage] == {
                'plain into ours': True,
                'ours into plain': True,
                'zero_to_fp32': True,
                'warned': True,
                'start_epoch': 0,
            }


@pytest.mark.ranks
def test_hostile_shards_run_no_code(tmp_path):
    for messages in run_ranks(
        saving.hostile, 2, tmp_path, root=tmp_path, target=tmp_path / 'owned'
    ):
        for message in messages:
            assert message.startswith('CheckpointError')
            assert 'refused, because it holds more than tensors and plain data' in message
    assert not (tmp_path / 'owned').exists()


@pytest.mark.ranks
def test_what_the_running_configuration_changed_is_said(tmp_path):
    for result in run_ranks(saving.resume_with_other_settings, 2, tmp_path, root=tmp_path / 'out'):
        assert result['weight_decay'] == [0.0, 0.5]  # the running configuration's
        assert result['t_initial'] == 30  # the schedule goes on as saved, and that is said
        text = '\n'.join(result['warnings'])
        assert "{'weight_decay': (0.05, 0.5)}" in text
        assert "differ in {'t_initial': (30, 90)}" in text
