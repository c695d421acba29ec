"""An engine is made without torch's compiler, which DeepSpeed's own Muon would import."""

import subprocess
import sys

from internvl_ds.dist.network import free_port
from tests.harness.ranks import base_env

MAKES_AN_ENGINE = """
import sys
from internvl_ds import initialize
from tests.harness.model import make_config, make_model, make_optimizer, zero_json
model = make_model()
initialize(make_config(), model, make_optimizer(model), zero_json(2))
muon = sys.modules['deepspeed.runtime.zero.muon.original_muon']
assert 'torch._inductor.lowering' not in sys.modules
print('ONE', muon.zeropower_via_newtonschulz5.__name__)
"""


def test_an_engine_imports_no_compiler():
    env = base_env(
        RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(free_port()),
    )  # fmt: skip
    job = subprocess.run(
        [sys.executable, '-c', MAKES_AN_ENGINE], env=env, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    assert 'ONE zeropower_via_newtonschulz5' in job.stdout
