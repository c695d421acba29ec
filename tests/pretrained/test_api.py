"""load_pretrained as a script calls it, on small real modules."""

import copy
import logging
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from internvl_ds.config import tree as config_module
from internvl_ds.errors import ConfigError, PretrainedError
from internvl_ds.pretrained import imagenet_22k_rows, load_pretrained

logger = logging.getLogger('test_pretrained')


class Block(nn.Module):
    def __init__(self, dim, window, heads):
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.randn(window * window, heads))
        self.register_buffer('relative_position_index', torch.arange(window))


class Net(nn.Module):
    def __init__(self, classes=5, dim=8, window=3, grid=4, heads=2, depth=2):
        super().__init__()
        self.absolute_pos_embed = nn.Parameter(torch.randn(1, grid * grid, dim))
        self.blocks = nn.ModuleList(Block(dim, window, heads) for _ in range(depth))
        self.norm = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, classes)


@pytest.fixture(autouse=True)
def _seed_and_log(caplog):
    torch.manual_seed(0)
    caplog.set_level(logging.DEBUG)


@pytest.fixture
def load(tmp_path):
    """Saves an object, then loads it into a model through the public function."""

    def run(obj, model, rand_init=False, **values):
        torch.save(obj, tmp_path / 'w.pth')
        config = config_module.default_config()
        config.MODEL.PRETRAINED = str(tmp_path / 'w.pth')
        config.TRAIN.RAND_INIT_FT_HEAD = rand_init
        for key, value in values.items():
            config.MODEL[key] = value
        config.freeze()
        return load_pretrained(config, model, logger)

    return run


def snapshot(model):
    return copy.deepcopy(model.state_dict())


def assert_state(model, expected):
    state = model.state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key


def lines(caplog, level):
    return [r.getMessage() for r in caplog.records if r.levelno == level]


@pytest.mark.parametrize(
    'wrap', [lambda s: {'model': s, 'epoch': 1}, lambda s: {'module': s}, dict]
)
def test_same_model(load, caplog, wrap):
    source, model = Net(), Net()
    expected = snapshot(source)
    for i in range(2):  # rebuilt by the model, whatever the file says
        source.blocks[i].relative_position_index.fill_(9)
    load(wrap(source.state_dict()), model)
    assert_state(model, expected)
    assert 'dropped 2 buffers that the model builds itself' in lines(caplog, logging.INFO)


def test_all_sizes_at_once(load, caplog):
    source, model = Net(window=3, grid=4), Net(window=5, grid=6)
    expected = snapshot(model) | {
        key: value
        for key, value in snapshot(source).items()
        if 'relative_position' not in key and key != 'absolute_pos_embed'
    }
    for i in range(2):
        table = source.blocks[i].relative_position_bias_table.detach()
        image = table.t().reshape(1, 2, 3, 3)
        image = F.interpolate(image, size=(5, 5), mode='bicubic', align_corners=False)
        expected[f'blocks.{i}.relative_position_bias_table'] = image.reshape(2, 25).t()
    image = source.absolute_pos_embed.detach().reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(6, 6), mode='bicubic', align_corners=False)
    expected['absolute_pos_embed'] = image.permute(0, 2, 3, 1).reshape(1, 36, 8)
    load(source.state_dict(), model)
    assert_state(model, expected)
    info = lines(caplog, logging.INFO)
    assert 'resized 2 relative_position_bias_table 3x3 -> 5x5' in info
    assert 'resized 1 absolute_pos_embed 4x4 -> 6x6' in info


def test_dtypes_meet_in_the_model(load):
    source, model = Net().bfloat16(), Net(window=5).half()
    load(source.state_dict(), model)
    table = source.blocks[0].relative_position_bias_table.detach().float()
    image = F.interpolate(table.t().reshape(1, 2, 3, 3), size=(5, 5), mode='bicubic')
    expected = image.reshape(2, 25).t().half()
    assert torch.equal(model.blocks[0].relative_position_bias_table, expected)
    assert torch.equal(model.head.weight, source.head.weight.half())
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_parameters_stay_the_same_objects(load):
    model = Net(window=5)
    before = list(model.parameters())
    load(Net().state_dict(), model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad for p in before)


