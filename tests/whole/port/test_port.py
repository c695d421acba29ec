"""The port of a script with the original's call sites: how many lines it takes, and its numbers."""

import difflib
import json
import sys
from pathlib import Path

import pytest

from internvl_ds.dist.network import free_port
from internvl_ds.tools.cli import main
from tests.harness.counts import trials
from tests.harness.ranks import ROOT, run_command, run_ranks
from tests.whole.port import running

FOLDER = Path(__file__).parent
FP32 = {
    f'{steps}-{clip}': ['O0', '--accumulation-steps', steps, '--opts', 'TRAIN.CLIP_GRAD', clip]
    for steps in ('1', '4')
    for clip in ('None', '5.0')
}
AMP = {
    'float16': ['O1', '--opts', 'AMP_TYPE', 'float16'],
    'bfloat16': ['O1', '--accumulation-steps', '4', '--opts', 'AMP_TYPE', 'bfloat16'],
}
EXACT = ('1-None', 'pretrained', 'eval')
UPDATES = 22  # two epochs of 11
# ZeRO stage, AMP_OPT_LEVEL, accumulation, CLIP_GRAD; --soak takes all, continuous integration one.
RESUMED = [(3, 'O0', 4, '5.0'), (1, 'O1', 1, 'None'), (0, 'O0', 1, '5.0'), (2, 'O1', 4, 'None')]
RESUMED = RESUMED[: trials('INTERNVL_DS_PORTS', 1, soak=4)]


def changes():
    """(removed, added) lines of each place where the two scripts differ."""
    plain, ported = ((FOLDER / f'{name}.py').read_text().splitlines() for name in PAIR)
    matcher = difflib.SequenceMatcher(None, plain, ported, autojunk=False)
    return [
        (plain[a:b], ported[c:d]) for tag, a, b, c, d in matcher.get_opcodes() if tag != 'equal'
    ]


PAIR = ('plain', 'ported')


def test_the_port_changes_at_most_15_lines_and_the_document_shows_each():
    lines = sum(max(len(removed), len(added)) for removed, added in changes())
    assert 10 < lines <= 15
    text = (ROOT / 'docs' / 'porting.md').read_text().splitlines()
    shown = [line[1:].strip() for line in text if line.startswith('+')]
    for line in (line for _, added in changes() for line in added):
        # the original goes on in the next line, or has a longer condition
        start = line.strip().split(' or ')[0].removesuffix(')')
        assert any(one.startswith(start) for one in shown), line


def ds_config(folder, stage):
    """At stage 3 every parameter is partitioned, however small."""
    zero = {'stage': stage, **({'stage3_param_persistence_threshold': 0} if stage == 3 else {})}
    path = folder / f'zero{stage}.json'
    path.write_text(json.dumps({'zero_optimization': zero}))
    return str(path)


def run(folder, script, stages):
    """Records of every rank, by stage and setting."""
    weights = f'{folder}/plain/0/1-None/port/ckpt_epoch_1.pth'  # of the original's kind
    settings = {
        **FP32,
        **AMP,
        'pretrained': ['O0', '--pretrained', weights, '--opts', 'TRAIN.CLIP_GRAD', 'None'],
        'eval': ['O0', '--resume', weights, '--eval'],
    }
    jobs = [
        {
            'ds_config': ds_config(folder, stage),
            'arguments': [
                '--output', f'{folder}/{script}/{stage}/{name}', '--throughput',
                '--amp-opt-level', *arguments,
            ],
        }
        for stage in stages
        for name, arguments in settings.items()
    ]  # fmt: skip
    ranks = run_ranks(running.run_script, 2, folder, script=script, jobs=jobs)
    names = [(stage, name) for stage in stages for name in settings]
    return {place: [found[n] for found in ranks] for n, place in enumerate(names)}


def off(plain, ported, kind):
    """The largest relative difference of a kind of number, over ranks and places."""
    worst = 0.0
    for a, b in zip(plain, ported, strict=True):
        assert [r.keys() for r in a] == [r.keys() for r in b]
        for x, y in zip(a, b, strict=True):
            if kind in x:
                pairs = zip(listed(x[kind]), listed(y[kind]), strict=True)
                worst = max([worst, *(abs(p - q) / abs(p or 1) for p, q in pairs)])
    return worst


