"""Who is measured: packages, their architectures at comparable sizes, and what each can do."""

from typing import NamedTuple

OURS = "transfermium"


class System(NamedTuple):
    """One architecture of one package.

    `peer` is the file in `peers/` and the name of the environment; `package` is the distribution whose version is
    recorded, `module` what a user imports; `without` names the tasks that the package does not offer.
    """

    name: str
    backbone: str
    peer: str
    package: str
    module: str
    width: int
    layers: int
    without: frozenset[str] = frozenset()


def _torchmdnet(backbone: str, layers: int) -> System:
    without = frozenset({"prepare", "infer_ase"})  # neighbours are found inside of the model; no ASE calculator
    return System("torchmd-net", backbone, "torchmdnet", "torchmd-net", "torchmdnet.models.model", 64, layers, without)


def _schnetpack(backbone: str) -> System:
    module = "peers.schnetpack"  # recent versions of torch need the repair in there before it can be imported
    return System("schnetpack", backbone, "schnetpack", "schnetpack", module, 64, 3)


def _nequip(name: str, without: frozenset[str] = frozenset()) -> System:
    return System(name, "NequIP", "nequip", "nequip", "nequip.model", 64, 3, without)


SYSTEMS = (
    System(OURS, "TensorNet", OURS, OURS, OURS, 64, 2),
    System(OURS, "PaiNN", OURS, OURS, OURS, 64, 3),
    System(OURS, "ET", OURS, OURS, OURS, 64, 4),
    System(OURS, "CGCNN", OURS, OURS, OURS, 64, 4),
    _torchmdnet("TensorNet", 2),
    _torchmdnet("ET", 4),
    _schnetpack("PaiNN"),
    _schnetpack("SchNet"),
    System("PyG CGConv", "CGCNN", "pyg", "torch_geometric", "torch_geometric.nn", 64, 4, frozenset({"infer_ase"})),
    _nequip("nequip"),
    _nequip("nequip (compiled)", frozenset({"prepare", "infer_ase"})),  # the same graphs; files for its calculator
    System("matgl", "TensorNet", "matgl", "matgl", "matgl.models", 64, 2),
    System("mace", "MACE", "mace", "mace-torch", "mace.modules", 64, 2),
    System("chgnet", "CHGNet", "chgnet", "chgnet", "chgnet.model", 64, 4),
)
