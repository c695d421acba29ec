"""Tags written as one file, and checkpoints compared: tags written by hand. No processes."""

import json
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

from internvl_ds.checkpoint.formats.export import write_original
from internvl_ds.tools.cli import main
from tests.bench.memory import peak_growth

RANKS = 2


def _write_tag(tag, shapes, master, moment):
    """A stage-1 tag of two ranks, as DeepSpeed lays it out, without a manifest."""
    tag.mkdir()
    flat = torch.cat([master(name).reshape(-1) for name in shapes])
    moments = torch.cat([moment(name).reshape(-1) for name in shapes])
    size = -(-len(flat) // (2 * RANKS)) * 2
    pad = size * RANKS - len(flat)
    module = OrderedDict((name, master(name).bfloat16()) for name in shapes)
    module['steps'] = torch.tensor(9)
    module['tied'] = module[next(iter(shapes))]
    head = {
        'module': module, 'buffer_names': ['steps'], 'dp_world_size': RANKS, 'global_steps': 4,
        'skipped_steps': 0, 'global_samples': 64, 'optimizer': None,
        'ds_config': {'zero_optimization': {'stage': 1}, 'bf16': {'enabled': True}},
        'param_shapes': [OrderedDict((name, torch.Size(s)) for name, s in shapes.items())],
        'shared_params': {'tied': next(iter(shapes))},
    }  # fmt: skip
    torch.save(head, tag / 'mp_rank_00_model_states.pt')
    padded = torch.cat([moments, torch.zeros(pad)])
    for rank in range(RANKS):
        state = {'step': torch.tensor(4.0), 'exp_avg': padded[rank * size : (rank + 1) * size]}
        optim = {
            'single_partition_of_fp32_groups': [flat[rank * size : (rank + 1) * size].clone()],
            'group_paddings': [pad if rank == RANKS - 1 else 0],
            'base_optimizer_state': {
                'state': {0: {k: v.clone() for k, v in state.items()}},
                'param_groups': [{'lr': 0.1, 'weight_decay': 0.05, 'params': [0]}],
            },
        }
        torch.save(
            {'optimizer_state_dict': optim},
            tag / f'bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt',
        )
    return tag


@pytest.fixture
def tag(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {'a.weight': (5, 3), 'a.bias': (5,), 'b': (7,)}
    masters = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    return _write_tag(tmp_path / 'tag', shapes, masters.get, lambda n: -masters[n]), masters


def test_the_original_file_holds_masters_and_moments_by_number(tag, tmp_path):
    tag, masters = tag
    out = tmp_path / 'out.pth'
    assert main(['ckpt', 'export', str(tag), str(out)]) == 0
    got = torch.load(out, weights_only=False)
    assert list(got['model']) == ['a.weight', 'a.bias', 'b', 'steps', 'tied']
    for number, (name, master) in enumerate(masters.items()):
        assert torch.equal(got['model'][name], master)
        state = got['optimizer']['state'][number]
        assert torch.equal(state['exp_avg'], -master)
        assert state['exp_avg'].shape == master.shape
        assert float(state['step']) == 4
    assert got['model']['tied'].data_ptr() == got['model']['a.weight'].data_ptr()
    (group,) = got['optimizer']['param_groups']
    assert (group['lr'], group['weight_decay'], group['params']) == (0.1, 0.05, [0, 1, 2])
    assert main(['ckpt', 'diff', str(tag), str(out)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.pth', 'tag']


def test_weights_in_one_file_or_several(tag, tmp_path, capsys):
    tag, masters = tag
    out = tmp_path / 'out.safetensors'
    assert main(['ckpt', 'export', str(tag), str(out), '--dtype', 'bf16']) == 0
    got = load_file(out)
    assert got.keys() == {*masters, 'steps', 'tied'}
    assert torch.equal(got['b'], masters['b'].bfloat16())
    assert int(got['steps']) == 9
    parts = tmp_path / 'parts.safetensors'
    capsys.readouterr()
    arguments = ['ckpt', 'export', str(tag), str(parts), '--max-shard-gib', '0.00000008', '--json']
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told['verified'] is False
    files = [file['path'].rpartition('/')[2] for file in told['files']]
    assert files[0] == 'parts-00001-of-00003.safetensors'
    assert files[-1] == 'parts.safetensors.index.json'
    where = json.loads((tmp_path / files[-1]).read_text())['weight_map']
    assert torch.equal(load_file(tmp_path / where['b'])['b'], masters['b'])
    capsys.readouterr()
    assert main(['ckpt', 'diff', str(tmp_path / files[-1]), str(tag), '--json']) == 1
    found = {row['name']: row for row in json.loads(capsys.readouterr().out)['found']}
    assert all(name.startswith('optimizer/') for name in found)  # of the weights nothing differs


def test_diff_says_what_differs_and_by_how_much(tag, tmp_path, capsys):
    _, masters = tag
    a, b = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save({'model': {**masters, 'only': torch.zeros(2)}, 'epoch': 3}, a)
    changed = masters['b'].clone()
    changed[2] += 0.5
    torch.save({'model': {**masters, 'b': changed, 'a.bias': torch.zeros(6)}, 'epoch': 4}, b)
    assert main(['ckpt', 'diff', str(a), str(a)]) == 0
    capsys.readouterr()
    assert main(['ckpt', 'diff', str(a), str(b)]) == 1
    said = capsys.readouterr().out
    assert 'model/b' in said
    assert '1 of 7 elements differ, by up to 0.5' in said
    assert 'shape (5,) and (6,)' in said
    assert 'only in A' in said
    assert '3 and 4' in said
    assert main(['ckpt', 'diff', str(a), str(tmp_path / 'none')]) == 2


def test_wrong_names_are_refused(tag, tmp_path, capsys):
    tag, _ = tag
    for name, reason in (('x.bin', 'must end in .pth'), ('no/x.pth', 'no such directory')):
        assert main(['ckpt', 'export', str(tag), str(tmp_path / name)]) == 2
        assert reason in capsys.readouterr().err
    assert main(['ckpt', 'export', str(tag), str(tmp_path / 'x.safetensors'), '--ema']) == 2
    assert 'holds no EMA' in capsys.readouterr().err
    assert main(['ckpt', 'export', str(tag), str(tmp_path / 'x.pth'), '--ema']) == 2


def test_export_needs_memory_for_one_tensor_not_for_all(tmp_path):
    count, numel = 12, 1 << 22  # 16 MiB each in fp32, 576 MiB with moments
    shapes = {f'w{i}': (numel,) for i in range(count)}
    tag = _write_tag(
        tmp_path / 'tag', shapes,
        lambda name: torch.full((numel,), float(name[1:])),
        lambda name: torch.full((numel,), -float(name[1:])),
    )  # fmt: skip
    out = tmp_path / 'out.pth'
    # the largest tensor, and 16 MiB for the pickles and what Python and torch keep
    assert peak_growth(lambda: write_original(tag, out)) < 2 * 4 * numel
    got = torch.load(out, weights_only=False, mmap=True)
    assert float(got['model']['w7'][-1]) == 7
    assert float(got['optimizer']['state'][11]['exp_avg'][0]) == -11
