"""Random sequences of training, freezing, saving and resuming, beside a plain loop's."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.model import module_dtype
from tests.harness.pythons import sharing
from tests.harness.ranks import RankFailed, run_ranks
from tests.harness.sequences import Seen, Sequence, draw
from tests.whole import sequences as sequences_ranks

# tests/conftest.py has the defaults. A number runs that sequence alone.
SEED = int(os.environ['INTERNVL_DS_SEQUENCE_SEED'])
COUNT = int(os.environ['INTERNVL_DS_SEQUENCES'])
ONLY = os.environ.get('INTERNVL_DS_SEQUENCE', '')
SIZES = tuple(map(int, os.environ.get('INTERNVL_DS_SEQUENCE_RANKS', '1 2').split()))
PYTHONS = list(filter(None, os.environ.get('INTERNVL_DS_PYTHONS', '').split(os.pathsep)))


class _Wrong(Exception):
    """Two states differ; says in what."""


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(300 + 5 * COUNT)
def test_what_comes_back_is_what_was_saved_and_what_a_plain_loop_has(tmp_path):
    numbers = [int(ONLY)] if ONLY else range(COUNT)
    pythons = [sys.executable, *(PYTHONS or sharing(tmp_path))]
    sequences = [draw(SEED, number, SIZES, len(pythons)) for number in numbers]
    if len(sequences) >= 200:
        _require_all_kinds(sequences)
    found = _run(sequences, pythons, tmp_path)
    wrong = [f'{said}\n{s.text()}' for s in sequences if (said := _problem(s, found[s.number]))]
    assert not wrong, f'{len(wrong)} of {len(sequences)} sequences\n' + '\n\n'.join(wrong[:3])


def _require_all_kinds(sequences: list[Sequence]) -> None:
    """Or nothing is tested: loads from every stage into every other, freezing, all refusals."""
    moves, done, refused = set(), set(), set()
    for sequence in sequences:
        saved_at: dict[str, int] = {}
        for segment in sequence.segments:
            steps = zip([segment.begin, *segment.operations], segment.expected, strict=True)
            for words, expected in steps:
                done.add(' '.join(map(str, words[:1] + words[-1:] * (words[:1] == ['toggle']))))
                refused.add(expected.error)
                if expected.saved:
                    saved_at[expected.saved] = segment.stage
                if expected.source:
                    moves.add((saved_at[expected.source], segment.stage))
    assert len(moves) == 16
    assert done > {'train', 'toggle True', 'toggle False', 'save', 'resume', 'pretrained'}
    assert refused == {None, 'CheckpointMismatch', 'CheckpointNotFound', 'ConfigError'}


def _run(sequences: list[Sequence], pythons: list[str], folder: Path) -> dict[int, list[Any]]:
    """Runs all, segment by segment; number of a sequence -> segment -> rank -> looks."""
    found: dict[int, list[Any]] = {s.number: [] for s in sequences}
    for index in range(max(len(s.segments) for s in sequences)):
        jobs: dict[tuple[int, int], list[Sequence]] = {}
        for sequence in sequences:
            if index < len(sequence.segments):
                segment = sequence.segments[index]
                jobs.setdefault((segment.ranks, segment.python), []).append(sequence)
        for (ranks, python), own in sorted(jobs.items()):
            states = folder / f'{index}-{ranks}-{python}'
            work = [(s.number, s.kind, s.segments[index].orders()) for s in own]
            # It would take DeepSpeed most of a minute to compile its op for each new environment.
            env = {'TESTS_WITHOUT_SHM_OP': '1'} if python else None
            try:
                results = run_ranks(
                    sequences_ranks.run_segments, ranks, folder, env=env,
                    timeout=60 + 5 * len(own), python=pythons[python],
                    folder=folder, work=work, states=states,
                )  # fmt: skip
            except RankFailed as error:
                last = re.findall(r'^sequence (\d+)$', str(error), re.MULTILINE)[-1:]
                failed = [s.text() for s in own if [str(s.number)] == last]
                raise AssertionError('\n\n'.join([str(error), *failed])) from None
            for rank, result in enumerate(results):
                for looks, kept in zip(result, torch.load(f'{states}-{rank}.pt'), strict=True):
                    for look, state in zip(looks, kept, strict=True):
                        look['state'] = state or {}
            for sequence, *looks in zip(own, *results, strict=True):
                found[sequence.number].append(looks)
    return found


def _problem(sequence: Sequence, found: list[Any]) -> str | None:
    """The first thing in which ranks and plain loop differ, or a load and its save; or None."""
    saved: dict[str, list[Any]] = {}
    for index, (segment, ranks) in enumerate(zip(sequence.segments, found, strict=True)):
        steps = zip([segment.begin, *segment.operations], segment.expected, strict=True)
        for step, (words, wanted) in enumerate(steps):
            looks = [looks[step] for looks in ranks]
            try:
                _compare(looks, wanted)
                if wanted.saved:
                    saved[wanted.saved] = looks
                if wanted.source:
                    _same(looks, saved[wanted.source])
                if words[:1] == ['pretrained']:
                    _same_weights(looks, saved[words[1]], segment.precision)
            except _Wrong as error:
                said = looks[0].get('said', '')
                return f'segment {index}, {words}: {error}. {said}'
        last = segment.expected[-1]
        for looks in ranks:
            if (looks[-1]['tags'], looks[-1]['latest']) != (last.tags, last.latest):
                return f'segment {index}, at the end: {looks[-1]}, not {last.tags}, {last.latest}'
    return None


def _compare(looks: list[Any], wanted: Seen) -> None:
    """What the ranks saw after an operation, and what the plain loop did."""
    for rank, look in enumerate(looks):
        said = f'rank {rank}: '
        _equal(look.get('error'), wanted.error, said + 'the error')
        _equal(look.get('returned', []), wanted.returned, said + 'what is returned')
        _equal(look.get('saved'), wanted.saved, said + 'the tag that is saved')
        if 'tags' in look:
            _equal([look['tags'], look['latest']], [wanted.tags, wanted.latest], said + 'tags')
        _equal(bool(look['state']), bool(wanted.state), said + 'whether there is a state')
        if wanted.state:
            _near(look['state'], wanted.state, look.get('norms', []), wanted.norms, said)


def _near(
    got: dict[str, Any], plain: dict[str, Any], norms: list[float], wanted: list[float], said: str
) -> None:
    tolerance, drift = plain['off']
    _equal(norms, pytest.approx(wanted, rel=tolerance), said + 'the norms')
    for key in ('counts', 'requires', 'lrs'):
        _equal(got[key], plain[key], said + key)
    _equal(got['other'], [], f'{said}of which the module computes with other values than masters')
    _equal(got['buffers'], plain['buffers'], said + 'buffers')
    for key in ('masters', 'frozen'):
        off, _ = _distance(got[key], plain[key], said + key)
        _require(off <= drift, f'{said}{key} are off by {off}, and may be by {drift}')
    _equal(got['moments'].keys(), plain['moments'].keys(), said + 'what is trained')
    for name, kept in plain['moments'].items():
        own = got['moments'][name]
        _equal(own.keys(), kept.keys(), f'{said}what is kept of {name}')
        for key in kept:
            if not isinstance(kept[key], torch.Tensor):
                _equal(own[key], kept[key], f'{said}{key} of {name}')
    for key in {key for kept in plain['moments'].values() for key in kept}:
        off, size = _distance(_of(got, key), _of(plain, key), said + key)
        _require(off <= tolerance * size, f'{said}{key} is off by {off} of {size}')
    _equal(got['ema'] is None, plain['ema'] is None, said + 'whether there is an average')
    if plain['ema'] is not None:
        _equal(got['ema']['of'], plain['ema']['of'], said + "the average's decay and count")
        # Buffers that are not persistent are in no state dict.
        average = {n: t for n, t in plain['ema']['tensors'].items() if n != 'offset'}
        tensors = {n: got['ema']['tensors'].get(n) for n in average}
        off, _ = _distance(tensors, average, said + 'the average')
        most = plain['ema']['off']
        _require(off <= most, f'{said}the average is off by {off}, and may be by {most}')


def _of(state: dict[str, Any], key: str) -> dict[str, torch.Tensor]:
    kept = ((name, moments.get(key)) for name, moments in state['moments'].items())
    return {name: value for name, value in kept if isinstance(value, torch.Tensor)}


def _same(looks: list[Any], saved: list[Any]) -> None:
    """What was loaded, and what was there when it was saved, bit for bit."""
    if len(looks) == len(saved):
        for rank, (look, then) in enumerate(zip(looks, saved, strict=True)):
            _equal(look['rng'], then['rng'], f"rank {rank}: the generator's state")
    for rank, look in enumerate(looks):
        got, then, said = look['state'], saved[0]['state'], f'rank {rank}, since the save: '
        trained = got['masters'].keys()
        for key in ('masters', 'moments', 'lrs'):
            _equal(got[key], {n: then[key].get(n) for n in trained}, said + key)
        weights = {**then['frozen'], **then['masters']}
        for name, value in got['frozen'].items():
            _equal(value, weights[name].to(value.dtype), f'{said}frozen {name}')
        _equal(got['buffers'], then['buffers'], said + 'buffers')
        _equal(got['counts'][0], then['counts'][0], said + 'updates')
        if got['ema'] and then['ema']:
            _equal(got['ema']['of'], then['ema']['of'], said + "the average's decay and count")
            for name in trained & then['masters'].keys() | got['buffers'].keys() - {'offset'}:
                own, before = (state['ema']['tensors'].get(name) for state in (got, then))
                _equal(own, before, f'{said}the average of {name}')


def _same_weights(looks: list[Any], saved: list[Any], precision: str) -> None:
    """What load_pretrained brought: what the module of the tag had, and at stage 3 its masters."""
    tag, dtype = saved[0]['state'], module_dtype(precision)
    weights = {**tag['frozen'], **(tag['masters'] if tag['stage'] == 3 else tag['rounded'])}
    for rank, look in enumerate(looks):
        got = {**look['state']['frozen'], **look['state']['masters']}
        for name, value in got.items():
            wanted = weights[name].to(dtype).to(value.dtype)
            _equal(value, wanted, f'rank {rank}, since the save: {name}')


def _equal(got: Any, wanted: Any, said: str) -> None:
    if isinstance(wanted, dict) and isinstance(got, dict):
        _equal(sorted(got), sorted(wanted), said)
        for key in wanted:
            _equal(got[key], wanted[key], f'{said} {key}')
    elif isinstance(wanted, torch.Tensor) and isinstance(got, torch.Tensor):
        same = got.dtype == wanted.dtype and torch.equal(got, wanted)
        _require(same, f'{said}: {got.flatten()[:3]}, not {wanted.flatten()[:3]}')
    else:
        _require(got == wanted, f'{said}: {got}, not {wanted}')


def _require(right: bool, said: str) -> None:
    if not right:
        raise _Wrong(said)


def _distance(got: dict[str, Any], wanted: dict[str, Any], said: str) -> tuple[float, float]:
    """Of all tensors as one vector, and the length of ``wanted``; in fp64."""
    _equal(sorted(got), sorted(wanted), said)
    for name in wanted:
        _equal(got[name].dtype, wanted[name].dtype, f'{said} {name}')
    pairs = [(got[n].double().flatten(), wanted[n].double().flatten()) for n in wanted]
    if not pairs:
        return 0.0, 0.0
    own, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    return float((own - other).norm()), float(other.norm())
