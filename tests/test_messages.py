"""Kernels against plain torch, formulas against automatic differentiation."""

import contextlib
import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import transfermium as tm
from transfermium.graph import Cutoff, to_graph
from transfermium.messages import (
    AtomFormula,
    EdgeFormula,
    Neighborhood,
    expression,
    fixed_weights,
    head_total,
    kernels,
    reference,
    sigmoid,
    softplus,
    spline,
    sqrt,
    total,
)
from transfermium.messages.expression import gradients, symbol
from transfermium.nn import Bessel

from .conftest import rattled


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class TestExpressions:
    def test_equal_expressions_are_the_same_object(self):
        x = symbol("x", 0)
        assert x * 2.0 + 1.0 is x * 2.0 + 1.0

    def test_what_adds_or_multiplies_nothing_is_left_out(self):
        x = symbol("x", 0)
        assert x + 0.0 is x
        assert x * 1.0 is x
        assert x * 0.0 is expression.constant(0.0)

    @pytest.mark.parametrize(
        "function",
        [
            lambda x, y: x * y + x * x * 3.0 - y,
            lambda x, y: x / (y * y + 1.0),
            lambda x, y: sqrt(x * x + 0.5) * sigmoid(y),
            lambda x, y: softplus(x * y),
            lambda x, y: 1.0 / (2.0 - sigmoid(x)),
            lambda x, y: x * total(x * y),
            lambda x, y: y * head_total(x * y * y, 3),
        ],
    )
    def test_gradients_of_gradients_are_those_of_torch(self, function):
        rng = torch.Generator().manual_seed(0)
        given = {name: torch.randn(3, 6, generator=rng, dtype=torch.float64) for name in "xygh"}
        given["x"].requires_grad_()
        given["y"].requires_grad_()
        symbols = {name: symbol(name, 0) for name in "xygh"}

        result = function(symbols["x"], symbols["y"])
        (first,) = gradients({result: symbols["g"]}, [symbols["x"]])
        second = gradients({first: symbols["h"]}, [symbols["x"], symbols["y"], symbols["g"]])

        given["g"].requires_grad_()
        value = function(given["x"], given["y"])
        (dx,) = torch.autograd.grad((value * given["g"]).sum(), given["x"], create_graph=True)
        expected = torch.autograd.grad(
            (dx * given["h"]).sum(), [given["x"], given["y"], given["g"]], materialize_grads=True
        )
        for mine, torchs in zip([first, *second], [dx, *expected], strict=True):
            torch.testing.assert_close(_value(mine, given).expand(3, 6), torchs)


class TestSplines:
    def test_they_are_close_to_the_function_and_its_slope(self):
        grid = spline.grid(5.0)
        basis = Bessel(20, 5.0).double()
        lengths = torch.linspace(0.7, 5.0, 4001, dtype=torch.float64, requires_grad=True)
        table = spline.coefficients(basis(grid.samples(torch.device("cpu"))))
        error = (spline.evaluate(table, lengths, grid) - basis(lengths)).abs().max()
        assert error < 1e-6 * basis(lengths).abs().max()

        slopes = [
            torch.autograd.grad(f.sum(), lengths)[0] for f in (spline.evaluate(table, lengths, grid), basis(lengths))
        ]
        assert (slopes[0] - slopes[1]).abs().max() < 2e-4 * slopes[1].abs().max()

    def test_second_derivatives_are_continuous(self):
        grid = spline.grid(5.0)
        table = spline.coefficients(torch.sin(3 * grid.samples(torch.device("cpu"))))
        knot = grid.start + 100 * grid.step
        r = torch.tensor([knot - 1e-9, knot + 1e-9], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(spline.evaluate(table, r, grid).sum(), r, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), r)
        assert curvature[0] == pytest.approx(float(curvature[1]), rel=1e-5)
        assert curvature[0] == pytest.approx(-9 * float(torch.sin(3 * r[0]).detach()), rel=1e-3)

    def test_beyond_the_cutoff_there_is_nothing(self):
        grid = spline.grid(5.0)
        table = spline.coefficients(Cutoff(5.0).envelope(grid.samples(torch.device("cpu"))))
        assert spline.evaluate(table, torch.tensor([5.0, 5.006], dtype=torch.float64), grid).abs().max() < 5e-8
        assert spline.evaluate(table, torch.tensor([5.04, 5.4, 50.0], dtype=torch.float64), grid).abs().max() < 1e-20