def test_left_out_tables_keep_the_model_and_are_reported(load, caplog):
    source, model = Net(heads=4), Net(heads=2)
    before = snapshot(model)
    load(source.state_dict(), model)
    assert torch.equal(
        model.blocks[1].relative_position_bias_table,
        before['blocks.1.relative_position_bias_table'],
    )
    assert torch.equal(model.head.weight, source.head.weight)
    warnings = lines(caplog, logging.WARNING)
    key = 'blocks.0.relative_position_bias_table'
    assert f'{key}: left out: 4 heads in the checkpoint, 2 in the model' in warnings
    # Two tables, and the two index buffers that are never taken from a file.
    assert any(w.startswith('4 entries missing') and key in w for w in warnings)


def test_report_is_short_and_full_at_debug(load, caplog):
    source = Net(depth=2).state_dict() | {f'extra.{i}': torch.zeros(1) for i in range(7)}
    load(source, Net(depth=4))
    warnings = lines(caplog, logging.WARNING)
    names = 'extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more'
    assert f'7 entries unexpected, not in the model: {names}' in warnings
    assert any('blocks.2.' in w and ' more' in w for w in warnings)
    debug = lines(caplog, logging.DEBUG)
    full = ', '.join(f'extra.{i}' for i in range(7))
    assert f'unexpected, not in the model: {full}' in debug
    assert any('blocks.3.proj.bias' in line for line in debug)


def test_student_of_a_sim_free_checkpoint(load):
    source, model = Net(), Net()
    state = {'teacher.norm.weight': torch.zeros(8), 'student_proj.weight': torch.zeros(8)}
    state |= {f'student.{key}': value for key, value in source.state_dict().items()}
    load({'model': state}, model)
    assert_state(model, snapshot(source))


def test_rand_init_scales_the_models_head(load):
    source, model = Net(classes=7), Net(classes=5)
    weight, bias = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    load(source.state_dict(), model, rand_init=True)
    assert torch.equal(model.head.weight, weight * 0.001)
    assert torch.equal(model.head.bias, bias * 0.001)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert model.head.weight.requires_grad


def test_rand_init_leaves_a_head_of_the_same_length(load):
    source, model = Net(), Net()
    load(source.state_dict(), model, rand_init=True)
    assert torch.equal(model.head.weight, source.head.weight)


def test_22k_head_gives_its_rows(load):
    source, model = Net(classes=21841), Net(classes=1000)
    load(source.state_dict(), model)
    for label, row in enumerate(imagenet_22k_rows().tolist()):
        assert torch.equal(model.head.weight[label], source.head.weight[row])
    assert torch.equal(model.head.bias[850], source.head.bias[11136])


def test_head_that_no_setting_allows(load, tmp_path):
    model = Net(classes=5)
    before = snapshot(model)
    with pytest.raises(PretrainedError, match=r'7 classes in the checkpoint, 5 in the model'):
        load(Net(classes=7).state_dict(), model)
    assert_state(model, before)


def test_other_shapes_are_named_and_nothing_is_loaded(load):
    model = Net(classes=5)
    before = snapshot(model)
    state = Net(classes=7).state_dict()
    state['norm.weight'], state['norm.bias'] = torch.zeros(3), torch.zeros(2, 4)
    with pytest.raises(PretrainedError) as caught:
        load(state, model, rand_init=True)
    text = str(caught.value)
    assert '2 entries do not fit the model' in text
    assert 'norm.weight ((3,) in the checkpoint, (8,) in the model)' in text
    assert 'norm.bias ((2, 4) in the checkpoint, (8,) in the model)' in text
    assert text.endswith('leave them out by names that it lacks (MODEL.PRETRAINED_RENAME)')
    # Neither the other entries nor the scaling of the head went through.
    assert_state(model, before)


def test_value_that_is_no_tensor(load):
    with pytest.raises(PretrainedError, match=r'norm.weight \(int in the checkpoint'):
        load(Net().state_dict() | {'norm.weight': 3}, Net())


