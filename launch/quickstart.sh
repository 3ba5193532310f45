#!/usr/bin/env bash
# Trains and evaluates the default 1-token model. See usage() and common.sh.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'END'
Usage: launch/quickstart.sh [--gpu | --tpu] [FLAGS]

Makes .venv, installs the pinned dependencies (once), trains a small model that
reads an image as one VoCo token, evaluates it on easy-VQA's test questions and
prints where the report is. Run again, it goes on where it stopped.

  --gpu, --tpu   install JAX for NVIDIA GPUs or TPUs; default is the CPU
  FLAGS          for python -m vocojax.train, after these two:
                 --config=configs/easyvqa_1tok.py --workdir=runs/easyvqa_1tok
                 Relative paths are relative to the repository's root.
                 .venv/bin/python -m vocojax.train --help lists all flags.

PYTHON=/path/to/python3.11 chooses the Python that .venv is made with.
END
}

extra=cpu
workdir=runs/easyvqa_1tok
flags=(--config=configs/easyvqa_1tok.py)
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --gpu) extra=gpu ;;
    --tpu) extra=tpu ;;
    --workdir=*) workdir=${1#*=} ;;
    --workdir)
      [[ $# -gt 1 ]] || die "--workdir: found nothing, expected a folder"
      workdir=$2
      shift
      ;;
    *) flags+=("$1") ;;
  esac
  shift
done

install "$extra"
status=0
.venv/bin/python -m vocojax.train --workdir="$workdir" "${flags[@]}" ||
  status=$?
if ((status == 143)); then
  echo "no report yet: training stopped early; run this again to go on"
fi
((status == 0)) || exit "$status"
[[ $workdir == /* ]] || workdir=$PWD/$workdir
if [[ -f $workdir/report.md ]]; then
  echo "report: $workdir/report.md"
fi
