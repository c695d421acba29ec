#!/usr/bin/env bash
# Trains under the MPI that is there: Open MPI, MPICH or Intel MPI.
#
#   bash launch/train_mpi.sh -n 16 --hostfile hosts --ppn 8 -- --cfg NAME --data-path DIR ...
#
#   -n N             ranks in all
#   --hostfile FILE  hosts, one a line (Open MPI: "host slots=8"; MPICH: "host:8")
#   --ppn N          ranks on each host
#   --allow-root     let Open MPI run as root
#   --dry-run        print the command, and run nothing
#
# What comes after -- goes to internvl_ds.train. The exit status is 0 only when rank 0 has come to the
# end of the program.
set -euo pipefail
# shellcheck source=launch/job.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/job.sh"

ranks='' hostfile='' ppn='' root=()
while (($#)); do
  case $1 in
    -n | -np) ranks=${2-} && shift ;;
    --hostfile) hostfile=${2-} && shift ;;
    --ppn) ppn=${2-} && shift ;;
    --allow-root) root=(--allow-run-as-root) ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage ;;
    --) shift && break ;;
    *) die "unknown option $1; --help lists them, and -- comes before those of the program" ;;
  esac
  shift
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die '-n N is needed: how many ranks'
[[ -z $ppn || $ppn =~ ^[1-9][0-9]*$ ]] || die "--ppn $ppn is no number"
[[ -z $hostfile || -r $hostfile ]] || die "--hostfile $hostfile cannot be read"
command -v mpirun >/dev/null || die 'no mpirun on PATH; pip install internvl_ds[mpi] brings Open MPI'

mapfile -t variables < <(set_variables)
version=$(mpirun --version 2>&1) # all of it: a reader that stops early kills it
case $version in
  *'Open MPI'* | *prterun*)
    # A connection to another host that is cut counts as broken after 11 s, not never (5.x, and 4.x).
    for name in time=5 intvl=2 probes=3; do
      export "PRTE_MCA_oob_tcp_keepalive_$name" "OMPI_MCA_oob_tcp_keepalive_$name"
    done
    # Without --bind-to none ranks share a core, and their local ranks may differ from the count.
    command=(mpirun -np "$ranks" --bind-to none "${root[@]}")
    [[ -z $hostfile ]] || command+=(--hostfile "$hostfile")
    [[ -z $ppn ]] || command+=(--map-by "ppr:$ppn:node")
    [[ -n $hostfile ]] || command+=(--oversubscribe)
    for name in "${variables[@]}"; do command+=(-x "$name"); done
    ;;
  *HYDRA* | *[Mm][Pp][Ii][Cc][Hh]* | *Intel*)
    command=(mpirun -n "$ranks")
    [[ -z $hostfile ]] || command+=(-f "$hostfile")
    [[ -z $ppn ]] || command+=(-ppn "$ppn")
    command+=(-genvlist "$(IFS=, && printf '%s' "${variables[*]}")")
    ;;
  *) die "$(command -v mpirun) is of an MPI that is not known here: ${version%%$'\n'*}" ;;
esac

# mpirun may end before it has passed on what ssh says of a host that it does not find.
name_unknown_hosts() {
  local host address
  while read -r host _ || [[ -n $host ]]; do
    host=${host%%:*}
    [[ -n $host && $host != \#* ]] || continue
    address=$(ssh -G "$host" 2>/dev/null | sed -n 's/^hostname //p')
    timeout 10 getent ahosts "${address:-$host}" >/dev/null ||
      say "no address is known here for host $host of $hostfile"
  done <"$hostfile"
}

run_job "${command[@]}" "${PYTHON:-python}" -m internvl_ds.train "$@" && code=0 || code=$?
((code == 0)) || [[ -z $hostfile ]] || name_unknown_hosts
exit "$code"
