"""Observables on cases with known answers: gases, crystals, Brownian motion, lines with noise."""

import numpy as np
import pytest
from ase import units
from ase.build import bulk, molecule

from transfermium import observables as obs

SKEWED = np.array([[10.0, 0.0, 0.0], [4.0, 9.0, 0.0], [-3.0, 2.5, 8.0]])


def gas(n_frames=200, n_atoms=40, cell=SKEWED, seed=0):
    fractions = np.random.default_rng(seed).random((n_frames, n_atoms, 3))
    return fractions @ cell, np.repeat(cell[None], n_frames, axis=0)


class TestRdf:
    @pytest.mark.parametrize("radius", [3.0, 9.0], ids=["inside half the cell", "beyond it"])
    def test_of_an_ideal_gas_it_is_one_in_any_cell(self, radius):
        positions, cells = gas(n_frames=1500)
        numbers = np.repeat([8, 1], [10, 30])
        found = obs.rdf(positions, cells, numbers, radius, width=0.5)
        assert set(found.g) == {"O-O", "H-O", "H-H"}
        for g in found.mean().values():
            assert g[2:] == pytest.approx(1.0, abs=0.08)  # the first shells are small
            weight = found.r**2
            assert (g * weight).sum() / weight.sum() == pytest.approx(1.0, abs=0.02)

    def test_few_atoms_make_no_difference(self):
        positions, cells = gas(n_frames=4000, n_atoms=2)
        found = obs.rdf(positions, cells, np.array([18, 18]), 4.0, width=1.0)
        assert found.mean()["Ar-Ar"][1:] == pytest.approx(1.0, abs=0.1)

    def test_of_a_crystal_it_counts_neighbours(self):
        atoms = bulk("Cu", a=3.6, cubic=True) * (3, 3, 3)
        found = obs.rdf(atoms.positions[None], atoms.cell.array[None], atoms.numbers, 4.5)
        counts = found.g["Cu-Cu"][0] * 4 * np.pi * found.r**2 * 0.05 * (len(atoms) - 1) / atoms.get_volume()
        for distance, expected in ((3.6 / np.sqrt(2), 12), (3.6, 6), (3.6 * np.sqrt(1.5), 24)):
            shell = np.abs(found.r - distance) < 0.06
            assert counts[shell].sum() == pytest.approx(expected, rel=1e-3)
        assert np.count_nonzero(found.g["Cu-Cu"]) <= 6

    def test_the_choice_of_cell_vectors_does_not_matter(self):
        positions, cells = gas(n_frames=3)
        other = cells.copy()
        other[:, 1] += other[:, 0]  # the same lattice
        other[:, 2] -= 2 * other[:, 1]
        numbers = np.full(40, 10)
        expected = obs.rdf(positions, cells, numbers, 7.0).g["Ne-Ne"]
        assert obs.rdf(positions, other, numbers, 7.0).g["Ne-Ne"] == pytest.approx(expected)

    def test_whether_positions_are_wrapped_does_not_matter(self):
        positions, cells = gas(n_frames=3)
        moved = positions + np.random.default_rng(1).integers(-3, 4, positions.shape) @ SKEWED
        numbers = np.full(40, 10)
        expected = obs.rdf(positions, cells, numbers, 4.0).g["Ne-Ne"]
        assert obs.rdf(moved, cells, numbers, 4.0).g["Ne-Ne"] == pytest.approx(expected)

    def test_widths_are_distances_between_faces(self):
        assert obs.widths(np.diag([2.0, 3.0, 4.0])) == pytest.approx([2, 3, 4])
        normal = np.cross(SKEWED[1], SKEWED[2])
        assert obs.widths(SKEWED)[0] == pytest.approx(SKEWED[0] @ normal / np.linalg.norm(normal))


class TestCollapse:
    def test_equal_functions_have_no_error(self):
        positions, cells = gas(n_frames=20)
        found = obs.rdf(positions, cells, np.full(40, 10), 4.0)
        _, errors = obs.rdf_errors(np.arange(20) * 0.1, found, found.mean(), window=5.0)
        assert errors == pytest.approx([0.0])  # less than one window is one

    def test_the_error_is_the_area_between_the_curves(self):
        r = (np.arange(40) + 0.5) * 0.1  # up to 4 Å
        g = np.ones((30, 40))
        g[10:20] += 1.5  # in the second ps
        found = obs.Rdf(r, {"O-O": g, "H-O": np.ones((30, 40))})
        starts, errors = obs.rdf_errors(np.arange(30) * 0.1, found, {"O-O": np.ones(40), "H-O": np.ones(40)})
        assert starts == pytest.approx([0.0, 1.0, 2.0])
        assert errors == pytest.approx([0.0, 6.0, 0.0])
        assert (errors > obs.COLLAPSED).tolist() == [False, True, False]

    def test_pairs_without_reference_are_not_scored(self):
        found = obs.Rdf(np.array([0.5, 1.5]), {"O-O": np.ones((2, 2)), "H-H": np.full((2, 2), 9.0)})
        _, errors = obs.rdf_errors(np.array([0.0, 0.5]), found, {"O-O": np.ones(2)})
        assert errors == pytest.approx([0.0])


