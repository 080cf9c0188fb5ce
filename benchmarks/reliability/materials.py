"""What intervals promise of a new material when those that validated were few: simulated, in seconds.

Errors of all frames of a material share a factor, log-normal with a spread of 0.7 in the logarithm: typically two.
"""

import numpy as np

LEVEL, SPREAD = 0.9, 0.7
REPEATS, NEW = 4000, 20  # of the simulation, and frames of a new material


def main() -> None:
    print("| materials | frames of each | coverage of a new material, % | new materials below 80 %, % |")
    print("|---|---|---|---|")
    for materials, frames in ((1, 40), (2, 20), (4, 10), (10, 5), (40, 1)):
        mean, poor = coverage(materials, frames)
        print(f"| {materials} | {frames} | {100 * mean:.1f} | {100 * poor:.0f} |")


def coverage(materials: int, frames: int) -> tuple[float, float]:
    """Its mean over repeats, and how often it is below 80 %."""
    rng = np.random.default_rng(0)
    rank = int(np.ceil((materials * frames + 1) * LEVEL - 1e-9))
    held = []
    for _ in range(REPEATS):
        scores = np.exp(SPREAD * rng.normal(size=(materials, 1))) * np.abs(rng.normal(size=(materials, frames)))
        width = np.sort(scores.ravel())[rank - 1]
        new = np.exp(SPREAD * rng.normal()) * np.abs(rng.normal(size=NEW))
        held.append(np.mean(new <= width))
    return float(np.mean(held)), float(np.mean(np.array(held) < 0.8))


if __name__ == "__main__":
    main()
