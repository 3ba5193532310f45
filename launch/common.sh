# shellcheck shell=bash
# Sourced by the scripts beside it: strict mode, errors, and the environment.
# Leaves the caller in the repository's root. Read next: ../setup.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trap 'echo "interrupted" >&2; exit 130' INT

die() {
  echo "error: $*" >&2
  exit 2
}

# quote [WORD...]: prints words as a shell would read them back.
quote() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  printf '%s\n' "${words[*]}"
}

# run COMMAND [ARGUMENT...]: runs it; with dry_run=1 prints it instead.
dry_run=0
run() {
  if ((dry_run)); then quote "$@"; else "$@"; fi
}

# install EXTRA: makes .venv hold this package with an extra of setup.py, or
# with none ('cpu'). Does nothing when a former call got to its end and neither
# setup.py nor constraints.txt changed since: a stamp in .venv, written last,
# tells. An environment in which an installation was cut off is made anew, since
# pip takes a half-copied package for a whole one.
install() {
  local extra=$1 python=.venv/bin/python stamp=.venv/installed-$1 base want
  base=${PYTHON:-python3}
  command -v "$base" >/dev/null ||
    die "$base: no such program; install Python 3.11 or newer, or set PYTHON" \
      "to its path"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "$base: found $("$base" --version 2>&1), expected Python 3.11 or" \
      "newer; install one and set PYTHON to its path"
  want=$("$base" -c '
import hashlib, pathlib
print(hashlib.sha256(b"".join(pathlib.Path(f).read_bytes()
  for f in ("setup.py", "constraints.txt"))).hexdigest())')
  if [[ -f $stamp && $(<"$stamp") == "$want" ]] && "$python" --version \
    >/dev/null 2>&1; then
    return
  fi
  if [[ -f .venv/installing ]] || ! "$python" -m pip --version \
    >/dev/null 2>&1; then
    echo "Making .venv with $("$base" --version)"
    "$base" -m venv --clear .venv ||
      die ".venv: cannot be made by $base -m venv; on Debian and Ubuntu," \
        "apt-get install python3-venv"
  fi
  local target=.
  [[ $extra == cpu ]] || target=".[$extra]"
  local constraints=/dev/null
  if "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
    constraints=constraints.txt
  fi
  rm -f "$stamp"
  touch .venv/installing
  echo "Installing dependencies ($extra); minutes the first time"
  "$python" -m pip install --quiet --disable-pip-version-check \
    -c "$constraints" -e "$target" ||
    die "installing $target failed, see above; run this again to retry"
  rm .venv/installing
  echo "$want" >"$stamp"
}
