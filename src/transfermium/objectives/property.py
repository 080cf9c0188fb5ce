"""Property: any labelled number or class, per structure or per atom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, Literal

import ase
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..graph import Batch, Sample
from ..heads import AtomHead, ClassHead, CompositionHead, DeviationHead, Head, ScalarHead, rms, values
from ..model import Output, copied
from .base import Loss, Objective, Quantity, absolute_errors, label


class Property(Objective):
    """A property called `name`, by mean absolute error (regression) or cross entropy (classification).

    With `uncertainty` an output NAME_std learns the standard deviation σ of the errors, in the unit of the label, by
    the robust loss √2 |y - t| / σ + ln(weight · σ), the likelihood of a Laplace distribution (arXiv:2303.03000).

    With `minus` the model learns how much the label differs from a cheap value of the same quantity that the same
    structures have ("delta learning"). Errors and predictions are of the quantity itself: the cheap value is added
    again, which is therefore needed wherever the model is used. The bare output is called NAME_minus_CHEAP.

    Args:
        name: of the label and of the output.
        kind: "intensive" (a mean over atoms: band gap), "extensive" (a sum: polarisability) or "per-atom" (charge).
        task: "regression" or "classification".
        pooling: for intensive regression, "mean" or "attention"; "composition" (intensive or extensive) is attention
            that knows the composition, then a deep residual network, as in CGAT.
        classes: number of classes, labelled 0, 1, ..., or the words that label them, in order.
        weight: of the error in the label's own unit; None is one over its standard deviation in the training set.
        uncertainty: of regression, learned too; errors then count by it, and `weight` only shifts the loss.
        minus: label that is subtracted before, and added after; in the unit of the label, or in one that is declared.
    """

    def __init__(
        self,
        name: str,
        kind: Literal["intensive", "extensive", "per-atom"] = "intensive",
        task: Literal["regression", "classification"] = "regression",
        pooling: Literal["mean", "attention", "composition"] = "mean",
        classes: int | list[str] = 2,
        weight: float | None = None,
        uncertainty: bool = False,
        minus: str | None = None,
    ):
        if kind not in ("intensive", "extensive", "per-atom"):
            raise InputError(f"kind is '{kind}', but must be one of intensive, extensive, per-atom")
        if task not in ("regression", "classification"):
            raise InputError(f"task is '{task}', but must be one of regression, classification")
        if task == "classification" and kind == "extensive":
            raise InputError("a class cannot be extensive: choose kind='intensive' or 'per-atom'")
        if pooling == "composition" and (kind == "per-atom" or task == "classification"):
            raise InputError("pooling='composition' gives one number per structure, not classes or numbers per atom")
        if uncertainty and task == "classification":
            raise InputError("classes have probabilities instead of an uncertainty: leave uncertainty out")
        if uncertainty and weight is not None and not 0 < weight < np.inf:
            raise InputError(f"the weight is {weight}, but must be above zero where an uncertainty is learned")
        if not name.isidentifier():
            raise InputError(
                f"'{name}' cannot name a property: use letters, digits and _, and --label {{name}}=KEY for the key"
            )
        if minus is not None and not minus.isidentifier():
            raise InputError(f"'{minus}' cannot name a label: use letters, digits and _, and --label {{name}}=KEY")
        if minus == name:
            raise InputError(f"'{name}' minus itself is nothing to learn: give minus the name of a cheaper label")
        if minus is not None and task == "classification":
            raise InputError("a class minus another is no class: leave minus out")
        self.name = name
        self.kind = kind
        self.task = task
        self.pooling = pooling
        self.classes = classes
        self.weight = weight
        self.uncertainty = uncertainty
        self.minus = minus

    def outputs(self, width: int) -> dict[str, Output]:
        deviation: dict[str, Output] = {self.deviation: DeviationHead(width, self.kind)} if self.uncertainty else {}
        return {self.output: self._head(width), **deviation}

    def _head(self, width: int) -> Head:
        classes = self.n_classes if self.task == "classification" else 0
        if self.kind == "per-atom":
            return AtomHead(width, classes)
        if classes:
            return ClassHead(width, classes)
        if self.pooling == "composition":
            return CompositionHead(width, self.kind)
        return ScalarHead(width, "sum" if self.kind == "extensive" else self.pooling)

    @property
    def output(self) -> str:
        """The output that is compared with the label, or with its difference from the cheap one."""
        return self.name if self.minus is None else f"{self.name}_minus_{self.minus}"

    @property
    def deviation(self) -> str:
        """The output that holds the uncertainty, where there is one."""
        return f"{self.output}_std"

    def labels(self) -> dict[str, bool]:
        return {name: True for name in (self.name, self.minus) if name is not None}

    def quantities(self) -> dict[str, Quantity]:
        meanings = {self.output: Quantity(self.name, "")}
        return {**meanings, self.deviation: Quantity(f"{self.name}_std", "")} if self.uncertainty else meanings

    def differences(self) -> dict[str, tuple[str, str]]:
        return {} if self.minus is None else {self.output: (self.name, self.minus)}

    def calibration(self, name: str, samples: Sequence[Sample]) -> tuple[str, Sequence[Sample]]:
        return self.output, samples

    def wanted(self, targets: Mapping[str, Any]) -> list[str]:
        if self.output not in targets:
            return []
        return [self.output, self.deviation] if self.uncertainty else [self.output]

    def settled(self, samples: Sequence[Sample]) -> Property:
        found = values(self.output, samples)
        if len(found) == 0:
            raise InputError(f"no training structure has '{self.name}': split the data in another way")
        if self.task == "classification":
            wrong = found[(found < 0) | (found >= self.n_classes) | (found != np.round(found))]
            if len(wrong):
                raise InputError(
                    f"'{self.name}' has the label {wrong[0]:g}, but {self.n_classes} classes are numbered "
                    f"0 to {self.n_classes - 1}: give classes=... or regress it"
                )
        if self.weight is not None:
            return self
        weight = 1.0
        if self.task == "regression" and len(found):
            weight = 1 / rms(found - found.mean(), found)
        settled: Property = copied(self, weight=weight)
        return settled

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        rows = len(atoms) if self.kind == "per-atom" else 1
        word = atoms.info.get(self.name)
        if self.task == "classification" and isinstance(word, str):
            return Sample(atoms, {self.name: np.array([self._number(word)])})
        target = label(atoms, self.name, (rows,))
        if self.minus is not None:
            target = target - label(atoms, self.minus, (rows,))
        return Sample(atoms, {self.output: target})

    @property
    def n_classes(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    def _number(self, word: str) -> float:
        names = [] if isinstance(self.classes, int) else self.classes
        if word not in names:
            raise InputError(
                f"'{self.name}' has the class '{word}': name all classes in order, as classes=[{word},...]"
            )
        return float(names.index(word))

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        output, target = outputs[self.output], batch.targets[self.output]
        weight = 1.0 if self.weight is None else self.weight
        if self.uncertainty:
            return {self.output: _robust(output, outputs[self.deviation], target, weight)}
        if self.task == "regression":
            return {self.output: absolute_errors(output, target, weight)}
        present = torch.isfinite(target)
        entropy = F.cross_entropy(output[present], target[present].long(), reduction="sum")
        return {self.output: (weight * entropy.double(), present.sum())}


def _robust(output: Tensor, deviation: Tensor, target: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Sum of √2 |y - t| / σ + ln(weight · σ) over labels, and their count."""
    present = torch.isfinite(target)
    errors = torch.where(present, output.double() - target, 0.0).abs()
    sigma = torch.where(present, deviation.double(), 1.0).clamp(min=1e-12)  # nothing in a structure without atoms
    losses = sqrt(2) * errors / sigma + torch.log(weight * sigma)
    return torch.where(present, losses, 0.0).sum(), present.sum()