def listed(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.ranks
@pytest.mark.slow
def test_the_port_trains_as_the_script_under_ddp_did(tmp_path):
    plain, ported = run(tmp_path, 'plain', [0]), run(tmp_path, 'ported', [0, 1, 2, 3])
    # three micro-batches are left over in every epoch; six saves come then
    log = Path(tmp_path, 'ported/3/4-None/port/log_rank0.txt').read_text()
    assert log.count('saving between two micro-batches') == 1
    assert max(line.get('norm', 0) for line in plain[0, '1-None'][0]) > 6  # clipped to 5
    assert [line.keys() for line in plain[0, 'eval'][0]][1:] == [
        {'resumed', 'max_accuracy'}, {'resumed_ema'},
    ]  # fmt: skip
    for (stage, name), found in ported.items():
        wanted = plain[0, name]
        assert off(wanted, found, 'lr') == 0.0, (stage, name)
        if name in EXACT:
            # two ranks: halving and one sum, in either order, round alike
            for kind in ('loss', 'val', 'pretrained', 'resumed', 'resumed_ema'):
                assert off(wanted, found, kind) == 0.0, (stage, name, kind)
        # Sums over micro-batches, or of squares for the norm, in another order: a rounding of 2^-24
        # each, a few an update, which add up.
        most = UPDATES * 2.0**-22
        if name == 'bfloat16':
            # The same of gradients that travel in bfloat16: a rounding is 2^-9.
            most = UPDATES * 2.0**-9
        if name == 'float16':
            most = UPDATES * 2.0**-11
        for kind in ('loss', 'norm', 'val', 'val_ema'):
            assert off(wanted, found, kind) <= most, (stage, name, kind)


def arguments(output, level, accumulation, clip):
    """Of a script with all that is random in it, and workers; EVAL_FREQ leaves one epoch out."""
    return [
        '--output', str(output), '--amp-opt-level', level, '--accumulation-steps',
        str(accumulation), '--opts', 'TRAIN.EPOCHS', '3', 'DATA.NUM_WORKERS', '2', 'AUG.NOISE',
        '0.1', 'AUG.MIXUP', '0.2', 'MODEL.DROP_RATE', '0.2', 'EVAL_FREQ', '2', 'AMP_TYPE',
        'float16', 'TRAIN.CLIP_GRAD', clip,
    ]  # fmt: skip


def launch(folder, stage, arguments):
    """The ported script as a program of its own, which makes its process group itself."""
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port',
        str(free_port()), '-m', 'tests.whole.port.ported', *arguments,
    ]  # fmt: skip
    job = run_command(command, timeout=240, env={'DS_CONFIG': ds_config(folder, stage)})
    assert job.returncode == 0, job.output[-3000:]


def numbers(output):
    """(rank, kind, place) -> what was recorded there, each time."""
    found = {}
    for rank in range(2):
        for line in running.records(output, rank):
            for kind in {'at', 'update', 'epoch'} & line.keys():
                place = (rank, kind, 'val_ema' in line, str(line[kind]))
                found.setdefault(place, []).append(line)
    return found


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize(('stage', 'level', 'accumulation', 'clip'), RESUMED)
def test_a_killed_port_goes_on_as_if_it_had_not_been(tmp_path, stage, level, accumulation, clip):
    setting = level, accumulation, clip
    whole = arguments(tmp_path / 'whole', *setting)
    job = {'ds_config': ds_config(tmp_path, stage), 'arguments': whole}
    run_ranks(running.run_script, 2, tmp_path, script='ported', jobs=[job])
    killed = arguments(tmp_path / 'killed', *setting)
    job.update(arguments=killed, kill='2:5')
    run_ranks(
        running.run_script, 2, tmp_path, expect_failure=True, script='ported', jobs=[job]
    )  # fmt: skip
    output, other = tmp_path / 'whole' / 'port', tmp_path / 'killed' / 'port'
    assert (other / 'ckpt_epoch_1').exists()
    assert not (other / 'ckpt_epoch_2').exists()
    launch(tmp_path, stage, killed)
    wanted, found = numbers(output), numbers(other)
    assert found.keys() == wanted.keys()
    again = 0
    for place, lines in found.items():
        again += len(lines) - 1
        assert lines == wanted[place] * len(lines), place
    assert again > 2 * 5  # what was killed has been made again, on each rank
    assert main(['ckpt', 'diff', str(output / 'ckpt_epoch_2'), str(other / 'ckpt_epoch_2')]) == 0
