"""Each of the original's 78 YAML files starts as it is: trains, or evaluates, as it says."""

from collections import Counter

import pytest

from tests.harness.ranks import run_ranks
from tests.whole import originals


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('classification')
    originals.write_all(folder)
    return folder


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('stage', [1, 3])
def test_every_yaml_of_the_original_starts(folder, stage):
    # A family's own file comes before those that evaluate what it has trained.
    names = sorted(originals.original_yamls(), key=lambda name: (name.count('imagenet'), name))
    outcomes, _ = run_ranks(
        originals.start_all, 2, folder, folder=str(folder), names=names, stage=stage
    )
    counts = Counter(outcomes.values())
    print(f'{len(outcomes)} YAML files at ZeRO stage {stage}: {dict(counts)}')
    assert counts == {'trained epoch 0': 13, 'evaluated 6 images': 65}, outcomes
