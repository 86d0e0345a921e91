"""In and out of the ecosystem: PEFT and Hugging Face folders, and loading anything by its name."""
