#!/usr/bin/env bash
# setup.sh PYTHON VENV: a virtual environment with torch, the tools, and the package built in place.
#
# A CUDA build of torch that PYTHON already has is used as it is, with its triton. Otherwise the
# pinned torch of requirements/cpu.txt is installed.
set -euo pipefail
python=$1
venv=$2

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# What is not imported need not be compiled to byte code.
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install -q --no-compile "$@"; }
has_cuda_torch() { "$1" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; }

if has_cuda_torch "$venv/bin/python"; then
    : # already seen by an earlier run
elif has_cuda_torch "$python"; then
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
        >"$site/outer-torch.pth"
else
    pip -r requirements/cpu.txt
fi
# In versions that this torch agrees with, or they would be replaced while the kernels compile.
pip 'setuptools>=77' wheel ninja torch
# The kernels for this processor; make test-all compiles the other builds as well.
export FASTUNET_BUILDS=${FASTUNET_BUILDS:-native}
export FASTUNET_CPU=${FASTUNET_CPU:-1} FASTUNET_HOST_CUDA=${FASTUNET_HOST_CUDA:-1}

# The kernels compile while the tools are installed. Without isolation: an isolated build would
# download a torch of its own.
FASTUNET_CPU=0 FASTUNET_CUDA=0 FASTUNET_HOST_CUDA=0 pip --no-build-isolation --no-deps -e .
mkdir -p build
"$venv/bin/python" setup.py -q build_ext --inplace >build/log.txt 2>&1 &
trap 'kill $! 2>/dev/null || true' EXIT
pip 'fastunet[test,lint]'
wait $! || { cat build/log.txt && exit 1; }
