"""Operations are counted, and bound a run."""

import pytest
import torch

import transfermium as tm
from tests.alloys import alloys, painn, same_bits
from transfermium.flop import counted, parse_flop

LENGTH = {"edges": 400, "lr": 1e-3, "device": "cpu", "verbose": False, "valid_fraction": 0.0, "calibrate": False}


def test_products_of_matrices_are_counted():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    assert counted(lambda: a @ b) == 2 * 3 * 5 * 7
    assert counted(lambda: (a @ b).sum().backward()) == 2 * (2 * 3 * 5 * 7)  # the gradient of `a` is as much again


@pytest.mark.parametrize(("text", "number"), [("20TFLOP", 2e13), ("0.5 PFLOPs", 5e14), ("3e12FLOP", 3e12)])
def test_numbers_of_operations(text, number):
    assert parse_flop(text) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize("flop", ["0TFLOP", "20", "-1GFLOP", "20 tons", "1e400FLOP"])
def test_numbers_of_operations_that_are_none(flop):
    with pytest.raises(tm.InputError, match=f"'{flop}'"):
        tm.pretrain(alloys(4, seed=1), tm.Potential(), painn(), flop=flop, **LENGTH)


def steps(flop, objective=None):
    model = tm.pretrain(alloys(20, seed=1), objective or tm.Potential(), painn(), flop=flop, **LENGTH)
    return model.card["history"][-1]["steps"], model


def test_a_run_takes_as_many_steps_as_its_operations_allow():
    few, _ = steps("0.2GFLOP")
    many, model = steps("0.8GFLOP")
    assert few > 2
    assert 4 * few <= many < 4 * few + 4
    told = tm.pretrain(alloys(20, seed=1), tm.Potential(), painn(), steps=many, **LENGTH)
    assert same_bits(model.state_dict(), told.state_dict())


def test_derivatives_cost_more_operations():
    direct, _ = steps("0.5GFLOP", tm.Potential(conservative=False))
    derivative, _ = steps("0.5GFLOP")
    assert direct > 1.5 * derivative


def test_the_smaller_bound_ends_a_run():
    model = tm.pretrain(alloys(20, seed=1), tm.Potential(), painn(), flop="1TFLOP", steps=3, **LENGTH)
    assert model.card["history"][-1]["steps"] == 3
