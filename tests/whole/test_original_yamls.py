"""Each of the original's 78 YAML files starts as it is: trains, or evaluates, as it says."""

import os
from collections import Counter

import pytest

from tests.harness.ranks import run_ranks
from tests.whole import originals


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('classification')
    originals.write_all(folder)
    return folder


def chosen(stage):
    """All; but at stage 1, without --soak, of each family one that evaluates what was trained."""
    # A family's own file comes before those that evaluate what it has trained.
    names = sorted(originals.original_yamls(), key=lambda name: (name.count('imagenet'), name))
    if stage == 3 or os.environ.get('INTERNVL_DS_SOAK'):
        return names
    families = [originals.family_of(name) for name in names]
    return [name for i, name in enumerate(names) if families[:i].count(families[i]) < 2]


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
    assert counts == {'trained epoch 0': 13, 'evaluated 6 images': len(names) - 13}, outcomes
    assert len(names) == 78 or stage == 1
