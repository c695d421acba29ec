"""The table of the original's README, and where its data sets lie."""

import pytest

from internvl_ds.errors import ConfigError
from internvl_ds.tools.evaluate.columns import COLUMNS, as_table, choose_paths

RESULT = {
    'rows': [
        {
            'name': 'a.yaml',
            'results': {'imagenet': {'acc1': 88.23}, 'imagenet_sketch': {'acc1': 69.117}},
        },
        {'name': 'a|b', 'results': {name: {'acc1': 100.0} for name in COLUMNS}},
    ]
}


def test_the_table_has_the_originals_columns_and_digits():
    assert as_table(RESULT).splitlines() == [
        'model   IN-1K  IN-ReaL  IN-V2   IN-A   IN-R  IN-Sketch',
        'a.yaml   88.2        -      -      -      -       69.1',
        'a|b     100.0    100.0  100.0  100.0  100.0      100.0',
    ]
    assert as_table(RESULT, markdown=True).splitlines() == [
        '| model name | IN-1K | IN-ReaL | IN-V2 | IN-A | IN-R | IN-Sketch |',
        '| --- | :---: | :---: | :---: | :---: | :---: | :---: |',
        '| a.yaml | 88.2 | - | - | - | - | 69.1 |',
        '| a/b | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |',
    ]


def test_a_root_has_the_folders_of_the_readme_and_words_win_over_it(tmp_path):
    for folder in ('imagenet-1k', 'imagenet-a', 'imagenetv2'):
        (tmp_path / folder).mkdir()
    paths, lacking = choose_paths(str(tmp_path), ['imagenet_r=elsewhere', 'imagenet_a=other=x'])
    assert paths == {
        'imagenet': f'{tmp_path}/imagenet-1k',
        'imagenet-real': f'{tmp_path}/imagenet-1k',
        'imagenetv2': f'{tmp_path}/imagenetv2',
        'imagenet_a': 'other=x',
        'imagenet_r': 'elsewhere',
    }
    assert lacking == ['imagenet_sketch']
    assert choose_paths(None, ['imagenet_r=x']) == ({'imagenet_r': 'x'}, [])


@pytest.mark.parametrize(
    ('root', 'words', 'said'),
    [
        (None, [], 'give --data ROOT'),
        ('', [], 'has none of the folders imagenet-1k, imagenetv2, imagenet-a'),
        (None, ['imagenet-a=x'], 'imagenet-a=x: is not DATASET=PATH with one of .*imagenet_a'),
        (None, ['imagenet_a'], 'is not DATASET=PATH'),
    ],
)
def test_what_there_is_to_evaluate_is_never_nothing(tmp_path, root, words, said):
    with pytest.raises(ConfigError, match=said):
        choose_paths(root if root is None else str(tmp_path), words)
