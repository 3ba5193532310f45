#!/usr/bin/env bash
# The paper's comparison at small scale. See usage() and benchmarks/study.py.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'END'
Usage: launch/reproduce_small.sh [--dry-run] [FLAGS]

Makes .venv, installs the pinned dependencies (once), trains every method on
GridVQA from the same start for several seeds, one run on each core, and makes
the tables: runs/study/tables.md. Says first about how many hours it takes. Run
again, it goes on where it stopped.

  --dry-run   print the commands of all runs that are left, and their time
  FLAGS       for python -m benchmarks.study, after --out=runs/study; such as
              --grids 2, --seeds 0 1, --only full 'voco_*'

PYTHON=/path/to/python3.11 chooses the Python that .venv is made with.
END
}

flags=()
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --dry-run) flags+=(--dry_run) && dry_run=1 ;;
    *) flags+=("$1") ;;
  esac
  shift
done

install cpu
.venv/bin/python -m benchmarks.study --out=runs/study "${flags[@]}"
run .venv/bin/python -m vocojax.report runs/study
