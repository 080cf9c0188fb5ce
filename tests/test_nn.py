"""Envelopes, radial functions and node inputs do what their formulas say."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor, nn

from transfermium.errors import InputError
from transfermium.graph import Cutoff, to_graph
from transfermium.nn import Bessel, ExpNormal, Gaussians, NodeInputs, lengths_and_directions, mlp


def derivatives(f: Callable[[Tensor], Tensor], at: float, order: int) -> list[float]:
    """Value and derivatives up to this order."""
    x = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    y = f(x)
    values = [float(y.detach())]
    for _ in range(order):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        values.append(float(y.detach()))
    return values


def test_the_envelope_starts_at_one_and_flat() -> None:
    assert derivatives(Cutoff(5.0).envelope, 0.0, 2) == [1.0, 0.0, 0.0]


def test_the_envelope_ends_at_zero_with_two_derivatives() -> None:
    assert derivatives(Cutoff(5.0).envelope, 5.0 - 1e-9, 2) == pytest.approx([0.0, 0.0, 0.0], abs=1e-7)
    assert derivatives(Cutoff(5.0).envelope, 5.0 + 1e-9, 2) == [0.0, 0.0, 0.0]


def test_the_envelope_only_falls() -> None:
    values = Cutoff(4.0).envelope(torch.linspace(0, 6, 500, dtype=torch.float64))
    assert bool((values.diff() <= 1e-14).all())
    assert bool((values[torch.linspace(0, 6, 500) >= 4.0] == 0).all())


def test_bessel_functions_are_orthonormal_in_the_sphere() -> None:
    r = torch.linspace(1e-6, 5.0, 20_001, dtype=torch.float64)
    basis = Bessel(6, 5.0).double()(r)
    overlap = torch.trapezoid(basis.unsqueeze(1) * basis.unsqueeze(2) * r.square().view(-1, 1, 1), r, dim=0)
    torch.testing.assert_close(overlap, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)


def test_gaussians_peak_at_their_centres() -> None:
    basis = Gaussians(9, 8.0)
    values = basis(basis.centers)
    assert torch.equal(values.argmax(dim=1), torch.arange(9))
    assert torch.equal(values.diagonal(), torch.ones(9))


def test_exponential_gaussians_can_be_trained_and_cover_all_lengths() -> None:
    basis = ExpNormal(16, 5.0)
    assert [name for name, _ in basis.named_parameters()] == ["centers", "betas"]
    values = basis(torch.linspace(0, 5, 100)).detach()
    assert 0.5 < float(values.max(dim=1).values.min()) <= float(values.max()) <= 1.0


def test_an_mlp_ends_with_a_linear_layer() -> None:
    layers = mlp(3, 5, 2, bias=False)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.SiLU, nn.Linear]
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Linear))


def test_lengths_and_directions_make_up_the_vectors() -> None:
    vectors = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths, directions = lengths_and_directions(vectors)
    torch.testing.assert_close(lengths.unsqueeze(1) * directions, vectors)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(10, dtype=torch.float64))


def test_a_new_input_has_no_effect_at_first(molecule: Atoms) -> None:
    graph = to_graph([molecule], Cutoff(3.0), [{"charge": np.linspace(-1, 1, len(molecule))}]).to("cpu", torch.float32)
    node_inputs = NodeInputs(8, inputs=["charge"])
    assert torch.equal(node_inputs(graph), node_inputs.element(graph.atomic_numbers))

    nn.init.ones_(node_inputs.inputs["charge"].weight)  # type: ignore[arg-type]
    added = node_inputs(graph) - node_inputs.element(graph.atomic_numbers)
    torch.testing.assert_close(added, graph.inputs["charge"].expand(-1, 8))


def test_an_element_beyond_the_table_is_an_error() -> None:
    graph = to_graph([Atoms("Og")], Cutoff(3.0))
    assert NodeInputs(4)(graph).shape == (1, 4)
    with pytest.raises(InputError, match=r"element 118 is beyond this model's table of 100 elements"):
        NodeInputs(4, elements=100)(graph)
