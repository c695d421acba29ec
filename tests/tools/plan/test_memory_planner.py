"""internvl-ds plan: sizes, activations and states, what fits, and the command."""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.tree import set_options
from internvl_ds.errors import ConfigError
from internvl_ds.tools.cli import main
from internvl_ds.tools.cli.quantities import parse_rate, parse_size, whole
from internvl_ds.tools.plan import activations, static_memory
from internvl_ds.tools.plan.advice import advice
from internvl_ds.tools.plan.memory_planner import MemoryPlanner
from internvl_ds.tools.plan.options import ALL, NONE, OPTIMIZER, Machine, choose, options, variant
from internvl_ds.tools.plan.sizes import Sizes, meta_model, sizes_of
from internvl_ds.tools.plan.static_memory import built_bytes, static_host_parts, static_parts
from internvl_ds.tools.plan.transient_memory import in_backward, in_update
from internvl_ds.tools.plan.zero_scheme import bucket_elements, scheme_of
from internvl_ds.train.model import build_model
from tests.harness.ranks import ROOT, base_env
from tests.tools.plan.measuring import make_config

TINY = (
    'MODEL.TYPE timm MODEL.NAME vit_tiny_patch16_224 MODEL.KWARGS.depth 3 MODEL.NUM_CLASSES 10 '
    'DATA.IMG_SIZE 32 DATA.BATCH_SIZE 4 AUG.MIXUP 0.0 AUG.CUTMIX 0.0 '
    'AMP_OPT_LEVEL O2 AMP_TYPE bfloat16'
)
ONE_GROUP = Sizes(
    groups=((1_000_000, 600_000),), frozen=(), float_buffers=0, other_buffers=0, moments=2.0,
    largest_module=1_000_000,
)  # fmt: skip


def config_of(*more):
    return make_config([*TINY.split(), *more])


def scheme(stage, ranks=4, sizes=ONE_GROUP, config=None, offload=NONE, **settings):
    base = {'zero_optimization': {'stage3_param_persistence_threshold': 0, **settings}}
    resolved = ds.resolve_or_raise(variant(base, stage, offload), config or config_of(), ranks)
    return scheme_of(resolved, ranks, sizes.trained)


class TestQuantities:
    @pytest.mark.parametrize(
        ('text', 'size'),
        [
            ('80GB', 80 * 10**9), ('80GiB', 80 * 2**30), ('1.5 TB', 1_500_000_000_000),
            ('512MiB', 2**29), ('7b', 7), ('80gb', 80 * 10**9),
        ],
    )  # fmt: skip
    def test_gb_is_decimal_and_gib_binary(self, text, size):
        assert parse_size(text) == size

    @pytest.mark.parametrize(
        'text', ['80', '80G', 'GB', '80iB', '-1GB', '0GB', '80GB/s', '9' * 99 + 'GB']
    )
    def test_anything_else_is_refused(self, text):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_size(text)

    @pytest.mark.parametrize('text', ['0', '-1', '1.0', '9' * 10, '9' * 5000])
    def test_a_number_that_means_nothing_is_refused(self, text):
        assert whole(1)('8') == 8
        with pytest.raises(argparse.ArgumentTypeError, match=r'at least 1|9 digits'):
            whole(1)(text)

    def test_a_rate_is_a_size_a_second(self):
        assert parse_rate('2GB/s') == 2 * 10**9
        with pytest.raises(argparse.ArgumentTypeError, match='2GB/s'):
            parse_rate('2GB')


