"""LoRA: low-rank updates of a frozen backbone, which start as nothing and end as plain weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import transfermium as tm
from tests.alloys import QUICK, alloys, painn, potential, same_bits, weights_of
from transfermium.graph import to_graph
from transfermium.lora import LowRank, adapt, adapted, merged
from transfermium.train import _Run
from transfermium.transfer import finetune

BACKBONES = (
    painn(),
    tm.TensorNet(width=8, depth=1, cutoff=4.0, radial=6),
    tm.ET(width=8, depth=2, heads=2, cutoff=4.0),
    tm.CGCNN(width=8, channels=8, depth=1, cutoff=4.0),
    tm.CGAT(width=8, depth=2),
)


def tune(objective: tm.Objective | None = None, **options) -> tm.Model:
    given = {"strategy": "lora", "steps": 4, "lr": 0.01, "valid_fraction": 0, **QUICK, **options}
    return finetune(potential(), alloys(8, seed=1), objective or tm.Potential(), **given)


def energy_model(backbone: tm.Backbone, dtype: torch.dtype) -> tm.Model:
    torch.manual_seed(0)
    fresh = type(backbone)(**{name: getattr(backbone, name) for name in ("width", "depth")}, **options_of(backbone))
    outputs = {"energy": tm.EnergyHead(fresh.width)}
    if "derivatives" in fresh.laws:
        outputs |= {"forces": tm.Gradient("energy"), "stress": tm.Strain("energy")}
    return tm.Model(fresh, outputs).to(dtype)


def options_of(backbone: tm.Backbone) -> dict:
    names = {"PaiNN": ("cutoff", "radial"), "CGCNN": ("channels", "cutoff"), "CGAT": (), "ET": ("heads", "cutoff")}
    return {name: getattr(backbone, name) for name in names.get(type(backbone).__name__, ("cutoff", "radial"))}


def outputs(model: tm.Model, training: bool = False) -> dict[str, torch.Tensor]:
    model.train(training)
    return {name: value.detach() for name, value in model(to_graph(alloys(3), model.backbone.edges)).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: type(b).__name__)
class TestUpdates:
    """Of every backbone, by the reference (float64) and by the fused kernels (float32)."""

    def test_they_are_nothing_at_first(self, backbone, dtype):
        model = energy_model(backbone, dtype)
        before = outputs(model)
        adapt(model.backbone, 2)
        assert same_bits(before, outputs(model))

    def test_merged_weights_compute_the_same(self, backbone, dtype):
        model = energy_model(backbone, dtype)
        before = outputs(model)
        adapt(model.backbone, 2)
        trained_somehow(model.backbone)
        with_updates = {training: outputs(model, training) for training in (False, True)}
        model.backbone = merged(model.backbone)
        assert not adapted(model.backbone)
        for training, expected in with_updates.items():
            found = outputs(model, training)
            for name in found:
                scale = float(expected[name].abs().max())
                tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype] * scale
                assert torch.allclose(found[name], expected[name], rtol=0, atol=tolerance, equal_nan=True)
                assert not torch.allclose(found[name], before[name], rtol=0, atol=100 * tolerance, equal_nan=True)

    def test_all_that_a_step_may_change_is_low_rank(self, backbone, dtype):
        model = energy_model(backbone, dtype)
        before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
        said = adapt(model.backbone, 2)
        assert said["numbers"] == sum(p.numel() for p in before.values())
        assert 0 < said["trained numbers"] == sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
        trained_somehow(model.backbone)
        after = dict(merged(model.backbone).named_parameters())
        assert list(after) == list(before)
        matrices = {f"{n}.weight" for n, m in merged(model.backbone).named_modules() if isinstance(m, nn.Linear)}
        changed = {name for name in before if not torch.equal(after[name], before[name])}
        assert changed >= matrices
        for name in changed:
            assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4).max() <= 2


def trained_somehow(backbone: tm.Backbone) -> None:
    """Give updates numbers as training might."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, LowRank):
                module.tall += 0.1 * torch.randn(module.tall.shape, generator=generator).to(module.tall)


def test_hyper_networks_and_stacks_of_matrices_are_adapted():
    backbone = tm.CGAT(width=8, depth=2)
    adapt(backbone, 2)
    node = backbone.nodes[0]
    assert parametrize.is_parametrized(node.update.generators[0][0], "weight")
    assert node.networks.parametrizations.weight[0].tall.shape == (4, 16, 2)  # of four matrices side by side


def test_what_the_base_does_not_have_is_trained_as_it_is():
    backbone = painn(vector_inputs=("forces",))
    own = {name for name in backbone.state_dict() if name.startswith("told.")}
    adapt(backbone, 2, own)
    names = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert own and own <= names
    assert all(name in own or ".parametrizations.weight.0." in name for name in names)


