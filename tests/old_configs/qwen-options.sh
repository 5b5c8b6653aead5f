#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
DIR=`pwd`

# Guide: one machine with several GPUs, or several machines; it's read from the environment.
GPUS_PER_NODE=$(python -c 'import torch; print(torch.cuda.device_count())')
NNODES=${NNODES:-1}
MASTER_ADDR=${MASTER_ADDR:-localhost}

MODEL="models/qwen2" # the folder of the model
# ATTENTION: the training data
DATA="data/train.json"
LAUNCHER="torchrun --standalone"

function usage() {
    echo '
Usage: bash finetune_lora.sh [-m MODEL_PATH] [-d DATA_PATH] [--deepspeed DS_CONFIG_PATH]
       python finetune.py --help
'
    cat <<MORE
It's the same as: python finetune.py --model_name_or_path m --data_path d
MORE
}

while [[ "$1" != "" ]]; do
    case $1 in
        -m | --model )
            shift
            MODEL=$1
            ;;
        -d | --data ) shift; DATA=$1 ;;
        -h | --help )
            usage
            exit 0
            ;;
        * )
            echo "Unknown argument ${1}, see finetune.py --help"
            exit 1
            ;;
    esac
    shift
done

DISTRIBUTED_ARGS="
    --nproc_per_node $GPUS_PER_NODE \
    --nnodes $NNODES \
    --master_addr $MASTER_ADDR
"

CUDA_VISIBLE_DEVICES=0 $LAUNCHER $DISTRIBUTED_ARGS finetune.py \
    --model_name_or_path $MODEL \
    --data_path $DATA \
    --bf16 False \
    --no_cuda True \
    --output_dir output/qwen-options \
    --max_steps 3 \
    --per_device_train_batch_size 2 \
    --evaluation_strategy "no" \
    --save_strategy "no" \
    --learning_rate 3e-4 \
    --logging_steps 1 \
    --report_to "none" \
    --model_max_length 256 \
    --lazy_preprocess True \
    --use_lora > train.log 2>&1