BACKBONES = [
    tm.TensorNet(width=16, depth=2),
    tm.PaiNN(width=24, depth=2),
    tm.CGCNN(width=13, channels=11, depth=2, cutoff=5.0, gaussians=16),
    tm.ET(width=16, depth=2, heads=4),
]


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: type(b).__name__)
class TestKernelsAgainstTheReference:
    @pytest.mark.parametrize("by", ["one thread", "OpenMP", "a pool"])
    def test_energies_derivatives_and_gradients_of_weights(self, backbone, by, threads, structures, monkeypatch):
        threads(1 if by == "one thread" else 3)
        monkeypatch.setattr(kernels, "WORTH_A_THREAD", 100)
        if by == "a pool":
            monkeypatch.setattr(kernels, "_team", lambda: None)
        structures = [rattled(atoms, seed) for seed, atoms in enumerate([*structures, structures[0] * (2, 2, 1)])]
        model = _model(backbone)
        fast = _everything(model, structures)
        with reference():
            slow = _everything(model, structures)
            exact = _everything(model.double(), structures)
        model.float()
        for name, value in exact.items():
            scale = value.abs().max()
            tolerance = 3e-5 * scale + 3 * (slow[name] - value).abs().max()
            assert (fast[name] - value).abs().max() <= tolerance, name

    def test_forces_are_derivatives_of_the_energy(self, backbone, alloy):
        model = _model(backbone).eval()
        atoms = rattled(alloy, 3)
        graph = to_graph([atoms], backbone.edges)
        forces = model(graph, ["forces"])["forces"].double()
        direction = torch.from_numpy(np.random.default_rng(0).normal(size=(len(atoms), 3)))
        h = 2e-3
        energies = [
            float(model(graph._replace(positions=graph.positions + s * h * direction), ["energy"])["energy"])
            for s in (-2, -1, 1, 2)
        ]
        slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * h)
        assert -float((forces * direction).sum()) == pytest.approx(slope, rel=2e-3, abs=2e-3)

    def test_hessians_are_right(self, backbone, molecule):
        """Forces differentiated with respect to positions, as for phonons."""
        model = _model(backbone).train()
        graph = to_graph([molecule], backbone.edges).to("cpu", torch.float32)
        rows = []
        for context in (contextlib.nullcontext(), reference()):
            with context:
                positions = graph.positions.clone().requires_grad_()
                energy = model(graph._replace(positions=positions), ["energy"])["energy"].sum()
                (slope,) = torch.autograd.grad(energy, positions, create_graph=True)
                rows.append(torch.autograd.grad(slope[0, 0], positions)[0])
        torch.testing.assert_close(rows[0], rows[1], rtol=2e-3, atol=2e-3 * float(rows[1].abs().max()))

    @pytest.mark.parametrize("change", ["in place", "data", "in place of data", "state"])
    def test_predictions_follow_changes_of_weights(self, backbone, change, alloy):
        model = _model(backbone).eval()
        graph = to_graph([alloy], backbone.edges)
        before = model(graph, ["energy"])["energy"]
        with torch.no_grad():
            for p in model.parameters():
                if change == "in place":
                    p.mul_(1.1)
                elif change == "data":
                    p.data = p.data * 1.1
                elif change == "in place of data":
                    p.data.mul_(1.1)
        if change == "state":
            model.load_state_dict({name: t * 1.1 for name, t in model.state_dict().items()})
        after = model(graph, ["energy"])["energy"]
        with reference():
            expected = model(graph, ["energy"])["energy"]
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
        assert (after - before).abs() > 10 * (after - expected).abs()

    def test_nothing_is_left_over_from_inference_mode(self, backbone, alloy):
        model = _model(backbone).eval()
        graph = to_graph([rattled(alloy, 1)], backbone.edges).to("cpu", torch.float32)
        with torch.inference_mode():
            model(graph, ["energy"])
        outputs = model(graph, ["energy", "forces"])
        with reference():
            expected = model(graph, ["energy", "forces"])
        for name, value in outputs.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
        model.train()(graph, ["energy"])["energy"].sum().backward()

    def test_copies_and_pickles_predict_the_same(self, backbone, alloy):
        model = _model(backbone).eval()
        graph = to_graph([alloy], backbone.edges)
        expected = model(graph, ["energy"])["energy"]
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(graph, ["energy"])["energy"], expected)

    @pytest.mark.parametrize("training", [True, False])
    def test_autocast_uses_the_reference_and_leaves_nothing(self, backbone, training, alloy):
        model = _model(backbone).train(training)
        graph = to_graph([rattled(alloy, 1)], backbone.edges)
        expected = model(graph, ["energy", "forces"])
        with torch.autocast("cpu", torch.bfloat16):
            found = model(graph, ["energy", "forces"])
            with reference():
                plain = model(graph, ["energy", "forces"])
        again = model(graph, ["energy", "forces"])
        for name, value in expected.items():
            assert torch.equal(again[name], value)
            assert torch.equal(found[name], plain[name])

    def test_forward_derivatives_use_the_reference(self, backbone, molecule):
        model = _model(backbone).eval()
        graph = to_graph([molecule], backbone.edges).to("cpu", torch.float32)
        forces = model(graph, ["forces"])["forces"]
        direction = torch.randn(forces.shape, generator=torch.Generator().manual_seed(0))

        def energy(positions):
            return model(graph._replace(positions=positions), ["energy"])["energy"].sum()

        _, slope = torch.func.jvp(energy, (graph.positions,), (direction,))
        with forward_ad.dual_level():
            dual = energy(forward_ad.make_dual(graph.positions, direction))
            other = forward_ad.unpack_dual(dual).tangent
        expected = -(forces * direction).sum().to(slope.dtype)
        torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-3)

    def test_every_input_may_be_thought_to_need_a_gradient(self, backbone, alloy, monkeypatch):
        """As with a torch that does not tell which gradients a backward pass will use."""
        model = _model(backbone)
        atoms = rattled(alloy, 1)
        expected = _everything(model, [atoms])
        monkeypatch.delattr(torch._C, "_will_engine_execute_node")
        for name, value in _everything(model, [atoms]).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max()))

    def test_edges_beyond_the_cutoff_have_no_effect(self, backbone, alloy):
        model = _model(backbone).eval()
        atoms = rattled(alloy, 4)
        near = model(to_graph([atoms], backbone.edges), ["energy", "forces"])
        far = model(to_graph([atoms], Cutoff(backbone.edges.radius + 0.7)), ["energy", "forces"])
        for name in near:
            torch.testing.assert_close(near[name], far[name], rtol=1e-5, atol=1e-5)


