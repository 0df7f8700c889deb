#!/usr/bin/env bash
# A base model, its mid-training and reinforcement learning, at toy scale, on this machine without a GPU: 4 minutes on 2 busy cores after the set-up.
#   bash examples/quickstart_rl.sh
# A step whose output is there already is skipped, and a training goes on where it was: to start again, remove runs/quickstart_rl.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
run=runs/quickstart_rl configs=configs/tiny/rl

step() { # step OUTPUT TITLE COMMAND...
  local output=$1 title=$2; shift 2
  if [ -e "$output" ]; then echo "== $title: $output is there" >&2; return; fi
  echo "== $title" >&2
  "$@" >&2
}

training() { # training TITLE COMMAND...: a run resumes from its last checkpoint, and one that has ended ends at once
  local title=$1; shift
  echo "== $title" >&2
  "$@" >&2
}

step $run/corpus/tokenizer "corpus and tokenizer" python examples/quickstart_rl_corpus.py $run/corpus
step $run/data_base "prepare the base model's text" prism prepare $configs/base_mixture.yaml
step $run/data_mid "prepare the mid-training mixture" prism prepare $configs/mid_mixture.yaml
step $run/prompts "prompts to train on" prism prompts $configs/train_prompts.yaml
step $run/prompts_heldout "held-out prompts" prism prompts $configs/heldout_prompts.yaml
training "train a base model from scratch" prism train $configs/base.yaml
training "mid-train it" prism train $configs/mid.yaml
training "reinforcement learning from the mid-trained model" prism rl $configs/rl.yaml
training "the control: the same from the base model" prism rl $configs/rl_from_base.yaml
for model in base mid rl rl_from_base; do
  step $run/${model}_hf "write $model as a Hugging Face folder" prism convert export --ckpt $run/$model --out $run/${model}_hf
done
echo "== reload them with plain transformers and compare" >&2
python examples/quickstart_rl_compare.py --prompts $run/prompts_heldout --out $run/compare \
  base=$run/base_hf "base + RL=$run/rl_from_base_hf" mid=$run/mid_hf "mid + RL=$run/rl_hf"
echo "run folder:  $run/rl (config.yaml, manifest.json, metrics.jsonl, checkpoints/)"
echo "TensorBoard: tensorboard --logdir $run/rl/tensorboard"
