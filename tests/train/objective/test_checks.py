"""What the settings of training may not contradict, told by `config check` and at set-up."""

import json

import pytest

from internvl_ds.tools.cli import main


def check(tmp_path, capsys, *opts):
    path = tmp_path / 'ds.json'
    path.write_text(json.dumps({'zero_optimization': {'stage': 1}}))
    options = ['--cfg', 'digits_quickstart', '--world-size', '2']
    status = main(['config', 'check', str(path), *options, *(['--opts', *opts] if opts else [])])
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    ('opts', 'words'),
    [
        (['TRAIN.LOSS', 'bec'], "TRAIN.LOSS is 'bec'; it can be '', 'bce'"),
        (['TRAIN.DIST_BN', 'mean'], "TRAIN.DIST_BN is 'mean'; it can be"),
        (['TRAIN.BCE_SUM', 'True'], "TRAIN.BCE_SUM True is of TRAIN.LOSS 'bce', and that is ''"),
        (['TRAIN.BCE_TARGET_THRESH', '0.2'], 'TRAIN.BCE_TARGET_THRESH 0.2 is of TRAIN.LOSS'),
        (
            ['TRAIN.LOSS', 'bce', 'TRAIN.BCE_TARGET_THRESH', '1.5'],
            'TRAIN.BCE_TARGET_THRESH is 1.5; it takes a number from 0 to 1, or None',
        ),
        (['TRAIN.SAVE_OVERHEAD', '1.0'], 'SAVE_OVERHEAD is 1.0, and a share of the time is from'),
        (['TRAIN.SAVE_OVERHEAD', '-0.1'], 'TRAIN.SAVE_OVERHEAD is -0.1, and a share'),
        (
            ['TRAIN.SAVE_OVERHEAD', '0.1', 'TRAIN.SAVE_MINUTES', '5.0'],
            'TRAIN.SAVE_OVERHEAD 0.1 and TRAIN.SAVE_MINUTES 5.0 both say how often to save',
        ),
        (['DATA.CLASS_WEIGHTS', 'equal'], "CLASS_WEIGHTS is 'equal'; it takes 'balanced', or numb"),
        (['DATA.CLASS_WEIGHTS', '[1, 2]'], 'has 2 numbers, and MODEL.NUM_CLASSES is 10'),
        (['DATA.CLASS_WEIGHTS', '[0, 0, 0, 0, 0, 0, 0, 0, 0, 0]'], 'of which one is above 0'),
        (['DATA.CLASS_WEIGHTS', '[1, 2, -1]'], 'is [1, 2, -1]; it takes'),
        (['DATA.CLASS_WEIGHTS', '2.0'], 'CLASS_WEIGHTS is 2.0; it takes'),
        (['TRAIN.DISTILL.TEACHER', 'resnet18'], "and TRAIN.DISTILL.PRETRAINED '': set both"),
        (['TRAIN.DISTILL.PRETRAINED', 'a.pth'], "TRAIN.DISTILL.TEACHER is '' and"),
        (
            ['TRAIN.DISTILL.TEACHER', 'resnet', 'TRAIN.DISTILL.PRETRAINED', 'a.pth'],
            "TRAIN.DISTILL.TEACHER 'resnet': timm has no such model",
        ),
        (['TRAIN.DISTILL.TYPE', 'firm'], "TRAIN.DISTILL.TYPE is 'firm'; it can be 'soft', 'hard'"),
        (['TRAIN.DISTILL.ALPHA', '1.5'], 'TRAIN.DISTILL.ALPHA is 1.5, and a share'),
        (['TRAIN.DISTILL.TEMPERATURE', '0.0'], 'TEMPERATURE is 0.0; it takes a number above 0'),
        (
            ['TRAIN.DISTILL.TYPE', 'hard', 'TRAIN.DISTILL.TEMPERATURE', '2.0'],
            "TRAIN.DISTILL.TEMPERATURE 2.0 is of TRAIN.DISTILL.TYPE 'soft', and that is 'hard'",
        ),
        (
            ['DATA.REPEATED_AUG', '3', 'DATA.IMG_ON_MEMORY', 'True'],
            'DATA.REPEATED_AUG 3 has several ranks read an image, and DATA.IMG_ON_MEMORY True',
        ),
        (
            ['DATA.REPEATED_AUG', '3', 'DATA.ZIP_MODE', 'True'],
            "and DATA.CACHE_MODE 'part' with DATA.ZIP_MODE True keeps it on one",
        ),
    ],
)
def test_a_contradiction_is_one_line_with_the_keys(tmp_path, capsys, opts, words):
    status, out = check(tmp_path, capsys, *opts)
    assert status == 1
    assert [words in line for line in out.splitlines()] == [False, True]


def test_what_agrees_passes(tmp_path, capsys):
    opts = ['TRAIN.LOSS', 'bce', 'TRAIN.BCE_SUM', 'True', 'TRAIN.BCE_TARGET_THRESH', '0.2']
    more = ['TRAIN.DIST_BN', 'reduce', 'DATA.REPEATED_AUG', '3']
    assert check(tmp_path, capsys, *opts, *more)[0] == 0
