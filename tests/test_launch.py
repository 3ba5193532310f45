"""What the files of launch/ would start, without starting it."""

import collections
import copy
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
BIN = pathlib.Path(sys.executable).parent
QUOTED = "--config.optimizer.freeze=('^vision/',)"


def bash(*arguments, **env):
  return subprocess.run(
    ["bash", *arguments],
    cwd=ROOT,
    env=os.environ | env,
    capture_output=True,
    text=True,
  )


def printed(*arguments):
  process = bash(*arguments, "--dry-run")
  assert process.returncode == 0, process.stderr
  return process.stdout.splitlines()


def test_shellcheck():
  scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
  assert {p.name for p in scripts} >= {"common.sh", "tpu_vm.sh"}
  process = subprocess.run(
    [BIN / "shellcheck", *scripts, ROOT / ".ci/run"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert (process.stdout, process.returncode) == ("", 0)


# Cloud TPU -----------------------------------------------------------------


def tpu(*arguments):
  """Of a dry run whose options come before the flags of the program."""
  command, *rest = arguments
  process = bash("launch/tpu_vm.sh", command, "--dry-run", *rest)
  assert process.returncode == 0, process.stderr
  return process.stdout.splitlines()


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (
      ["create"],
      "gcloud compute tpus tpu-vm create vocojax "
      "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite",
    ),
    (
      "create --name=a --zone=us-west4-a --project=p --spot --type=v6e-8 "
      "--version=v2-alpha-tpuv6e".split(),
      "gcloud compute tpus tpu-vm create a --zone=us-west4-a --project=p "
      "--accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --spot",
    ),
    (
      ["create", "--queued", "--zone=us-west4-a"],
      "gcloud compute tpus queued-resources create vocojax --zone=us-west4-a "
      "--node-id=vocojax --accelerator-type=v5litepod-16 "
      "--runtime-version=v2-alpha-tpuv5-lite",
    ),
    (["status"], "gcloud compute tpus tpu-vm describe vocojax"),
    (
      ["status", "--queued"],
      "gcloud compute tpus queued-resources describe vocojax",
    ),
    (
      ["doctor", "--", "--workdir=/mnt/a b"],
      "gcloud compute tpus tpu-vm ssh vocojax --worker=all '--command=cd "
      "vocojax; .venv/bin/python -m vocojax.doctor "
      "'\\''--workdir=/mnt/a b'\\'''",
    ),
    (
      ["tail", "--worker=3"],
      "gcloud compute tpus tpu-vm ssh vocojax --worker=3 '--command=tail -n "
      "100 -F vocojax/train.log'",
    ),
    (
      ["stop"],
      "gcloud compute tpus tpu-vm ssh vocojax --worker=all '--command=kill "
      "-TERM $(cat vocojax/train.pid)'",
    ),
    (["delete"], "gcloud compute tpus tpu-vm delete vocojax --quiet"),
    (
      ["delete", "--queued", "--zone=z"],
      "gcloud compute tpus queued-resources delete vocojax --zone=z --force "
      "--quiet",
    ),
  ],
)
def test_tpu_vm(arguments, expected):
  assert tpu(*arguments) == [expected]


def test_tpu_vm_install():
  before = sorted(ROOT.iterdir())
  assert tpu("install", "--zone=z") == [
    "git archive --prefix=vocojax/ --output=vocojax.tar.gz HEAD",
    "gcloud compute tpus tpu-vm scp vocojax.tar.gz vocojax: --zone=z "
    "--worker=all",
    "gcloud compute tpus tpu-vm ssh vocojax --zone=z --worker=all "
    "'--command=set -e; tar -xzf vocojax.tar.gz; command -v ~/.local/bin/uv || "
    "curl -LsSf https://astral.sh/uv/install.sh | sh; ~/.local/bin/uv python "
    "install 3.11; export PYTHON=$(~/.local/bin/uv python find 3.11); bash -c "
    "'\\''source vocojax/launch/common.sh && install tpu'\\'''",
  ]
  assert sorted(ROOT.iterdir()) == before


