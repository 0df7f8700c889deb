#!/usr/bin/env bash
# A real Slurm of two virtual nodes on this one machine, for tests/e2e/test_slurm.py: bash tools/slurm_cluster.sh start|stop
# As root, on Debian or Ubuntu: installs slurm-wlm and munge by apt-get where they are missing, and starts them without systemd.
# A second start finds it running and returns. Prints one line; exit code 4 where this machine cannot have it, and the line says why.
set -euo pipefail

conf=/etc/slurm/slurm.conf
state=/var/spool/prism-slurm # all its state and logs
mark="# Written by megatron_prism's tools/slurm_cluster.sh"

say() { echo "slurm_cluster: $*"; }
fail() {
    say "$*" >&2
    exit 4
}

check_machine() {
    [ "$(id -u)" = 0 ] || fail "needs root: slurmd starts jobs as their users"
    if [ -e $conf ] && ! grep -q "^$mark" $conf; then
        fail "$conf belongs to another cluster; left alone"
    fi
}

is_alive() { [[ $(cat "/proc/$1/comm" 2>/dev/null) == slurm* ]]; } # a number may have gone to another process

is_up() {
    local name
    for name in slurmctld slurmd.node1 slurmd.node2; do
        is_alive "$(cat /run/prism-$name.pid 2>/dev/null)" || return 1
    done
    [ "$(timeout 10 sinfo --noheader --Node --responding --states=idle,alloc,mix,comp --format=%N 2>/dev/null | sort -u | wc -l)" = 2 ]
}

install_packages() {
    command -v slurmctld slurmd munged sbatch >/dev/null && return
    command -v apt-get >/dev/null || fail "slurmctld, slurmd or munged is missing, and there is no apt-get to install them"
    local log
    log=$(mktemp)
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } >"$log" 2>&1 </dev/null ||
        fail "apt-get cannot install slurm-wlm and munge: $(grep -v '^$' "$log" | tail -n 1) (all of it: $log)"
    rm -f "$log"
}

end_daemons() {
    local pid
    for pid in $(cat /run/prism-slurm*.pid 2>/dev/null); do
        if is_alive "$pid"; then
            kill "$pid" 2>/dev/null || true
            for _ in $(seq 60); do
                is_alive "$pid" || break
                sleep 0.5
            done
        fi
    done
    rm -f /run/prism-slurm*.pid
}

start_munge() {
    munge --no-input >/dev/null 2>&1 && return
    install -d -o munge -g munge /run/munge /var/lib/munge /var/log/munge
    [ -e /etc/munge/munge.key ] || fail "/etc/munge/munge.key is missing: dpkg-reconfigure munge"
    runuser -u munge -- munged >/dev/null 2>&1 || fail "munged does not start: see /var/log/munge/munged.log"
}

write_conf() {
    local host
    host=$(hostname -s)
    mkdir -p /etc/slurm $state
    cat >$conf <<END
$mark
ClusterName=prismtest
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmctldPort=6817
StateSaveLocation=$state/slurmctld
SlurmctldPidFile=/run/prism-slurmctld.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdSpoolDir=$state/slurmd.%n
SlurmdPidFile=/run/prism-slurmd.%n.pid
SlurmdLogFile=$state/slurmd.%n.log
# the nodes are what is said here, whatever the machine has
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5,sched_min_interval=100000
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=30
# ended jobs are still told of when the last of the tests asks; the default is five minutes
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=6821 CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=6822 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=node1,node2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
}

start() {
    check_machine
    if command -v sinfo >/dev/null && is_up; then
        say "already running: node1 and node2, partitions debug and high"
        return
    fi
    install_packages
    end_daemons # of a cluster that is half there
    start_munge
    write_conf
    mkdir -p $state/slurmctld
    slurmctld -c >/dev/null 2>&1 </dev/null || fail "slurmctld does not start: see $state/slurmctld.log"
    local node
    for node in node1 node2; do
        slurmd -N $node >/dev/null 2>&1 </dev/null || fail "slurmd does not start: see $state/slurmd.$node.log"
    done
    for _ in $(seq 60); do
        is_up && say "running: node1 and node2, partitions debug and high; logs in $state" && return
        sleep 0.5
    done
    fail "the nodes do not come up: see $state/*.log"
}

stop() {
    check_machine
    if ! timeout 10 scontrol ping >/dev/null 2>&1; then
        say "not running"
        return
    fi
    scancel --user=root # what runs would survive the daemons
    for _ in $(seq 60); do
        [ -z "$(squeue --noheader)" ] && break
        sleep 0.5
    done
    end_daemons
    rm -rf $state $conf
    say "stopped"
}

case "${1:-}" in
start | stop) "$1" ;;
*)
    echo "usage: bash tools/slurm_cluster.sh start|stop" >&2
    exit 2
    ;;
esac
