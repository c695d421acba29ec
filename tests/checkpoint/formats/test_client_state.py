"""Tags of scripts over plain DeepSpeed, InternImage's among them: what is in their client_state."""

import json

import pytest
import torch

from internvl_ds.checkpoint.formats.client_state import (
    average_of,
    holds_average,
    saved_state,
    unread_keys,
)
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.config.tree import default_config
from internvl_ds.errors import CheckpointMismatch
from internvl_ds.tools.cli import main
from tests.checkpoint import intern_image
from tests.checkpoint.intern_image import (
    ACCUMULATION,
    ACCURACY,
    DECAY,
    PER_EPOCH,
    UPDATES,
    Net,
    groups_of,
    make_schedule,
)
from tests.harness.ranks import run_ranks

NAMES = ['layers.1.weight', 'layers.1.bias', 'head.weight']


def tag(folder, names=NAMES, accumulation=1, **client_state):
    """A tag of plain DeepSpeed at stage 2 on one rank, its optimizer left out."""
    module = {name: torch.randn(3) for name in names}
    head = {
        'module': module,
        'param_shapes': [{n: t.shape for n, t in module.items() if n != 'tied.weight'}],
        'dp_world_size': 1,
        'global_steps': 5,
        'skipped_steps': 2,
        'ds_config': {
            'zero_optimization': {'stage': 2},
            'gradient_accumulation_steps': accumulation,
        },
        'lr_scheduler': None,
        **client_state,
    }
    folder.mkdir(exist_ok=True)
    torch.save(head, folder / 'mp_rank_00_model_states.pt')
    return TagShards(folder)


class TestAverage:
    @pytest.mark.parametrize(
        'form',
        [
            lambda name: name,
            lambda name: f'module.{name}',
            lambda name: name.replace('.', ''),
            lambda name: f'module{name.replace(".", "")}',
        ],
    )
    def test_is_found_by_whatever_name_scripts_give(self, tmp_path, form):
        kept = {name: torch.randn(3) for name in NAMES}
        shards = tag(tmp_path, model_ema={form(name): t for name, t in kept.items()})

        assert holds_average(shards)
        torch.testing.assert_close(average_of(shards), kept, rtol=0, atol=0)

    def test_of_two_parameters_under_one_name_is_refused(self, tmp_path):
        names = ['layers.1.1.bias', 'layers.11.bias', 'head.weight']
        kept = {f'module{name.replace(".", "")}': torch.zeros(3) for name in names}

        with pytest.raises(CheckpointMismatch, match='layers.1.1.bias and for layers.11.bias'):
            average_of(tag(tmp_path, names, model_ema=kept))

    def test_of_another_model_is_refused(self, tmp_path):
        kept = {name: torch.zeros(3) for name in (*NAMES, 'neck.weight')}

        with pytest.raises(CheckpointMismatch, match='1 names are not in it: neck.weight'):
            average_of(tag(tmp_path, model_ema=kept))

    def test_without_a_trained_parameter_is_refused(self, tmp_path):
        kept = {name: torch.zeros(3) for name in NAMES[:2]}

        with pytest.raises(CheckpointMismatch, match='1 trained parameters .*: head.weight'):
            average_of(tag(tmp_path, model_ema=kept))

    def test_of_a_tied_parameter_is_one(self, tmp_path):
        kept = {name: torch.zeros(3) for name in (*NAMES, 'tied.weight')}
        tied = {'shared_params': {'tied.weight': 'head.weight'}}
        average = average_of(tag(tmp_path, kept, model_ema=kept, **tied))

        assert sorted(average) == sorted(NAMES)
        kept['tied.weight'] = torch.ones(3)
        with pytest.raises(CheckpointMismatch, match='two averages of head.weight, which is tied'):
            average_of(tag(tmp_path, kept, model_ema=kept, **tied))

    def test_may_not_be_there(self, tmp_path):
        assert not holds_average(tag(tmp_path / 'a'))
        assert not holds_average(tag(tmp_path / 'b', model_ema=None))


