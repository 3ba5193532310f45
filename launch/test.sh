#!/usr/bin/env bash
# Lint, types and tests, all that CI runs of them. Arguments go to pytest:
#   launch/test.sh -m "not slow" tests/test_masks.py
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install test
bin=.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/shellcheck" launch/*.sh launch/slurm.sbatch .ci/run
"$bin/hadolint" launch/Dockerfile
"$bin/pyrefly" check --python-interpreter-path "$bin/python"
"$bin/python" -m pytest -n 2 "$@"
