#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=1
MODEL="models/qwen2" # the folder of the model
DATA="data/train.json"

DISTRIBUTED_ARGS="
    --nproc_per_node $GPUS_PER_NODE
"

python finetune.py \
    --model_name_or_path $MODEL \
    --data_path $DATA \
    --eval_data_path data/eval.json \
    --bf16 False \
    --no_cuda True \
    --output_dir output/qwen \
    --num_train_epochs 5 \
    --max_steps 3 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 1000 \
    --save_total_limit 10 \
    --learning_rate 3e-4 \
    --weight_decay 0.1 \
    --adam_beta2 0.95 \
    --warmup_ratio 0.01 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --report_to "none" \
    --model_max_length 256 \
    --lazy_preprocess True \
    --use_lora \
    --q_lora False \
    --lora_r 8 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --lora_target_modules q_proj k_proj v_proj \
    --lora_weight_path "" \
    --lora_bias none \
    --cache_dir None \
    --optim adamw_torch \
    --gradient_checkpointing
