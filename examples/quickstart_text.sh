#!/usr/bin/env bash
# Mid-training on real text, two processes, and the way to Hugging Face and back, on this machine without a GPU: about 4 minutes on 2 cores after the set-up.
#   bash examples/quickstart_text.sh
# A step whose output is there already is skipped: to start again, remove runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
run=runs/quickstart

step() { # step OUTPUT TITLE COMMAND...
  local output=$1 title=$2; shift 2
  if [ -e "$output" ]; then echo "== $title: $output is there" >&2; return; fi
  echo "== $title" >&2
  "$@" >&2
}

step $run/corpus/tokenizer "corpus and tokenizer, from this machine's own Python" python examples/quickstart_corpus.py $run/corpus
step $run/data_base "prepare the base model's text" prism prepare configs/tiny/base_mixture.yaml
step $run/base_hf "train a base model from scratch, 2 processes, data parallel, and write it as a Hugging Face folder" bash -c "
  prism train configs/tiny/base.yaml --nproc 2 && prism convert export --ckpt $run/base --out $run/base_hf"
step $run/base_ckpt "import the Hugging Face folder" prism convert import --hf $run/base_hf --out $run/base_ckpt
step $run/data_mid "prepare the mid-training mixture" prism prepare configs/tiny/mid_mixture.yaml
step $run/mid_hf "mid-train, 2 processes, tensor parallel, and write it as a Hugging Face folder" bash -c "
  prism train configs/tiny/mid.yaml --nproc 2 && prism convert export --ckpt $run/mid --out $run/mid_hf"
echo "== reload both with plain transformers and compare" >&2
python examples/quickstart_compare.py --base $run/base_hf --mid $run/mid_hf --data $run/corpus --json $run/compare.json
echo "run folder:  $run/mid (config.yaml, manifest.json, metrics.jsonl, checkpoints/)"
echo "TensorBoard: tensorboard --logdir $run/mid/tensorboard"
