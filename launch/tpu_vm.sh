#!/usr/bin/env bash
# Trains on a Cloud TPU slice of one or many hosts. See usage() and common.sh.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'END'
Usage: launch/tpu_vm.sh COMMAND [OPTIONS] [-- FLAGS]

  create   asks for the slice; --queued waits in line for it, --spot is cheaper
           and may be taken away
  status   says whether it is there yet
  install  copies the last commit to every host and installs it there, with a
           Python of its own
  doctor   checks every host; FLAGS are those of python -m vocojax.doctor
  start    starts training on every host, in the background; FLAGS are those of
           python -m vocojax.train. Started again, it goes on where it stopped
  tail     follows the log of a host
  stop     makes every host save and stop
  delete   gives the slice back; what is on its disks is lost

  --name=NAME        of the slice; default vocojax
  --zone=ZONE        default: gcloud config set compute/zone ZONE
  --project=PROJECT  default: gcloud config set project PROJECT
  --type=TYPE        default v5litepod-16: a v5e 4x4 slice of 4 hosts
  --version=VERSION  of its runtime; default v2-alpha-tpuv5-lite, for v5e
  --worker=N         host that tail follows; default 0
  --queued, --spot   see create; with --queued, give it to status and delete too
  --dry-run          prints the commands, changes nothing

Needs: gcloud, signed in (gcloud auth login), a project with TPU quota in the
zone and the Cloud TPU API enabled, and git. The hosts need the internet to
install, and a folder that all of them see for --workdir and the data, such as
a Filestore share or a bucket mounted with gcsfuse.

  launch/tpu_vm.sh create --zone=us-west4-a --queued
  launch/tpu_vm.sh install --zone=us-west4-a
  launch/tpu_vm.sh start --zone=us-west4-a -- --config=configs/voco_1tok.py \
    --workdir=/mnt/share/voco_1tok
  launch/tpu_vm.sh tail --zone=us-west4-a
  launch/tpu_vm.sh delete --zone=us-west4-a --queued
END
}

[[ $# -gt 0 ]] || die "found no command, expected create, status, install," \
  "doctor, start, tail, stop or delete; --help explains them"
command=$1
shift
name=vocojax type=v5litepod-16 version=v2-alpha-tpuv5-lite worker=0
queued=0 spot=() place=() flags=()
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --name=*) name=${1#*=} ;;
    --zone=* | --project=*) place+=("$1") ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --queued) queued=1 ;;
    --spot) spot=(--spot) ;;
    --dry-run) dry_run=1 ;;
    --)
      shift
      flags=("$@")
      break
      ;;
    *) die "$1: unknown option; --help lists all of them, and flags of the" \
      "program come after --" ;;
  esac
  shift
done
((dry_run)) || command -v gcloud >/dev/null ||
  die "gcloud: no such program; install the Google Cloud CLI"

tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)

on() { # WORKER SCRIPT
  run "${tpu[@]}" ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

case $command in
  --help | -h) usage ;;
  create)
    if ((queued)); then
      run "${queue[@]}" create "$name" "${place[@]}" --node-id="$name" \
        --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
    else
      run "${tpu[@]}" create "$name" "${place[@]}" \
        --accelerator-type="$type" --version="$version" "${spot[@]}"
    fi
    ;;
  status)
    if ((queued)); then
      run "${queue[@]}" describe "$name" "${place[@]}"
    else
      run "${tpu[@]}" describe "$name" "${place[@]}"
    fi
    ;;
  install)
    archive=vocojax.tar.gz
    ((dry_run)) || [[ -z $(git status --porcelain) ]] ||
      echo "warning: changes that are not committed do not go along" >&2
    ((dry_run)) || trap 'rm -f "$archive"' EXIT
    run git archive --prefix=vocojax/ --output="$archive" HEAD
    run "${tpu[@]}" scp "$archive" "$name:" "${place[@]}" --worker=all
    # The runtime's own Python may be older than 3.11.
    on all "set -e; tar -xzf $archive; command -v ~/.local/bin/uv || curl\
 -LsSf https://astral.sh/uv/install.sh | sh; ~/.local/bin/uv python install\
 3.11; export PYTHON=\$(~/.local/bin/uv python find 3.11); bash -c\
 'source vocojax/launch/common.sh && install tpu'"
    ;;
  doctor)
    on all "cd vocojax; $(quote .venv/bin/python -m vocojax.doctor "${flags[@]}")"
    ;;
  start)
    train=$(quote .venv/bin/python -m vocojax.train "${flags[@]}")
    on all "cd vocojax; if [ -e train.pid ] && kill -0 \$(cat train.pid); then\
 echo error: already running, stop it first >&2; exit 1; fi;\
 nohup $train </dev/null >>train.log 2>&1 & echo \$! >train.pid"
    ;;
  tail) on "$worker" "tail -n 100 -F vocojax/train.log" ;;
  stop) on all "kill -TERM \$(cat vocojax/train.pid)" ;;
  delete)
    if ((queued)); then
      run "${queue[@]}" delete "$name" "${place[@]}" --force --quiet
    else
      run "${tpu[@]}" delete "$name" "${place[@]}" --quiet
    fi
    ;;
  *) die "$command: unknown command, expected create, status, install, doctor," \
    "start, tail, stop or delete; --help explains them" ;;
esac
