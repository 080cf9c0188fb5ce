"""The page of a simulation: did it hold together, and what does it say about the substance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..observables import COLLAPSED, FITTED
from .figures import COLOURS, INK, SOFT, _figure, _label_ends, styled
from .page import Page

Result = Mapping[str, Any]  # of `md`

ENGINES = {
    "verlet": "velocity Verlet",
    "langevin": "a Langevin thermostat",
    "bussi": "stochastic velocity rescaling",
    "nose-hoover": "a Nosé-Hoover chain",
    "mtk": "the barostat of Martyna, Tobias and Klein",
    "mtk-shape": "the barostat of Martyna, Tobias and Klein, also of the shape of the cell",
}
MOST_PAIRS = 6  # of elements with a figure of their own
MOST_POINTS = 600  # of a curve


def page(result: Result) -> Page:
    """One page with the verdict, the numbers and their figures."""
    settings = result["settings"]
    lasted = f"{_lasted(result):g} ps"
    page = Page(
        f"{result['formula']}, {settings['ensemble'].upper()}", f"{lasted} of {result['n_atoms']} atoms with a model"
    )
    page.verdict(verdict(result))
    page.table(rows(result), "Averages, with 95 % intervals", notes(result))
    page.figure(temperature_curve(result), "Temperature; its target, where there is one, is dashed.")
    page.figure(energy_curve(result), _energy_caption(result))
    if "rdf" in result:
        told = {name for name in result["rdf"] if name != "r"}
        for pair in sorted(told, key=lambda name: (name not in _scored(result), name))[:MOST_PAIRS]:
            beside = " Dashed: the reference." if pair in result.get("reference", {}).get("rdf", {}) else ""
            page.figure(rdf_curve(result, pair), f"Radial distribution function of {pair}.{beside}")
    if "msd" in result:
        page.figure(msd_curve(result), "Mean-square displacement of each element, averaged over all origins.")
    if "reference" in result:
        page.figure(
            error_curve(result), f"Error of the worst pair in windows of 1 ps; more than {COLLAPSED:g} Å is a collapse."
        )
    page.heading("How it was done")
    page.text(_told(result))
    return page.numbers(result)


def _lasted(result: Result) -> float:
    """In ps; the log may end before that."""
    return float(result["steps"] * result["settings"]["timestep"] / 1000)


def held_together(result: Result) -> bool:
    """Whether it neither exploded nor lost the structure of its reference."""
    return not result["stopped"] and result.get("reference", {}).get("collapsed") is None


def verdict(result: Result) -> str:
    """Whether it held together, in one or two sentences."""
    if result["stopped"]:
        return result["stopped"][0].upper() + result["stopped"][1:] + "."
    texts = [f"It ran to its end: {_lasted(result):g} ps"]
    if "temperature" in result:
        texts.append(f"at {result['temperature']['value']:.0f} K on average")
    if "drift" in result and _finite(result["drift"]["value"]):
        texts.append(f"with a drift of {_with_interval(result['drift'])} meV/atom/ps")
    sentence = ", ".join(texts) + "."
    if "reference" in result:
        at = result["reference"]["collapsed"]
        if at is not None:
            sentence += f" But it lost the structure of the reference in the window that begins at {at:g} ps."
        elif _scored(result):
            sentence += " Its structure is that of the reference within the limit."
        else:
            sentence += " Its structure was not judged, as there are too few pairs of atoms."
    return sentence


def rows(result: Result) -> list[dict[str, str]]:
    """Rows of a table of what was measured."""
    found = {name: result[name] for name in ("temperature", "drift", "pressure", "density") if name in result}
    found |= {f"cell, {name}": one for name, one in result.get("cell", {}).items()}
    found |= {f"diffusion of {element}": one for element, one in result.get("diffusion", {}).items()}
    table = [
        {
            "quantity": {"drift": "drift of the conserved energy"}.get(name, name),
            "value": f"{one['value']:.4g}",
            "95 % interval": _interval(one),
            "unit": one["unit"],
        }
        for name, one in found.items()
        if _finite(one["value"])
    ]
    for pair, error in result.get("reference", {}).get("errors", {}).items():
        table.append({"quantity": f"RDF error of {pair}", "value": f"{error:.3g}", "95 % interval": "", "unit": "Å"})
    return table


def notes(result: Result) -> list[str]:
    """What has to be known to read the numbers."""
    texts = ["Intervals allow for values that are alike at times near each other; those of diffusion are over atoms."]
    lasted = _lasted(result)
    if any(_finite(one["value"]) for one in result.get("diffusion", {}).values()):
        texts.append(
            "Diffusion in a periodic box is too small by 2.84 kT / 6πηL (Yeh and Hummer), with the viscosity η of the "
            "model and the length L of a cubic box; 1 Å²/ps is 1e-4 cm²/s."
            + (f" {lasted:g} ps are short for it: 100 ps are a minimum in liquids." if lasted < 100 else "")
        )
    if noisy := result.get("reference", {}).get("noisy"):
        texts.append(
            f"{', '.join(noisy)}: there are so few of these pairs that even frames of the reference would seem to have "
            "lost it; they are not scored unless they are named."
        )
    if uneven := result.get("reference", {}).get("uneven"):
        texts.append(
            f"{', '.join(uneven)}: the reference has cells of another size, and in one of them so few atoms that their "
            "number shows in the RDF, for an atom and its own images are no pair: compare cells of one size."
        )
    if result["forces"] == "direct":
        texts.append("Forces of this model are no derivatives of its energy: what they do need not conserve energy.")
    return texts


@styled()
def temperature_curve(result: Result) -> Figure:
    """Temperature against time."""
    fig, axes = _figure(4.4, 2.5)
    times, values = _thinned(result["log"]["time_ps"], result["log"]["temperature_K"])
    axes.plot(times, values, color=COLOURS[1], linewidth=1.0)
    if result["settings"]["ensemble"] != "nve":
        axes.axhline(result["settings"]["temperature"], color=SOFT, linewidth=0.9, dashes=(4, 3))
    axes.set(xlabel="time (ps)", ylabel="temperature (K)")
    _from_zero(axes)
    return fig


@styled()
def energy_curve(result: Result) -> Figure:
    """The conserved energy, or the potential energy where nothing is conserved, against time."""
    fig, axes = _figure(4.4, 2.5)
    log, n = result["log"], result["n_atoms"]
    name = "conserved_eV" if "conserved_eV" in log else "potential_eV"
    values = 1000 * (np.asarray(log[name], float) - log[name][0]) / n
    times, thin = _thinned(log["time_ps"], values)
    axes.plot(times, thin, color=COLOURS[0], linewidth=1.0)
    slope = result.get("drift", {}).get("value")
    if _finite(slope):
        times = np.asarray(log["time_ps"], float)
        used = times >= _begin(result) - 1e-9
        line = values[used].mean() + slope * (times[used] - times[used].mean())
        axes.plot(times[used], line, color=INK, linewidth=1.0, dashes=(4, 3))
    axes.set(xlabel="time (ps)", ylabel="energy (meV/atom)")
    axes.set_xlim(0, None)
    return fig


@styled()
def rdf_curve(result: Result, pair: str) -> Figure:
    """One radial distribution function, and that of the reference."""
    fig, axes = _figure(3.1, 2.3)
    r = np.asarray(result["rdf"]["r"])
    reference = result.get("reference", {}).get("rdf", {}).get(pair)
    axes.axhline(1, color="#e6e9ed", linewidth=0.8, zorder=0)
    axes.plot(r, result["rdf"][pair], color=COLOURS[0], linewidth=1.3)
    if reference is not None:
        axes.plot(r, reference, color=INK, linewidth=1.0, dashes=(3, 2))
    axes.set_title(pair)
    axes.set(xlabel="distance (Å)", ylabel="g(r)", xlim=(0, r[-1]))
    axes.set_ylim(0, None)
    return fig


@styled()
def msd_curve(result: Result) -> Figure:
    """Mean-square displacements against the lag, up to half of the longest."""
    fig, axes = _figure(4.4, 2.5)
    lag = np.asarray(result["msd"]["lag"], float)
    shown = lag <= FITTED[1] * lag[-1] + 1e-9
    ends = []
    for colour, (element, values) in zip(COLOURS, _without(result["msd"], "lag").items(), strict=False):
        times, thin = _thinned(lag[shown], np.asarray(values, float)[shown])
        axes.plot(times, thin, color=colour)
        ends.append((element, times[-1], thin[-1], colour))
    axes.set(xlabel="lag (ps)", ylabel="mean-square displacement (Å²)")
    _from_zero(axes)
    _label_ends(axes, ends)
    return fig


@styled()
def error_curve(result: Result) -> Figure:
    """Errors of radial distribution functions in windows of time."""
    fig, axes = _figure(4.4, 2.5)
    windows = result["reference"]["windows"]
    axes.axhline(COLLAPSED, color=COLOURS[1], linewidth=0.9, dashes=(4, 3))
    middles = np.asarray(windows["begin"]) + 0.5
    axes.plot(middles, windows["error"], color=COLOURS[0], marker="o", markersize=3.5)
    axes.set_xlim(0, max(result["log"]["time_ps"][-1], 1))
    axes.set(xlabel="time (ps)", ylabel="RDF error (Å)", ylim=(0, 1.15 * max(3, *windows["error"], 0)))
    return fig


def _told(result: Result) -> str:
    settings = result["settings"]
    texts = [f"{settings['ensemble'].upper()} with {ENGINES[settings['engine']]}, steps of {settings['timestep']:g} fs"]
    if settings["ensemble"] != "nve":
        texts.append(f"{settings['temperature']:g} K, with a time constant of {settings['tau']:g} fs")
    if settings["pressure"] is not None:
        texts.append(f"{settings['pressure'] / 0.0006241509:.4g} kbar, {settings['tau_pressure']:g} fs")
    texts += [f"a row of the log every {settings['every']}", f"{result['degrees of freedom']} degrees of freedom"]
    if _begin(result) > 0:
        texts.append(f"averages leave out the first {_begin(result):g} ps")
    if "reference" in result:
        texts.append(
            f"{_count(result['reference']['frames'], 'frame')} of reference, scored on {', '.join(_scored(result))}"
        )
    return "; ".join(texts) + "."


def _energy_caption(result: Result) -> str:
    if "conserved_eV" not in result["log"]:
        return "Potential energy, from its first value; a Langevin thermostat conserves nothing."
    return "The conserved energy, from its first value; dashed: its drift by least squares."


def _begin(result: Result) -> float:
    """Of what is averaged, in ps."""
    return float(result["log"]["time_ps"][-1]) - float(result["averaged_ps"])


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def _scored(result: Result) -> list[str]:
    return list(result.get("reference", {}).get("scored", []))


def _thinned(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Averages of neighbours where there are more points than a figure shows."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    groups = np.array_split(np.arange(len(x)), min(len(x), MOST_POINTS))
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])


def _from_zero(axes: Axes) -> None:
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)


def _with_interval(one: Mapping[str, Any]) -> str:
    interval = _interval(one)
    return f"{one['value']:.3g} ({interval})" if interval else f"{one['value']:.3g}"


def _interval(one: Mapping[str, Any]) -> str:
    if not _finite(one["low"]) or one["low"] == one["high"]:
        return ""
    return f"{one['low']:.3g} to {one['high']:.3g}"


def _finite(value: Any) -> bool:
    return value is not None and bool(np.isfinite(value))


def _without(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}
