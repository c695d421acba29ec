# What the train_*.sh scripts share: sourced by them, not run.
# shellcheck shell=bash

# Variables that reach the ranks on other hosts, where they are set here.
readonly FORWARDED='PATH|PYTHONPATH|LD_LIBRARY_PATH|VIRTUAL_ENV|TMPDIR|MASTER_ADDR|MASTER_PORT|'\
'TORCH_EXTENSIONS_DIR|DS_ACCELERATOR|(NCCL|GLOO|TORCH_NCCL|CUDA|OMP|HF|TRITON|INTERNVL_DS)_.*'
# Their values would be seen in the list of processes, or are of the job script alone.
readonly KEPT_HERE='.*(TOKEN|SECRET|PASSWORD).*|INTERNVL_DS_(VENV|PYTHON|GRACE)'

die() {
  printf '%s: error: %s\n' "$(basename -- "$0")" "$1" >&2
  exit 2
}

# The comment at the top of the script, without the #.
usage() {
  sed -n '2,/^[^#]/{/^#SBATCH/d;/^#/s/^# \{0,1\}//p}' "$0"
  exit
}

set_variables() {
  local name
  compgen -e | grep -xE "$FORWARDED" | grep -vxE "$KEPT_HERE" | while read -r name; do
    [[ -z ${!name-} ]] || printf '%s\n' "$name"
  done
}

# Runs the command, or prints it with DRY_RUN=1.
#
# What counts is what rank 0 writes into the file INTERNVL_DS_RESULT (by default below the current
# directory, which its host must see too), because some launchers return 0 for a job that failed:
# "training", then "finished", or "preempted N" where N is to be the exit status.
#
# Ctrl-C (SIGINT), SIGTERM, SIGUSR1 or a terminal that is closed (SIGHUP) has a job that is training
# save and stop, by a file beside that one. Signals to launchers would not: deepspeed's dies alone and
# leaves its ranks training, Open MPI's kills them. JOB_STOPPED_BY then names the signal; it stays
# empty where the ranks got one themselves. A second signal, or INTERNVL_DS_GRACE seconds without an
# end, ends all processes of the job on this host; so does the first signal where nothing is training.
# The exit status is then 128 and the signal's number.
run_job() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
    return
  fi
  local code=0 job guard='' asked='' name stopped_by='' ended_by='' result=''
  rm -f -- "$INTERNVL_DS_RESULT" "$INTERNVL_DS_RESULT.stop"
  for name in INT TERM USR1 HUP; do # under nohup HUP stays ignored
    # shellcheck disable=SC2064
    trap "asked=$name" "$name"
  done
  set -m # the job becomes a process group of its own, which a terminal's signals do not reach
  "$@" &
  job=$!
  while :; do
    [[ -n $asked ]] || { wait "$job" && code=0 || code=$?; }
    kill -0 "$job" 2>/dev/null || break
    # A signal has ended the wait, not the job.
    name=$asked asked=''
    if [[ -n $guard && -n $name && $name != HUP ]]; then # a shell sends HUP after its terminal
      say 'a second signal, or no end in time: the job is ended at once'
      ended_by=$name
      end_group "$job" INT # which ends ranks at once that were asked to stop
    elif [[ -n $guard || -z $name ]]; then
      continue
    elif [[ ! -s $INTERNVL_DS_RESULT ]]; then
      say 'nothing was training yet: the job is ended at once'
      ended_by=$name
      end_group "$job"
    else
      stopped_by=$name
      (set -o noclobber && : >"$INTERNVL_DS_RESULT.stop") || true # never through a link
      say "asked the job to save and to stop; a second signal ends it at once"
      (sleep "${INTERNVL_DS_GRACE:-300}" && kill -TERM $$) &
      guard=$!
    fi
  done
  trap '' INT TERM USR1 HUP
  end_group "$job"
  [[ -z $guard ]] || { kill -KILL -- "-$guard" && wait "$guard"; } 2>/dev/null || true
  [[ ! -f $INTERNVL_DS_RESULT || -L $INTERNVL_DS_RESULT ]] || result=$(<"$INTERNVL_DS_RESULT")
  rm -f -- "$INTERNVL_DS_RESULT" "$INTERNVL_DS_RESULT.stop"
  case $result in
    finished) ;;
    'preempted '*)
      code=${result#preempted }
      JOB_STOPPED_BY=$stopped_by
      say "saved and stopped, as asked; the same command goes on from there (exit status $code)"
      ;;
    *)
      [[ -z $ended_by ]] || code=$((128 + $(kill -l "$ended_by")))
      ((code != 0)) || {
        say "error: $1 returned 0, but rank 0 did not reach the end of the program"
        code=1
      }
      ;;
  esac
  return "$code"
}

say() {
  printf '%s: %s\n' "$(basename -- "$0")" "$1" >&2 || true # the terminal may be gone
}

# Ends what is left of a job, after 30 seconds by force. $2: a signal for what SIGTERM has not ended
# within a second. The shell's own words on it go nowhere.
end_group() {
  local left=30
  {
    kill -TERM -- "-$1" || return 0
    while ((left-- > 0)) && kill -0 -- "-$1"; do
      sleep 1
      [[ -z ${2-} ]] || kill "-$2" -- "-$1" || true
    done
    kill -KILL -- "-$1" || true
    wait "$1" || true
  } 2>/dev/null
}

export JOB_STOPPED_BY=''
random=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
export INTERNVL_DS_RESULT=${INTERNVL_DS_RESULT:-$PWD/.internvl_ds-result-$HOSTNAME-$$-$random}
