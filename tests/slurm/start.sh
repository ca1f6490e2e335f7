#!/usr/bin/env bash
# A Slurm cluster of several nodes on this one machine, to try and to test scripts/slurm.
#
#   tests/slurm/start.sh start [--nodes N] [--folder FOLDER]   # 2 nodes in build/slurm
#   tests/slurm/start.sh status [--folder FOLDER]
#   tests/slurm/start.sh stop [--folder FOLDER]
#
# Starts munged, slurmctld and N slurmd on loopback, all with files in FOLDER and nowhere else: a
# Slurm that the machine has besides is not touched. `start` of a cluster that runs says so; `stop`
# ends its jobs and daemons and removes FOLDER. Needs no systemd and no cgroups. As root it installs
# Debian's packages where they are missing.
#
# Exit status: 0 done, 1 failed, 2 a wrong argument, 3 this machine cannot have a Slurm.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PATH=$PATH:/usr/sbin:/sbin

# Nodes claim more CPUs than the machine may have: two nodes fit on two cores.
readonly CPUS_PER_NODE=8
readonly READY_WITHIN_S=120
readonly APT_WITHIN_S=600

die() {
  local status=$1
  shift
  printf 'start.sh: %s\n' "$*" >&2
  exit "$status"
}

# wait_for SECONDS COMMAND...: until it succeeds; fails when the time is over.
wait_for() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}

usage() { die 2 "usage: start.sh start|stop|status [--nodes N] [--folder FOLDER]"; }

