#!/bin/sh
# Gradients of every objective under srun, and a task that is killed: `sudo sh benchmarks/reliability/slurm.sh`, from the
# root of the repository, where PYTHON names an interpreter that has the package and pytest.
#
# For a container or a virtual machine with the Debian packages slurmctld, slurmd, slurm-client and munge, as
# benchmarks/scale/slurm.sh, which makes the cluster of this one machine and ends it.
set -eu

PYTHON=${PYTHON:-python}
FOLDER=$(mktemp -d)
export OMP_NUM_THREADS=1 PYTHONPATH=.

sh benchmarks/scale/slurm.sh start
trap 'sh benchmarks/scale/slurm.sh stop; rm -rf "$FOLDER"' EXIT

for tasks in 2 3; do
    mkdir "$FOLDER/$tasks"
    srun --overcommit --ntasks="$tasks" "$PYTHON" -c "import sys, torch; torch.set_num_threads(1)
import tests.test_distributed as these
these.write_gradients(sys.argv[1], '1')" "$FOLDER/$tasks"
done
"$PYTHON" - "$FOLDER" <<'END'
import sys
from pathlib import Path

import torch

from tests.test_distributed import all_objectives, assert_same, gradients

torch.set_num_threads(1)
for name in all_objectives():
    expected = gradients(name)
    for tasks in (2, 3):
        for rank in range(tasks):
            found = torch.load(Path(sys.argv[1]) / str(tasks) / f"{rank}.pt", weights_only=True)
            assert_same(found[name], expected, name)
print(f"one, two and three tasks have the same gradients for {', '.join(all_objectives())}")
END

# One of two tasks is killed without a word; the other ends, and the same command goes on.
"$PYTHON" -c "import ase.io; from tests.alloys import alloys; ase.io.write('$FOLDER/a.extxyz', alloys(16))"
pretrain() {
    srun --overcommit --ntasks=2 --kill-on-bad-exit=1 "$PYTHON" -c "import os, signal, sys
import transfermium.cli
train = sys.modules['transfermium.train']
train.train.__kwdefaults__['save_every'] = 0.0
step, calls = train._Run._optimise, []
def optimise(*arguments):
    calls.append(1)
    if len(calls) == $1 and os.environ['SLURM_PROCID'] == '1':
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
train._Run._optimise = optimise
transfermium.cli.main()" pretrain "$FOLDER/a.extxyz" --objective Denoise --backbone PaiNN --backbone.width 8 \
        --backbone.cutoff 4 --lr 0.01 --steps 12 --edges 400 --device cpu --out "$2"
}
pretrain 0 "$FOLDER/untouched"
if pretrain 5 "$FOLDER/killed"; then
    echo "the job of a task that was killed ended well" >&2
    exit 1
fi
pretrain 0 "$FOLDER/killed"
"$PYTHON" - "$FOLDER" <<'END'
import sys
from pathlib import Path

from tests.alloys import same_bits
from transfermium.model import read_tensors

one, other = (read_tensors(Path(sys.argv[1]) / name / "model.safetensors")[0] for name in ("untouched", "killed"))
assert same_bits(one, other)
print("a run of which one task was killed goes on to the same bits")
END
