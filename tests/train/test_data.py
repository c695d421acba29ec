"""What the training program reads: exactly the images it says, in an order that repeats."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms

from internvl_ds.checkpoint.formats.rng import rng_state
from internvl_ds.dist.signals import SIGNALS
from internvl_ds.engine.epochs import seed_everything
from internvl_ds.errors import ConfigError, DataError
from internvl_ds.train.data import (
    EvalSampler,
    build_loaders,
    build_mixup,
    order_of,
    shard_indices,
    start_epoch,
)
from internvl_ds.train.datasets.opening import evaluates_22k_as_1k
from internvl_ds.train.datasets.transforms import build_transform
from internvl_ds.train.position import Position
from internvl_ds.train.sampler import TrainSampler
from tests.harness.training import small_config, write_folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('images'), classes=3, train=25, val=7)


def epoch_images(loader, epoch, rank=0, seed=0):
    start_epoch(loader, seed, epoch, rank)
    return torch.cat([images for images, _ in loader])


def signals_that_reach(pid):
    """Those of `SIGNALS` that a process neither blocks nor ignores."""
    status = dict(
        line.split(':\t') for line in Path(f'/proc/{pid}/status').read_text().splitlines()
    )
    deaf = int(status['SigBlk'], 16) | int(status['SigIgn'], 16)
    return [number for number in SIGNALS if not deaf >> (number - 1) & 1]


@pytest.mark.parametrize('total', [1, 7, 797])
@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_every_validation_image_is_counted_once_on_equally_long_shares(total, world):
    shares = [shard_indices(total, world, rank) for rank in range(world)]
    counted = [index for indices, valid in shares for index in indices[:valid]]
    assert sorted(counted) == list(range(total))
    assert len({len(indices) for indices, _ in shares}) == 1
    assert all(0 <= index < total for indices, _ in shares for index in indices)


@pytest.mark.parametrize('batch_size', [1, 3, 64])
@pytest.mark.parametrize(('total', 'world'), [(1, 4), (7, 2), (7, 3), (797, 4)])
def test_every_rank_runs_the_same_batches(total, world, batch_size):
    shapes = set()
    for rank in range(world):
        sampler = EvalSampler(total, world, rank)
        loader = torch.utils.data.DataLoader(
            torch.arange(total), batch_size=batch_size, sampler=sampler
        )
        shapes.add(tuple(len(batch) for batch in loader))
        assert sampler.num_valid <= len(sampler)
    assert len(shapes) == 1


def test_training_images_are_dealt_out_without_overlap(data):
    config = small_config(data, DATA__BATCH_SIZE=2)
    loaders = [build_loaders(config, rank, 3).train for rank in range(3)]
    assert len({len(loader) for loader in loaders}) == 1
    for loader in loaders:
        start_epoch(loader, 0, 0, 0)
    seen = [draw.image for loader in loaders for draw in loader.sampler]
    assert len(seen) == len(set(seen)) == 24  # 25 images, 8 for each rank


@pytest.mark.parametrize('epoch', [0, 3])
@pytest.mark.parametrize(('total', 'world'), [(25, 3), (24, 4), (7, 1)])
def test_the_order_is_that_of_torchs_distributed_sampler(total, world, epoch):
    for rank in range(world):
        ours = TrainSampler(total, world, rank, seed=5)
        ours.start(epoch)
        theirs = DistributedSampler(range(total), world, rank, seed=5, drop_last=True)
        theirs.set_epoch(epoch)
        assert [draw.image for draw in ours] == list(theirs)
        assert len(ours) == len(theirs)


@pytest.mark.parametrize('repeats', [2, 3])
@pytest.mark.parametrize(('total', 'world'), [(25, 3), (24, 4), (7, 1)])
def test_repeats_are_those_of_timms_sampler_each_with_a_seed_of_its_own(total, world, repeats):
    draws = []
    for rank in range(world):
        ours = TrainSampler(total, world, rank, seed=0, repeats=repeats)
        ours.start(3)
        theirs = RepeatAugSampler(range(total), world, rank, num_repeats=repeats, selected_round=0)
        theirs.set_epoch(3)
        own = list(ours)
        assert [draw.image for draw in own] == list(theirs)[: len(ours)]
        assert len(own) == total // world
        for first in range(len(own)):
            ours.start(3, first)
            assert list(ours) == own[first:]
        draws += own
    assert len({draw.seed for draw in draws}) == len(draws)
    most = max(sum(draw.image == image for draw in draws) for image in range(total))
    assert most == repeats


def test_a_repeated_epoch_goes_on_in_its_middle_on_other_ranks_and_not_in_another_order(data):
    config = small_config(data, DATA__REPEATED_AUG=3)
    whole = list(TrainSampler(25, 1, 0, 0, repeats=3))
    rest = [TrainSampler(25, 2, rank, 0, repeats=3) for rank in range(2)]
    for sampler in rest:
        sampler.start(0, 4)
    assert sorted(draw for share in rest for draw in share) == sorted(whole[8:24])
    order = order_of(build_loaders(config, 0, 2).train, 0)
    plain = order_of(build_loaders(small_config(data), 0, 2).train, 0)
    assert order == {**plain, 'REPEATED_AUG': 3}
    logger = logging.getLogger('test')
    for saved, now, goes_on in ((order, order, True), (order, plain, False), (plain, order, False)):
        position = Position(micro_batches=2, images=8, ranks=2, order=saved)
        assert position.fit(8, 2, 1, 3, logger, now) is goes_on


def test_three_augment_is_timms(data):
    config = small_config(data, DATA__IMG_SIZE=40, AUG__AUTO_AUGMENT='3a', AUG__COLOR_JITTER=0.3)
    names = [type(step).__name__ for step in build_transform(config, training=True).transforms]
    assert names[1:4] == ['RandomHorizontalFlip', 'AutoAugment', 'ColorJitter']
    policy = build_transform(config, training=True).transforms[2].policy
    ops = [op.aug_fn.__name__ for (op,) in policy]
    assert ops == ['solarize', 'desaturate', 'gaussian_blur_rand']
    assert epoch_images(build_loaders(config, 0, 1).train, 0).isfinite().all()


def test_an_image_is_augmented_alike_on_any_number_of_ranks():
    shares = [TrainSampler(24, world, rank, 0) for world in (1, 2, 3) for rank in range(world)]
    draws = [set(share) for share in shares]
    assert draws[0] == draws[1] | draws[2] == draws[3] | draws[4] | draws[5]
    assert len({draw.seed for draw in draws[0]}) == 24


def test_an_image_is_augmented_anew_in_every_epoch_and_under_every_seed():
    seeds = []
    for seed in (0, 1):
        sampler = TrainSampler(24, 1, 0, seed)
        for epoch in range(3):
            sampler.start(epoch)
            seeds += [draw.seed for draw in sampler]
    assert len(set(seeds)) == 2 * 3 * 24


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_goes_on_at_any_batch(data, workers):
    config = small_config(data, DATA__IMG_SIZE=40, DATA__NUM_WORKERS=workers, AUG__REPROB=0.5)
    whole = epoch_images(build_loaders(config, 1, 2).train, 2)
    for done in (1, 2):
        # The number of workers may be another one, too.
        other = small_config(data, DATA__IMG_SIZE=40, DATA__NUM_WORKERS=1, AUG__REPROB=0.5)
        rest = build_loaders(other, 1, 2).train
        start_epoch(rest, 0, 2, 1, micro_batches=done)
        images = torch.cat([images for images, _ in rest])
        assert torch.equal(images, whole[4 * done :])


def test_reading_images_leaves_the_generators_of_mixup_and_dropout_alone(data):
    config = small_config(data, DATA__IMG_SIZE=40, AUG__REPROB=0.5)
    loader = build_loaders(config, 0, 1).train
    start_epoch(loader, 0, 0, 0)
    before = rng_state()
    assert len(list(loader)) == 6
    assert rng_state() == before


def test_workers_outlive_the_signals_that_stop_a_run(data):
    config = small_config(data, DATA__NUM_WORKERS=2)
    loader = build_loaders(config, 0, 1).train
    start_epoch(loader, 0, 0, 0)
    batches = iter(loader)
    workers = batches.workers  # a worker of an earlier test may still be ending
    for worker in workers:
        # From its first instruction on it blocks them, and ignores them later.
        assert not signals_that_reach(worker.pid)
        for number in SIGNALS:
            os.kill(worker.pid, number)
    assert len(list(batches)) == 6
    assert len(workers) == 2


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_repeats_exactly_in_a_resumed_run(data, workers):
    config = small_config(data, DATA__IMG_SIZE=40, DATA__NUM_WORKERS=workers, AUG__REPROB=0.5)
    running = build_loaders(config, 0, 1).train
    first, second = epoch_images(running, 0), epoch_images(running, 1)
    resumed = build_loaders(config, 0, 1).train
    np.random.seed(123)  # whatever a fresh process happens to have
    assert torch.equal(epoch_images(resumed, 1), second)
    assert not torch.equal(first, second)


def test_workers_that_are_kept_read_the_same_bit_for_bit(data):
    """Whole epochs, with mixup, from the middle of one, and after one that was broken off."""

    def epochs(**values):
        config = small_config(
            data, DATA__IMG_SIZE=40, AUG__REPROB=0.5, AUG__MIXUP=0.8, AUG__CUTMIX=1.0,
            AUG__AUTO_AUGMENT='rand-m9-mstd0.5-inc1', **values,
        )  # fmt: skip
        loader, mixup = build_loaders(config, 0, 1).train, build_mixup(config)
        read = []
        for epoch, done, until in ((0, 0, 6), (1, 0, 2), (1, 2, 6), (2, 4, 6), (3, 0, 6)):
            start_epoch(loader, 0, epoch, 0, micro_batches=done)
            for number, batch in enumerate(loader, done):
                if number == until:
                    break
                read += [*mixup(*batch), torch.rand(2)]
        return read

    wanted = epochs()
    for workers in (1, 2):
        kept = epochs(DATA__NUM_WORKERS=workers, DATA__PERSISTENT_WORKERS=True)
        assert len(kept) == len(wanted) == 3 * 20
        assert all(map(torch.equal, kept, wanted))
        assert all(map(torch.equal, epochs(DATA__NUM_WORKERS=workers), wanted))


def test_the_rank_reads_itself_where_there_are_no_workers_to_keep(data):
    loader = build_loaders(small_config(data, DATA__PERSISTENT_WORKERS=True), 0, 1).train
    assert len(list(loader)) == 6


def test_augmentation_differs_between_epochs_and_seeds(data):
    config = small_config(data, DATA__IMG_SIZE=40)
    loader = build_loaders(config, 0, 1).train
    same = [epoch_images(loader, 0) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], epoch_images(loader, 1))
    other = small_config(data, DATA__IMG_SIZE=40, SEED=1)
    assert not torch.equal(same[0], epoch_images(build_loaders(other, 0, 1).train, 0))


def test_generators_begin_anew_in_every_epoch_and_position_and_on_every_rank(data):
    loader = build_loaders(small_config(data), 0, 1).train

    def drawn(**changes):
        start_epoch(loader, **{'seed': 0, 'epoch': 0, 'rank': 0, **changes})
        return float(torch.rand(())), float(np.random.rand())

    draws = {drawn(), drawn(epoch=1), drawn(seed=1), drawn(rank=1), drawn(micro_batches=1)}
    assert len(draws) == 5
    assert drawn() in draws
    torch.manual_seed(3)
    wanted = float(torch.rand(()))
    torch.manual_seed(3)
    assert drawn(generators_go_on=True)[0] == wanted


def test_mixup_repeats_with_the_epoch(data):
    config = small_config(data, AUG__MIXUP=0.8, AUG__CUTMIX=1.0)
    loader = build_loaders(config, 0, 1).train

    def mixed(epoch):
        mixup = build_mixup(config)
        start_epoch(loader, 0, epoch, 0)
        return torch.cat([mixup(images, labels)[1] for images, labels in loader])

    assert torch.equal(mixed(3), mixed(3))
    assert not torch.equal(mixed(3), mixed(4))


def test_mixup_is_off_without_a_share(data):
    assert build_mixup(small_config(data)) is None


def test_mixup_wants_an_even_batch(data):
    with pytest.raises(ConfigError, match=r'DATA\.BATCH_SIZE 5 is odd.*AUG\.CUTMIX 1\.0'):
        build_loaders(small_config(data, AUG__CUTMIX=1.0, DATA__BATCH_SIZE=5), 0, 1)


def test_a_missing_folder_is_named_with_a_way_to_get_data(tmp_path):
    with pytest.raises(ConfigError, match=rf'{tmp_path}/val.*internvl-ds digits DIR'):
        build_loaders(small_config(tmp_path), 0, 1)


def test_a_class_folder_without_images_is_named(tmp_path):
    write_folder(tmp_path, classes=3, train=6, val=2)
    with pytest.raises(ConfigError, match='class_2'):
        build_loaders(small_config(tmp_path), 0, 1)


def test_a_pipe_among_the_images_is_named_and_not_waited_for(tmp_path):
    write_folder(tmp_path, classes=3, train=6, val=3)
    pipe = tmp_path / 'val' / 'class_0' / 'pipe.jpg'
    os.mkfifo(pipe)
    images = build_loaders(small_config(tmp_path), 0, 1).val.dataset
    with pytest.raises(
        DataError, match=f'{pipe} cannot be used as an image: Unreadable: .*regular'
    ):
        list(images)


def test_another_number_of_classes_names_both(data):
    with pytest.raises(ConfigError, match=r'3 classes.*MODEL\.NUM_CLASSES 10'):
        build_loaders(small_config(data, MODEL__NUM_CLASSES=10), 0, 1)


def test_train_and_val_must_hold_the_same_classes(tmp_path):
    write_folder(tmp_path, classes=3, train=6, val=3)
    (tmp_path / 'val' / 'class_1').rename(tmp_path / 'val' / 'other')
    with pytest.raises(ConfigError, match=r'only .*train has class_1, only .*val has other$'):
        build_loaders(small_config(tmp_path), 0, 1)


def test_fewer_images_than_one_global_batch_is_an_error_with_the_numbers(data):
    with pytest.raises(ConfigError, match=r'25 images.*4 ranks x DATA\.BATCH_SIZE 8'):
        build_loaders(small_config(data, DATA__BATCH_SIZE=8), 0, 4)


@pytest.mark.parametrize('mode', ['EVAL_MODE', 'THROUGHPUT_MODE'])
def test_without_training_no_training_images_are_needed(tmp_path, mode):
    write_folder(tmp_path, classes=3, train=0, val=3)
    loaders = build_loaders(small_config(tmp_path, **{mode: True}), 0, 1)
    assert loaders.train is None
    assert len(loaders.val.dataset) == 3


def test_a_22k_head_is_measured_on_1000_classes_where_the_config_says_so(data):
    config = small_config(data, MODEL__NUM_CLASSES=21841)
    assert not evaluates_22k_as_1k(config, 1000)
    config.EVAL_22K_TO_1K = True
    assert evaluates_22k_as_1k(config, 1000)
    config = small_config(data, MODEL__NUM_CLASSES=21841, DATA__DATASET='imagenet22K')
    assert evaluates_22k_as_1k(config, 1000)
    assert not evaluates_22k_as_1k(config, 21841)
    config.EVAL_22K_TO_1K = True
    with pytest.raises(ConfigError, match=r'3 classes.*tell 1000 apart'):
        build_loaders(config, 0, 1)


def gradient(width, height):
    """Brightness rises from left to right."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.tile(row[None, :, None], (height, 1, 3)))


