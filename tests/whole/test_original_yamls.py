"""Each of the original's 78 YAML files starts as it is: trains, or evaluates, as it says."""

from collections import Counter

import pytest

from tests.harness.counts import SOAK, share
from tests.harness.ranks import run_ranks
from tests.whole import originals

TRAINED = 13


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('classification')
    originals.write_all(folder)
    return folder


def chosen(stage):
    """All; without --soak each family at one stage, and half of what evaluates it."""
    # A family's own file comes before those that evaluate what it has trained.
    names = sorted(originals.original_yamls(), key=lambda name: (name.count('imagenet'), name))
    families = [name for name in names if originals.family_of(name) == name]
    assert len(families) == TRAINED
    if not SOAK:
        families = families[stage // 2 :: 2]
    variants = [n for n in names if originals.family_of(n) in families and n not in families]
    return [n for n in names if n in families or n in share(variants, 2)]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize('stage', [1, 3])
def test_every_yaml_of_the_original_starts(folder, stage):
    names = chosen(stage)
    outcomes, _ = run_ranks(
        originals.start_all, 2, folder, folder=str(folder), names=names, stage=stage
    )
    counts = Counter(outcomes.values())
    print(f'{len(outcomes)} YAML files at ZeRO stage {stage}: {dict(counts)}')
    trained = sum(originals.family_of(name) == name for name in names)
    evaluated = len(names) - trained
    assert counts == {'trained epoch 0': trained, 'evaluated 6 images': evaluated}, outcomes


def test_each_family_is_started_and_with_soak_each_of_78():
    started = {*chosen(1), *chosen(3)}
    assert len(started) == 78 if SOAK else len(started) > 78 / 2
    assert len(set(map(originals.family_of, started))) == TRAINED
