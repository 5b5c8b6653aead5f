#!/usr/bin/env bash

export OMP_NUM_THREADS=1
export WANDB_PROJECT="project-name"

OUTPUT_DIR="output/pygmalion"
MODEL_NAME='models/neox'
TRAIN_DATASET="data/train.arrow"
EVAL_DATASET="data/eval.arrow"
BSZ=2

accelerate launch \
    './training/hf_trainer.py' \
    --model_name_or_path "$MODEL_NAME" \
    --train_file "$TRAIN_DATASET" \
    --eval_file "$EVAL_DATASET" \
    --output_dir "$OUTPUT_DIR" \
    --report_to "none" \
    --do_train --do_eval \
    --ddp_find_unused_parameters false \
    --optim 'adamw_torch' \
    --seed 42 --data_seed 42 \
    --logging_first_step true --logging_steps 1 \
    --dataloader_num_workers 0 \
    --per_device_train_batch_size "$BSZ" --per_device_eval_batch_size "$BSZ" \
    --fp16 false --no_cuda \
    --low_cpu_mem_usage true \
    --model_load_delay_per_rank 0 \
    --use_xformers \
    --evaluation_strategy "steps" --eval_steps 128 \
    --save_strategy "steps" --save_steps 128 \
    --save_total_limit 2 \
    --gradient_accumulation_steps 1 \
    --learning_rate 1.0e-4 \
    --lr_scheduler_type "cosine" \
    --warmup_steps 1 \
    --num_train_epochs 1 --max_steps 3 \
    --use_lora --lora_rank 8 --lora_alpha 32 --lora_dropout 0.05 \
    --lora_target_modules 'query_key_value,dense' \
    $@