def test_tpu_vm_start():
  """Twice quoted: for this shell and for that of the hosts."""
  (line,) = tpu("start", "--", "--config=a.py", QUOTED)
  *words, command = shlex.split(line)
  assert shlex.join(words) == (
    "gcloud compute tpus tpu-vm ssh vocojax --worker=all"
  )
  assert command == (
    "--command=cd vocojax; if [ -e train.pid ] && kill -0 $(cat train.pid); "
    "then echo error: already running, stop it first >&2; exit 1; fi; nohup "
    ".venv/bin/python -m vocojax.train --config=a.py "
    "'--config.optimizer.freeze=('\\''^vision/'\\'',)' </dev/null >>train.log "
    "2>&1 & echo $! >train.pid"
  )


# A training program on a host: says what it was given, ends at SIGTERM.
PROGRAM = """\
#!{python}
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print(sys.argv[1:], flush=True)
print(signal.Signals(signal.sigwait([signal.SIGTERM])).name, flush=True)
"""


def test_what_the_hosts_run(tmp_path):
  """Started once, not twice at a time, stopped, started again."""
  program = tmp_path / "vocojax/.venv/bin/python"
  program.parent.mkdir(parents=True)
  program.write_text(PROGRAM.format(python=sys.executable))
  program.chmod(0o755)
  log = tmp_path / "vocojax/train.log"

  def on_host(*arguments):
    (line,) = tpu(*arguments)
    command = shlex.split(line)[-1].removeprefix("--command=")
    return subprocess.run(
      ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True
    )

  def wait_for(text):
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text() != text:
      assert time.monotonic() < deadline, log.read_text()
      time.sleep(0.05)

  started = f"{['-m', 'vocojax.train', '--config=a.py', QUOTED]}\n"
  start = ("start", "--", "--config=a.py", QUOTED)
  assert on_host(*start).returncode == 0
  wait_for(started)
  try:
    again = on_host(*start)
    assert (again.returncode, again.stderr) == (
      1,
      "error: already running, stop it first\n",
    )
  finally:
    assert on_host("stop").returncode == 0
  wait_for(started + "SIGTERM\n")
  pid = int((tmp_path / "vocojax/train.pid").read_text())
  while pathlib.Path(f"/proc/{pid}").exists():
    time.sleep(0.05)
  assert on_host(*start).returncode == 0
  wait_for(started + "SIGTERM\n" + started)
  assert on_host("stop").returncode == 0
  wait_for(2 * (started + "SIGTERM\n"))


@pytest.mark.skipif(
  shutil.which("gcloud") is None, reason="no gcloud, which knows its flags"
)
def test_gcloud_has_these_flags():
  lines = [
    line
    for arguments in (["create", "--spot", "--zone=z"], ["install"], ["delete"])
    for queued in ([], ["--queued"])
    for line in tpu(*arguments, *queued)
    if line.startswith("gcloud")
  ]
  flags = collections.defaultdict(set)
  for line in lines:
    words = shlex.split(line)
    flags[tuple(words[:5])] |= {
      word.partition("=")[0] for word in words[5:] if word.startswith("--")
    }
  assert sum(map(len, flags.values())) == 15
  for command, names in flags.items():
    text = subprocess.run(
      [*command, "--help"], capture_output=True, text=True, timeout=120
    ).stdout
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    for name in names:
      assert re.search(rf"{name}(?![\w-])", text), (command, name)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "found no command, expected create, "),
    (["fly"], "fly: unknown command, expected create, "),
    (["start", "--config=a.py"], "--config=a.py: unknown option; --help lists"),
  ],
)
def test_tpu_vm_mistakes(arguments, message):
  process = bash("launch/tpu_vm.sh", *arguments, PATH=os.environ["PATH"])
  assert (process.returncode, process.stdout) == (2, "")
  assert process.stderr.startswith(f"error: {message}")


