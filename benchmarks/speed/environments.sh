#!/bin/sh
# One virtual environment per peer, because their pins conflict: environments.sh [DIR [NAME...]]
#
# DIR is .environments beside this file by default; NAMEs choose among the peers. What is complete is kept.
# PYTHON=python3.12 chooses the interpreter. About 1.5 GB each: torch comes first, so that no other build of it follows.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/.environments}
[ $# -gt 0 ] && shift
torch=$(grep '^torch==' "$here/../../constraints.txt")
wanted=${*:-torchmdnet schnetpack nequip pyg matgl mace chgnet}

requirements() {
    case $1 in
    torchmdnet) echo torchmd-net==3.1.0 warp-lang==1.19.0 ;;
    schnetpack) echo schnetpack==2.0.4 matscipy==1.3.1 ;;
    nequip) echo nequip==0.19.1 e3nn==0.6.0 ;;
    pyg) echo torch_geometric==2.8.1 ;;
    matgl) echo matgl==4.1.2 torch_geometric==2.8.1 ;;
    mace) echo mace-torch==0.3.16 e3nn==0.4.4 ;;
    chgnet) echo chgnet==0.4.2 ;;
    *) echo "there is no peer '$1': choose from torchmdnet schnetpack nequip pyg matgl mace chgnet" >&2; return 1 ;;
    esac
}

for name in $wanted; do
    packages=$(requirements "$name")
    [ -e "$folder/$name/.complete" ] && continue
    echo "$name: $packages"
    "${PYTHON:-python3}" -m venv "$folder/$name"
    "$folder/$name/bin/pip" install --disable-pip-version-check --quiet "$torch"
    # shellcheck disable=SC2086  # several packages
    "$folder/$name/bin/pip" install --disable-pip-version-check --quiet "$torch" ase==3.29.0 vesin==0.6.2 $packages
    touch "$folder/$name/.complete"
done
