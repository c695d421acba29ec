"""DeepSpeed's own estimates, beside ours.

They count 16-bit training with Adam only, and nothing of DeepSpeed's buffers or of activations; so
a plan shows them, and decides by its own count. ``tests/tools/plan/test_memory_planner.py`` says
what differs.
"""

from __future__ import annotations

from internvl_ds.tools.plan.layout import Layout
from internvl_ds.tools.plan.sizes import Sizes


def deepspeed_estimate(sizes: Sizes, layout: Layout) -> int | None:
    """Bytes of model states on each GPU, by DeepSpeed; None where it has no estimate.

    It has one for stages 2 and 3.
    """
    if layout.stage == 2:
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

        _, device = estimate_zero2_model_states_mem_needs(
            sizes.parameters, layout.ranks, 1, cpu_offload=layout.optimizer_on_host
        )
        return int(device)
    if layout.stage == 3:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

        _, device, _ = estimate_zero3_model_states_mem_needs(
            sizes.parameters,
            sizes.largest_module,
            layout.ranks,
            1,
            cpu_offload=layout.optimizer_on_host,
            cpu_offload_params=layout.parameters_on_host,
        )
        return int(device)
    return None
