"""TRAIN.COMPILE: the same numbers, names and tags, made by compiled code."""

import pytest
import torch
from torch import nn

from internvl_ds.errors import ConfigError
from internvl_ds.zero.module_state import require_bare
from tests.engine import compiling
from tests.harness.model import Net
from tests.harness.ranks import run_ranks

# Compiled code adds in another order: some roundings of 2^-24 a product, in layers of 19 features,
# through eight updates of AdamW, which divides by the root of small second moments.
NEAR = {'rel': 1e-5, 'abs': 1e-6}


def check(results, stages, backend, near):
    for result in results:
        for stage in map(str, stages):
            seen, graphs = result[stage]['seen'], result[stage]['graphs']
            assert graphs[''] == 0
            # One graph for training and one for evaluation; stage 3 gathers between the layers.
            assert graphs[backend] == 2 or (stage == '3' and graphs[backend] > 2), graphs
            pairs = [(seen[''], seen[backend]), (seen[' later'], seen[f'{backend} later'])]
            pairs.append((seen[' later'], seen[f' resumed by {backend}']))
            pairs.append((seen[' later'], seen[f'{backend} resumed by ']))
            for plain, compiled in pairs:
                for one, other in zip(plain, compiled, strict=True):
                    assert other == pytest.approx(one, **near), (stage, plain, compiled)
            for plain, compiled in zip(*result[stage]['logits'].values(), strict=True):
                assert compiled == pytest.approx(plain, rel=1e-3, abs=100 * near['abs'])
            plain, compiled = result[stage]['names'].values()
            assert plain == compiled
            assert not any('_orig_mod' in name for name in compiled)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_inductor_trains_resumes_and_evaluates_as_the_module_does(tmp_path):
    stages = [3]  # where the graphs hold what is gathered; aot_eager shows the other stages
    results = run_ranks(
        compiling.train, 2, tmp_path, timeout=900, output=str(tmp_path), stages=stages
    )
    check(results, stages, 'inductor', NEAR)


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'autocast_bf16'])
def test_stages_compile(tmp_path, precision):
    stages = {'fp32': [0], 'autocast_bf16': [1, 2]}[precision]
    results = run_ranks(
        compiling.train, 2, tmp_path, timeout=400, output=str(tmp_path), stages=stages,
        precision=precision, backend='aot_eager',
    )  # fmt: skip
    # aot_eager may leave out a rounding to bf16 between two operations, of 2^-9.
    near = NEAR if precision == 'fp32' else {'rel': 2e-2, 'abs': 2e-3}
    check(results, stages, 'aot_eager', near)


@pytest.mark.ranks
def test_a_rank_that_cannot_compile_is_named_on_all(tmp_path):
    said = run_ranks(compiling.refused, 2, tmp_path, timeout=120)
    assert said[0] == said[1]
    assert said[0]['unknown'].startswith("TRAIN.COMPILE 'nonsense': torch.compile does not work on")
    assert 'does not work on rank 0, 1 (InvalidBackend' in said[0]['unknown']
    assert "TRAIN.COMPILE 'inductor': torch.compile does not work on rank 1 (" in said[0]['no c++']


def test_what_torch_compile_returned_is_no_module_to_train():
    with pytest.raises(ConfigError, match=r'the model is what torch.compile returned.*_orig_mod'):
        require_bare(torch.compile(Net()))
    inside = nn.Sequential(Net(), torch.compile(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r'1 of the model is what torch.compile returned'):
        require_bare(inside)
    model = Net()
    model.compile()
    require_bare(model)