# SLURM ---------------------------------------------------------------------


def test_slurm():
  assert printed("launch/slurm.sbatch", "--config=a.py", QUOTED) == [
    "srun --kill-on-bad-exit=1 .venv/bin/python -m vocojax.train "
    "--config=a.py '--config.optimizer.freeze=('\\''^vision/'\\'',)'"
  ]


def test_slurm_runs_a_copy(tmp_path):
  """SLURM copies the script away and starts it in the folder of sbatch."""
  copied = tmp_path / "slurm_script"
  shutil.copy(LAUNCH / "slurm.sbatch", copied)
  srun = tmp_path / "srun"
  srun.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
  srun.chmod(0o755)
  checkout = tmp_path / "checkout"
  shutil.copytree(LAUNCH, checkout / "launch")
  job = {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": "1"}
  job["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
  process = bash(str(copied), "--config=a.py", QUOTED, **job)
  assert process.returncode == 2
  assert process.stderr.startswith(f"error: {checkout}/.venv: not there; ")
  python = checkout / ".venv/bin/python"
  python.parent.mkdir(parents=True)
  python.symlink_to(sys.executable)
  process = bash(str(copied), "--config=a.py", QUOTED, **job)
  assert process.stdout.splitlines() == [
    str(checkout),
    "--kill-on-bad-exit=1",
    ".venv/bin/python",
    "-m",
    "vocojax.train",
    "--config=a.py",
    QUOTED,
  ], process.stderr


def test_slurm_directives():
  """One process a GPU, as JAX expects of SLURM; SIGTERM in time."""
  lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
  directives = [s for s in lines if s.startswith("#SBATCH")]
  # SLURM reads them up to the first command.
  first = next(i for i, s in enumerate(lines) if s and not s.startswith("#"))
  assert all(lines.index(s) < first for s in directives)
  options = dict(s.split()[1].partition("=")[::2] for s in directives)
  assert options["--ntasks-per-node"] == options["--gpus-per-node"]
  name, _, seconds = options["--signal"].partition("@")
  assert getattr(signal, f"SIG{name}") == signal.SIGTERM
  assert int(seconds) == 300


def test_slurm_mistakes():
  process = bash("launch/slurm.sbatch")
  assert process.returncode == 2
  assert process.stderr.startswith("error: found no flags, expected --config")
  process = bash("launch/slurm.sbatch", "--config=a.py")
  assert process.stderr.startswith("error: not in a SLURM job; ")


# GKE -----------------------------------------------------------------------


def jobset():
  return yaml.safe_load((LAUNCH / "gke/jobset.yaml").read_text())


def lost(manifest):
  """Fields that the types of Kubernetes and JobSet do not know.

  Raises:
    pydantic.ValidationError: a field has a wrong type.
  """

  def missing(found, known, path):
    if isinstance(found, dict):
      for key, value in found.items():
        if not isinstance(known, dict) or key not in known:
          yield f"{path}{key}"
        else:
          yield from missing(value, known[key], f"{path}{key}.")
    elif isinstance(found, list):
      for i, (value, there) in enumerate(zip(found, known, strict=True)):
        yield from missing(value, there, f"{path}{i}.")
    elif found != known:
      yield path

  return list(
    missing(manifest, JobsetV1alpha2JobSet.from_dict(manifest).to_dict(), "")
  )


def test_jobset_has_known_fields_of_the_right_types():
  assert lost(jobset()) == []


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda spec, pod: spec.update(replicas=1), "spec.replicas"),
    (
      lambda spec, pod: pod.update(terminationGracePeriod=1),
      r"spec.replicatedJobs.0.template.spec.template.spec.terminationGracePeriod",
    ),
    (
      lambda spec, pod: pod["containers"][0].update(port=1),
      "spec.replicatedJobs.0.template.spec.template.spec.containers.0.port",
    ),
  ],
)
def test_unknown_fields_are_seen(change, message):
  manifest = copy.deepcopy(jobset())
  spec = manifest["spec"]
  change(
    spec, spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  )
  assert lost(manifest) == [message]


