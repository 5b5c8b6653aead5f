#!/usr/bin/env bash
# Fine-tune a model on one or several nodes: torchrun around train.py.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: examples/finetune.sh -m MODEL -d DATA [options] [arguments of train.py]

  -m, --model MODEL      folder or hub name of the model
  -d, --data DATA        training data: a file, a folder, a data set of the hub
  -o, --output FOLDER    default: output/finetune
  --deepspeed CONFIG     a DeepSpeed file, such as train_args/deepspeed/zero3.json
  --fsdp CONFIG          an FSDP2 file, such as train_args/fsdp/full_shard.json
  --use_lora True        train a LoRA adapter
  --q_lora True          train a LoRA adapter on a quantised base
  --cpu                  train on CPUs (gloo); GPUS_PER_NODE is then the number of processes
  -h, --help             this text

Everything else goes to train.py, which refuses what it does not know: examples/finetune.sh ... --learning_rate 1e-5.
With --train_args_file RUN.json, -m and -d may be left out.

Environment, the same command on each node but for NODE_RANK:
  GPUS_PER_NODE          processes per node; default: the GPUs that are visible, or 1
  NNODES                 nodes; default 1
  NODE_RANK              which of them this is, from 0; default 0
  MASTER_ADDR            the node with rank 0; default localhost
  MASTER_PORT            a free port there; default 6001
  PYTHON                 the interpreter; default python
TEXT
}

refuse() {
    printf 'error: %s (-h shows the usage)\n' "$*" >&2
    exit 2
}

# The GPUs that this job may use, or 1 process where there is none.
visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
    elif [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi -L 2>/dev/null); then
        grep -c '^GPU ' <<<"$gpus" || echo 1
    else
        echo 1
    fi
}

model='' data='' output='' cpu='' run_file=''
more=()
value() { [ $# -ge 2 ] && [[ $2 != -* ]] || refuse "$1 needs a value after it"; }
config() {
    value "$@"
    [ -f "$2" ] || refuse "$1 is $2, and there is no such file: name a JSON file, such as those in train_args/${1#--}"
}
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --cpu) cpu=yes && shift && continue ;;
    -m | --model | --model_name_or_path) value "$@" && model=$2 ;;
    -d | --data | --train_file) value "$@" && data=$2 ;;
    -o | --output | --output_dir) value "$@" && output=$2 ;;
    --train_args_file | --config) value "$@" && run_file=$2 ;;
    --deepspeed) config "$@" && more+=(--deepspeed "$2") ;;
    --fsdp) config "$@" && more+=(--fsdp true --fsdp_config "$2") ;;
    -[a-zA-Z]*) refuse "$1 is no option" ;;
    *) more+=("$1") && shift && continue ;;
    esac
    shift 2
done

if [ -z "$run_file" ]; then
    [ -n "$model" ] || refuse "no model is named: -m MODEL"
    [ -n "$data" ] || refuse "no data are named: -d DATA"
fi
[ -n "$run_file" ] && more+=(--train_args_file "$run_file") || output=${output:-output/finetune}
[ -z "$model" ] || more+=(--model_name_or_path "$model")
[ -z "$data" ] || more+=(--train_file "$data")
[ -z "$output" ] || more+=(--output_dir "$output")
if [ -n "$cpu" ]; then
    more+=(--use_cpu true)
    export DS_ACCELERATOR=cpu # DeepSpeed reads it when it is imported
fi

number() {
    [[ ${!1} =~ ^[0-9]+$ ]] && [ "${!1}" -ge "$2" ] || refuse "$1 is ${!1}: it must be a whole number, at least $2"
}
GPUS_PER_NODE=${GPUS_PER_NODE:-$(if [ -n "$cpu" ]; then echo 1; else visible_gpus; fi)}
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_PORT=${MASTER_PORT:-6001}
number GPUS_PER_NODE 1 && number NNODES 1 && number NODE_RANK 0 && number MASTER_PORT 1
[ "$NODE_RANK" -lt "$NNODES" ] || refuse "NODE_RANK is $NODE_RANK and NNODES is $NNODES: ranks are 0 to $((NNODES - 1))"

# torchrun kills the processes so many seconds after a SIGTERM; its 30 are too short for the checkpoint of a large model.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# exec: a signal to this script reaches torchrun, which passes it on.
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nproc_per_node "$GPUS_PER_NODE" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "${MASTER_ADDR:-localhost}" --master_port "$MASTER_PORT" \
    "$(dirname "${BASH_SOURCE[0]}")/../train.py" ${more[@]+"${more[@]}"}
