"""Loading of tokenizers and models, their vocabularies, quantised bases and adapters."""