class TestFormulas:
    @pytest.mark.parametrize("heads", [1, 3, 7, 21])
    def test_attention(self, heads, alloy):
        """A weight that needs all channels of an edge, or of a head, before any of them can be summed."""

        def attention(sender, receiver, filters, direction, length):
            product = sender[0] * receiver[0] * filters[0]
            weight = sigmoid(total(product) if heads == 1 else head_total(product, heads))
            return [sender[0] * weight * filters[0] * direction[2] + length * sender[0]]

        formula = EdgeFormula(attention, outputs=(1,), filters=1, senders=(1,), receivers=(1,))
        cutoff, basis = Cutoff(4.0), Bessel(6, 4.0)
        structure = to_graph([rattled(alloy, 5)], cutoff)
        rng = torch.Generator().manual_seed(0)
        weight = torch.randn(6, 21, generator=rng, dtype=torch.float64) / 3
        features = torch.randn(structure.n_atoms, 2, 21, generator=rng, dtype=torch.float64) / 3

        results = {}
        for name, dtype, context in (
            ("exact", torch.float64, reference()),
            ("kernel", torch.float32, contextlib.nullcontext()),
        ):
            with context:
                graph = structure.to("cpu", dtype)
                positions = graph.positions.clone().requires_grad_()
                w, x = weight.to(dtype).requires_grad_(), features.to(dtype).requires_grad_()
                edges = Neighborhood(graph._replace(positions=positions), cutoff, basis)
                own, other = x.split(1, dim=1)
                (y,) = edges.sum(formula, lambda at, w=w: at.basis @ w * at.envelope, [other], [own])
                (slope,) = torch.autograd.grad(y.square().sum(), positions, create_graph=True)
                slope.square().sum().backward(inputs=[w, x])
                results[name] = [t.detach().double() for t in (y, slope, w.grad, x.grad)]
        for kernel, exact in zip(results["kernel"], results["exact"], strict=True):
            assert (kernel - exact).norm() < 3e-5 * exact.norm()

    def test_traces_show_single_operations(self):
        formula = AtomFormula(lambda x: [x[0] * x[0]], inputs=(1,), outputs=(1,))
        traced = make_fx(lambda x: formula(x)[0])(torch.zeros(3, 1, 8))
        assert torch.equal(traced(torch.full((3, 1, 8), 3.0)), torch.full((3, 1, 8), 9.0))

    def test_outputs_that_are_not_used_need_no_gradient(self):
        formula = AtomFormula(lambda x: [x[0] * x[1], x[1] * x[1]], inputs=(2,), outputs=(1, 1))
        x = torch.randn(7, 2, 9, requires_grad=True)
        first, _ = formula(x)
        (slope,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(slope, x.detach().flip(1))

    def test_nothing_is_kept_of_a_graph(self, alloy):
        model = _model(BACKBONES[1]).train()
        graph = to_graph([alloy], BACKBONES[1].edges).to("cpu", torch.float32)
        kept = weakref.ref(graph.senders)
        model(graph, ["energy", "forces"])["forces"].square().sum().backward()
        del graph
        gc.collect()
        assert kept() is None

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    @pytest.mark.parametrize("by", ["OpenMP", "a pool"])
    def test_forked_processes_have_threads_of_their_own(self, by):
        code = f"""
import os, torch
from transfermium.messages import AtomFormula, kernels
torch.set_num_threads(2)
kernels.WORTH_A_THREAD = 1
if "{by}" == "a pool":
    kernels._team = lambda: None
formula = AtomFormula(lambda x: [x[0] * 2.0], inputs=(1,), outputs=(1,))
x = torch.ones(64, 1, 8)
formula(x)
child = os.fork()
if not child:
    os._exit(0 if formula(x)[0].tolist() == [[[2.0] * 8]] * 64 else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
        assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0

    def test_one_layer_may_have_several_bases_and_tables(self, alloy):
        """What is kept for one of them must not be given to another."""

        class Layer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = torch.nn.Linear(6, 8)

            def one(self, at):
                return self.linear(at.basis) * at.envelope

            def other(self, at):
                return -2 * self.linear(at.basis) * at.envelope

        torch.manual_seed(0)
        layer, cutoff, x = Layer(), Cutoff(4.0), torch.ones(len(alloy), 1, 8)
        graph = to_graph([alloy], cutoff).to("cpu", torch.float32)
        formula = EdgeFormula(lambda s, r, f, d, x: [s[0] * f[0]], outputs=(1,), filters=1, senders=(1,))
        bases = [Bessel(6, 4.0), Bessel(6, 3.0)]
        for _ in range(2):
            for basis in bases:
                for filters in (layer.one, layer.other):
                    with fixed_weights():
                        (found,) = Neighborhood(graph, cutoff, basis).sum(formula, filters, [x])
                    with reference():
                        (expected,) = Neighborhood(graph, cutoff, basis).sum(formula, filters, [x])
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_indices_of_32_bits_do(self, alloy):
        model = _model(BACKBONES[1]).eval()
        graph = to_graph([alloy], BACKBONES[1].edges)
        short = graph._replace(senders=graph.senders.int(), receivers=graph.receivers.int())
        assert torch.equal(model(short, ["energy"])["energy"], model(graph, ["energy"])["energy"])

    def test_other_precisions_use_the_reference(self, alloy):
        formula = EdgeFormula(lambda s, r, f, d, x: [s[0] * f[0]], outputs=(1,), filters=1, senders=(1,))
        cutoff, x = Cutoff(4.0), torch.ones(len(alloy), 1, 3, dtype=torch.float64)
        edges = Neighborhood(to_graph([alloy], cutoff).to("cpu", torch.float32), cutoff, Bessel(6, 4.0))

        def filters(at):
            return at.envelope.expand(-1, 3)

        (mixed,) = edges.sum(formula, filters, [x])
        (single,) = edges.sum(formula, filters, [x.float()])
        assert mixed.dtype == torch.float64
        torch.testing.assert_close(mixed.float(), single)
        with pytest.raises(TypeError, match=r"'senders0' is torch.float64 on cpu, but must be float32 on the CPU"):
            table = spline.coefficients(filters(edges.samples).unsqueeze(1))
            formula.kernels.value(3, edges.grid)(edges, [edges.vectors, table, x], len(alloy))

    def test_components_are_counted(self):
        formula = AtomFormula(lambda x: [x[0], x[0]], inputs=(1,), outputs=(1,))
        for context in (contextlib.nullcontext(), reference()):
            with context, pytest.raises(ValueError, match="a formula gave 2 components, but its outputs have 1"):
                formula(torch.zeros(3, 1, 8))

    def test_a_llvmlite_that_fails_is_told_of_and_not_used(self, monkeypatch):
        def broken(*arguments):
            raise RuntimeError("LLVM IR parsing error")

        monkeypatch.setattr(kernels, "_compiled", broken)
        kernels.available.cache_clear()
        try:
            with pytest.warns(UserWarning, match=r"cannot compile here \(RuntimeError: LLVM IR parsing error\)"):
                assert not kernels.available()
        finally:
            monkeypatch.undo()
            kernels.available.cache_clear()

    def test_threads_may_be_first_at_the_same_time(self):
        formula = AtomFormula(lambda x: [x[0] * 2.0], inputs=(1,), outputs=(1,))
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: formula(torch.ones(3, 1, 8))[0], range(8)))
        assert all(result.tolist() == [[[2.0] * 8]] * 3 for result in results)
        assert len(formula.kernels.compiled) == 1

    def test_shapes_are_checked(self):
        formula = AtomFormula(lambda x: [x[0] + x[1]], inputs=(1, 1), outputs=(1,))
        with pytest.raises(ValueError, match=r"'atoms1' has shape \(2, 1, 8\), but must have \(3, 1, 8\)"):
            formula(torch.zeros(3, 1, 8), torch.zeros(2, 1, 8))

    def test_edges_are_checked(self, alloy):
        model = _model(BACKBONES[1]).eval()
        graph = to_graph([alloy], BACKBONES[1].edges)
        with pytest.raises(IndexError):
            model(graph._replace(senders=graph.senders + 3), ["energy"])
        with pytest.raises(ValueError, match="sorted by receiver"):
            model(graph._replace(receivers=graph.receivers.flip(0)), ["energy"])

    def test_extreme_numbers_stay_finite(self):
        formula = AtomFormula(lambda x: [sigmoid(x[0]), softplus(x[0])], inputs=(1,), outputs=(1, 1))
        x = torch.tensor([-1e4, -90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 1e4]).view(1, 1, -1)
        s, p = formula(x)
        torch.testing.assert_close(s, torch.sigmoid(x), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(p, torch.nn.functional.softplus(x), rtol=1e-6, atol=1e-12)

    def test_what_is_not_a_number_shows(self):
        formula = AtomFormula(lambda x: [sigmoid(x[0]), sqrt(x[0])], inputs=(1,), outputs=(1, 1))
        s, r = formula(torch.tensor([torch.nan, -1.0]).view(1, 1, -1))
        assert s.isnan().tolist() == [[[True, False]]]
        assert r.isnan().all()

    def test_gradients_of_weights_cannot_be_differentiated_again_unnoticed(self, molecule):
        model = _model(BACKBONES[0]).train()
        graph = to_graph([molecule], BACKBONES[0].edges)
        energy = model(graph, ["energy"])["energy"].sum()
        weights = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(energy, weights, create_graph=True, allow_unused=True)
        with pytest.raises((NotImplementedError, RuntimeError)):
            sum(g.square().sum() for g in first if g is not None).backward()


def test_without_llvmlite_plain_torch_does_the_same():
    code = (
        "import sys; sys.modules['llvmlite'] = None; import torch, ase.build, transfermium as tm;"
        "torch.manual_seed(0); b = tm.PaiNN(8, 1); m = tm.Model(b, tm.Potential().outputs(8)).eval();"
        "from transfermium.graph import to_graph; from transfermium.messages import have_kernels;"
        "print(have_kernels(torch.zeros(1)), float(m(to_graph([ase.build.bulk('Cu')], b.edges), ['energy'])['energy']))"
    )
    have, energy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert have == "False"
    import ase.build

    torch.manual_seed(0)
    backbone = tm.PaiNN(8, 1)
    model = tm.Model(backbone, tm.Potential().outputs(8)).eval()
    here = model(to_graph([ase.build.bulk("Cu")], backbone.edges), ["energy"])["energy"]
    assert float(energy) == pytest.approx(float(here), rel=1e-5)


def _model(backbone):
    torch.manual_seed(0)
    fresh = type(backbone)(**{k: getattr(backbone, k) for k in tm.model.described(backbone)["arguments"]})
    return tm.Model(fresh, tm.Potential().outputs(fresh.width))


def _everything(model, structures):
    model.train()
    model.zero_grad()
    graph = to_graph(structures, model.backbone.edges)
    outputs = model(graph, ["energy", "forces", "stress"])
    stress = outputs["stress"].nan_to_num()
    loss = outputs["energy"].square().sum() + outputs["forces"].square().sum() + 1e3 * stress.square().sum()
    weights = dict(model.named_parameters())
    loss.backward(inputs=list(weights.values()))
    found = {name: value.detach().double() for name, value in {**outputs, "stress": stress}.items()}
    return found | {name: p.grad.double().clone() for name, p in weights.items() if p.grad is not None}


def _value(x, given):
    """An expression evaluated with torch."""
    a = [_value(argument, given) for argument in x.args]
    rules = {
        "constant": lambda: torch.tensor(x.value, dtype=torch.float64),
        "input": lambda: given[x.value[0]].detach(),
        "add": lambda: a[0] + a[1],
        "mul": lambda: a[0] * a[1],
        "inverse": lambda: 1 / a[0],
        "sqrt": lambda: a[0].sqrt(),
        "sigmoid": lambda: a[0].sigmoid(),
        "softplus": lambda: torch.nn.functional.softplus(a[0]),
        "total": lambda: a[0].sum(-1, keepdim=True),
        "head_total": lambda: head_total(a[0], x.value),
    }
    return rules[x.op]()
