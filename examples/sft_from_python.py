"""Fine-tune from Python: a model, a tokenizer, a list of conversations."""

import sys

from hf_sft import DataArguments, SFTTrainer, TrainingArguments

conversations = [
    [{"role": "user", "content": f"What is {a} plus {b}?"}, {"role": "assistant", "content": str(a + b)}]
    for a in range(10)
    for b in range(10)
]
model, output_dir = sys.argv[1:3]  # a folder or hub name with a chat template; where to save
args = TrainingArguments(output_dir=output_dir, max_steps=20, learning_rate=1e-4, per_device_train_batch_size=2)
trainer = SFTTrainer(model, args, train_dataset=conversations, data_args=DataArguments(max_seq_length=256))
trainer.train()
trainer.save_model()
