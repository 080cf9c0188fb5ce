"""Every route to the gradient of a force loss against double backward in double precision."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

import transfermium as tm
from benchmarks.routes import routes
from transfermium.graph import to_batch
from transfermium.messages import reference

BACKBONES = [
    tm.TensorNet(width=8, depth=1, radial=8),
    tm.PaiNN(width=8, depth=2, radial=8),
    tm.CGCNN(width=8, channels=8, depth=2, cutoff=5.0, gaussians=8),
]
OBJECTIVES = {
    "energy and forces": tm.Potential(energy=1.0, forces=1.0, stress=0.0),
    "forces": tm.Potential(energy=0.0, forces=1.0, stress=0.0),
    "stress too": tm.Potential(energy=1.0, forces=1.0, stress=10.0),
}
EXACT = {
    "double backward": routes.gradient_by_double_backward,
    "jvp": routes.gradient_by_jvp,
}
ROUNDING, SPLINES, DIFFERENCE = 3e-5, 3e-4, 1e-2  # relative errors of the whole gradient

every_backbone = pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: type(b).__name__)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


@every_backbone
@every_objective
class TestTheGradientIsThatOfDoubleBackward:
    @pytest.mark.parametrize("route", EXACT.values(), ids=EXACT)
    def test_but_for_rounding(self, route, backbone, objective, structures):
        with reference():
            assert error(route, backbone, objective, structures) < ROUNDING

    def test_but_for_the_splines_of_kernels(self, backbone, objective, structures):
        assert error(routes.gradient_by_double_backward, backbone, objective, structures) < SPLINES

    @pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
    def test_but_for_the_step_of_a_difference(self, kernels, backbone, objective, structures):
        route = routes.gradient_by_difference if kernels else in_plain_torch(routes.gradient_by_difference)
        assert error(route, backbone, objective, structures) < DIFFERENCE

    def test_in_the_limit_of_small_steps(self, backbone, objective, structures):
        route = partial(routes.gradient_by_difference, step=1e-5)
        assert error(route, backbone, objective, structures, dtype=torch.float64) < 1e-6


@every_backbone
def test_a_traced_graph_serves_batches_of_any_size(backbone, structures):
    objective = OBJECTIVES["energy and forces"]
    route = partial(routes.gradient_by_compiled_double_backward, compiler=as_it_is)
    model = tm.Model(tm.model.copied(backbone), objective.outputs(backbone.width))
    for some in (structures, structures[:3], [*structures, *structures[1:]]):
        assert error(route, backbone, objective, some, model) < ROUNDING


def test_structures_without_labels_change_nothing(alloy, molecule):
    objective, backbone = OBJECTIVES["forces"], BACKBONES[1]
    model = tm.Model(backbone, objective.outputs(backbone.width))
    molecule.info["forces"] = np.full((len(molecule), 3), np.nan)
    gradients = [
        routes.gradient_by_difference(model, batch_of(some, backbone, objective), routes.mean_loss(objective))[1]
        for some in ([labelled(alloy)], [alloy, molecule])
    ]
    assert routes.relative_error(gradients[1], gradients[0]) < 1e-3


def error(route, backbone, objective, structures, model=None, dtype=torch.float32):
    """Relative error of the whole gradient by a route."""
    torch.manual_seed(0)
    model = model or tm.Model(tm.model.copied(backbone), objective.outputs(backbone.width))
    model.to(dtype)
    batch = batch_of([labelled(atoms) for atoms in structures], backbone, objective)
    loss = routes.mean_loss(objective)
    with reference():
        value, exact = routes.gradient_by_double_backward(copy.deepcopy(model).double(), batch, loss)
    found, gradients = route(model, batch, loss)
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    return routes.relative_error(gradients, exact)


def labelled(atoms, seed=0):
    """With labels from a random generator: residuals are far from zero, where |x| has a kink."""
    rng = np.random.default_rng(seed)
    stress = 0.01 * rng.normal(size=(3, 3))
    atoms.info |= {"energy": rng.normal(), "stress": stress + stress.T}
    atoms.arrays["forces"] = rng.normal(size=(len(atoms), 3))
    return atoms


def batch_of(structures, backbone, objective):
    rng = np.random.default_rng(0)
    return to_batch([objective.prepare(atoms, rng) for atoms in structures], backbone.edges)


def as_it_is(graph, dynamic):
    """Instead of inductor, which takes minutes."""
    return graph


def in_plain_torch(route):
    def inside(*arguments):
        with reference():
            return route(*arguments)

    return inside