def test_wrong_types_are_seen():
  manifest = jobset()
  manifest["spec"]["failurePolicy"]["maxRestarts"] = "ten"
  with pytest.raises(ValueError, match="maxRestarts"):
    lost(manifest)


def test_jobset():
  """Chips and hosts make up the topology; everything that is named exists."""
  manifest = jobset()
  assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert manifest["kind"] == "JobSet"
  spec = manifest["spec"]
  (job,) = spec["replicatedJobs"]
  job_spec = job["template"]["spec"]
  pod = job_spec["template"]["spec"]
  (container,) = pod["containers"]
  selector = pod["nodeSelector"]
  assert selector == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }
  chips = {"google.com/tpu": 4}
  assert container["resources"] == {"requests": chips, "limits": chips}
  hosts = job_spec["parallelism"]
  assert hosts == job_spec["completions"] == 4
  assert hosts * 4 == 4 * 4
  # Hosts are numbered, find each other by name, and start and end together.
  assert job_spec["completionMode"] == "Indexed"
  assert spec["network"] == {"enableDNSHostnames": True, "subdomain": "vocojax"}
  assert job_spec["backoffLimit"] == 0
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
  assert spec["failurePolicy"]["maxRestarts"] > 0
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  (rule,) = job_spec["podFailurePolicy"]["rules"]
  assert rule["onPodConditions"] == [
    {"type": "DisruptionTarget", "status": "True"}
  ]
  assert pod["terminationGracePeriodSeconds"] == 300
  from jax._src.clusters import cloud_tpu_cluster

  ports = {port["containerPort"] for port in container["ports"]}
  assert ports == {8471, int(cloud_tpu_cluster.coordinator_port)}
  # What is mounted exists, and is where the run writes.
  assert [m["name"] for m in container["volumeMounts"]] == [
    v["name"] for v in pod["volumes"]
  ]
  (mount,) = container["volumeMounts"]
  module, *flags = container["args"]
  flags = dict(flag.removeprefix("--").split("=") for flag in flags)
  assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
  assert (ROOT / flags["config"]).is_file()
  assert flags["workdir"].startswith(f"{mount['mountPath']}/")


# The image -----------------------------------------------------------------


def test_dockerfile():
  process = subprocess.run(
    [BIN / "hadolint", "Dockerfile"], cwd=LAUNCH, capture_output=True, text=True
  )
  assert (process.stdout + process.stderr, process.returncode) == ("", 0)


def test_what_goes_into_the_image():
  """All that is copied exists; what setup.py reads is there before it runs."""
  text = (LAUNCH / "Dockerfile").read_text()
  copied = [s.split()[1:-1] for s in text.splitlines() if s.startswith("COPY")]
  for name in (name for names in copied for name in names):
    assert (ROOT / name).exists(), name
  installs = text.index("pip install")
  for name in ("setup.py", "constraints.txt", "pyproject.toml", "LICENSE"):
    assert text.index(name, text.index("COPY")) < installs
  assert text.startswith("#")
  assert "\nFROM python:3.11-slim\n" in text  # that of constraints.txt
  users = re.findall(r"^USER (\S+)$", text, re.M)
  assert users
  assert users[-1] not in ("root", "0")


@pytest.mark.parametrize(
  ("extra", "target"),
  [("cpu", "."), ("tpu", ".[tpu]"), ("gpu", ".[gpu]")],
)
def test_extra_of_the_image(tmp_path, extra, target):
  """The line that installs, run with a pip that only says what it was asked."""
  text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
  (command,) = re.findall(r"^RUN (.*pip install.*)$", text, re.M)
  pip = tmp_path / "pip"
  pip.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  pip.chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  process = bash("-c", command, EXTRA=extra, PATH=path)
  assert process.stdout.split() == [
    *("install", "--no-cache-dir", "-c", "constraints.txt"),
    target,
  ]
