"""The faults of `tests.bench.mutations`, a file for each part of the core."""

from tests.bench.mutants import formats, inputs, tag, zero

MUTANTS = [*tag.MUTANTS, *zero.MUTANTS, *formats.MUTANTS, *inputs.MUTANTS]
