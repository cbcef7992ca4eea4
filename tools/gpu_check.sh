#!/usr/bin/env bash
# What a training step takes on a GPU: one table in at most eight minutes, without a download.
#
#   tools/gpu_check.sh [WHEELS]                     on a machine that has torch, transformers and lightning
#   SHAPES=mini STEPS=1 tools/gpu_check.sh          on a CPU, to see that it runs
#
# WHEELS is a folder with the other packages, filled where there is a network:
#   pip download --no-deps --dest wheels bm25s docstring-parser faiss-cpu filelock jinja2 'jsonargparse>=4.53,<4.54' \
#     peft pyarrow rapidfuzz sentence-transformers tensorboard typeshed-client
# The models are Llama-shaped, of the sizes of Qwen2.5, with random weights; an agent without a policy writes the tags.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
shapes=${SHAPES:-0.5B 3B}
steps=${STEPS:-3}
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')

if [ $# -gt 0 ]; then
  "$python" -m venv --system-site-packages .gpu-check
  python=.gpu-check/bin/python
  "$python" -m pip install --quiet --no-index --no-deps --find-links "$1" "$1"/*.whl
fi
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1

echo "== a training step, bf16, by stage (docs/performance.md explains the columns)"
# shellcheck disable=SC2086  # several shapes are several words
timeout 360 "$python" -m tools.bench.step.bench --shapes $shapes --precision bf16-mixed --steps "$steps" \
  --engines transformers --micro_batch_tokens 16384 --checkpointing

echo "== the embedded quickstart on $device"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
time timeout 120 "$python" -m calibadv.cli.main fit --config quickstart --config calibrators/calibadv \
  --trainer.accelerator "$([ "$device" = cuda ] && echo gpu || echo cpu)" --model.rollout_steps "${QUICKSTART_STEPS:-20}" \
  --run.root "$runs" --run.name quickstart