def test_evaluation_crops_the_centre_or_squeezes_the_whole(data):
    unit = {'DATA__IMG_SIZE': 48, 'AUG__MEAN': [0.0] * 3, 'AUG__STD': [1.0] * 3}
    image = gradient(96, 48)
    cropped = build_transform(small_config(data, **unit), training=False)(image)
    whole = build_transform(small_config(data, TEST__CROP=False, **unit), training=False)(image)
    assert cropped.shape == whole.shape == (3, 48, 48)
    assert cropped[0, 0, 0] == pytest.approx(0.25, abs=0.02)
    assert whole[0, 0, 0] == pytest.approx(0.0, abs=0.02)
    assert whole[0, 0, -1] == pytest.approx(1.0, abs=0.02)


def test_evaluation_on_random_crops_is_refused(data):
    config = small_config(data, TEST__CROP=False, AUG__RANDOM_RESIZED_CROP=True)
    with pytest.raises(ConfigError, match='RANDOM_RESIZED_CROP'):
        build_transform(config, training=False)


def test_small_images_are_shifted_not_scaled(data):
    config = small_config(
        data, DATA__IMG_SIZE=32, AUG__HFLIP=0.0, AUG__MEAN=[0.0] * 3, AUG__STD=[1.0] * 3
    )
    image = gradient(32, 32)
    original = np.asarray(image)[0, :, 0] / 255
    for _ in range(20):
        row = build_transform(config, training=True)(image)[0, 16].numpy()
        shift = next(s for s in range(-4, 5) if np.allclose(row[4:28], np.roll(original, s)[4:28]))
        assert -4 <= shift <= 4


