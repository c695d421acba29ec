# Set-up that quickstart.sh and test.sh share: sourced by them, not run.
#
# It makes the virtual environment, installs this package and an extras set into it, and has
# DeepSpeed compile the op it needs on CPU, each only where it is not done yet. All of it is
# recorded inside the environment, so deleting that directory is all it takes to start afresh.
#
# Settings, all optional:
#   INTERNVL_DS_VENV    where the environment goes (default: .venv at the root of the repository)
#   INTERNVL_DS_PYTHON  the Python to make it with (default: python3 where it is 3.10 or newer, else
#                       the newest on PATH)
# shellcheck shell=bash

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${INTERNVL_DS_VENV:-$ROOT/.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
VENV=${VENV%/}

readonly VENV_GIB=7 # the environment with every dependency takes 6 GiB
readonly TEMP_GIB=3 # pip downloads 2.5 GiB to TMPDIR before it installs

# Files in the environment.
readonly MADE_FOR=.internvl_ds-venv         # these scripts made it, for the path in this file
readonly UNFINISHED=.internvl_ds-unfinished # an installation began and did not end
readonly STAMP=.internvl_ds-installed       # with -EXTRAS: the fingerprint of what is installed

say() { printf '==> %s\n' "$*"; }

die() {
  printf '\n%s: error: %s\n' "$(basename -- "$0")" "$1" >&2
  shift
  (($# == 0)) || printf '  %s\n' "$@" >&2
  exit 1
}

# Makes the environment ready and puts it first on PATH. $1: the extras, as in 'demo' or 'dev,mpi'.
set_up() {
  local extras=$1
  cd -- "$ROOT" || exit
  unset PYTHONHOME
  export PATH="$VENV/bin:$PATH" VIRTUAL_ENV=$VENV
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}
  if is_set_up "$extras"; then
    return
  fi
  wait_for_other_set_ups
  if ! is_set_up "$extras"; then
    venv_works || make_venv
    check_compiler "$VENV/bin/python"
    install_package "$extras"
    build_op
    fingerprint >"$VENV/$STAMP-$extras"
  fi
  exec {set_up_lock}>&-
}

is_set_up() {
  venv_works && [[ -f $VENV/$STAMP-$1 && $(<"$VENV/$STAMP-$1") == "$(fingerprint)" ]] &&
    venv_imports internvl_ds torch deepspeed timm
}

# What an installation depends on: the two files that describe it, and where they lie.
fingerprint() { { cat setup.cfg pyproject.toml && printf '%s\n' "$ROOT"; } | cksum; }

venv_works() {
  [[ -x $VENV/bin/python && ! -e $VENV/$UNFINISHED ]] &&
    [[ ! -f $VENV/$MADE_FOR || $(<"$VENV/$MADE_FOR") == "$VENV" ]] &&
    venv_imports pip
}

# Whether the environment has these modules; they are looked for, not imported.
venv_imports() {
  "$VENV/bin/python" -I - "$@" 2>/dev/null <<'PYTHON'
import sys
from importlib.util import find_spec
sys.exit(sys.version_info < (3, 10) or not all(find_spec(name) for name in sys.argv[1:]))
PYTHON
}

# Two set-ups of one environment at a time would break it; the lock goes with the process.
wait_for_other_set_ups() {
  local lock
  lock=${TMPDIR:-/tmp}/internvl_ds-$(id -u)-$(cksum <<<"$VENV" | cut -d' ' -f1).lock
  exec {set_up_lock}>"$lock"
  command -v flock >/dev/null || return 0
  if ! flock -n "$set_up_lock"; then
    say "another set-up of $VENV is under way: waiting for it"
    flock "$set_up_lock"
  fi
}

make_venv() {
  local python
  if [[ -e $VENV || -L $VENV ]]; then
    may_remove_venv || die "$VENV is there, and is no virtual environment that works." \
      'Remove it, or name another place: INTERNVL_DS_VENV=/some/dir'
    say "$VENV is broken or half made: making it anew"
    rm -rf -- "$VENV"
  fi
  python=$(find_python)
  check_compiler "$python"
  need_space
  say "making the virtual environment $VENV with $("$python" --version) ($python)"
  mkdir -p -- "$VENV" || die "$VENV cannot be made." \
    'Name a place that you may write to: INTERNVL_DS_VENV=/some/dir'
  printf '%s\n' "$VENV" >"$VENV/$MADE_FOR"
  : >"$VENV/$UNFINISHED"
  "$python" -m venv -- "$VENV" || die "$python could not make a virtual environment in $VENV."
}

# Only what these scripts made, an empty directory, or a broken environment in the default place.
may_remove_venv() {
  [[ -d $VENV && ! -L $VENV ]] || return 1
  [[ -f $VENV/$MADE_FOR ]] && return
  [[ -z $(ls -A -- "$VENV") ]] && return
  [[ -f $VENV/pyvenv.cfg && $VENV == "$ROOT/.venv" ]]
}

# Prints the Python to use: the user's own, else the newest that is known to work; of these the
# first that can also compile extensions, or the first at all.
find_python() {
  local names name path answer first='' why=()
  read -ra names <<<"python3 python3.13 python3.12 python3.11 python3.10 python3.14"
  [[ -z ${INTERNVL_DS_PYTHON:-} ]] || names=("$INTERNVL_DS_PYTHON")
  for name in "${names[@]}"; do
    path=$(command -v "$name") || continue
    answer=$("$path" - 2>/dev/null <<'PYTHON'
import os, sys, sysconfig
version = '%d.%d' % sys.version_info[:2]
try:
    import ensurepip, venv
except ImportError:
    ensurepip = None
if sys.version_info < (3, 10):
    print('is %s' % version)
elif ensurepip is None:
    print('has no venv module (Debian, Ubuntu: apt-get install python%s-venv)' % version)
else:
    header = os.path.join(sysconfig.get_path('include'), 'Python.h')
    print('compiles' if os.path.isfile(header) else 'runs')
PYTHON
    ) || answer='does not run'
    case $answer in
      compiles) printf '%s\n' "$path" && return ;;
      runs) first=${first:-$path} ;;
      *) why+=("$path $answer") ;;
    esac
  done
  [[ -z $first ]] || { printf '%s\n' "$first" && return; }
  ((${#why[@]})) || why=("none of these is on PATH: ${names[*]}")
  die 'no suitable Python was found: it takes 3.10 or newer, with its venv module.' "${why[@]}" \
    'Install one, or name one: INTERNVL_DS_PYTHON=/path/to/python3.12'
}

# On a machine without a GPU, DeepSpeed compiles a C++ op as soon as ranks meet. $1: the Python.
check_compiler() {
  local compiler include
  if [[ $(uname) != Linux ]] || has_gpu; then
    return
  fi
  read -r compiler _ <<<"${CXX:-c++}"
  command -v "$compiler" >/dev/null ||
    die "there is no C++ compiler ($compiler), which DeepSpeed needs on a machine without a GPU." \
      'Debian, Ubuntu: apt-get install g++' 'Fedora, RHEL:   dnf install gcc-c++' \
      'elsewhere:      install GCC or Clang, or set CXX to the compiler'
  include=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [[ -f $include/Python.h ]] ||
    die "Python's headers are missing ($include/Python.h), which DeepSpeed needs without a GPU." \
      "Debian, Ubuntu: apt-get install $(basename -- "$include")-dev" \
      'Fedora, RHEL:   dnf install python3-devel'
}

has_gpu() { [[ -e /dev/nvidiactl ]] || command -v nvidia-smi >/dev/null; }

need_space() {
  local temp=${TMPDIR:-/tmp} venv_mount temp_mount
  venv_mount=$(mount_of "$VENV") temp_mount=$(mount_of "$temp")
  if [[ $venv_mount == "$temp_mount" ]]; then
    need_gib $((VENV_GIB + TEMP_GIB)) "$VENV" "the virtual environment, and downloads in $temp"
  else
    need_gib "$VENV_GIB" "$VENV" 'the virtual environment'
    need_gib "$TEMP_GIB" "$temp" "pip's downloads"
  fi
}

# Dies when fewer than $1 GiB are free where $2 is or will be; $3 says what for.
need_gib() {
  local free
  free=$(df -Pk -- "$(existing_parent "$2")" | awk 'NR == 2 { print int($4 / 1048576) }')
  ((free >= $1)) ||
    die "not enough disk space for $2: $free GiB are free, and it takes $1 GiB ($3)." \
      'Free some, or go elsewhere: INTERNVL_DS_VENV=/dir for the environment,' \
      'TMPDIR=/dir for downloads'
}

mount_of() { df -Pk -- "$(existing_parent "$1")" | awk 'NR == 2 { print $NF }'; }

existing_parent() {
  local dir=$1
  while [[ ! -d $dir ]]; do dir=$(dirname -- "$dir"); done
  printf '%s\n' "$dir"
}

install_package() {
  local log=$VENV/internvl_ds-install.log
  say "installing internvl_ds[$1] with PyTorch, DeepSpeed and the rest: takes minutes (log: $log)"
  : >"$VENV/$UNFINISHED"
  # Python compiles what is imported; pip would compile all of 13,000 files first, for 1.5 minutes.
  if PIP_USER=0 "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check \
    --no-compile --progress-bar off -e ".[$1]" >"$log" 2>&1; then
    rm -f -- "$VENV/$UNFINISHED"
    return
  fi
  # Up to this line of pip's, nothing in the environment has been touched.
  grep -q '^Installing collected packages' "$log" || rm -f -- "$VENV/$UNFINISHED"
  printf '\nThe last lines of %s:\n' "$log" >&2
  tail -n 15 -- "$log" | sed 's/^/    /' >&2
  if grep -q 'No space left on device' "$log"; then
    die 'pip ran out of disk space.' \
      'Free some, or go elsewhere: INTERNVL_DS_VENV=/dir, and TMPDIR=/dir for downloads'
  elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError' \
    "$log" || grep -qE 'Network is unreachable|name resolution|Connection refused' "$log"; then
    die 'pip could not reach the package index: is there a network?' \
      'Behind a proxy set HTTPS_PROXY; for a mirror set PIP_INDEX_URL. Then run this again.'
  fi
  die 'pip could not install the package; its log is above.' \
    'Where a package has no file for this Python, name another: INTERNVL_DS_PYTHON=/path/to/python3.12'
}

# Compiles now, where the reason can be told, what DeepSpeed would compile inside every rank.
build_op() {
  local log=$VENV/internvl_ds-op.log
  rm -f -- "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/lock" # an interrupted build leaves it for ever
  say "having DeepSpeed compile its op for CPU ranks, where it needs one"
  if ! python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >"$log" 2>&1; then
    printf '\nThe last lines of %s:\n' "$log" >&2
    tail -n 15 -- "$log" | sed 's/^/    /' >&2
    die "DeepSpeed could not compile its op for CPU ranks; the compiler's words are above."
  fi
}
