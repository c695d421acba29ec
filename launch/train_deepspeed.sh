#!/usr/bin/env bash
# Trains under the deepspeed launcher, on this host or on those of a hostfile.
#
#   bash launch/train_deepspeed.sh -n 8 -- --cfg NAME --data-path DIR ...
#   bash launch/train_deepspeed.sh --hostfile hosts -- --cfg NAME ...
#
#   -n N             ranks on each host (default: all GPUs)
#   --hostfile FILE  "host slots=8", one a line; started over pdsh
#   --port N         rank 0's port (default: a free one on this host; 29500 with a hostfile)
#   --dry-run        print the command, and run nothing
#
# What comes after -- goes to internvl_ds.train. Ctrl-C has the job save and stop; a second one ends it.
# The exit status is 0 only when rank 0 has come to the end of the program.
set -euo pipefail
# shellcheck source=launch/job.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/job.sh"

ranks='' hostfile='' port=''
while (($#)); do
  case $1 in
    -n) ranks=${2-} && shift ;;
    --hostfile) hostfile=${2-} && shift ;;
    --port) port=${2-} && shift ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage ;;
    --) shift && break ;;
    *) die "unknown option $1; --help lists them, and -- comes before those of the program" ;;
  esac
  shift
done
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || die "-n $ranks is no number"
[[ -z $port || $port =~ ^[0-9]+$ ]] || die "--port $port is no number"
[[ -z $hostfile || -r $hostfile ]] || die "--hostfile $hostfile cannot be read"
command -v deepspeed >/dev/null || die 'no deepspeed on PATH; activate the environment'

command=(deepspeed)
[[ -z $hostfile ]] || command+=(--hostfile "$hostfile" --force_multi)
[[ -z $ranks ]] || command+=(--num_gpus "$ranks")
if [[ -z $port && -z $hostfile ]]; then
  port=$("${PYTHON:-python}" -c 'from internvl_ds.dist.network import free_port; print(free_port())')
fi
[[ -z $port ]] || command+=(--master_port "$port")
command+=(--no_local_rank --module internvl_ds.train)

if [[ -n $hostfile && ${DRY_RUN:-0} != 1 ]]; then
  # A connection that is cut counts as broken after 15 s, not never.
  export PDSH_SSH_ARGS_APPEND="-oServerAliveInterval=5 -oServerAliveCountMax=3 ${PDSH_SSH_ARGS_APPEND-}"
  # The launcher forwards few variables by itself; others go through this file, as they stand in it
  # into the command of a shell.
  [[ ! -e .deepspeed_env ]] || die "$PWD/.deepspeed_env exists; add to it, or start elsewhere"
  trap 'rm -f .deepspeed_env' EXIT
  mapfile -t variables < <(set_variables)
  for name in "${variables[@]}"; do printf '%s=%q\n' "$name" "${!name}"; done >.deepspeed_env
fi
run_job "${command[@]}" "$@"