[[ $# -gt 0 ]] || usage
command=$1
shift
nodes=2
folder=$root/build/slurm
while [[ $# -gt 0 ]]; do
  case $1 in
    --nodes) nodes=${2-} ;;
    --folder) folder=${2-} ;;
    *) usage ;;
  esac
  shift 2 || usage
done
[[ $nodes =~ ^[1-9][0-9]?$ ]] || die 2 "--nodes: want a number from 1 to 99, got '$nodes'"
[[ -n $folder ]] || usage
folder=$(realpath -m "$folder")
[[ ! $folder =~ [[:space:],] ]] || die 2 "--folder: slurm.conf takes no spaces and commas in it: $folder"
# A socket's path has at most 107 characters.
((${#folder} <= 90)) || die 2 "--folder: want at most 90 characters, got ${#folder}: $folder"
export SLURM_CONF=$folder/slurm.conf

# Whether the folder holds a cluster of start.sh. A slurm.conf alone may be a real cluster's.
holds_ours() { grep -qsxF "StateSaveLocation=$folder/state" "$SLURM_CONF"; }

# ---- daemons ------------------------------------------------------------------------------------

# is_ours PID: a living process that was started with a file of this folder among its arguments.
is_ours() {
  [[ -r /proc/$1/cmdline ]] && tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null | grep -qF "$folder/"
}

# Process ids of the daemons that run, with the controller first.
daemons() {
  local file pid
  for file in "$folder"/slurmctld.pid "$folder"/node*.pid "$folder"/munged.pid; do
    pid=$(cat "$file" 2>/dev/null) || continue
    if [[ -n $pid ]] && is_ours "$pid"; then echo "$pid"; fi
  done
}

# Processes of jobs: their environment names this cluster and a job. slurmstepd is found by its
# environment, too, which it has from slurmd.
job_processes() {
  local file pid words
  for file in /proc/[0-9]*/environ; do
    pid=${file//[!0-9]/}
    words=$(tr '\0' '\n' 2>/dev/null <"$file") || continue
    grep -qxF "SLURM_CONF=$SLURM_CONF" <<<"$words" || continue
    if grep -q '^SLURM_JOB_ID=' <<<"$words" || [[ $(cat "/proc/$pid/comm") == slurmstepd ]]; then
      echo "$pid"
    fi
  done 2>/dev/null
}

no_daemons() { [[ -z $(daemons) ]]; }
no_jobs() { [[ -z $(squeue --noheader 2>/dev/null) ]]; }
all_idle() { [[ $(sinfo --noheader --Node --partition main --format '%t' 2>/dev/null | sort -u) == idle ]]; }

end_everything() {
  local pid pids
  if timeout 10 scontrol ping >/dev/null 2>&1; then
    squeue --noheader --format %A 2>/dev/null | sort -u | xargs --no-run-if-empty scancel || true
    wait_for 20 no_jobs || true
  fi
  for pid in $(daemons); do kill "$pid" 2>/dev/null || true; done
  if ! wait_for 20 no_daemons; then
    for pid in $(daemons); do kill -9 "$pid" 2>/dev/null || true; done
    wait_for 10 no_daemons || die 1 "these processes do not end: $(daemons | tr '\n' ' ')"
  fi
  # What a job left behind, and steps of a node that was killed.
  for _ in {1..50}; do
    pids=$(job_processes)
    [[ -n $pids ]] || break
    for pid in $pids; do kill -9 "$pid" 2>/dev/null || true; done
    sleep 0.1
  done
  rm -rf -- "$folder"
}

# ---- packages -----------------------------------------------------------------------------------

apt_install() {
  local apt=(timeout "$APT_WITHIN_S" apt-get -o DPkg::Lock::Timeout=300)
  local install=("${apt[@]}" install --yes --no-install-recommends "$@")
  export DEBIAN_FRONTEND=noninteractive
  "${install[@]}" || { "${apt[@]}" update && "${install[@]}"; }
}

has_all() {
  local name
  for name in slurmctld slurmd sbatch munged; do
    command -v "$name" >/dev/null || return 1
  done
}

install_packages() {
  if has_all; then return; fi
  # A node of a real cluster keeps the Slurm it has.
  ! command -v sbatch slurmd slurmctld >/dev/null ||
    die 3 "part of a Slurm is here, but not all of slurmctld, slurmd, sbatch and munged"
  [[ $(id -u) == 0 ]] || die 3 "no Slurm here, and only root can install it (apt-get install slurm-wlm munge)"
  command -v apt-get >/dev/null || die 3 "no Slurm here, and no apt-get to install slurm-wlm and munge"
  echo "start.sh: installing slurm-wlm, munge and shellcheck with apt-get" >&2
  local deadline=$((SECONDS + APT_WITHIN_S)) log why
  log=$(mktemp)
  # Somebody else may be using apt: its locks are waited for, but not for ever.
  until apt_install slurm-wlm munge shellcheck >"$log" 2>&1 </dev/null; do
    if grep -q 'Could not get lock' "$log" && ((SECONDS < deadline)); then
      sleep 2
      continue
    fi
    why=$(grep -E '^E: ' "$log" | tail -n 1) || true
    rm -f "$log"
    die 3 "no Slurm here, and apt-get could not install it: ${why:-no end within $APT_WITHIN_S s}"
  done
  rm -f "$log"
  has_all || die 3 "slurm-wlm and munge are installed, but slurmctld, slurmd, sbatch or munged is missing"
}

# ---- start --------------------------------------------------------------------------------------

# The first of N + 1 ports in a row that nothing listens on.
free_ports() {
  local first port
  for _ in {1..50}; do
    first=$((20000 + RANDOM % 10000))
    for ((port = first; port <= first + nodes; port++)); do
      if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
    done
    echo "$first"
    return
  done
  die 1 "no free ports between 20000 and 30000"
}

write_configuration() {
  local host user version user_signal first=$1
  host=$(hostname -s)
  user=$(id -un)
  version=$(slurmctld -V) # such as: slurm-wlm 22.05.8
  version=${version##* }
  user_signal=PreemptParameters=send_user_signal
  ((${version%%.*} >= 23)) || user_signal=SlurmctldParameters=preempt_send_user_signal
  cat >"$SLURM_CONF" <<CONF
ClusterName=rlhfuse
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$first
SlurmUser=$user
SlurmdUser=$user
# cred_expire is also how long a requeued job waits before it starts again (120 s by default).
AuthType=auth/munge
AuthInfo=socket=$folder/munged.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/jobs.log
# No cgroups: processes of a step are found as children of slurmstepd.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=200000,sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=20
KillWait=5
# A job of the partition urgent takes nodes from main, whose jobs get the signal that they asked for
# (sbatch --signal) and GraceTime seconds.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$user_signal
# GPUs in name only: scripts count them.
GresTypes=gpu
NodeName=node[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((first + 1))-$((first + nodes))] CPUs=$CPUS_PER_NODE Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
  printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"$folder/gres.conf"
}

start_daemons() {
  local node
  (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
  # --force: munged would refuse a folder that a group can write to.
  munged --force --key-file="$folder/munge.key" --socket="$folder/munged.socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
    --seed-file="$folder/munged.seed" >>"$folder/start.log" 2>&1 || return
  slurmctld -f "$SLURM_CONF" >>"$folder/start.log" 2>&1 || return
  for ((node = 1; node <= nodes; node++)); do
    mkdir "$folder/spool-node$node"
    slurmd -f "$SLURM_CONF" -N "node$node" >>"$folder/start.log" 2>&1 || return
  done
}

start() {
  if holds_ours && [[ -n $(daemons) ]]; then
    if all_idle || [[ -n $(squeue --noheader 2>/dev/null) ]]; then
      echo "The cluster in $folder runs already."
      how_to_use
      return
    fi
    end_everything # half a cluster: what a start that was interrupted has left
  fi
  if [[ -e $folder ]]; then
    holds_ours || [[ -z $(ls -A "$folder") ]] ||
      die 2 "--folder: $folder is there and holds no cluster of start.sh"
    rm -rf -- "$folder"
  fi
  install_packages
  mkdir -p "$folder/state"
  chmod 755 "$folder"

  # Two starts at once must not choose the same ports. The lock is on a folder, and leaves no file;
  # daemons do not inherit it.
  exec 9</tmp
  flock --timeout "$READY_WITHIN_S" 9 || die 1 "another start.sh does not come to its end"
  write_configuration "$(free_ports)"
  if ! start_daemons 9<&- || ! wait_for "$READY_WITHIN_S" all_idle; then
    exec 9<&-
    tail -n 5 "$folder"/*.log >&2
    end_everything
    die 1 "the cluster did not start; its logs end above"
  fi
  exec 9<&-
  echo "A Slurm cluster of $nodes nodes runs in $folder."
  how_to_use
}

how_to_use() {
  cat <<TEXT
  export SLURM_CONF=$SLURM_CONF
  sinfo, sbatch, squeue and scancel use it then; $0 stop ends it
TEXT
}

case $command in
  start) start ;;
  stop)
    if [[ ! -e $folder ]]; then
      echo "No cluster in $folder."
    elif holds_ours; then
      end_everything
      echo "The cluster in $folder is stopped and removed."
    else
      die 2 "--folder: $folder holds no cluster of start.sh"
    fi
    ;;
  status)
    if ! holds_ours || no_daemons; then die 1 "no cluster in $folder"; fi
    how_to_use
    sinfo --Node --partition main
    squeue
    ;;
  *) usage ;;
esac
