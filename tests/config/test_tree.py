"""The yacs tree: defaults, YAML inheritance, --opts, flags, and what is refused."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from yacs.config import CfgNode

from internvl_ds.config.tree import (
    copy_of_tree,
    default_config,
    find_config_file,
    get_config,
    get_option,
    merge_opts,
    scale_lr,
)
from internvl_ds.errors import ConfigError

# The original script's keys and defaults, written out by hand.
ORIGINAL = {
    'BASE': [''],
    'DATA': {
        'BATCH_SIZE': 128,
        'DATA_PATH': '',
        'DATASET': 'imagenet',
        'IMG_SIZE': 224,
        'INTERPOLATION': 'bicubic',
        'ZIP_MODE': False,
        'CACHE_MODE': 'part',
        'PIN_MEMORY': True,
        'NUM_WORKERS': 8,
        'IMG_ON_MEMORY': False,
        'TRANSFORM': 'build_transform',
    },
    'MODEL': {
        'TYPE': 'intern_vit_6b',
        'NAME': 'intern_vit_6b',
        'PRETRAINED': '',
        'RESUME': '',
        'NUM_CLASSES': 1000,
        'DROP_RATE': 0.0,
        'DROP_PATH_RATE': 0.1,
        'DROP_PATH_TYPE': 'linear',
        'LABEL_SMOOTHING': 0.1,
        'INTERN_VIT_6B': {
            'PATCH_SIZE': 14,
            'PRETRAIN_SIZE': 224,
            'QKV_BIAS': False,
            'EMBED_DIM': 3200,
            'NUM_HEADS': 25,
            'MLP_RATIO': 4,
            'INIT_VALUES': 0.1,
            'QK_NORMALIZATION': True,
            'DEPTH': 48,
            'USE_FLASH_ATTN': True,
            'FREEZE_VIT': True,
            'PRETRAINED': None,
            'CLS_TARGET': 'cls_patch_concat',
            'NORM_TYPE': 'rms',
        },
        'CLIP_VIT': {
            'PATCH_SIZE': 14,
            'PRETRAIN_SIZE': 336,
            'EMBED_DIM': 1024,
            'NUM_HEADS': 16,
            'MLP_RATIO': 4,
            'DEPTH': 24,
            'FREEZE_VIT': True,
            'PRETRAINED': 'openai/clip-vit-large-patch14-336',
            'CLS_TARGET': 'cls_patch_concat',
        },
    },
    'TRAIN': {
        'START_EPOCH': 0,
        'EPOCHS': 300,
        'WARMUP_EPOCHS': 20,
        'WEIGHT_DECAY': 0.05,
        'BASE_LR': 5e-4,
        'WARMUP_LR': 5e-7,
        'MIN_LR': 5e-6,
        'CLIP_GRAD': 5.0,
        'AUTO_RESUME': True,
        'ACCUMULATION_STEPS': 0,
        'USE_CHECKPOINT': False,
        'LR_SCHEDULER': {'NAME': 'cosine', 'DECAY_EPOCHS': 30, 'DECAY_RATE': 0.1},
        'OPTIMIZER': {
            'NAME': 'adamw',
            'EPS': 1e-8,
            'BETAS': (0.9, 0.999),
            'MOMENTUM': 0.9,
            'USE_ZERO': False,
            'FREEZE_BACKBONE': None,
            'DCN_LR_MUL': None,
        },
        'EMA': {'ENABLE': False, 'DECAY': 0.9998},
        'LR_LAYER_DECAY': False,
        'LR_LAYER_DECAY_RATIO': 0.875,
        'RAND_INIT_FT_HEAD': False,
    },
    'AUG': {
        'COLOR_JITTER': 0.4,
        'AUTO_AUGMENT': 'rand-m9-mstd0.5-inc1',
        'REPROB': 0.25,
        'REMODE': 'pixel',
        'RECOUNT': 1,
        'MIXUP': 0.8,
        'CUTMIX': 1.0,
        'CUTMIX_MINMAX': None,
        'MIXUP_PROB': 1.0,
        'MIXUP_SWITCH_PROB': 0.5,
        'MIXUP_MODE': 'batch',
        'RANDOM_RESIZED_CROP': False,
        'MEAN': (0.485, 0.456, 0.406),
        'STD': (0.229, 0.224, 0.225),
    },
    'TEST': {'CROP': True, 'SEQUENTIAL': False},
    'AMP_OPT_LEVEL': '',
    'AMP_TYPE': 'float16',
    'OUTPUT': '',
    'TAG': 'default',
    'SAVE_FREQ': 1,
    'PRINT_FREQ': 10,
    'EVAL_FREQ': 1,
    'SEED': 0,
    'EVAL_MODE': False,
    'THROUGHPUT_MODE': False,
    'LOCAL_RANK': 0,
    'EVAL_22K_TO_1K': False,
}

# A configuration of the original project's shape: a frozen backbone of its own, a linear probe.
LINEAR_PROBE = """
DATA:
  IMG_ON_MEMORY: False
  BATCH_SIZE: 16 # single GPU batch size
  TRANSFORM: 'build_transform_for_linear_probe'
  DATA_PATH: './data/imagenet-1k'
  IMG_SIZE: 448
