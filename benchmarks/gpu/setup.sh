#!/usr/bin/env bash
# Installs what `make gpu` needs from a folder of wheels, without a network, beside the torch that is there.
#
#   benchmarks/gpu/setup.sh WHEELS [TARGET]        TARGET: output/gpu-packages
#   PYTHONPATH=output/gpu-packages make gpu PART=ceilings GPU_PYTHON=python3
#
# The wheels are made on a machine with a network, for Python 3.12 on x86-64:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#       --platform manylinux2010_x86_64 --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 \
#       -c constraints.txt -r benchmarks/gpu/requirements.txt -d WHEELS
set -euo pipefail

wheels=${1:?usage: benchmarks/gpu/setup.sh WHEELS [TARGET]}
target=${2:-output/gpu-packages}
mkdir -p "$target"
target=$(cd "$target" && pwd)
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/../.." && pwd)
install=("$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$target")

"${install[@]}" "$wheels"/*.whl
# The project itself, as it is now: after a change of it, call this again.
PYTHONPATH=$target "${install[@]}" --no-build-isolation "$here"
PYTHONPATH=$target "$python" -c 'import torch, diffusers, peft, tuner; print("ready, with torch", torch.__version__)'