class TestDiffusion:
    def test_of_brownian_motion(self):
        rng = np.random.default_rng(0)
        coefficient, dt = 0.23, 0.1
        steps = rng.normal(scale=np.sqrt(2 * coefficient * dt), size=(1000, 300, 3))
        positions = np.cumsum(steps, axis=0)
        times = np.arange(1000) * dt
        found = obs.diffusion(times, obs.msd(positions, np.ones(300)))
        assert found.value == pytest.approx(coefficient, rel=0.1)
        assert found.low < coefficient < found.high

    def test_displacements_are_those_of_all_origins(self):
        positions = np.random.default_rng(1).normal(size=(12, 5, 3)).cumsum(axis=0)
        masses = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
        held = positions - np.average(positions, axis=1, weights=masses)[:, None]
        found = obs.msd(positions, masses)
        for lag in range(12):
            expected = np.square(held[lag:] - held[: 12 - lag]).sum(axis=-1).mean(axis=0)
            assert found[lag] == pytest.approx(expected)

    def test_the_motion_of_the_whole_does_not_count(self):
        drifting = np.arange(50)[:, None, None] * np.array([1.0, 2.0, 3.0]) + np.random.default_rng(2).normal(
            size=(8, 3)
        )
        assert obs.msd(drifting, np.ones(8)) == pytest.approx(0.0, abs=1e-9)

    def test_a_harmonic_crystal_does_not_diffuse(self):
        rng = np.random.default_rng(3)
        times = np.arange(2000) * 0.01
        phases, rates = rng.random((50, 3)) * 2 * np.pi, 30 + 10 * rng.random((50, 3))
        positions = 0.1 * np.cos(rates * times[:, None, None] + phases)
        displacements = obs.msd(positions, np.full(50, 1e6))
        assert displacements[100:1000].mean() == pytest.approx(3 * 0.1**2, rel=0.05)  # twice the variance
        assert abs(obs.diffusion(times, displacements).value) < 1e-5

    def test_of_a_box_of_water_too_little_is_missed(self):
        """64 molecules: 2.84 kT / 6πηL is 0.6e-9 m²/s."""
        assert obs.finite_size(300, 12.42, 0.85) == pytest.approx(0.059, abs=0.001)


class TestSeries:
    def test_drift_is_the_slope_per_atom(self):
        t = np.linspace(0, 5, 501)
        noise = 1e-3 * np.random.default_rng(0).normal(size=501)
        found = obs.drift(t, 0.064 * t + noise - 470.0, n_atoms=192)
        assert found.value == pytest.approx(1000 * 0.064 / 192, rel=0.02)
        assert found.low < found.value < found.high

    @pytest.mark.parametrize("memory", [0.0, 0.9], ids=["white", "slow"])
    def test_intervals_hold_the_truth_where_noise_is_slow_too(self, memory):
        rng = np.random.default_rng(4)
        held = {"drift": 0, "average": 0}
        for _ in range(200):
            noise = rng.normal(size=600)
            for i in range(1, 600):
                noise[i] += memory * noise[i - 1]
            drift, mean = obs.drift(np.arange(600) * 0.01, noise, 1), obs.average(noise)
            held["drift"] += drift.low < 0 < drift.high
            held["average"] += mean.low < 0 < mean.high
        assert min(held.values()) > 0.85 * 200

    def test_few_values_have_no_interval(self):
        assert np.isnan(obs.drift(np.arange(2), np.arange(2), 1).value)
        assert obs.average(np.array([1.0, 3.0])).value == 2 and np.isnan(obs.average(np.array([1.0, 3.0])).low)

    def test_temperature_is_that_of_equipartition(self):
        assert obs.temperature(np.array([9 / 2 * units.kB * 321]), 9) == pytest.approx([321])

    def test_density_of_water(self):
        masses = np.tile(molecule("H2O").get_masses(), 64)
        assert obs.density(masses, np.array([12.42**3])) == pytest.approx([1.0], abs=0.005)