MODEL:
  TYPE: intern_vit_6b
  DROP_PATH_RATE: 0.0
  INTERN_VIT_6B:
    FREEZE_VIT: True
    PATCH_SIZE: 14
    PRETRAIN_SIZE: 448
    QKV_BIAS: False
    EMBED_DIM: 3200
    NUM_HEADS: 25
    MLP_RATIO: 4
    INIT_VALUES: 0.1
    QK_NORMALIZATION: True
    DEPTH: 45
    USE_FLASH_ATTN: True
    PRETRAINED: "./pretrained/intern_vit_6b.pth"
    CLS_TARGET: 'cls_patch_concat'
TRAIN:
  EMA:
    ENABLE: True
    DECAY: 0.998
  EPOCHS: 10
  WARMUP_EPOCHS: 1
  WEIGHT_DECAY: 0.0
  BASE_LR: 0.1 # 512
  WARMUP_LR: .0
  MIN_LR: .0
  LR_LAYER_DECAY: false
  OPTIMIZER:
    NAME: 'sgd'
"""

OTHER_BACKBONE = """
DATA:
  DATASET: 'imagenet_a'
AUG:
  MEAN: (0.48145466, 0.4578275, 0.40821073)
  STD: (0.26862954, 0.26130258, 0.27577711)
MODEL:
  TYPE: clip_vit
  CLIP_VIT:
    FREEZE_VIT: True
    PRETRAINED: './pretrained/clip'
TRAIN:
  BASE_LR: 1e-3
