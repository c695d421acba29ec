# What the train_*.sh scripts share: sourced by them, not run.
# shellcheck shell=bash

# Variables that reach the ranks on other hosts, where they are set here.
readonly FORWARDED=(
  PATH PYTHONPATH LD_LIBRARY_PATH VIRTUAL_ENV TMPDIR OMP_NUM_THREADS MASTER_ADDR MASTER_PORT
  TORCH_EXTENSIONS_DIR CUDA_VISIBLE_DEVICES DS_ACCELERATOR GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME
  NCCL_DEBUG NCCL_IB_DISABLE NCCL_IB_HCA HF_HOME INTERNVL_DS_RESULT
)

die() {
  printf '%s: error: %s\n' "$(basename -- "$0")" "$1" >&2
  exit 2
}

# The comment at the top of the script, without the #.
usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
  exit "${1:-0}"
}

set_variables() {
  local name
  for name in "${FORWARDED[@]}"; do
    [[ -z ${!name-} ]] || printf '%s\n' "$name"
  done
}

# Runs the command, or prints it with DRY_RUN=1. Some launchers return 0 for a job that failed, so
# what counts is that rank 0 has recorded the end of the program; the directory must be one that its
# host sees too (INTERNVL_DS_RESULT, by default below the current directory).
#
# SIGTERM and SIGINT go to all processes of the job on this host: the deepspeed launcher would die of
# one alone, and leave its ranks training.
run_job() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
    return
  fi
  local code=0 job
  rm -f -- "$INTERNVL_DS_RESULT"
  set -m # the job becomes a process group of its own
  "$@" &
  job=$!
  set +m
  # shellcheck disable=SC2064 # the group is known now
  trap "kill -TERM -- -$job 2>/dev/null" TERM
  # shellcheck disable=SC2064
  trap "kill -INT -- -$job 2>/dev/null" INT
  while :; do
    wait "$job" && code=0 || code=$?
    kill -0 "$job" 2>/dev/null || break # a signal ends the wait, not the job
  done
  end_group "$job"
  if ((code == 0)) && [[ ! -s $INTERNVL_DS_RESULT ]]; then
    printf '%s: error: %s returned 0, but rank 0 did not reach the end of the program\n' \
      "$(basename -- "$0")" "$1" >&2
    code=1
  fi
  rm -f -- "$INTERNVL_DS_RESULT"
  return "$code"
}

# Ends what a launcher has left behind, after ${INTERNVL_DS_GRACE:-30} seconds by force.
end_group() {
  local left=${INTERNVL_DS_GRACE:-30}
  kill -TERM -- "-$1" 2>/dev/null || return 0
  while ((left-- > 0)) && kill -0 -- "-$1" 2>/dev/null; do sleep 1; done
  kill -KILL -- "-$1" 2>/dev/null || true
}

export INTERNVL_DS_RESULT=${INTERNVL_DS_RESULT:-$PWD/.internvl_ds-result-$HOSTNAME-$$}