class TestState:
    def test_has_the_names_that_this_package_uses_and_no_other(self, tmp_path):
        config = default_config()
        config.TRAIN.EMA.DECAY = 0.75
        shards = tag(
            tmp_path, epoch=torch.tensor(4), max_accuracy=torch.tensor(61.5), config=config,
            model_ema={name: torch.zeros(3) for name in NAMES}, step=17, best_top5=88.0,
        )  # fmt: skip

        assert saved_state(shards) == {
            'epoch': 4, 'max_accuracy': 61.5, 'max_accuracy_ema': None, 'ema_decay': 0.75,
            'lr_scheduler': None, 'schedule': None, 'scaler': None, 'loss_scale': None,
            'config': config.dump(),
        }  # fmt: skip
        assert unread_keys(shards) == ['step', 'best_top5']
        assert shards.updates == 3

    def test_a_schedule_of_deepspeeds_own_is_no_schedule_of_the_script(self, tmp_path):
        shards = tag(tmp_path, lr_scheduler={'last_batch_iteration': 5})
        assert saved_state(shards)['lr_scheduler'] is None

    @pytest.mark.parametrize('epoch', ['4', True, 4.5, None, torch.zeros(2)])
    def test_an_epoch_that_is_no_number_is_none(self, tmp_path, epoch):
        assert saved_state(tag(tmp_path, epoch=epoch))['epoch'] is None

    @pytest.mark.parametrize(
        ('accumulation', 'epochs', 'expected'),
        [
            (1, 10, None),
            # 40 of 100 micro-batches; the last whole update of epoch 3 ended with number 39
            (2, 10, {'position': 40, 'moved': 39, 'group': 2}),
            # an epoch of 10 is 3 updates of 3, and one that is left
            (3, 10, {'position': 40, 'moved': 38, 'group': 3}),
            # of an unknown length: 5 updates were made
            (2, 0, {'position': 10, 'moved': 9, 'group': 2}),
        ],
    )
    def test_intern_images_schedule_counts_micro_batches(
        self, tmp_path, accumulation, epochs, expected
    ):
        config = default_config()
        config.TRAIN.EPOCHS = epochs
        schedule = {'t_initial': 100, 't_in_epochs': False}
        state = saved_state(
            tag(tmp_path, accumulation=accumulation, custom_lr_scheduler=schedule, epoch=3,
                config=config)
        )  # fmt: skip

        assert state['lr_scheduler'] == schedule
        assert state['schedule'] == (expected and {'counts': 'micro-batches', **expected})

    def test_a_schedule_by_our_name_counts_what_this_runs_does(self, tmp_path):
        state = {'t_initial': 20, 'warmup_t': 4, 'warmup_steps': [0.1], 't_in_epochs': False}
        kept = saved_state(tag(tmp_path, accumulation=4, lr_scheduler=state))

        assert kept['lr_scheduler'] == state
        assert kept['schedule'] is None


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Form -> a tag's path and what it holds."""
    root = tmp_path_factory.mktemp('tags')
    found = run_ranks(intern_image.save_tags, 2, root, root=root)[0]
    exported = root / 'exported.pth'
    assert main(['ckpt', 'export', found['bf16']['path'], str(exported)]) == 0
    found['exported'] = {**found['bf16'], 'path': str(exported)}
    return found


def same(got, was, *, lrs, scale=None):
    assert got['state'] == was['state']
    assert (got['accuracy'], got['epoch'], got['updates']) == (ACCURACY, 1, UPDATES)
    assert got['lrs'] == pytest.approx(lrs, rel=1e-12)
    assert got['scale'] == scale


def averaged(got, was):
    """Whether an average has the script's values; the buffer and what is frozen are the model's."""
    values = got['average']['values']
    trained = {n: values[n] for n in values if not n.startswith(('frozen', 'mean', 'again'))}
    assert trained == {n: was['average'][f'module{n.replace(".", "")}'] for n in trained}
    assert len(trained) == 5
    assert values['again.weight'] == values['tied.weight']
    return True


def lrs_of(kind, position, per_update=1):
    """What a schedule gives at a position: built over micro-batches, or over updates of so many."""
    optimizer = torch.optim.AdamW(groups_of(Net()))
    make_schedule(optimizer, kind, per_update).step_update(position)
    return {group['name']: group['lr'] for group in optimizer.param_groups}


