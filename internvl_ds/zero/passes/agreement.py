"""Stops ranks that train different parameters, or in another order: ZeRO would mix them.

At stages 1 to 3 DeepSpeed puts gradients into buckets in the order in which the backward makes
them. Where a rank skips a layer, or takes layers in another order, the all-reduce of a bucket adds
gradients of other parameters: in silence where the sizes agree (stages 1 and 2 of 0.19.8), else
with an error of the network or a hang.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Container, Sequence

import torch

from internvl_ds.dist.group import current_group
from internvl_ds.dist.rendezvous import exchange, rank, world_size
from internvl_ds.errors import ConfigError, RankError, few
from internvl_ds.zero.passes.unused import Unused
from internvl_ds.zero.wrapper import Wrapper

_ADVICE = (
    'At ZeRO stages 1 to 3 the ranks must use the same layers in the same order in each pass: '
    'multiply what a rank leaves out by 0, draw such choices from one seed on all ranks, or train '
    'at ZeRO stage 0'
)


class Agreement:
    """Compares the gradients that ranks make: before the first backward, and before each update.

    What a first pass uses is compared before anything is reduced. Later a rank asks the others only
    where a backward made other gradients than those before: most runs never ask again.
    """

    def __init__(self, wrapper: Wrapper, unused: Unused) -> None:
        self._unused, self._is_alone = unused, world_size() == 1
        trained = {p: name for p, name in wrapper.names.items() if p.requires_grad}
        self._names, parameters = list(trained.values()), list(trained)
        self._indices = {id(p): index for index, p in enumerate(parameters)}
        self._made: list[int] = []  # in the backward that runs
        self._passes: list[str] = []  # a digest for each backward since the last update
        self._agreed: set[str] = set()
        self._last: list[int] = []  # what the last backward made
        self._used: set[int] = set()  # by the backwards since the last update
        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(functools.partial(self._note, index))

    def before(self, used: Container[int]) -> None:
        """Compares the parameters of the first loss. Collective: every rank calls it.

        Args:
            used: ids of parameters.

        Raises:
            ConfigError: on all ranks, naming the parameters.
        """
        if self._is_alone:
            return
        indices = [index for identity, index in self._indices.items() if identity in used]
        digests = exchange('first backward', _digest(indices), current_group().limit('TIMEOUT'))
        if len(set(digests)) > 1:
            self._require_same('first backward', indices)

    def after(self) -> None:
        """Records the end of a backward."""
        if self._made:
            self._passes.append(_digest(self._made))
            self._used.update(self._made)
            self._last, self._made = self._made, []

    def forget(self) -> None:
        """Drops what the backwards since the last update made, as `zero_grad` does."""
        self._made, self._passes, self._used = [], [], set()

    def require(self) -> None:
        """Compares the gradients since the last update, before it is applied.

        Raises:
            ConfigError: naming the parameters; see `Unused` too.
        """
        self.after()  # of a backward that was not the engine's own
        passes, self._passes = self._passes, []
        used, self._used = self._used, set()
        if not self._is_alone:
            self._require_agreement(passes)
        self._unused.require({self._names[index] for index in used})

    def _require_agreement(self, passes: list[str]) -> None:
        if len(self._agreed) == 1 and self._agreed.issuperset(passes):
            return
        try:
            # Others may wait in a collective, whose limit is COMM.TIMEOUT.
            others = exchange('gradients', passes, current_group().limit('TIMEOUT') / 2)
        except RankError as error:
            raise ConfigError(
                f'a backward of rank {rank()} made other gradients than those before it (the last '
                f'of them {self._shown(self._last)}), and other ranks went on: {error}. {_ADVICE}'
            ) from error
        if any(other != passes for other in others):
            self._require_same('backward', self._last)
            raise ConfigError(
                f'the ranks made gradients of other parameters in the passes of this update. '
                f'{_ADVICE}'
            )
        self._agreed.update(passes)

    def _require_same(self, what: str, used: Sequence[int]) -> None:
        """Compares parameters, in order, and names the ones that differ between ranks."""
        found = exchange(f'parameters of the {what}', list(used), current_group().limit('TIMEOUT'))
        first = found[0]
        for other, theirs in enumerate(found):
            if theirs == first:
                continue
            ours, only = set(first) - set(theirs), set(theirs) - set(first)
            difference = '; '.join(
                f'rank {who} alone of {self._shown(sorted(which))}'
                for who, which in ((0, ours), (other, only))
                if which
            )
            if not difference:
                at = next(i for i, (a, b) in enumerate(zip(first, theirs, strict=True)) if a != b)
                difference = (
                    f'in another order: rank 0 of {self._names[first[at]]} where rank {other} '
                    f'does of {self._names[theirs[at]]}'
                )
            raise ConfigError(f'the {what} makes gradients on {difference}. {_ADVICE}')

    def _shown(self, indices: Sequence[int]) -> str:
        return few([self._names[index] for index in indices])

    def _note(self, index: int, _: torch.Tensor) -> None:
        self._made.append(index)


def _digest(indices: Sequence[int]) -> str:
    return hashlib.blake2b(repr(indices).encode(), digest_size=8).hexdigest()


def parameters_of(loss: torch.Tensor) -> set[int]:
    """The ids of the parameters that a loss depends on, by its graph.

    Those inside a reentrant checkpoint are not seen, on all ranks alike.
    """
    found, seen, ahead = set(), set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, 'variable', None)) is not None:
            found.add(id(variable))
        ahead.extend(following for following, _ in node.next_functions)
    return found