class TestBuild:
    @pytest.mark.parametrize(
        ('stage', 'build', 'elements'),
        [
            (3, 'always', 2 + 1 + 1 + 1 + 5),  # slices for 4 ranks, and the largest
            (2, 'auto', 13),
            (3, 'never', 13),
            (3, 'auto', 13),  # less than 2 GiB
        ],
    )
    def test_each_rank_has_its_slices_and_the_largest_tensor(self, stage, build, elements):
        sizes = Sizes(((5, 4),), (3, 1), float_buffers=5, other_buffers=7, moments=2.0,
                      largest_module=5)  # fmt: skip
        layout = SimpleNamespace(stage=stage, ranks=4)
        assert built_bytes(sizes, layout, build) == 4 * (elements + 5) + 7

    def test_a_big_model_is_built_so_by_itself(self):
        sizes = Sizes(((1 << 30, 1 << 20),), (), 0, 0, 2.0, 1 << 30)
        got = built_bytes(sizes, SimpleNamespace(stage=3, ranks=8), 'auto')
        assert got == max(4 * ((1 << 27) + (1 << 17) + (1 << 30)), (2 << 30) + 4 * (1 << 30))


class TestSizes:
    def test_are_those_of_the_real_model(self):
        config = config_of('TRAIN.OPTIMIZER.FREEZE_BACKBONE', 'True')
        sizes, model = sizes_of(meta_model(config), config), build_model(config)

        assert sizes.parameters == sum(p.numel() for p in model.parameters())
        assert sizes.trained == 192 * 10 + 10
        assert sorted(sizes.groups) == [(10,), (1920,)]  # a bias has no weight decay

    def test_batch_norms_have_buffers(self):
        config = make_config(['MODEL.TYPE', 'timm', 'MODEL.NAME', 'resnet18'])
        sizes = sizes_of(meta_model(config), config)

        assert sizes.float_buffers == 2 * 4800  # mean and variance of 4800 channels
        assert sizes.other_buffers == 20 * 8  # 20 layers count their batches

    @pytest.mark.parametrize(
        ('name', 'more', 'moments'),
        [
            ('adamw', (), 2), ('sgd', (), 1), ('sgd', ('TRAIN.OPTIMIZER.MOMENTUM', '0.0'), 0),
            ('lion', (), 1), ('sgd_linear_probing', (), 1),
        ],
    )  # fmt: skip
    def test_the_optimizer_is_asked_what_it_keeps(self, name, more, moments):
        config = config_of('TRAIN.OPTIMIZER.NAME', name, *more)

        assert sizes_of(meta_model(config), config).moments == moments

    def test_muon_keeps_momentum_of_matrices_and_what_adamw_does_of_the_rest(self):
        config = config_of('TRAIN.OPTIMIZER.NAME', 'muon')
        sizes = sizes_of(meta_model(config), config)
        rest = sum(p.numel() for p in build_model(config).parameters() if p.dim() in (1, 3))

        assert sizes.moments == pytest.approx(1 + rest / sizes.trained)


