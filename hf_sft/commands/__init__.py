"""Sub-commands of ``hf-sft``; each module has ``main(argv) -> exit status`` and imports heavy packages inside functions."""
