"""Which tensors a Muon orthogonalises, as its class does."""

import pytest
import timm.optim
import torch
from torch import nn

from internvl_ds.zero.muon import routing

SHAPES = {
    'weight': (8, 12), 'bias': (8,), 'conv': (8, 3, 2, 2), 'class token': (1, 1, 8),
    'positions': (1, 9, 8), 'narrow': (3, 8), 'long': (4, 1024),
}  # fmt: skip


def muon(groups):
    return timm.optim.Muon(groups, lr=0.01)


def parameter(shape, trained=True):
    return nn.Parameter(torch.ones(shape), requires_grad=trained)


def test_groups_are_divided_as_timm_s_class_routes_their_tensors():
    tensors = {name: parameter(shape) for name, shape in SHAPES.items()}
    optimizer = muon(list(tensors.values()))
    (group,) = optimizer.param_groups
    parts = routing.divided(optimizer, group)
    for p in tensors.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for entries, members in parts:
        for p in members:
            assert optimizer.state[p]['use_muon'] is entries['use_muon']
    assert sum(len(members) for _, members in parts) == len(SHAPES)
    routes = {name: routing.is_suitable(shape) for name, shape in SHAPES.items()}
    assert [name for name, route in routes.items() if route] == ['weight', 'conv']


@pytest.mark.parametrize(
    ('entries', 'route'),
    [
        ({}, None), ({'use_fallback': False}, None), ({'use_fallback': True}, False),
        ({'use_muon': True}, True), ({'use_muon': False}, False),
        ({'use_muon': True, 'use_fallback': True}, False),
    ],
)  # fmt: skip
def test_a_group_that_states_its_route_is_not_divided(entries, route):
    optimizer = muon([{'params': [parameter((8, 8)), parameter((8,))], **entries}])
    (group,) = optimizer.param_groups
    assert routing.route_of(optimizer, group) is route
    parts = routing.divided(optimizer, group)
    assert len(parts) == (2 if route is None else 1)


def test_what_is_frozen_goes_where_trained_tensors_are():
    matrix, vector = parameter((8, 8)), parameter((8,), trained=False)
    optimizer = muon([matrix, vector])
    ((entries, members),) = routing.divided(optimizer, optimizer.param_groups[0])
    assert entries == {'use_muon': True}
    assert members == [matrix, vector]


def test_other_optimizers_and_subclasses_are_none():
    kind = type('Mine', (timm.optim.Muon,), {})
    for optimizer in (torch.optim.SGD([parameter((8, 8))]), kind([parameter((8, 8))], lr=0.1)):
        assert not routing.is_muon(optimizer)
        (group,) = optimizer.param_groups
        assert routing.divided(optimizer, group) == [({}, group['params'])]


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='a torch without Muon')
def test_torch_s_takes_matrices_only():
    optimizer = torch.optim.Muon([parameter((8, 8))])
    assert routing.is_muon(optimizer)
    assert routing.route_of(optimizer, optimizer.param_groups[0]) is True
    assert routing.routes_of(optimizer, optimizer.param_groups[0]) == [{}]
