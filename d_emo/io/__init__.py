"""What is kept on disk: snapshots, training states, model cards, and sharing them on the Hugging Face hub."""
