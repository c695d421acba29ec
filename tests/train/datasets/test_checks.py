"""Settings that mean nothing together, and what ranks keep in memory."""

import pytest

from internvl_ds.errors import ConfigError
from internvl_ds.train.data import build_loaders, order_of
from internvl_ds.train.datasets import checks
from internvl_ds.train.sampler import TrainSampler
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config, write_folder
from tests.train.datasets.made import epochs_of_parts, error_of, zip_folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp('images'), classes=3, train=25, val=7)
    for split in ('train', 'val'):
        zip_folder(root / split, root / f'{split}.zip')
    return root


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        (
            {'DATA__DATASET': 'cifar'},
            "DATA.DATASET is 'cifar'; it can be 'imagenet', 'imagenet22K'",
        ),
        ({'DATA__CACHE_MODE': 'all'}, "DATA.CACHE_MODE is 'all'; it can be 'no', 'part', 'full'"),
        ({'DATA__CACHE_MODE': 'full'}, 'DATA.ZIP_MODE is False: set it True'),
        ({'DATA__INTERPOLATION': 'cubic'}, "DATA.INTERPOLATION is 'cubic'"),
        (
            {'AUG__MIXUP_MODE': 'batches'},
            "AUG.MIXUP_MODE is 'batches'; it can be 'batch', 'pair', 'elem'",
        ),
        ({'AUG__REMODE': 'noise'}, "AUG.REMODE is 'noise'"),
        ({'AUG__REPROB': 1.5}, 'AUG.REPROB is 1.5, and a probability'),
        ({'DATA__MAX_SKIPPED': -0.1}, 'DATA.MAX_SKIPPED is -0.1, and a probability or share'),
        ({'DATA__ON_ERROR': 'ignore'}, "DATA.ON_ERROR is 'ignore'; it can be 'stop', 'skip'"),
        ({'DATA__EXIF_ROTATE': 'maybe'}, "DATA.EXIF_ROTATE is 'maybe'; it can be True, False"),
        ({'AUG__MEAN': [0.5]}, r'AUG.MEAN is \(0.5,\), and takes 3 numbers'),
        ({'AUG__CUTMIX_MINMAX': 0.5}, 'AUG.CUTMIX_MINMAX is 0.5, and takes 2 numbers'),
        (
            {'DATA__ZIP_MODE': True, 'DATA__CACHE_MODE': 'full', 'DATA__IMG_ON_MEMORY': True},
            "DATA.IMG_ON_MEMORY True .* DATA.CACHE_MODE is 'full'",
        ),
    ],
)
def test_what_means_nothing_is_refused_by_name(data, values, words):
    with pytest.raises(ConfigError, match=words):
        build_loaders(small_config(data, **values), 0, 1)


@pytest.mark.parametrize(('total', 'world'), [(25, 3), (24, 4), (7, 1)])
def test_parts_are_disjoint_the_same_in_every_epoch_and_shuffled(total, world):
    shares = []
    for rank in range(world):
        sampler = TrainSampler(total, world, rank, 0, parts=True)
        epochs = []
        for epoch in range(6):
            sampler.start(epoch)
            epochs.append([draw.image for draw in sampler])
            assert len(epochs[-1]) == len(set(epochs[-1])) == total // world == len(sampler)
            sampler.start(epoch, first=2)
            assert [draw.image for draw in sampler] == epochs[-1][2:]
        shares.append(set().union(*epochs))
        assert shares[-1] <= set(range(rank, total, world))
        assert total < 8 or len(set(map(tuple, epochs))) == 6
    assert sum(map(len, shares)) == len(set().union(*shares))


PARTS = [
    {'DATA__IMG_ON_MEMORY': True},
    {'DATA__ZIP_MODE': True, 'DATA__CACHE_MODE': 'part'},
    {'DATA__ZIP_MODE': True, 'DATA__CACHE_MODE': 'full'},
]


@pytest.mark.first
@pytest.mark.ranks
def test_ranks_read_their_parts_and_go_on_with_the_very_same_images(data, tmp_path):
    more = [{**PARTS[0], 'DATA__NUM_WORKERS': 1}, {}]
    ranks = run_ranks(epochs_of_parts, 2, tmp_path, data=str(data), cases=[*PARTS, *more])
    for of_case in zip(*ranks, strict=True):
        seen = [read['0 after 0']['images'] for read in of_case]
        assert len(set(seen[0]) | set(seen[1])) == 24  # of 25: each once, over both ranks
        for read in of_case:
            assert read['1 after 1']['images'] == read['1 after 0']['images'][4:]
            assert read['1 after 1']['sums'] == read['1 after 0']['sums'][4:]
    memory, part, full, workers, plain = zip(*ranks, strict=True)
    assert memory == part == workers
    assert full == plain
    for rank, read in enumerate(memory):
        assert {image % 2 for image in read['0 after 0']['images']} == {rank}


def test_another_number_of_parts_is_another_order(data):
    orders = [
        order_of(build_loaders(small_config(data, **values), 0, world).train, 0)
        for values, world in [(PARTS[0], 1), (PARTS[0], 2), ({}, 1), ({}, 2)]
    ]
    assert [order.pop('parts') for order in orders] == [1, 2, None, None]
    assert orders[0] == orders[1] == orders[2] == orders[3]


def test_memory_holds_the_part_alone_and_reads_no_file_again(data, tmp_path):
    root = write_folder(tmp_path, classes=3, train=12, val=3)
    loader = build_loaders(small_config(root, DATA__IMG_ON_MEMORY=True), 1, 2).train
    source = loader.dataset.images.source
    sizes = [path.stat().st_size for path in sorted((root / 'train').rglob('*.png'))]
    assert source.kept_bytes == sum(sizes[1::2])
    for path in (root / 'train').rglob('*.png'):
        path.unlink()
    assert len(list(loader)) == 1  # 6 images in batches of 4


def test_what_has_no_room_is_refused_before_it_is_read(data, monkeypatch):
    class Memory:
        available = 1000

    monkeypatch.setattr(checks.psutil, 'virtual_memory', Memory)
    said = error_of(small_config(data, DATA__IMG_ON_MEMORY=True))
    assert 'rank 0 is to keep 25 images' in said
    assert 'DATA.IMG_ON_MEMORY' in said