@pytest.mark.filterwarnings('ignore:.*(sparse tensor|quantize)')
def test_tensors_that_cannot_be_copied_are_named_before_anything_is(load, tmp_path):
    for kind, change in {
        'sparse': torch.Tensor.to_sparse,
        'complex: torch.complex64': lambda v: v.to(torch.complex64),
        'without values': lambda v: v.to('meta'),
        'quantized': lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
    }.items():
        model, state = Net(), Net().state_dict()
        before = snapshot(model)
        with pytest.raises(PretrainedError) as caught:
            load(state | {'head.weight': change(state['head.weight'])}, model)
        assert str(caught.value) == (
            f'{tmp_path / "w.pth"}: 1 entries cannot be copied into the model: head.weight ({kind})'
        )
        assert_state(model, before)


def test_an_absent_key_is_none_too(load):
    state = Net().state_dict()
    model = Net()
    load({'model': state}, model, PRETRAINED_KEY=None)
    assert_state(model, state)


def test_nothing_in_common(load, tmp_path):
    state = {f'net.{key}': value for key, value in Net().state_dict().items()}
    with pytest.raises(PretrainedError) as caught:
        load({'state_dict': state, 'epoch': 1}, Net())
    text = str(caught.value)
    assert text.startswith(f'{tmp_path / "w.pth"}: no key of the checkpoint is in the model')
    assert 'the checkpoint has net.absolute_pos_embed, net.blocks.0.' in text
    assert "(took the 16 entries under 'state_dict'; dropped 2 buffers " in text
    assert 'the model has absolute_pos_embed, blocks.0.relative_position_bias_table' in text
    assert 'MODEL.PRETRAINED_KEY names what to take of the file' in text
    with pytest.raises(PretrainedError, match='the checkpoint has none'):
        load({}, Net())


def test_missing_file_and_empty_setting():
    config = config_module.default_config()
    with pytest.raises(PretrainedError, match=r'MODEL\.PRETRAINED is empty'):
        load_pretrained(config, Net(), logger)
    config.MODEL.PRETRAINED = '/nowhere/w.pth'
    with pytest.raises(PretrainedError, match=r'/nowhere/w\.pth: no such file'):
        load_pretrained(config, Net(), logger)


@pytest.mark.parametrize('rand_init', [False, True])
def test_no_random_number_is_drawn(load, rand_init):
    source, model = Net(window=5, classes=7 if rand_init else 5), Net()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    load(source.state_dict(), model, rand_init=rand_init)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_the_report_says_what_was_done(load):
    source = Net(depth=2).state_dict() | {'extra': torch.zeros(1)}
    report = load(source, Net(depth=3, window=5))
    assert [note.text for note in report.notes] == [
        'dropped 2 buffers that the model builds itself',
        'resized 2 relative_position_bias_table 3x3 -> 5x5',
    ]
    assert report.unexpected == ('extra',)
    assert set(report.missing) == {
        'blocks.0.relative_position_index',
        'blocks.1.relative_position_index',
        *(key for key in Net(depth=3).state_dict() if key.startswith('blocks.2.')),
    }
    assert 'blocks.1.proj.weight' in report.loaded
    # 5 and 3 a block: 11 of 14 parameters
    assert report.matched == pytest.approx(11 / 14)


def test_weights_of_which_too_little_fits_are_refused(load):
    model = Net()
    before = snapshot(model)
    state = {
        'norm.weight': torch.zeros(8),
        'head.bias': torch.zeros(5),
        'layers.0.w': torch.ones(1),
    }
    with pytest.raises(PretrainedError) as caught:
        load(state, model)
    text = str(caught.value)
    assert "only 18 % of the model's parameters are in the checkpoint" in text
    assert 'MODEL.PRETRAINED_MIN_MATCH is 50 %' in text
    assert 'lacks absolute_pos_embed' in text
    assert 'the model lacks layers.0.w' in text
    assert 'MODEL.PRETRAINED_RENAME' in text
    assert_state(model, before)
    assert load(state, model, PRETRAINED_MIN_MATCH=0.1).matched == pytest.approx(2 / 11)


