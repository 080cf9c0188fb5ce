"""Property: any labelled number or class, per structure or per atom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import ase
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..graph import Batch, Sample
from ..heads import AtomHead, ClassHead, ScalarHead, rms, values
from ..model import Output
from .base import Loss, Objective, Quantity, absolute_errors, label


class Property(Objective):
    """A property called `name`, by mean absolute error (regression) or cross entropy (classification).

    Args:
        name: of the label and of the output.
        kind: "intensive" (a mean over atoms: band gap), "extensive" (a sum: polarisability) or "per-atom" (charge).
        task: "regression" or "classification".
        pooling: for intensive regression, "mean" or "attention".
        classes: number of classes, labelled 0, 1, ..., or the words that label them, in order.
        weight: of the error in the label's own unit; None is one over its standard deviation in the training set.
    """

    def __init__(
        self,
        name: str,
        kind: Literal["intensive", "extensive", "per-atom"] = "intensive",
        task: Literal["regression", "classification"] = "regression",
        pooling: Literal["mean", "attention"] = "mean",
        classes: int | list[str] = 2,
        weight: float | None = None,
    ):
        if kind not in ("intensive", "extensive", "per-atom"):
            raise InputError(f"kind is '{kind}', but must be one of intensive, extensive, per-atom")
        if task not in ("regression", "classification"):
            raise InputError(f"task is '{task}', but must be one of regression, classification")
        if task == "classification" and kind == "extensive":
            raise InputError("a class cannot be extensive: choose kind='intensive' or 'per-atom'")
        if not name.isidentifier():
            raise InputError(
                f"'{name}' cannot name a property: use letters, digits and _, and --label {{name}}=KEY for the key"
            )
        self.name = name
        self.kind = kind
        self.task = task
        self.pooling = pooling
        self.classes = classes
        self.weight = weight

    def outputs(self, width: int) -> dict[str, Output]:
        classes = self.n_classes if self.task == "classification" else 0
        if self.kind == "per-atom":
            return {self.name: AtomHead(width, classes)}
        if classes:
            return {self.name: ClassHead(width, classes)}
        return {self.name: ScalarHead(width, "sum" if self.kind == "extensive" else self.pooling)}

    def labels(self) -> dict[str, bool]:
        return {self.name: True}

    def quantities(self) -> dict[str, Quantity]:
        return {self.name: Quantity(self.name, "")}

    def settled(self, samples: Sequence[Sample]) -> Property:
        found = values(self.name, samples)
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
        return Property(self.name, self.kind, self.task, self.pooling, self.classes, weight)

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        rows = len(atoms) if self.kind == "per-atom" else 1
        word = atoms.info.get(self.name)
        if self.task == "classification" and isinstance(word, str):
            return Sample(atoms, {self.name: np.array([self._number(word)])})
        return Sample(atoms, {self.name: label(atoms, self.name, (rows,))})

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
        output, target = outputs[self.name], batch.targets[self.name]
        weight = 1.0 if self.weight is None else self.weight
        if self.task == "regression":
            return {self.name: absolute_errors(output, target, weight)}
        present = torch.isfinite(target)
        entropy = F.cross_entropy(output[present], target[present].long(), reduction="sum")
        return {self.name: (weight * entropy.double(), present.sum())}
