#!/usr/bin/env bash
# Mid-training at 128 tokens forgets what stands 512 tokens away; a merge with the base model and a long-context step bring it back. At toy scale, on this
# machine without a GPU.
#   bash examples/quickstart_longctx.sh
# A step whose output is there already is skipped, and a training goes on where it was: to start again, remove runs/quickstart_longctx.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
run=runs/quickstart_longctx configs=configs/tiny/longctx

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

step $run/corpus/tokenizer "corpus, questions and tokenizer" python examples/quickstart_longctx_corpus.py $run/corpus
for name in short base mid long; do
  step $run/data_$name "prepare the mixture $name" prism prepare $configs/${name}_mixture.yaml
done
training "train a base model from scratch, at 128 tokens" prism train $configs/short.yaml
training "train it on, at 512 tokens" prism train $configs/base.yaml
training "mid-train it, at 128 tokens" prism train $configs/mid.yaml
step $run/merged "merge: 15 % base, 85 % mid-trained" prism merge --model $run/base=0.15 --model $run/mid=0.85 --out $run/merged
step $run/merged_ckpt "import the merge" prism convert import --hf $run/merged --out $run/merged_ckpt
training "the long-context step, at 512 tokens" prism train $configs/extend.yaml
training "the same, attention alone" prism train $configs/extend_attention.yaml
training "the same without the merge" prism train $configs/extend.yaml run_dir=$run/unmerged init.checkpoint=$run/mid
for model in base mid merged_ckpt extended extended_attention unmerged; do
  prism evaluate $configs/evaluate.yaml model.checkpoint=$run/$model out=$run/scores/$model
done