def test_names_of_ones_own(load):
    source, model = Net(), Net()
    state = {key.replace('blocks', 'stages'): value for key, value in source.state_dict().items()}
    load(state, model, PRETRAINED_RENAME=[(r'^stages\.', 'blocks.')])
    assert_state(model, snapshot(source))


def test_the_average_on_request(load):
    source, average, model = Net(), Net(), Net()
    checkpoint = {'model': source.state_dict(), 'model_ema': average.state_dict()}
    load(checkpoint, model, PRETRAINED_EMA=True)
    assert_state(model, snapshot(average))


def test_the_average_under_the_name_of_timms_program_and_by_its_key(load):
    model, average = Net(), Net()
    checkpoint = {'state_dict': Net().state_dict(), 'state_dict_ema': average.state_dict()}
    load(checkpoint, model, PRETRAINED_EMA=True)
    assert_state(model, average.state_dict())
    model = Net()
    load(checkpoint, model, PRETRAINED_KEY='state_dict_ema')
    assert_state(model, average.state_dict())
    with pytest.raises(PretrainedError, match='PRETRAINED_KEY and PRETRAINED_EMA are set'):
        load(checkpoint, model, PRETRAINED_EMA=True, PRETRAINED_KEY='state_dict')
    with pytest.raises(PretrainedError, match='no model_ema, state_dict_ema, .* in it'):
        load({'state_dict': checkpoint['state_dict']}, model, PRETRAINED_EMA=True)


def test_readers_is_one_of_two(load):
    with pytest.raises(ConfigError, match="PRETRAINED_READERS is 'two'"):
        load({}, Net(), PRETRAINED_READERS='two')


def vit(name='vit_base_patch16_224', **more):
    return timm.create_model(
        name, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=4, **more
    )


def test_a_clip_of_openai_into_timms_model(load, caplog):
    model = vit('vit_base_patch16_clip_224')
    wanted = {k: torch.randn(v.shape) for k, v in model.state_dict().items()}
    swaps = {
        'cls_token': 'class_embedding', 'pos_embed': 'positional_embedding', 'norm_pre.': 'ln_pre.',
        'patch_embed.proj': 'conv1', 'blocks.': 'transformer.resblocks.', 'norm1': 'ln_1',
        'norm2': 'ln_2', 'attn.qkv.': 'attn.in_proj_', 'attn.proj': 'attn.out_proj',
        'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj', 'norm.': 'ln_post.',
    }  # fmt: skip
    state = {}
    for key, value in wanted.items():
        name = key
        for ours, openais in swaps.items():
            name = name.replace(ours, openais)
        if key == 'head.weight':
            name, value = 'proj', value.t()
        elif key == 'head.bias':
            continue
        elif key == 'cls_token':
            value = value[0, 0]
        elif key == 'pos_embed':
            value = value[0]
        state[f'visual.{name}'] = value
    wanted['head.bias'] = torch.zeros(4)
    load(state, model)
    assert_state(model, wanted)
    assert any("timm's checkpoint_filter_fn: 0 -> " in line for line in lines(caplog, logging.INFO))


def test_an_internvit_of_the_original_into_timms_model(load):
    source = timm.create_model(
        'vit_intern300m_patch14_448', img_size=56, embed_dim=24, depth=2, num_heads=2, num_classes=4
    )
    model = timm.create_model(
        'vit_intern300m_patch14_448', img_size=84, embed_dim=24, depth=2, num_heads=2, num_classes=4
    )
    load({'module': source.state_dict()}, model)
    expected = snapshot(source)
    grid = source.pos_embed[:, 1:].detach().transpose(1, 2).reshape(1, 24, 4, 4)
    grid = F.interpolate(grid, size=(6, 6), mode='bicubic', antialias=True)
    expected['pos_embed'] = torch.cat(
        [source.pos_embed[:, :1].detach(), grid.flatten(2).transpose(1, 2)], 1
    )
    assert_state(model, expected)