class TestActivations:
    def step(self, precision=ds.BF16, recompute=False):
        config = config_of('TRAIN.USE_CHECKPOINT', str(recompute))
        return activations.watch_step(meta_model(config), 32, precision, loss)

    def test_of_a_batch_that_was_not_watched_are_what_watching_it_says(self, monkeypatch):
        step = self.step()
        monkeypatch.setattr(activations, '_BATCHES', (9, 16))

        again = self.step()

        for batch in (9, 16):
            assert step.activations(batch) == again.activations(batch)

    def test_grow_with_the_batch_and_shrink_with_recomputing(self):
        plain, recomputed = self.step(), self.step(recompute=True)

        assert plain.activations(64) - plain.activations(32) == pytest.approx(
            plain.activations(32) - plain.activations(0), rel=0.05
        )
        assert recomputed.activations(32) < 0.7 * plain.activations(32)

    def test_a_teacher_is_whole_on_each_rank_and_its_answers_are_made_in_the_step(self):
        opts = 'TRAIN.DISTILL.TEACHER', 'resnet18', 'TRAIN.DISTILL.PRETRAINED', 'no.pth'
        plain, taught = MemoryPlanner(config_of()), MemoryPlanner(config_of(*opts))
        model = timm.create_model('resnet18', num_classes=10)
        floats = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        weights, counts = sum(t.numel() for t in floats), 8 * 20  # batches seen, of 20 batch norms
        for stage in (0, 3):
            layout = scheme(stage, 2, plain.sizes)
            one, other = (planner.need_of(layout, recompute=False) for planner in (plain, taught))
            assert other.static.weights - one.static.weights == 2 * weights + counts
            assert other.build - one.build == 4 * weights + counts
            assert other.parts.gradients == one.parts.gradients
        step = taught.step_of(layout, recompute=False)
        with_answers = 4 * 4 * 10  # of 4 images, float32
        saved = plain.step_of(layout, recompute=False).saved
        assert saved + with_answers <= step.saved <= saved + 4 * with_answers
        # resnet18's first convolution has 16 x 16 x 64 values of each of 4 images, in bf16.
        assert step.activations.max() >= step.saved + 4 * 16 * 16 * 64 * 2

    def test_end_with_every_gradient_finished(self):
        config = config_of()
        trained = sizes_of(meta_model(config), config).trained

        for precision, size in ((ds.BF16, 2), (ds.FP32, 4), (ds.AUTOCAST_FP16, 4)):
            assert self.step(precision).at(8).gradients[-1] == size * trained

    def test_leave_the_model_as_it_was(self):
        model = meta_model(config_of())
        before = {name: id(p) for name, p in model.named_parameters()}

        activations.watch_step(model, 32, ds.BF16, loss)

        assert {name: id(p) for name, p in model.named_parameters()} == before
        assert all(p.is_meta and p.grad is None for p in model.parameters())

    def test_of_a_model_that_needs_data_are_an_error(self):
        class Looks(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x.flatten(1)) if x.sum().item() else x

        with pytest.raises(ConfigError, match=r'Looks cannot be planned: .*DataDependent'):
            activations.watch_step(Looks(3 * 32 * 32, 10, device='meta'), 32, ds.FP32, loss)

    def test_attention_on_a_gpu_keeps_no_matrix_of_all_pairs_of_tokens(self):
        pairs = 1024 * 1024 * 4  # bytes, for each image

        class Attends(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.bias = torch.nn.Parameter(torch.empty(1024, 1024, device='meta'))

            def forward(self, x):
                x = x.flatten(2).transpose(1, 2)[:, None]
                attend = torch.nn.functional.scaled_dot_product_attention
                return attend(x, x, x, self.bias, dropout_p=0.1).mean((1, 2))

        saved = {
            gpu: activations.watch_step(Attends(), 32, ds.FP32, loss, gpu=gpu).at(16).saved
            for gpu in (True, False)
        }

        assert saved[False] > 16 * pairs
        assert saved[True] < pairs

    def test_autocast_on_a_gpu_computes_softmax_in_float32(self):
        class Weighs(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x.flatten(1)).softmax(-1)

        saved = {
            gpu: activations.watch_step(
                Weighs(3 * 32 * 32, 512, device='meta'), 32, ds.AUTOCAST_BF16, loss, gpu=gpu
            ).at(1000).saved
            for gpu in (True, False)
        }  # fmt: skip

        # What the softmax returns; in bf16 it is cast to float32 for the loss.
        assert saved[True] - saved[False] == pytest.approx(-1000 * 512 * 2, rel=0.01)


def loss(logits, theirs=None):
    return torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


class TestStates:
    def test_adam_in_bf16_takes_2_and_12_bytes_divided_by_stage(self):
        n, ranks = ONE_GROUP.trained, 4
        of = {stage: static_parts(ONE_GROUP, scheme(stage), ema=False) for stage in range(4)}

        assert [of[s].weights for s in range(4)] == [2 * n, 2 * n, 2 * n, 2 * n // ranks]
        assert [of[s].optimizer for s in range(4)] == [12 * n, *[12 * n // ranks] * 3]
        assert of[3].gradients == 2 * n // ranks
        assert of[3].buffers == 2 * n  # stage 3 keeps its bucket

    def test_fp32_has_masters_of_its_own_under_zero_only(self):
        config, n = make_config([*TINY.split(), 'AMP_OPT_LEVEL', 'O0']), ONE_GROUP.trained

        for stage, optimizer in ((0, 8 * n), (1, 3 * n), (3, 3 * n)):
            assert (
                static_parts(ONE_GROUP, scheme(stage, config=config), False).optimizer == optimizer
            )

    def test_the_average_is_a_shard_of_the_masters(self):
        assert static_parts(ONE_GROUP, scheme(0), ema=True).ema == 4 * ONE_GROUP.trained
        assert static_parts(ONE_GROUP, scheme(2), ema=True).ema == ONE_GROUP.trained
        assert static_host_parts(ONE_GROUP, scheme(2, offload=OPTIMIZER), ema=True).ema == (
            ONE_GROUP.trained
        )

    def test_offload_moves_states_to_the_host(self):
        device = static_parts(ONE_GROUP, scheme(3, offload=ALL), ema=True)
        host = static_host_parts(ONE_GROUP, scheme(3, offload=ALL), ema=True)

        assert (device.weights, device.optimizer, device.gradients, device.ema) == (0, 0, 0, 0)
        assert host.weights == 2**20  # of 800000 bytes, page-locked
        assert host.optimizer == 3 * ONE_GROUP.trained

    def test_partitions_are_padded(self):
        sizes = replace(ONE_GROUP, groups=((101,), (7,)))

        assert static_parts(sizes, scheme(1, sizes=sizes), False).weights == 2 * (104 + 8)
        assert static_parts(sizes, scheme(3, sizes=sizes), False).weights == 2 * (26 + 2)

    def test_stage_3_gathers_frozen_weights_too_twice_while_they_arrive(self):
        sizes = replace(ONE_GROUP, groups=((10,),), frozen=(900_000, 700_000, 40))
        step = activations.Timeline(np.full(3, 5.0), np.array([0.0, 0.0, 20.0]), forward=1)
        settings = {'sizes': sizes, 'stage3_param_persistence_threshold': 50}

        parts = in_backward(sizes, scheme(3, **settings), step)
        assert (parts.activations, parts.buffers) == (5, 2 * 2 * 1_600_000)
        # Without reuse and prefetching: the largest module, once whole and once arriving.
        settings.update(stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)
        parts = in_backward(sizes, scheme(3, **settings), step)
        assert parts.buffers == 2 * 2 * sizes.largest_module

    @pytest.mark.parametrize(
        ('zero', 'elements'),
        [
            ({'stage': 0, 'reduce_bucket_size': 5}, 0),
            ({'stage': 2, 'reduce_bucket_size': 5e8}, 500_000_000),
            ({'stage': 2, 'reduce_bucket_size': 'auto'}, 22_000_000),
            ({'stage': 3}, 22_000_000),
        ],
    )
    def test_a_bucket_left_open_is_no_larger_than_the_model(self, zero, elements):
        assert bucket_elements({'zero_optimization': zero}, 22_000_000) == elements

    def test_deepspeeds_estimate_of_stage_2_counts_the_update_and_no_buffers(self):
        n, ranks = ONE_GROUP.trained, 4
        _, theirs = estimate_zero2_model_states_mem_needs(n, ranks, 1, cpu_offload=False)
        ours = static_parts(ONE_GROUP, scheme(2), ema=False).total

        # 18 n / ranks: ours, a shard of gradients in 16 bits, and its copy in fp32.
        assert theirs == ours + (2 + 4) * n // ranks
        # Ours are more at once: a rank keeps whole the gradients that it owns a part of, here both,
        # and its shard is there once more as one tensor.
        assert in_update(ONE_GROUP, scheme(2)) == 2 * n + (2 + 4) * n // ranks

    def test_deepspeeds_estimate_of_stage_3_leaves_the_weights_out(self):
        n, ranks, largest = ONE_GROUP.trained, 4, ONE_GROUP.largest_module
        _, theirs, _ = estimate_zero3_model_states_mem_needs(
            n, largest, ranks, 1, cpu_offload=False
        )
        ours = static_parts(ONE_GROUP, scheme(3), ema=False)

        # Beside 4 bytes of the largest layer: the same 18, but 2 of stage 3's 16-bit weights less.
        with_fp32_gradients = ours.total - ours.buffers + 4 * n // ranks
        assert theirs - 4 * largest == with_fp32_gradients - 2 * n // ranks


@pytest.fixture(scope='module')
def planner():
    """Of the default batch, which a ds_config may change; it measures once for all tests."""
    return MemoryPlanner(config_of('DATA.BATCH_SIZE', '128'))


class TestFit:
    def test_the_largest_micro_batch_fits_and_one_more_does_not(self, planner):
        config = config_of()
        room = 300_000_000
        for stage in range(4):
            of = planner.scheme(ds.resolve_or_raise(variant({}, stage, NONE), config, 8), 8)
            most = planner.largest_micro_batch(of, room, recompute=False)

            needs = [
                planner.need_of(replace(of, micro_batch=n), recompute=False).device
                for n in (most, most + 1)
            ]
            assert needs[0] <= room < needs[1]

    def test_nothing_fits_into_less_than_the_states(self, planner):
        of = planner.scheme(ds.resolve_or_raise({}, config_of(), 1), 1)

        assert planner.largest_micro_batch(of, 1_000_000, recompute=False) == 0

    def test_need_takes_what_a_ds_config_says(self, planner):
        config = config_of('DATA.BATCH_SIZE', '128')

        def need(micro=4, recompute=False, **zero):
            tree = {'train_micro_batch_size_per_gpu': micro, 'zero_optimization': zero}
            return planner.need(ds.resolve_or_raise(tree, config, 2), 2, recompute=recompute)

        plain = need(stage=2, reduce_bucket_size=10_000_000)
        assert need(64, stage=2, reduce_bucket_size=10_000_000).device > plain.device
        overlapped = need(stage=2, reduce_bucket_size=10_000_000, overlap_comm=True)
        assert overlapped.parts.buffers - plain.parts.buffers == 20_000_000
        assert need(4096, recompute=True, stage=0).device < need(4096, stage=0).device
        assert plain.host == 0
        assert need(stage=2, offload_optimizer={'device': 'cpu'}).host > 0

    def test_a_host_keeps_the_copy_of_a_background_save(self, monkeypatch):
        """That of rank 0 has the module too, and its ranks' share of the states."""
        # What torch rounds up of it is measured: see test_measured.py.
        monkeypatch.setattr(static_memory, 'locked_bytes', lambda size: size)
        config = config_of('DATA.BATCH_SIZE', '96')
        planner = MemoryPlanner(config)

        def on_host(hosts):
            found = options(planner, config, {}, Machine(8, 10**10, 8 // hosts, None, 1e9))
            return {o.stage: o for o in found if not o.recompute and o.offload == NONE}

        sync = {hosts: on_host(hosts) for hosts in (1, 2)}
        set_options(config, {'CHECKPOINT.ASYNC': True})
        for hosts, of_stages in sync.items():
            for stage, option in on_host(hosts).items():
                copy, size = (
                    option.host_bytes - of_stages[stage].host_bytes,
                    option.checkpoint_bytes,
                )
                weights = 0 if stage == 3 else option.need.parts.weights
                wanted = size if stage == 0 else weights + (size - weights) / hosts
                assert copy == pytest.approx(wanted, rel=0.01)

    def test_cuda_and_nccl_have_their_share_of_a_gpu_and_fragments_of_the_rest(self):
        alone, many = (Machine(gpus, 16 * 10**9, 1, None, 1e9).usable for gpus in (1, 2))

        assert alone == pytest.approx(0.95 * 15.5e9, rel=0.01)
        assert many == pytest.approx(0.95 * 14.5e9, rel=0.01)
        assert Machine(8, 10**9, 8, None, 1e9).usable == 0

    def test_the_choice_keeps_the_batch_and_takes_what_it_must(self, planner):
        config = config_of('DATA.BATCH_SIZE', '96')

        def take(memory, host=None):
            whole = memory + Machine(8, 0, 8, None, 1e9).taken
            return choose(options(planner, config, {}, Machine(8, whole, 8, host, 1e9)))

        easy, tight = take(10**9), take(25_000_000)
        assert (easy.stage, easy.recompute, easy.micro_batch, easy.accumulation) == (
            0,
            False,
            96,
            1,
        )
        assert tight.micro_batch * tight.accumulation == 96
        of = planner.scheme(
            ds.resolve_or_raise(variant({}, tight.stage, tight.offload), config, 8), 8
        )
        taken = replace(of, micro_batch=tight.micro_batch, accumulation=tight.accumulation)
        assert planner.need_of(taken, recompute=tight.recompute).device <= 0.95 * 25_000_000
        assert (tight.stage, tight.micro_batch) != (0, 96)
        assert take(1_000_000) is None
        assert take(10**9, host=1000) is None


class TestCommand:
    WORDS = ('plan', '--cfg', 'digits_quickstart', '--gpus', '8', '--gpu-mem', '80GB')

    def test_json_has_every_option_and_the_choice(self, capsys):
        more = '--cpu-mem', '1TiB', '--disk-rate', '2GB/s', '--host-mtbf', '500'
        assert main([*self.WORDS, *more, '--json']) == 0

        tree = json.loads(capsys.readouterr().out)
        combinations = {(o['stage'], o['offload'], o['recompute']) for o in tree['options']}
        assert combinations == {
            (stage, offload, recompute)
            for recompute in (False, True)
            for stage, offload in [
                (0, 'none'), (1, 'none'), (2, 'none'), (3, 'none'),
                (1, 'optimizer'), (2, 'optimizer'), (3, 'optimizer'), (3, 'all'),
            ]
        }  # fmt: skip
        assert tree['precision'] == 'bf16'
        assert tree['failures']['between'] == 500 * 3600
        assert tree['machine']['host_bytes'] == 2**40
        for option in tree['options']:
            passing = sum(option['device'].values())
            assert option['device_bytes'] >= passing > 0
            assert option['save_seconds'] == option['checkpoint_bytes'] / 2e9
        chosen = tree['options'][tree['choice']]
        assert chosen['micro_batch'] == 16
        assert tree['advice'].endswith('--deepspeed_config zero0 --opts DATA.BATCH_SIZE 16')

    def test_the_table_shows_every_option_once_and_the_advice_last(self, capsys):
        assert main([*self.WORDS]) == 0

        first, _, titles, *rows, _, words = capsys.readouterr().out.splitlines()
        assert first.startswith('vit_tiny_patch16_224: 0.4 M parameters')
        assert titles.split()[:3] == ['stage', 'offload', 'recompute']
        assert len(rows) == 16
        assert sum('<-' in row for row in rows) == 1
        assert words.startswith('Take ZeRO stage 0, 16 images')

    def test_nothing_fits_is_status_1_and_says_what_is_missing(self, capsys):
        assert main([*self.WORDS[:-1], '1MB']) == 1

        assert 'Nothing fits: the least is ZeRO stage 3' in capsys.readouterr().out

    def test_settings_of_a_ds_config_are_kept(self, tmp_path, capsys):
        path = tmp_path / 'mine.json'
        path.write_text('{"zero_optimization": {"stage": 0, "reduce_bucket_size": 20000000}}')

        assert main([*self.WORDS, '--deepspeed_config', str(path), '--json']) == 0

        tree = json.loads(capsys.readouterr().out)
        by_stage = {o['stage']: o['device']['buffers'] for o in tree['options']}
        assert by_stage[1] >= 2 * 20_000_000
        assert f'--deepspeed_config {path} --opts' in tree['advice']

    def test_advice_says_what_to_write_where_nothing_ships(self):
        config = config_of('DATA.BATCH_SIZE', '96')
        machine = Machine(8, 10**10, 8, None, 1e9)
        found = [
            o for o in options(MemoryPlanner(config), config, {}, machine) if o.offload == OPTIMIZER
        ]
        section = '"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", '

        words = advice(found, config, {}, '', machine)
        assert words.startswith('Take ZeRO stage 1 with the optimizer offloaded, 96 images')
        assert f'--opts DATA.BATCH_SIZE 96, and a --deepspeed_config of {{{section}' in words
        words = advice(found, config, {}, 'mine.json', machine)
        assert f'--deepspeed_config mine.json --opts DATA.BATCH_SIZE 96, with {{{section}' in words

    @pytest.mark.parametrize(
        ('words', 'said'),
        [
            (('--gpu-mem', '80'), 'no size'),
            (('--gpus', '0'), 'not a number above 0'),
            (('--disk-rate', '2GB'), 'no rate'),
        ],
    )
    def test_wrong_words_are_status_2(self, words, said, capsys):
        with pytest.raises(SystemExit) as caught:
            main([*self.WORDS, *words])

        assert caught.value.code == 2
        assert said in capsys.readouterr().err

    def test_a_model_that_does_not_exist_is_status_2(self, capsys):
        assert main([*self.WORDS, '--opts', 'MODEL.NAME', 'vit_tinny']) == 2
        assert 'timm has no such model' in capsys.readouterr().err


_SIX_G = """
import resource
resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
from internvl_ds.tools.cli import main
raise SystemExit(main([
    'plan', '--cfg', 'vit_base_patch16_224_finetune', '--gpus', '64', '--gpu-mem', '80GB', '--json',
    '--opts', 'MODEL.NAME', 'vit_base_patch14_reg4_dinov2', 'MODEL.KWARGS.embed_dim', '3200',
    'MODEL.KWARGS.depth', '48', 'MODEL.KWARGS.num_heads', '25', 'MODEL.KWARGS.reg_tokens', '0',
    'MODEL.KWARGS.qk_norm', 'True', 'DATA.BATCH_SIZE', '16', 'TRAIN.LR_LAYER_DECAY', 'False',
]))
"""


_INTERN_VIT_6B = [
    'plan', '--cfg', 'intern_vit_6b_224_linear_probe', '--gpus', '8', '--gpu-mem', '80GB', '--json',
    '--deepspeed_config', 'intern_vit_6b_224_linear_probe',
]  # fmt: skip


@pytest.mark.slow
def test_a_linear_probe_of_intern_vit_6b_is_planned(capsys):
    assert main(_INTERN_VIT_6B) == 0
    tree = json.loads(capsys.readouterr().out)
    # All but the head is frozen: its batch norm, and 1000 rows of twice the width.
    assert tree['model']['trained'] == 2 * 6400 + 6400 * 1000 + 1000
    assert tree['model']['parameters'] == 5_909_207_400
    least = tree['options'][tree['choice']]
    assert 11.8e9 < least['device']['weights'] < 11.9e9
    assert least['largest_micro_batch'] >= 128


@pytest.mark.slow
@pytest.mark.soak_only  # the same model, but for its head frozen, is planned above
def test_a_model_of_5_9_g_parameters_is_planned_in_2_gib():
    done = subprocess.run(
        [sys.executable, '-c', _SIX_G], capture_output=True, text=True, timeout=300,
        env=base_env(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    tree = json.loads(done.stdout)
    assert tree['model']['parameters'] == pytest.approx(5.9e9, rel=0.01)
    by_stage = {o['stage']: o for o in tree['options'] if o['offload'] == 'none'}
    assert by_stage[0]['largest_micro_batch'] == 0  # 16 bytes a parameter are 94 GB
    assert by_stage[3]['largest_micro_batch'] > 0
    assert math.isclose(
        by_stage[1]['device']['weights'], 2 * tree['model']['parameters'], rel_tol=1e-3
    )
