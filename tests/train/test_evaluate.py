"""Accuracy over exactly the validation images, whatever the ranks, batches and precision."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from internvl_ds.engine.epochs import seed_everything
from internvl_ds.pretrained.head import imagenet_22k_rows
from internvl_ds.train.data import EvalSampler, build_loaders
from internvl_ds.train.evaluate import count_batch, evaluate, measure_throughput
from internvl_ds.train.model import build_model
from tests.harness import training as training_ranks
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config, write_folder

CPU = torch.device('cpu')


class Lookup(nn.Module):
    """Answers with the row of logits that the 'image' names."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return self.logits[images[:, 0].long()]


class Images(TensorDataset):
    def __init__(self, count, labels, classes):
        super().__init__(torch.arange(count, dtype=torch.float32)[:, None], labels)
        self.classes = [str(i) for i in range(classes)]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('images'), classes=3, train=25, val=7)


def lookup_case(count=13, classes=10):
    torch.manual_seed(0)
    logits, labels = torch.randn(count, classes), torch.randint(classes, (count,))
    return logits, labels, Images(count, labels, classes)


@pytest.mark.parametrize('batch_size', [1, 5, 13, 64])
def test_it_agrees_with_counting_by_hand(tmp_path, batch_size):
    logits, labels, dataset = lookup_case()
    loader = DataLoader(dataset, batch_size=batch_size)
    result = evaluate(small_config(tmp_path), Lookup(logits), loader, CPU)
    order = logits.argsort(dim=1, descending=True)
    assert result.count == 13
    assert result.acc1 == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    in_top5 = (order[:, :5] == labels[:, None]).any(dim=1).double().mean().item()
    assert result.acc5 == pytest.approx(100 * in_top5)
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())


@pytest.mark.parametrize(('count', 'world'), [(1, 4), (7, 2), (13, 3), (13, 4)])
def test_the_ranks_sums_are_those_of_one_process(count, world):
    """What each rank would add, batch by batch, without a process group."""
    logits, labels, dataset = lookup_case(count)
    total = torch.zeros(5, dtype=torch.float64)
    for rank in range(world):
        sampler = EvalSampler(count, world, rank)
        left = sampler.num_valid
        for images, targets in DataLoader(dataset, batch_size=2, sampler=sampler):
            valid = min(left, len(targets))
            total += count_batch(logits[images[:valid, 0].long()], targets[:valid])
            left -= valid
    assert total[3] == count
    torch.testing.assert_close(total, count_batch(logits, labels))


def test_an_empty_batch_counts_nothing():
    assert count_batch(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64)).tolist() == [0.0] * 5


def test_with_fewer_than_five_classes_top5_is_over_all(tmp_path):
    logits, _, dataset = lookup_case(classes=3)
    result = evaluate(small_config(tmp_path), Lookup(logits), DataLoader(dataset), CPU)
    assert result.acc5 == 100.0


def test_22k_logits_are_measured_on_the_1k_classes(tmp_path):
    logits = torch.zeros(2, 21841)
    row = imagenet_22k_rows()[7]
    logits[0, row] = 1.0
    logits[1, row + 1] = 1.0
    dataset = Images(2, torch.tensor([7, 7]), 1000)
    config = small_config(tmp_path, MODEL__NUM_CLASSES=21841, EVAL_22K_TO_1K=True)
    result = evaluate(config, Lookup(logits), DataLoader(dataset, batch_size=1), CPU)
    assert result.acc1 == 50.0


@pytest.mark.parametrize('training', [True, False])
def test_the_model_is_evaluated_in_eval_mode_and_put_back(data, training):
    config = small_config(data, EVAL_MODE=True)
    model = nn.Sequential(nn.Dropout(0.9), build_model(config)).train(training)
    loader = build_loaders(config, 0, 1).val
    results = {evaluate(config, model, loader, CPU) for _ in range(3)}
    assert len(results) == 1
    assert model.training == training


def test_it_leaves_no_gradients_and_takes_half_precision(data):
    config = small_config(data, EVAL_MODE=True)
    model = build_model(config).to(torch.bfloat16)
    result = evaluate(config, model, build_loaders(config, 0, 1).val, CPU)
    assert result.count == 7
    assert all(p.grad is None for p in model.parameters())


def test_throughput_is_images_per_second(data):
    config = small_config(data, THROUGHPUT_MODE=True)
    model = build_model(config)
    assert measure_throughput(model, build_loaders(config, 0, 1).val, CPU) > 1


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize(('stage', 'level', 'ranks'), [(0, 'O0', 3), (3, 'O0', 2), (3, 'O2', 2)])
def test_through_an_engine_on_several_ranks(data, tmp_path, stage, level, ranks):
    results = run_ranks(
        training_ranks.evaluate_on_ranks, ranks, tmp_path,
        data=str(data), stage=stage, level=level, batch_size=3,
    )  # fmt: skip
    assert all(result == results[0] for result in results)
    config = small_config(data, EVAL_MODE=True)
    seed_everything(0)
    expected = evaluate(config, build_model(config), build_loaders(config, 0, 1).val, CPU)
    assert results[0]['count'] == 7
    assert results[0]['training']
    assert results[0]['loss'] == pytest.approx(expected.loss, rel=1e-5 if level == 'O0' else 1e-2)
    if level == 'O0':
        assert results[0]['acc1'] == expected.acc1


@pytest.mark.ranks
def test_a_share_that_counts_images_twice_is_an_error(data, tmp_path):
    texts = run_ranks(training_ranks.evaluate_with_a_padding_sampler, 2, tmp_path, data=str(data))
    for text in texts:
        assert 'counted 8 images on 2 ranks' in text
        assert 'has 7' in text
