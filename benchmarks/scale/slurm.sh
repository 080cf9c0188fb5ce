#!/bin/sh
# A Slurm cluster of this one machine, to try batch scripts on: `sudo sh benchmarks/scale/slurm.sh start [TASKS]`, then
# `sbatch recipes/slurm/pretrain.sbatch ...`; `sudo sh benchmarks/scale/slurm.sh stop` ends it.
#
# For a container or a virtual machine with the Debian packages slurmctld, slurmd, slurm-client and munge; it replaces
# /etc/slurm/slurm.conf, so it stops where there is one that it has not written.
set -eu

CONF=/etc/slurm/slurm.conf
MARK="# written by transfermium's slurm.sh"
FOLDER=/tmp/transfermium-slurm

start() {
    if [ -e "$CONF" ] && ! grep -qF "$MARK" "$CONF"; then
        echo "$CONF exists: this machine has a Slurm of its own" >&2
        exit 1
    fi
    mkdir -p "$(dirname "$CONF")" "$FOLDER/state" "$FOLDER/spool" /run/munge
    cat > "$CONF" <<END
$MARK
ClusterName=loopback
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=${1:-$(nproc)} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    [ -e /etc/munge/munge.key ] || mungekey
    chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge
    pgrep -x munged > /dev/null || su -s /bin/sh munge -c munged
    slurmctld -c
    slurmd
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        sinfo -h -o %T | grep -q idle && break
        sleep 1
    done
    sinfo
}

stop() {
    scontrol shutdown || true
}

case "${1:-}" in
    start) start "${2:-}" ;;
    stop) stop ;;
    *) echo "usage: slurm.sh start [TASKS] | stop" >&2; exit 2 ;;
esac