@pytest.mark.parametrize('name', ['build_transform', 'build_transform_for_linear_probe'])
def test_training_transforms_give_normalized_tensors_of_the_right_size(data, name):
    config = small_config(
        data, DATA__TRANSFORM=name, DATA__IMG_SIZE=48, AUG__AUTO_AUGMENT='rand-m9-mstd0.5-inc1',
        AUG__COLOR_JITTER=0.4, AUG__REPROB=0.25,
    )  # fmt: skip
    seed_everything(3)  # another crop may have no pixel below the mean
    tensor = build_transform(config, training=True)(gradient(96, 64))
    assert tensor.shape == (3, 48, 48)
    assert tensor.dtype == torch.float32
    assert tensor.min() < 0


def test_images_are_normalized_as_timm_and_torchvision_do_to_the_bit(data):
    config = small_config(
        data, DATA__IMG_SIZE=48, AUG__AUTO_AUGMENT='rand-m9-mstd0.5-inc1', AUG__REPROB=0.25,
        AUG__COLOR_JITTER=0.4,
    )  # fmt: skip
    aug = config.AUG
    whole = create_transform(
        48, is_training=True, color_jitter=0.4, auto_augment=aug.AUTO_AUGMENT, re_prob=0.25,
        re_mode=aug.REMODE, re_count=aug.RECOUNT, hflip=aug.HFLIP, scale=tuple(aug.SCALE),
        interpolation=config.DATA.INTERPOLATION, mean=tuple(aug.MEAN), std=tuple(aug.STD),
    )  # fmt: skip
    plain = build_transform(config, training=False)
    plain.transforms[-1:] = [transforms.ToTensor(), transforms.Normalize(aug.MEAN, aug.STD)]
    levels = np.random.default_rng(0).integers(0, 256, (20, 64, 80, 3), np.uint8)
    for seed, image in enumerate(map(Image.fromarray, levels)):
        for training, reference in ((True, whole), (False, plain)):
            seed_everything(seed)
            expected = reference(image)
            seed_everything(seed)
            assert build_transform(config, training)(image).equal(expected)


def test_a_deviation_of_zero_is_refused(data):
    with pytest.raises(ConfigError, match=r'AUG\.STD \[0\.2, 0\.0, 0\.2\] has a zero'):
        build_transform(small_config(data, AUG__STD=[0.2, 0.0, 0.2]), training=True)


def test_an_unknown_transform_is_named(data):
    with pytest.raises(ConfigError, match=r"DATA\.TRANSFORM is 'mine'"):
        build_transform(small_config(data, DATA__TRANSFORM='mine'), training=True)


def test_a_policy_that_timm_does_not_know_is_named(data):
    config = small_config(data, AUG__AUTO_AUGMENT='mine')
    with pytest.raises(ConfigError, match="AUG.AUTO_AUGMENT 'mine'"):
        build_transform(config, training=True)