"""


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file by name and returns its path."""

    def write(text, name='run.yaml'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
        return path

    return write


@pytest.fixture
def config_of(write):
    """The configuration that a YAML text, --opts and flags make."""

    def config_of(text='', *opts, **flags):
        return get_config(Namespace(cfg=str(write(text)), opts=list(opts) or None, **flags))

    return config_of


def flatten(tree, prefix=''):
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[f'{prefix}{key}'] = value
    return flat


def test_defaults_are_the_originals_in_name_value_and_type():
    ours = flatten(default_config())

    for key, value in flatten(ORIGINAL).items():
        assert ours[key] == value, key
        assert type(ours[key]) in (type(value), CfgNode), key


def test_keys_that_the_original_lacks_are_these():
    assert set(flatten(default_config())) - set(flatten(ORIGINAL)) == {
        'AUG.HFLIP',
        'AUG.SCALE',
        'BENCH.UPDATES',
        'BENCH.WARMUP',
        'CHECKPOINT.ASYNC',
        'CHECKPOINT.ASYNC_COPY',
        'CHECKPOINT.ASYNC_MEMORY',
        'CHECKPOINT.ASYNC_RATE',
        'CHECKPOINT.FROZEN',
        'CHECKPOINT.IO_TIMEOUT',
        'CHECKPOINT.KEEP_BEST',
        'CHECKPOINT.KEEP_EVERY',
        'CHECKPOINT.KEEP_STEPS',
        'CHECKPOINT.LEFTOVER_AGE',
        'CHECKPOINT.LOCK_AGE',
        'CHECKPOINT.LOCK_WAIT',
        'CHECKPOINT.MIRROR',
        'CHECKPOINT.MIRROR_WAIT',
        'CHECKPOINT.RENDEZVOUS_TIMEOUT',
        'CHECKPOINT.SHARED_OUTPUT',
        'COMM.ABORT_TIMEOUT',
        'COMM.CONNECT_TIMEOUT',
        'COMM.DEAD_AFTER',
        'COMM.EXIT_TIMEOUT',
        'COMM.INIT_TIMEOUT',
        'COMM.INTERFACE',
        'COMM.SILENT_AFTER',
        'COMM.TIMEOUT',
        'COMM.WARN_AFTER',
        'DATA.CHECK_CLASS_NAMES',
        'DATA.FACTORY',
        'DATA.META_DATA',
        'DATA.MULTI_LABEL',
        'DATA.PERSISTENT_WORKERS',
        'DATA.REAL_LABELS',
        'DATA.WORKER_TIMEOUT',
        'EVAL_LOADED',
        'MODEL.DOWNLOAD_TIMEOUT',
        'MODEL.FACTORY',
        'MODEL.KWARGS',
        'MODEL.PRETRAINED_EMA',
        'MODEL.PRETRAINED_KEY',
        'MODEL.PRETRAINED_MIN_MATCH',
        'MODEL.PRETRAINED_READERS',
        'MODEL.PRETRAINED_RENAME',
        'TRAIN.EMA.WARMUP',
        'TRAIN.MAX_CONSECUTIVE_OVERFLOWS',
        'TRAIN.PREEMPT_EXIT_CODE',
        'TRAIN.SAVE_MINUTES',
        'TRAIN.SAVE_OVERHEAD',
        'MODEL.SYNC_BN',
        'DATA.ON_ERROR',
        'DATA.CLASS_WEIGHTS',
        'DATA.REPEATED_AUG',
        'TRAIN.BCE_SUM',
        'TRAIN.BCE_TARGET_THRESH',
        'TRAIN.DIST_BN',
        'TRAIN.DISTILL.ALPHA',
        'TRAIN.DISTILL.PRETRAINED',
        'TRAIN.DISTILL.TEACHER',
        'TRAIN.DISTILL.TEMPERATURE',
        'TRAIN.DISTILL.TYPE',
        'TRAIN.LOSS',
        'DATA.MAX_SKIPPED',
        'DATA.EXIF_ROTATE',
        'TRAIN.COMPILE',
        'TRAIN.DETERMINISTIC',
        'TRAIN.OPTIMIZER.ADAM',
        'TRAIN.SHARDED_BUILD',
        'TRAIN.SAVE_ON_OVERFLOW',
        'TRAIN.SAVE_STEPS',
        'TRAIN.TRACEBACK',
        'SAVE_CKPT_NUM',  # the original has it as a flag only
    }


def test_default_config_is_a_copy_that_can_be_changed():
    default_config().TRAIN.EPOCHS = 1

    assert default_config().TRAIN.EPOCHS == 300


def test_a_linear_probe_of_the_originals_shape_merges_without_an_edit(config_of):
    config = config_of(LINEAR_PROBE)

    vit = config.MODEL.INTERN_VIT_6B
    assert (vit.DEPTH, vit.INIT_VALUES, vit.QKV_BIAS) == (45, 0.1, False)
    assert vit.CLS_TARGET == 'cls_patch_concat'
    assert config.DATA.TRANSFORM == 'build_transform_for_linear_probe'
    assert config.TRAIN.WARMUP_LR == 0.0
    assert config.TRAIN.OPTIMIZER.NAME == 'sgd'
    assert config.TRAIN.EMA.DECAY == 0.998
    assert config.TRAIN.CLIP_GRAD == 5.0  # not in the file


def test_another_backbone_of_the_originals_shape_merges_without_an_edit(config_of):
    config = config_of(OTHER_BACKBONE)

    assert config.AUG.MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert config.AUG.STD == (0.26862954, 0.26130258, 0.27577711)
    assert config.MODEL.CLIP_VIT.PRETRAINED == './pretrained/clip'
    assert config.TRAIN.BASE_LR == 1e-3  # YAML reads 1e-3 as text


def test_the_configurations_that_ship_merge():
    for path in find_config_file('digits_quickstart').parent.glob('*.yaml'):
        config = get_config(Namespace(cfg=path.stem))
        assert Path(config.OUTPUT) == Path('output', path.stem)


def test_config_is_frozen(config_of):
    config = config_of()

    with pytest.raises(AttributeError):
        config.TRAIN.EPOCHS = 1


class TestBase:
    def test_is_found_beside_the_file_that_names_it(self, write, monkeypatch, tmp_path):
        write('TRAIN: {EPOCHS: 7, BASE_LR: 0.5}\nTAG: far', 'shared/far.yaml')
        write('BASE: [../shared/far.yaml]\nTRAIN: {EPOCHS: 8}', 'runs/near.yaml')
        path = write('BASE: near.yaml\nDATA: {BATCH_SIZE: 4}', 'runs/run.yaml')
        monkeypatch.chdir(tmp_path)

        config = get_config(Namespace(cfg=str(path.relative_to(tmp_path))))

        assert (config.TRAIN.EPOCHS, config.TRAIN.BASE_LR, config.DATA.BATCH_SIZE) == (8, 0.5, 4)
        assert config.TAG == 'far'
        assert config.BASE == ['near.yaml']

    def test_a_later_one_wins_over_an_earlier_one(self, write, config_of):
        write('SEED: 1\nSAVE_FREQ: 5', 'one.yaml')
        write('SEED: 2', 'two.yaml')

        config = config_of('BASE: [one.yaml, two.yaml]')

        assert (config.SEED, config.SAVE_FREQ) == (2, 5)

    def test_may_be_reached_on_two_ways(self, write, config_of):
        write('SEED: 1', 'root.yaml')
        write('BASE: root.yaml', 'one.yaml')
        write('BASE: root.yaml', 'two.yaml')

        assert config_of('BASE: [one.yaml, two.yaml]').SEED == 1

    @pytest.mark.parametrize('base', ["['']", '[]', "''", '~'])
    def test_empty_means_none(self, config_of, base):
        assert config_of(f'BASE: {base}\nSEED: 3').SEED == 3

    def test_in_a_circle_is_refused(self, write):
        write('BASE: b.yaml', 'a.yaml')
        path = write('BASE: a.yaml', 'b.yaml')

        with pytest.raises(ConfigError, match=r'circle: .*b\.yaml -> .*a\.yaml -> .*b\.yaml'):
            get_config(Namespace(cfg=str(path)))

    def test_that_is_missing_is_named_with_the_file_that_names_it(self, config_of):
        with pytest.raises(ConfigError, match=r'run\.yaml: BASE names gone\.yaml'):
            config_of('BASE: gone.yaml')


class TestRefused:
    @pytest.mark.parametrize(
        ('text', 'message'),
        [
            ('TRAIN: {EPOCH: 3}', 'unknown key TRAIN.EPOCH; the nearest known key is TRAIN.EPOCHS'),
            ('BATCH_SIZE: 3', 'unknown key BATCH_SIZE; the nearest known key is DATA.BATCH_SIZE'),
            ('TRAIN: {EMA: {DECAI: 1}}', 'the nearest known key is TRAIN.EMA.DECAY'),
            ('SOMETHING_ELSE_ALTOGETHER: 1', 'unknown key SOMETHING_ELSE_ALTOGETHER$'),
            ('TRAIN: 3', r'TRAIN is a section, not a value \(3\)'),
            ('TRAIN:', r'TRAIN is a section, not a value \(None\)'),
            ('AMP_TYPE: {TRAIN: bfloat16}', r"AMP_TYPE is a value \('float16'\), not a section"),
            ('TRAIN: {CLIP_GRAD: {MAX: 1}}', 'TRAIN.CLIP_GRAD is a value'),
            ('DATA: {BATCH_SIZE: many}', "DATA.BATCH_SIZE takes a value of type int.*'many'"),
            ('DATA: {BATCH_SIZE: 1.5}', 'of type int, such as 128, and 1.5 is of type float'),
            ('DATA: {BATCH_SIZE: True}', 'True is of type bool'),
            ('TRAIN: {BASE_LR: True}', 'TRAIN.BASE_LR takes a value of type float'),
            ('TRAIN: {AUTO_RESUME: 1}', 'TRAIN.AUTO_RESUME takes a value of type bool'),
            ('AUG: {MEAN: 0.5}', 'AUG.MEAN takes a value of type tuple'),
            ('TAG: 2026-11-23', 'TAG takes a value of type str'),
            ('TAG: 7', 'TAG takes a value of type str'),
            ('AUG: {CUTMIX_MINMAX: 2026-11-23}', 'not a valid type'),
            ('DATA: {1: 2}', r'key DATA\.1 is a int to YAML'),
            ('on: 2', r'key True is a bool to YAML'),
            ('- 1', 'holds a list, not a mapping'),
            ('just words', 'holds a str, not a mapping'),
            ('A: [', 'cannot be read as YAML'),
        ],
    )
    def test_in_yaml(self, config_of, text, message):
        with pytest.raises(ConfigError, match=message) as caught:
            config_of(text)

        assert 'run.yaml: ' in str(caught.value)

    @pytest.mark.parametrize(
        ('opts', 'message'),
        [
            (['TRAIN.EPOCH', '3'], '--opts: unknown key TRAIN.EPOCH; .* is TRAIN.EPOCHS'),
            (['TRAIN', '3'], '--opts: TRAIN is a section'),
            (['SEED.X', '3'], r'--opts: SEED is a value \(0\), not a section'),
            (['SEED', 'x'], "--opts: SEED takes a value of type int, such as 0, and 'x' is of"),
            (['SEED', '['], r"--opts: SEED '\[' cannot be read as YAML"),
            (['SEED'], "KEY VALUE pairs, and 'SEED' has no value"),
            (['SEED', '1', 'TAG'], "KEY VALUE pairs, and 'TAG' has no value"),
        ],
    )
    def test_in_opts(self, config_of, opts, message):
        with pytest.raises(ConfigError, match=message):
            config_of('', *opts)

    def test_in_a_flag_by_its_name(self, config_of):
        with pytest.raises(ConfigError, match=r'--batch-size: DATA\.BATCH_SIZE takes'):
            config_of(batch_size='many')

    def test_a_file_that_is_not_there_tells_which_ones_ship(self):
        with pytest.raises(ConfigError, match=r'--cfg nowhere: no such file; .*digits_quickstart'):
            get_config(Namespace(cfg='nowhere'))

    def test_a_file_that_is_no_text(self, tmp_path):
        path = tmp_path / 'run.yaml'
        path.write_bytes(b'\x89PNG\xff')

        with pytest.raises(ConfigError, match=r'run\.yaml: cannot be read as YAML'):
            get_config(Namespace(cfg=str(path)))


class TestValues:
    @pytest.mark.parametrize(
        ('text', 'key', 'value'),
        [
            ('TRAIN: {BASE_LR: 5e-4}', 'TRAIN.BASE_LR', 5e-4),
            ("TRAIN: {BASE_LR: '5e-4'}", 'TRAIN.BASE_LR', 5e-4),
            ('TRAIN: {CLIP_GRAD: 1}', 'TRAIN.CLIP_GRAD', 1.0),
            ('TRAIN: {CLIP_GRAD: None}', 'TRAIN.CLIP_GRAD', None),
            ('TRAIN: {CLIP_GRAD: ~}', 'TRAIN.CLIP_GRAD', None),
            ('TRAIN: {OPTIMIZER: {BETAS: [0.9, 0.95]}}', 'TRAIN.OPTIMIZER.BETAS', (0.9, 0.95)),
            ('AUG:\n  MEAN: (0.5, 0.5, 0.5)', 'AUG.MEAN', (0.5, 0.5, 0.5)),
            ('TRAIN: {OPTIMIZER: {FREEZE_BACKBONE: [0, 1]}}', 'TRAIN.OPTIMIZER.FREEZE_BACKBONE',
             [0, 1]),
            ('TRAIN: {OPTIMIZER: {DCN_LR_MUL: 0.1}}', 'TRAIN.OPTIMIZER.DCN_LR_MUL', 0.1),
            ("TAG: '7'", 'TAG', '7'),
            ('AUG: {AUTO_AUGMENT: None}', 'AUG.AUTO_AUGMENT', None),
            ('MODEL: {KWARGS: {patch_size: 4, init_values: 1e-5}}', 'MODEL.KWARGS.init_values',
             1e-5),
        ],
    )  # fmt: skip
    def test_from_yaml(self, config_of, text, key, value):
        found = get_option(config_of(text), key, 'missing')

        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize(
        ('key', 'text', 'value'),
        [
            ('TRAIN.BASE_LR', '1e-3', 1e-3),
            ('TRAIN.CLIP_GRAD', '0', 0.0),
            ('TRAIN.CLIP_GRAD', 'null', None),
            ('TRAIN.EMA.ENABLE', 'true', True),
            ('AUG.MEAN', '[0.1, 0.2, 0.3]', (0.1, 0.2, 0.3)),
            ('AUG.MEAN', '(0.1, 0.2, 0.3)', (0.1, 0.2, 0.3)),
            ('TAG', '7', '7'),
            ('TAG', '007', '007'),
            ('TAG', 'no', 'no'),
            ('TAG', '2026-11-23', '2026-11-23'),
            ('TAG', 'a: b: c', 'a: b: c'),
            ('TAG', "'quoted'", 'quoted'),
            ('MODEL.PRETRAINED', '', ''),
            ('MODEL.KWARGS.depth', '3', 3),
            ('MODEL.INTERN_VIT_6B.DEPTH', '3', 3),
            ('TRAIN.OPTIMIZER.FREEZE_BACKBONE', 'true', True),
        ],
    )
    def test_from_opts(self, config_of, key, text, value):
        found = get_option(config_of('', key, text), key, 'missing')

        assert found == value
        assert type(found) is type(value)

    def test_an_opt_wins_over_the_yaml_in_an_open_section(self, config_of):
        config = config_of('MODEL: {KWARGS: {depth: 2}}', 'MODEL.KWARGS.depth', '4')

        assert config.MODEL.KWARGS.depth == 4

    def test_opts_may_be_values_already(self):
        config = default_config()

        merge_opts(config, ['SEED', 3, 'AUG.MEAN', (0.0, 0.0, 0.0)])

        assert (config.SEED, config.AUG.MEAN) == (3, (0.0, 0.0, 0.0))

    @pytest.mark.parametrize('key', ['OUTPUT', 'DATA.DATA_PATH', 'MODEL.RESUME'])
    def test_text_that_no_path_can_be_is_refused(self, key):
        with pytest.raises(ConfigError, match=f'--opts: {key}: has a NUL character'):
            merge_opts(default_config(), [key, '/data/a\0b'])


class TestFlags:
    @pytest.mark.parametrize(
        ('flag', 'value', 'key'),
        [
            ('batch_size', 3, 'DATA.BATCH_SIZE'),
            ('dataset', 'imagenet22K', 'DATA.DATASET'),
            ('data_path', '/data', 'DATA.DATA_PATH'),
            ('zip', True, 'DATA.ZIP_MODE'),
            ('cache_mode', 'no', 'DATA.CACHE_MODE'),
            ('pretrained', 'a.pth', 'MODEL.PRETRAINED'),
            ('resume', 'b.pth', 'MODEL.RESUME'),
            ('accumulation_steps', 2, 'TRAIN.ACCUMULATION_STEPS'),
            ('use_checkpoint', True, 'TRAIN.USE_CHECKPOINT'),
            ('amp_opt_level', 'O2', 'AMP_OPT_LEVEL'),
            ('tag', '7', 'TAG'),
            ('eval', True, 'EVAL_MODE'),
            ('throughput', True, 'THROUGHPUT_MODE'),
            ('save_ckpt_num', 4, 'SAVE_CKPT_NUM'),
            ('use_zero', True, 'TRAIN.OPTIMIZER.USE_ZERO'),
            ('local_rank', 1, 'LOCAL_RANK'),
        ],
    )
    def test_sets_its_key(self, config_of, flag, value, key):
        assert get_option(config_of(**{flag: value}), key, 'missing') == value

    @pytest.mark.parametrize('unset', [None, '', False])
    def test_that_is_not_set_leaves_the_yaml(self, config_of, unset):
        config = config_of('TRAIN: {USE_CHECKPOINT: True}\nTAG: t', use_checkpoint=unset, tag=unset)

        assert config.TRAIN.USE_CHECKPOINT is True
        assert config.TAG == 't'

    def test_of_zero_is_set(self, config_of):
        config = config_of('TRAIN: {ACCUMULATION_STEPS: 4}', accumulation_steps=0)

        assert config.TRAIN.ACCUMULATION_STEPS == 0

    def test_wins_over_opts_which_win_over_the_yaml_and_its_base(self, write, config_of):
        write('SEED: 1\nSAVE_FREQ: 1\nDATA: {BATCH_SIZE: 1}\nPRINT_FREQ: 1', 'base.yaml')
        text = 'BASE: base.yaml\nSAVE_FREQ: 2\nDATA: {BATCH_SIZE: 2}\nPRINT_FREQ: 2'

        config = config_of(text, 'DATA.BATCH_SIZE', '3', 'PRINT_FREQ', '3', batch_size=4)

        values = (config.SEED, config.SAVE_FREQ, config.PRINT_FREQ, config.DATA.BATCH_SIZE)
        assert values == (1, 2, 3, 4)


class TestOutput:
    def test_is_output_and_the_yamls_stem(self, config_of):
        assert config_of().OUTPUT == 'output/run'

    def test_starts_with_the_yamls_own(self, config_of):
        assert config_of('OUTPUT: /results').OUTPUT == '/results/run'

    def test_starts_with_the_flag_first_of_all(self, config_of):
        assert config_of('OUTPUT: /results', output='there').OUTPUT == 'there/run'

    def test_may_be_a_number(self, config_of):
        assert config_of(output='2026').OUTPUT == '2026/run'

    @pytest.mark.parametrize('flags', [{'tag': 't1'}, {}])
    def test_ends_with_the_tag(self, config_of, flags):
        text = '' if flags else 'TAG: t1'
        assert config_of(text, **flags).OUTPUT == 'output/run/t1'

    def test_leaves_the_default_tag_out(self, config_of):
        assert config_of(tag='default').OUTPUT == 'output/run'

    def test_keeps_a_dot_in_the_yamls_name(self, write):
        path = write('', 'vit_sgd_lr0.1.yaml')

        assert get_config(Namespace(cfg=str(path))).OUTPUT == 'output/vit_sgd_lr0.1'


class TestFindConfigFile:
    @pytest.mark.parametrize('name', ['digits_quickstart', 'digits_quickstart.yaml'])
    def test_by_name_among_those_that_ship(self, name):
        assert find_config_file(name).name == 'digits_quickstart.yaml'

    def test_by_path_first(self, write, monkeypatch, tmp_path):
        write('SEED: 5', 'digits_quickstart.yaml')
        monkeypatch.chdir(tmp_path)

        assert find_config_file('digits_quickstart.yaml') == Path('digits_quickstart.yaml')


class TestGetOption:
    def test_reads_a_dotted_key(self):
        assert get_option(default_config(), 'TRAIN.EMA.DECAY', 0.5) == 0.9998

    @pytest.mark.parametrize('key', ['NOPE', 'NOPE.EMA', 'TRAIN.NOPE', 'TRAIN.EMA.DECAY.NOPE'])
    def test_has_a_default_where_key_or_section_is_missing(self, key):
        assert get_option(default_config(), key, 0.5) == 0.5

    def test_reads_a_tree_of_the_scripts_own(self):
        tree = CfgNode({'TRAIN': {'EMA': {'DECAY': None}}})

        assert get_option(tree, 'TRAIN.EMA.DECAY', 0.5) is None
        assert get_option(tree, 'SAVE_CKPT_NUM', 1) == 1


def test_a_learning_rate_is_given_for_512_images():
    assert scale_lr(1e-3, 512) == 1e-3
    assert scale_lr(1e-3, 1024) == 2e-3


def test_a_copy_of_a_tree_is_that_of_clone():
    config = default_config()
    config.AUG.SCALE = [0.5, [1.0]]
    config.freeze()
    copied = copy_of_tree(config)
    assert copied == config.clone()
    assert copied.dump() == config.dump()
    assert type(copied.AUG) is CfgNode
    assert copied.is_frozen()
    config.defrost()
    config.MODEL.NAME, config.AUG.SCALE[1][0] = 'other', 2.0
    assert copied.MODEL.NAME == default_config().MODEL.NAME
    assert copied.AUG.SCALE == [0.5, [1.0]]