class TestFinetune:
    def test_zero_steps_leave_the_base_as_it_is(self):
        model = tune(steps=0, align=False)
        assert same_bits(weights_of(model), weights_of(potential()))

    def test_zero_steps_are_those_of_a_full_transfer(self):
        assert same_bits(weights_of(tune(steps=0)), weights_of(tune(steps=0, strategy="full")))

    def test_the_backbone_changes_by_low_rank_matrices_alone_and_heads_fully(self):
        model, base = tune(rank=1), potential()
        after, before = weights_of(model), weights_of(base)
        assert after.keys() == before.keys()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed > {name for name in after if name.startswith("heads.") and name.endswith("weight")}
        inside = {name for name in changed if name.startswith("backbone.")}
        assert len(inside) >= 6
        for name in inside:
            assert name.endswith(".weight") and after[name].dim() == 2
            assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) == 1

    def test_it_learns(self):
        tests = alloys(8, seed=3)
        errors = [tm.evaluate(tune(steps=steps, rank=2), tests, verbose=False)["forces"]["mae"] for steps in (0, 40)]
        assert errors[1] < 0.95 * errors[0]

    def test_the_card_says_how_many_numbers_were_trained(self):
        said = {rank: tune(rank=rank, steps=1).card["history"][-1]["lora"] for rank in (1, None)}
        assert said[1]["rank"] == 1 and said[None]["rank"] == 8
        backbone = potential().backbone
        shapes = [m.weight.shape for m in backbone.modules() if isinstance(m, nn.Linear)]
        assert said[1]["trained numbers"] == sum(rows + columns for rows, columns in shapes)
        assert said[1]["numbers"] == sum(p.numel() for p in backbone.parameters())

    def test_a_run_that_was_stopped_goes_on_to_the_same_bits(self, tmp_path, monkeypatch):
        options = {"steps": 6, "rank": 2, "valid_fraction": 0.25, "validate_every": 2}
        expected = tune(**options)
        stop_after(monkeypatch, 3)
        with pytest.raises(KeyboardInterrupt):
            tune(out=tmp_path, **options)
        assert (tmp_path / "state.safetensors").exists()
        monkeypatch.undo()
        assert same_bits(weights_of(tune(out=tmp_path, **options)), weights_of(expected))

    def test_file_and_model_are_plain_and_the_same(self, tmp_path):
        model = tune(out=tmp_path)
        again = tm.load(tmp_path)
        assert same_bits(weights_of(model), weights_of(again))
        assert not any("parametrizations" in name for name in weights_of(again))
        more = [finetune(base, alloys(6), tm.Potential(), steps=2, **QUICK) for base in (model, again)]
        assert same_bits(*map(weights_of, more))

    def test_layer_decay_and_precision_go_with_it(self):
        model = tune(layer_decay=0.5, dtype="float64")
        assert all(p.dtype == torch.float64 and p.requires_grad for p in model.backbone.parameters())

    def test_a_dry_run_counts_what_would_be_trained(self):
        cost = tune(dry_run=True, rank=1).card["dry run"]
        heads = sum(p.numel() for p in potential().heads.parameters())
        trained = tune(rank=1, steps=0).card["history"][-1]["lora"]["trained numbers"]
        assert cost["trained_parameters"] == heads + trained

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"rank": 0}, "rank is 0, but must be at least one"),
            ({"strategy": "full", "rank": 4}, "rank is for strategy 'lora', but the strategy is 'full'"),
            ({"backbone_lr": 0.0}, "strategy 'lora' trains the backbone, but backbone_lr=0 freezes it"),
        ],
        ids=str,
    )
    def test_options_that_make_no_sense_are_refused(self, options, words):
        with pytest.raises(tm.InputError, match=words):
            tune(**options)

    def test_another_rank_is_another_run(self, tmp_path):
        tune(out=tmp_path, rank=1)
        with pytest.raises(tm.InputError, match="rank was 1 there and is 2 now"):
            tune(out=tmp_path, rank=2)


def stop_after(monkeypatch, steps: int) -> None:
    """Interrupt training after so many steps, each of which is saved."""
    usual, seen = _Run._set_learning_rates, []

    def counted(run, fraction):
        seen.append(fraction)
        if len(seen) > 1:
            run._save()
        if len(seen) > steps:
            raise KeyboardInterrupt
        return usual(run, fraction)

    monkeypatch.setattr(_Run, "_set_learning_rates", counted)


def test_updates_of_a_matrix_have_its_own_rank_at_most():
    update = LowRank(torch.Size((3, 5)), 8)
    assert update.tall.shape == (3, 3) and update.wide.shape == (3, 5)
    assert torch.equal(update(torch.ones(3, 5)), torch.ones(3, 5))
