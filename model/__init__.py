"""The Llama model, its dimensions and its checkpoints."""
