#!/usr/bin/env bash
# From a bare Python to a trained classifier: set up, write the digits, train on two ranks, report.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

readonly CFG=digits_quickstart
readonly DATA=.demo/digits OUTPUT=.demo/output CONSOLE=.demo/console.log
readonly RUN=$OUTPUT/$CFG
readonly ENOUGH=95 # percent of the validation images
readonly GRACE=90  # seconds that ranks get to end by themselves when the script is told to stop

usage() {
  cat <<HELP
Usage: bash launch/quickstart.sh [--fresh] [--epochs N]

Sets up a virtual environment, writes scikit-learn's handwritten digits as an image folder, trains
a small ViT on them with DeepSpeed (ZeRO-2, two ranks, bf16 where the device computes in it; on CPU
where there is no GPU), and prints the accuracy and where the results are. Run again, it resumes
from the newest checkpoint.

Options:
  --fresh     remove the results of earlier runs ($OUTPUT) first
  --epochs N  train to N epochs instead of the configuration's own number
  -h, --help  show this text

Environment:
  INTERNVL_DS_VENV    where the virtual environment goes (default: .venv in the repository)
  INTERNVL_DS_PYTHON  the Python to make it with (default: python3 where it is 3.10 or newer, else
                      the newest on PATH)
  TMPDIR              where pip downloads to and unpacks (some GiB)
  OMP_NUM_THREADS     CPU threads of each rank (default: 1)

Exit status: 0 when the final accuracy is at least $ENOUGH %, 1 otherwise, 2 for a wrong option.
HELP
}

main() {
  local fresh=no epochs='' port
  while (($#)); do
    case $1 in
      --fresh) fresh=yes ;;
      --epochs)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || wrong_option "--epochs takes a number, not '${2:-}'"
        epochs=$2
        shift
        ;;
      --epochs=*)
        set -- --epochs "${1#*=}" "${@:2}"
        continue
        ;;
      -h | --help) usage && exit ;;
      *) wrong_option "unknown option '$1'" ;;
    esac
    shift
  done

  set_up demo
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  if [[ $fresh == yes ]]; then
    say "removing $OUTPUT"
    rm -rf -- "$OUTPUT"
  fi
  internvl-ds digits "$DATA" || die 'the training data are not there; the line above says why.'
  [[ ! -f $RUN/latest ]] || say "found checkpoint $(<"$RUN/latest"): this run resumes from it (--fresh starts anew)"
  port=$(free_port)
  local precision=()
  computes_in_bf16 || precision=(--amp-opt-level O0)
  ((${#precision[@]} == 0)) || say 'this CPU has no instructions for bf16: training in fp32, which is faster here'
  train "$port" "${precision[@]}" ${epochs:+--opts TRAIN.EPOCHS "$epochs"}
  report
}

wrong_option() {
  printf 'quickstart.sh: error: %s\n\n' "$1" >&2
  usage >&2
  exit 2
}

free_port() {
  python -c 'from internvl_ds.dist.network import free_port; print(free_port())'
}

# Without these a CPU takes several times as long in bf16 as in fp32.
computes_in_bf16() { has_gpu || grep -qswE 'avx512f|amx_bf16|bf16' /proc/cpuinfo; }

# Two ranks, on as many GPUs where there are any: one where there is one, on CPU where there is none.
count_ranks() {
  python -c 'import torch; print(min(torch.cuda.device_count(), 2) or 2)'
}

# Trains, and ends with the script: an interrupted launcher would leave its ranks running. The job
# has a process group of its own, so that a signal reaches the launcher and every rank.
# $1: a free port; then further arguments of the training program.
train() {
  local port=$1 ranks status=0
  shift
  ranks=$(count_ranks)
  local command=(
    deepspeed --num_gpus "$ranks" --no_local_rank --master_port "$port"
    --module internvl_ds.train
    --cfg "$CFG" --data-path "$DATA" --output "$OUTPUT"
    --deepspeed_config ds_configs/zero2.json "$@"
  )
  say "training on $ranks rank(s): ${command[*]}"
  mkdir -p -- "$(dirname -- "$CONSOLE")"
  trap 'remove_shared_memory '"$port" EXIT
  set -m
  (
    set -o pipefail
    "${command[@]}" 2>&1 | (trap '' INT TERM HUP && exec tee -- "$CONSOLE")
  ) &
  job=$!
  set +m
  trap 'stop 130' INT
  trap 'stop 143' TERM
  trap 'stop 129' HUP
  wait "$job" || status=$?
  trap - INT TERM HUP
  ((status == 0)) || die "training failed (status $status). What went wrong is in:" \
    "$CONSOLE" "$RUN/log_rank0.txt (one file per rank)"
}

# Tells the ranks to stop and waits, as they may be writing a checkpoint; then insists. $1: status.
stop() {
  local waited=0
  trap '' INT TERM HUP
  printf '\n==> stopping the ranks\n' >&2
  kill -TERM -- "-$job" 2>/dev/null || true
  while kill -0 -- "-$job" 2>/dev/null && ((waited++ < GRACE * 2)); do sleep 0.5; done
  kill -KILL -- "-$job" 2>/dev/null || true
  exit "$1"
}

# DeepSpeed's launcher leaves 66 MiB per rank behind on CPU; the port makes them this run's. $1: it.
remove_shared_memory() {
  rm -f -- /dev/shm/deepspeed_allreduce_buffer_"$(id -u)"_*_"$1"_*
}

report() {
  python - "$RUN" "$DATA" "$ENOUGH" <<'PYTHON'
import json
import sys
from pathlib import Path

run, data, enough = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
try:
    lines = (run / 'metrics.jsonl').read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r.get('acc1') is not None]
    last = records[-1]
except (OSError, ValueError, IndexError) as error:
    sys.exit(f'\nquickstart.sh: error: no accuracy in {run}/metrics.jsonl: {error}')
best = max(records, key=lambda r: r['acc1'])
images = sum(1 for _ in data.glob('val/*/*.png'))
tags = sorted(run.glob('ckpt_epoch_*'), key=lambda p: p.stat().st_mtime)
print(f'''
accuracy     {last['acc1']:.2f} % of {images} validation images after epoch {last['epoch']}
             (best: {best['acc1']:.2f} % after epoch {best['epoch']})
checkpoints  {run}/: {', '.join(tag.name for tag in tags) or 'none'}
log          {run}/log_rank0.txt, numbers in {run}/metrics.jsonl
plot         {run}/curves.png
''')
if last['acc1'] < enough:
    # --fresh, because a resumed run goes on with the lr schedule of its first start
    sys.exit(f'quickstart.sh: error: the accuracy is under {enough:g} %; start again with --fresh, '
             'and with more epochs (--epochs N)')
PYTHON
}

main "$@"
