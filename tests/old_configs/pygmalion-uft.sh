#!/usr/bin/env bash
python training/hf_trainer.py \
    --model_name_or_path models/neox --train_file data/uft.arrow --eval_file data/uft.arrow \
    --output_dir output/pygmalion-uft --uft true --no_cuda --max_steps 3 --logging_steps 1 --save_strategy no \
    --learning_rate 1.0e-4 --per_device_train_batch_size 1 --evaluation_strategy no
