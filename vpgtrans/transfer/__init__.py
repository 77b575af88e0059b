"""Moving a projector to another LLM: token pairs, word converters, initialisers and their zero-training scores."""