# InternImage's loop moves its schedule when an update is made, before it counts the micro-batch.
MOVED, NEXT = PER_EPOCH - 1, PER_EPOCH + ACCUMULATION


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
def test_a_scripts_tag_goes_on_in_engines_of_this_package(saved, tmp_path):
    cases = [
        ('bf16', 1, 'bf16', 'cosine', 'updates'),
        ('bf16', 3, 'fp32', 'cosine', 'micro-batches'),
        ('fused', 2, 'bf16', 'cosine', 'micro-batches'),
        ('early fused', 1, 'bf16', 'cosine', 'micro-batches'),
        ('fp16', 2, 'fp16', 'cosine', 'micro-batches'),
        ('fp16', 1, 'fp16', 'cosine', 'updates'),
        ('linear', 2, 'fp32', 'linear', 'micro-batches'),
        ('linear', 0, 'fp32', 'cosine', 'updates'),
        ('others', 2, 'fp32', 'cosine', 'updates'),
        ('others', 3, 'bf16', 'cosine', 'updates'),
        ('exported', 1, 'bf16', 'cosine', 'micro-batches'),
    ]
    loads = [(saved[form]['path'], *rest) for form, *rest in cases]
    for results in run_ranks(intern_image.load_tags, 2, tmp_path, loads=loads):
        for (form, _, precision, kind, _), got in zip(cases, results, strict=True):
            was, path = saved[form], saved[form]['path']
            if form == 'others' or (form, kind) == ('linear', 'cosine'):  # which is not taken over
                lrs = [lrs_of(kind, UPDATES + n, ACCUMULATION) for n in (0, 1)]
            else:
                lrs = [lrs_of(kind, position) for position in (MOVED, NEXT)]
            same(got, was, lrs=lrs[0], scale=512.0 if precision == 'fp16' else None)
            assert got['next'] == pytest.approx(lrs[1], rel=1e-12)
            unverified = [f'{path} has no manifest: it could not be verified']
            assert [t for t in got['said'] if 'manifest' in t] == unverified * (form != 'exported')
            numbers = got['average']['numbers']
            if form in ('bf16', 'fused', 'early fused', 'fp16', 'exported'):
                assert numbers == [ACCURACY + 1, DECAY, UPDATES]
                assert averaged(got, was)
            elif form == 'others':
                assert numbers == [0.0, 0.5, UPDATES]
                assert averaged(got, was)
                line = f'{path}: what its client_state has of step, best_top5 is not restored'
                assert line in got['said']
            else:
                assert (
                    f'{path} has no EMA: starting from the loaded weights' in got['average']['said']
                )
            if (form, kind) == ('linear', 'cosine'):
                (line,) = (text for text in got['said'] if 'schedule' in text)
                assert 'of another kind than the configured CosineLRScheduler' in line
                assert 'it has lr_min_rate' in line


@pytest.mark.ranks
@pytest.mark.slow
def test_a_scripts_tag_goes_on_in_the_scripts_own_engine(saved, tmp_path):
    cases = [
        ('bf16', 1, 'bf16'),
        ('fused', 1, 'bf16'),
        ('early fused', 1, 'bf16'),
        ('fp16', 2, 'fp16'),
        ('others', 2, 'fp32'),
        ('others 0', 0, 'fp32'),
    ]
    loads = [(saved[form]['path'], *rest) for form, *rest in cases]
    for results in run_ranks(intern_image.load_in_own_engines, 2, tmp_path, loads=loads):
        for (form, _, precision), got in zip(cases, results, strict=True):
            scale = 512.0 if precision == 'fp16' else None
            # each has the lr that it had: the script steps its schedule
            own = ('cosine', MOVED) if 'others' not in form else ('cosine', UPDATES, ACCUMULATION)
            same(got, saved[form], lrs=lrs_of(*own), scale=scale)
            assert averaged(got, saved[form])
            assert got['average']['numbers'][2] == UPDATES
            count = f'does not say how often its average was updated: counted as {UPDATES}'
            assert [t for t in got['average']['said'] if count in t]
            by_name = [t for t in got['said'] if ': from ' in t]  # else DeepSpeed loaded it
            assert bool(by_name) == (form == 'early fused')


@pytest.mark.ranks
@pytest.mark.slow
def test_weights_of_a_scripts_tag_are_evaluated_and_start_others(saved, tmp_path):
    was = saved['bf16']
    for got in run_ranks(intern_image.evaluate, 2, tmp_path, path=was['path']):
        assert got['accuracy'] == ACCURACY
        assert got['weights'] == was['weights']
        for name, values in was['weights'].items():
            average = was['average'].get(f'module{name.replace(".", "")}', values)
            assert got['averaged'][name] == average, name


@pytest.mark.ranks
@pytest.mark.slow
def test_the_commands_take_a_scripts_tag(saved, capsys):
    path, exported = saved['bf16']['path'], saved['exported']['path']

    assert main(['ckpt', 'diff', path, exported]) == 0
    assert main(['ckpt', 'diff', path, saved['fp16']['path']]) == 1
    capsys.readouterr()
    assert main(['ckpt', 'show', path, '--json']) == 3
    state = json.loads(capsys.readouterr().out)['state']
    assert {key: state[key] for key in ('epoch', 'max_accuracy', 'max_accuracy_ema')} == {
        'epoch': 0, 'max_accuracy': ACCURACY, 'max_accuracy_ema': ACCURACY + 1
    }  # fmt: skip
    assert state['ema_decay'] == DECAY
    assert 't_initial' in state['lr_scheduler']
    assert main(['ckpt', 'show', path, '--config']) == 3
    assert f'ACCUMULATION_STEPS: {ACCUMULATION}\n' in capsys.readouterr().out
